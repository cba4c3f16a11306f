"""R2D2 from acting through the replay to learning: what the learner sees is what the actor saw."""

from dataclasses import replace
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.config import EnvConfig
from agents.r2d2 import R2D2Config, r2d2
from agents.training import Silence, train
from rlfeed.codec import encode
from rlfeed.envs import make_envs
from rlfeed.errors import ConfigError
from rlfeed.feed import make_loader
from rlfeed.nest import map_nest
from rlfeed.replay import ReplayBuffer
from rlfeed.rollout import Rollout
from rlfeed.testing.probes import RecallEnv
from rlfeed.train.checkpoint import Checkpoints
from rlfeed.train.replay_loop import ReplayLoop, ReplayLoopConfig

CPU = torch.device("cpu")
VECTOR = spaces.Box(-1, 1, (3,))
IMAGE = spaces.Box(0, 255, (12, 12, 1), np.uint8)
MIXED = spaces.Dict({"place": VECTOR, "room": spaces.Discrete(3), "action_mask": spaces.MultiBinary(2)})


class RandomEnv(gymnasium.Env):
    """Show and reward noise; episodes of 1 to 12 steps end in either way."""

    action_space = spaces.Discrete(2, start=1)

    def __init__(self, space):
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.left = int(self.np_random.integers(1, 13))
        return self._shown(), {}

    def step(self, action):
        self.left -= 1
        over, which = self.left == 0, bool(self.np_random.random() < 0.5)
        return self._shown(), float(self.np_random.normal()), over and which, over and not which, {}

    def _shown(self):
        shown = self.observation_space.sample()
        if isinstance(shown, dict):
            shown["action_mask"][:] = 1
        return shown


class WritingEnv(gymnasium.Env):
    """Give five rewards, one after the other, and end."""

    observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.Discrete(2)
    rewards = (7.0, 9.0, 0.5, 1.0, 2.0)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), self.rewards[self.steps - 1], self.steps == 5, False, {}


def played(env, steps, num_envs=3, capacity=2000, **config):
    """Let an agent act for some steps; give it and the replay."""
    envs = make_envs(env, num_envs, mode="serial")
    found = envs.observation_space, envs.action_space
    config = R2D2Config(**{"length": 4, "burn_in": 2, "memory_width": 6, "widths": (5,), **config})
    agent = config.build(*found, total_steps=100, seed=0, device=CPU, num_envs=num_envs)
    buffer = ReplayBuffer(
        *found, capacity=capacity, num_envs=num_envs, sampler=agent.sampler, extras=agent.columns, storage="private"
    )
    Rollout(envs, agent.policy, seed=4).collect(buffer, steps=steps)
    envs.close()
    return agent, buffer


@pytest.mark.parametrize(
    ("space", "memory"),
    [(VECTOR, "lstm"), (VECTOR, "gru"), (VECTOR, "none"), (IMAGE, "lstm"), (MIXED, "lstm")],
    ids=["lstm", "gru", "none", "image", "mixed"],
)
def test_replayed_steps_have_the_values_by_which_the_actor_chose(space, memory):
    """B27, (d), (e): with the actor's weights the stored carry and the burn-in give the actor's values again."""
    agent, buffer = played(lambda: RandomEnv(space), 240, memory=memory)
    batch = buffer.sample(256, agent.unit)
    assert batch.burn_in.unique().tolist() == [0, 1, 2]
    assert len(batch.lengths.unique()) > 3
    assert agent.learn(batch, env_steps=0).scalars["train/q_drift"].item() < 1e-5


def test_carries_that_know_the_first_observation_already_would_be_noticed():
    """B27: an actor that stores the carry after its observation lets the learner see the future."""
    agent, buffer = played(lambda: RandomEnv(VECTOR), 240, burn_in=0)
    batch = buffer.sample(48, agent.unit)
    seen = map_nest(lambda leaf: leaf[:, 0], agent._window(batch).seen)
    with torch.no_grad():
        _, after = agent.network.step(seen, batch.carry)
    for late, stored in zip(after, batch.carry, strict=True):
        stored.copy_(torch.where(batch.is_first[:, 0, None, None], stored, late))
    assert agent.learn(batch, env_steps=0).scalars["train/q_drift"].item() > 1e-3


@pytest.mark.parametrize("burn_in", [0, 3])
def test_burn_in_from_an_episodes_beginning_ends_in_the_actors_carry(burn_in):
    """(e): where the true first carry is known, the burn-in gives the carry that the actor had after those steps."""
    agent, buffer = played(lambda: RandomEnv(VECTOR), 240, burn_in=burn_in, length=5)
    whole, bare = agent.unit, replace(agent.unit, burn_in=0)
    batch, other = buffer.sample(64, whole), buffer.sample(512, bare)
    stored = {int(name): row for row, name in enumerate(other.ids)}
    window, compared = agent._window(batch), 0
    for row in range(64):
        if (there := stored.get(int(batch.ids[row]))) is None or not batch.is_first[row, 0]:
            continue
        carry = agent.network.core.initial_carry(1)
        for column in range(burn_in - int(batch.burn_in[row]), burn_in):
            seen = map_nest(lambda leaf, row=row, column=column: leaf[row : row + 1, column], window.seen)
            with torch.no_grad():
                _, carry = agent.network.step(seen, carry)
        for ours, actors in zip(carry, other.carry, strict=True):
            assert torch.allclose(ours[0], actors[there], atol=1e-6)
        compared += 1
    assert compared > 10


