"""IMPALA: PPO's network and loss on advantages of V-trace, and blocks of what actors have stored."""

import dataclasses

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents import impala
from agents.blocks import cut
from agents.config import EnvConfig
from agents.ppo import PPO, PPOConfig
from agents.training import train
from rlfeed.codec import encode
from rlfeed.envs import make_envs
from rlfeed.errors import ConfigError
from rlfeed.replay import ReplayBuffer
from rlfeed.replay.in_order import InOrder
from rlfeed.returns import continuing
from rlfeed.rollout import Rollout
from rlfeed.testing import IdentifiableEnv

SMALL = {"widths": (16,), "epochs": 1, "minibatches": 1}


def make(envs, **config):
    settings = PPOConfig(**{"estimator": "vtrace", **SMALL, **config})
    return PPO(
        settings, envs.observation_space, envs.action_space, total_steps=1000, seed=0, device=torch.device("cpu")
    )


def played(**config):
    envs = make_envs(lambda: IdentifiableEnv(lengths=(3, 1, 7, 2)), 2)
    agent = make(envs, **config)
    return agent, envs, next(Rollout(envs, agent.policy, seed=0).blocks(12))


@pytest.mark.parametrize("core", ["none", "lstm"])
def test_impala_with_the_policy_that_acted_has_the_targets_of_gae(core):
    """B21: with equal policies V-trace is lambda-returns, truncations and the end of the block included (B17, B19)."""
    agent, _, batch = played(core=core, lam=0.9)
    block = cut(batch, agent.network.normalized, sequences=core != "none")
    found = agent.estimate(block)
    plain = make(make_envs(lambda: IdentifiableEnv(), 2), core=core, lam=0.9, estimator="gae").estimate(block)
    mask = block.mask
    torch.testing.assert_close(found["log_prob"][mask], block.batch.extras["log_prob"][mask], rtol=0, atol=1e-6)
    torch.testing.assert_close(found["target"][mask], plain["target"][mask], rtol=1e-5, atol=1e-3)
    assert mask.sum() == 24


def test_impala_policy_that_has_moved_counts_likely_actions_up_to_the_clip_and_unlikely_ones_less():
    agent, _, batch = played(lam=1.0)
    block = cut(batch, agent.network.normalized, sequences=False)
    batch.extras["log_prob"] += torch.tensor([2.0]).log()  # the actor was twice as sure of what it did: rho is 1/2
    halved = agent.estimate(block)
    batch.extras["log_prob"] -= torch.tensor([16.0]).log()  # and now an eighth: rho is 8, and counts as 1
    clipped = agent.estimate(block)
    # Where an episode terminates with this step, delta is all there is: half of it, or the whole.
    last = ~continuing(batch) & batch.terminated
    assert last.any()
    delta = (batch.reward - clipped["value"])[last]
    torch.testing.assert_close(halved["advantage"][last], delta / 2, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(clipped["advantage"][last], delta, rtol=1e-4, atol=1e-3)


def test_impala_from_windows_over_closing_rows_learns_what_it_learns_from_blocks():
    """The same steps, in a block of a rollout and as actors store them: estimates are equal, step by step."""
    agent, envs, batch = played(lam=0.9)
    rollout = Rollout(make_envs(lambda: IdentifiableEnv(lengths=(3, 1, 7, 2)), 2), agent.policy, seed=0)
    buffer = ReplayBuffer(
        envs.observation_space, envs.action_space, capacity=200, num_envs=2, extras=agent.columns, storage="private"
    )
    reader = InOrder(buffer, 16)  # 12 steps and the closing rows of the four episodes that end in them
    rollout.collect(buffer, steps=40)
    windows = reader.take(2)
    expected = agent.estimate(cut(batch, agent.network.normalized, sequences=False))
    found = agent.estimate(cut(windows, agent.network.normalized, sequences=False))
    for row in range(2):
        kept = windows.mask[row]
        assert windows.observation[row, :-1][kept][:12].tolist() == batch.observation[row, :-1].tolist()
        # Steps whose episode is over within both hold no value of what lies beyond.
        ended = torch.nonzero(batch.terminated[row] | batch.truncated[row]).max() + 1
        for name in ("value", "target", "advantage", "log_prob"):
            torch.testing.assert_close(
                found[name][row][kept][:ended], expected[name][row][:ended], rtol=1e-5, atol=1e-3, msg=name
            )
    learned = agent.learn(windows, env_steps=0)
    assert torch.isfinite(learned.scalars["train/loss"])
    assert learned.updates == 1


def test_impala_without_actors_runs_in_one_process_the_same_twice():
    config = dataclasses.replace(
        impala(), actors=0, total_steps=512, eval_every=512, eval_episodes=2, env=EnvConfig(num_envs=4)
    )
    one, two = (train(config)[0] for _ in range(2))
    assert one.updates.value == 4 * 2 * 4
    states = [b"".join(map(bytes, encode(agent.state_dict()))) for agent in (one, two)]
    assert states[0] == states[1]


def test_impala_settings_that_do_not_fit_actors_are_named_at_once():
    with pytest.raises(ConfigError, match=r"estimator: is 'gae' with 2.*actors_ahead: is 100; expected at least 528"):
        dataclasses.replace(impala(), actors_ahead=100, agent=PPOConfig(minibatches=4))


def test_impala_columns_name_what_actors_store():
    masked = spaces.Dict({"x": spaces.Box(-1, 1, (2,)), "action_mask": spaces.MultiBinary(3)})
    agent = PPO(
        PPOConfig(core="gru", core_width=5), masked, spaces.Discrete(3), total_steps=10, seed=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert set(agent.columns) == {"log_prob", "carry", "action_mask"}
    assert agent.columns["carry"].shape == (1, 5)
    assert agent.columns["log_prob"].contains(np.zeros((), np.float32))


@pytest.mark.slow
def test_impala_learns_cartpole_from_two_actors():
    """B20: V-trace that passes its unit tests must learn, too."""
    agent, evaluation = train(dataclasses.replace(impala(), total_steps=150_000, eval_every=150_000, seed=101))
    assert agent.updates.value > 1000
    assert evaluation.mean > 400