def test_sequences_never_join_two_episodes():
    """B29, B32: an end is the last step of its row, a beginning the first."""
    agent, buffer = played(lambda: RandomEnv(VECTOR), 240)
    batch = buffer.sample(128, agent.unit)
    last = torch.arange(batch.reward.shape[1]) == batch.lengths.unsqueeze(1) - 1
    assert not ((batch.terminated | batch.truncated) & ~last).any()
    assert not batch.is_first[:, 1:].any()
    assert (batch.burn_in[~batch.is_first[:, 0]] == 2).all()  # burn-in is shorter at beginnings alone


def test_priorities_through_the_loader_are_of_the_trained_steps():
    """The golden row, eta .9 of |delta| .5, 1, 2 is 1.916667: the errors of 7 and 9 in the burn-in do not count."""
    agent, buffer = played(WritingEnv, 5, num_envs=1, memory="none", length=3, gamma=0.0, alpha=1.0, beta=1.0)
    agent.lr = lambda env_steps: 0.0
    for parameter in agent.network.parameters():
        parameter.data.zero_()
    agent.config = replace(agent.config, rescale=False)
    loader = make_loader(buffer, agent.unit, batch_size=32, lookahead=0)
    draws = iter(loader)
    batch = next(draws)
    assert loader.update_priorities(batch, agent.learn(batch, env_steps=0).priorities) == 32
    # By burn-in and trained steps: of 7, 9, .5; of 9, .5, 1; of .5, 1, 2; of 1, 2; of 2.
    golden = {(0, 3): 8.65, (1, 3): 8.45, (2, 3): 1.916667, (2, 2): 1.95, (2, 1): 2.0}
    later = next(draws)
    starts = zip(later.burn_in.tolist(), (later.lengths - later.burn_in).tolist(), strict=True)
    expected = [golden[2, 3] / golden[start] for start in starts]  # weights are 1 / P, over the greatest of them
    assert len(set(expected)) == 5
    assert later.weights.tolist() == pytest.approx(expected, rel=1e-5)
    loader.close()


def test_replay_that_no_sequence_fits_in_is_refused_with_the_numbers():
    config = replace(r2d2(), device="cpu", capacity=128, batch_size=16, env=EnvConfig(num_envs=8, mode="serial"))
    with pytest.raises(ConfigError, match=r"one sample touches 27 rows, but a lane has 16.*at least 216 rows"):
        train(config)


CONFIG = ReplayLoopConfig(
    total_steps=240, learning_starts=40, train_every=16, updates_per_round=2, batch_size=8, capacity=400,
    checkpoint_every=120, log_every=100,
)  # fmt: skip


def run(directory, *, until=240, resume=False):
    """Train in ``directory`` until an env step; give the loop."""
    envs = make_envs("CartPole-v1", 2)
    found = envs.observation_space, envs.action_space
    config = R2D2Config(length=6, burn_in=3, memory_width=8, widths=(8,), target_every=4)
    agent = config.build(*found, total_steps=240, seed=3, device=CPU, num_envs=2)
    checkpoints = Checkpoints(directory)
    checkpoint = checkpoints.latest() if resume else None
    buffer = (
        ReplayBuffer.load(checkpoint.path / "replay")
        if checkpoint
        else ReplayBuffer(*found, capacity=400, num_envs=2, sampler=agent.sampler, extras=agent.columns)
    )
    loop = ReplayLoop(
        CONFIG, agent, Rollout(envs, agent.policy, seed=3), buffer, device=CPU, seed=3, checkpoints=checkpoints,
        logger=Silence(), stop=lambda: loop.env_steps >= until < 240,
    )  # fmt: skip
    if checkpoint:
        loop.restore(checkpoint)
    loop.run()
    envs.close()
    return loop


def test_r2d2_stopped_and_resumed_equals_the_uninterrupted_run(tmp_path):
    torch.set_num_threads(1)
    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", until=117)
    resumed = run(tmp_path / "parts", resume=True)
    states = [
        [b"".join(map(bytes, encode(state))) for state in (loop.agent.state_dict(), loop.collector.state_dict())]
        for loop in (resumed, whole)
    ]
    assert states[0] == states[1]
    assert resumed.updates == whole.updates > 20


def recalled(delay, **changes):
    """Train on the memory probe; give the mean return of greedy episodes, 1 for those that remember."""
    agent = {"length": 6, "burn_in": 2, "memory_width": 24, "widths": (16,), "lr": 3e-3, "target_every": 20}
    run = {"total_steps": 2400, "learning_starts": 200, "train_every": 16, "batch_size": 16, "eval_every": 10**6}
    agent |= {name: value for name, value in changes.items() if hasattr(R2D2Config(), name)}
    run |= {name: value for name, value in changes.items() if name not in agent}
    config = replace(
        r2d2(), agent=R2D2Config(**agent), env=EnvConfig(num_envs=8, mode="serial"), device="cpu", seed=100, **run,
        eval_episodes=100,
    )  # fmt: skip
    return train(config, env=partial(RecallEnv, delay))[1].mean


@pytest.mark.slow  # test_probes.py has a lighter one
def test_r2d2_learns_to_recall_what_it_saw_three_steps_ago():
    """P10."""
    assert recalled(3) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(("delay", "total_steps"), [(1, 3000), (5, 8000), (30, 60_000)])
def test_r2d2_with_the_presets_settings_recalls_over_any_delay(delay, total_steps):
    """P10: 30 steps are more than the burn-in, and more than a sequence: they take the stored carry."""
    agent = {name: getattr(R2D2Config(), name) for name in ("length", "burn_in", "memory_width", "widths", "lr")}
    assert recalled(delay, total_steps=total_steps, batch_size=32, target_every=100, **agent) >= 0.9


@pytest.mark.slow
def test_r2d2_without_memory_cannot_recall():
    """P10's control: nothing but the carry tells."""
    assert abs(recalled(3, memory="none")) <= 0.35
