import dataclasses

import numpy as np
import pytest
import torch
from support.recorder import Recorder

from rlfeed.durable import load_state
from rlfeed.envs import make_envs
from rlfeed.errors import ConfigError, DivergedError
from rlfeed.replay import ReplayBuffer, Transition
from rlfeed.rollout import Rollout, adapt
from rlfeed.testing import IdentifiableEnv
from rlfeed.train.agent import Learned, ReplayAgent
from rlfeed.train.checkpoint import Checkpoints
from rlfeed.train.evaluate import Evaluation
from rlfeed.train.replay_loop import ReplayLoop, ReplayLoopConfig

CPU = torch.device("cpu")
CONFIG = ReplayLoopConfig(
    total_steps=120,
    learning_starts=10,
    train_every=16,
    updates_per_round=3,
    batch_size=8,
    capacity=1000,
    eval_every=40,
    eval_episodes=2,
    checkpoint_every=50,
    log_every=30,
)


class SumAgent(ReplayAgent):
    """An agent that learns the sum of all rewards it was shown, and in what order."""

    def __init__(self, loss=lambda update: 0.5):
        self.policy = adapt(lambda observation: np.zeros(len(observation), np.int64))
        self.unit = Transition()
        self.total, self.seen, self.loss = torch.zeros((), dtype=torch.float64), [], loss

    def learn(self, batch, *, env_steps):
        self.total = self.total + batch.reward.double().sum()
        self.seen.append((env_steps, batch.ids.tolist()))
        return Learned({"train/loss": torch.tensor(self.loss(len(self.seen)))})

    def parts(self):
        return {}

    def scalars(self, env_steps):
        return {"train/learning_rate": 1.0}

    def state_dict(self):
        return {"total": self.total.clone()}

    def load_state_dict(self, state):
        self.total = state["total"].clone()


class Run:
    """A loop with everything around it."""

    def __init__(self, directory, *, agent=None, num_envs=1, config=CONFIG, stop=lambda loop: False, checkpoint=None):
        numbers = iter(range(num_envs))
        self.envs = make_envs(lambda: IdentifiableEnv(next(numbers)), num_envs)
        self.agent = agent or SumAgent()
        self.rollout = Rollout(self.envs, self.agent.policy, seed=3)
        self.modes, self.evaluated, self.logger = [], [], Recorder()
        spaces = self.envs.observation_space, self.envs.action_space
        self.buffer = (
            ReplayBuffer.load(checkpoint.path / "replay")
            if checkpoint
            else ReplayBuffer(*spaces, capacity=config.capacity, num_envs=num_envs)
        )
        self.loop = ReplayLoop(
            config,
            self.agent,
            self.rollout,
            self.buffer,
            device=CPU,
            seed=3,
            evaluate=self.evaluate,
            checkpoints=Checkpoints(directory / "checkpoints"),
            logger=self.logger,
            advance=lambda env_steps: self.modes.append(self.rollout.mode),
            stop=lambda: stop(self.loop),
        )
        if checkpoint:
            self.loop.restore(checkpoint)

    def evaluate(self, policy):
        self.evaluated.append(self.loop.env_steps)
        return Evaluation(np.array([2.0, 4.0]), np.array([5, 7]), 3.0, 1.0)


def test_loop_to_the_end_does_what_is_due_when_it_is_due(tmp_path):
    run = Run(tmp_path)
    assert run.loop.run() is True
    assert run.loop.env_steps == run.buffer.stats().inserted == 120
    assert run.modes == ["random"] * 10 + ["explore"] * 110
    # Rounds at 10, 26, 42, ..., 106: seven of three updates.
    assert [env_steps for env_steps, _ in run.agent.seen] == [n for n in range(10, 121, 16) for _ in range(3)]
    assert run.evaluated == [40, 80, 120]
    assert run.logger.at("time/fps") == [30, 60, 90, 120]
    assert run.logger.points["eval/mean_reward"] == [(40, 3.0), (80, 3.0), (120, 3.0)]
    assert run.logger.points["eval/mean_ep_length"] == [(40, 6.0), (80, 6.0), (120, 6.0)]
    assert run.logger.points["replay/ratio"][-1] == (120, 21 * 8 / 120)
    assert run.logger.points["replay/size"][-1] == (120, 120)
    assert [path.name for path in Checkpoints(tmp_path / "checkpoints").paths()] == ["000000000100", "000000000120"]
    assert run.loop.evaluation.mean == 3.0
    # The last checkpoint came after every point had been flushed: a kill then loses none of them.
    assert run.logger.flushed == {tag: len(points) for tag, points in run.logger.points.items()}


def test_loop_logs_every_episode_where_it_ended(tmp_path):
    run = Run(tmp_path)
    run.loop.run()
    lengths = [3, 1, 5, 2] * 11
    ends = np.cumsum(lengths)
    finished = int((ends <= 120).sum())
    assert run.logger.points["charts/episodic_length"] == list(zip(ends[:finished], lengths, strict=False))
    returns = [sum(10.0 * k + t / 100 for t in range(1, n + 1)) for k, n in enumerate(lengths[:finished])]
    assert [value for _, value in run.logger.points["charts/episodic_return"]] == pytest.approx(returns)
    assert run.logger.points["rollout/ep_len_mean"][-1] == (120, pytest.approx(np.mean(lengths[:finished])))


@pytest.mark.parametrize("num_envs", [3, 7])
def test_loop_with_several_environments_misses_no_round(tmp_path, num_envs):
    run = Run(tmp_path, num_envs=num_envs)
    run.loop.run()
    assert 120 <= run.loop.env_steps < 120 + num_envs
    assert run.loop.updates == 3 * len(range(10, run.loop.env_steps + 1, 16))


def test_loop_whose_prefill_holds_no_sample_collects_until_there_is_one(tmp_path):
    config = dataclasses.replace(CONFIG, total_steps=60, learning_starts=0)
    agent = SumAgent()
    agent.unit = Transition(n_step=3)
    run = Run(tmp_path, num_envs=6, config=config, agent=agent)
    assert run.loop.run() is True
    assert run.loop.updates == 3 * len(range(0, 61, 16))


def test_loop_learning_starts_at_most_after_a_tenth_of_the_run(tmp_path):
    run = Run(tmp_path, config=dataclasses.replace(CONFIG, learning_starts=10_000))
    run.loop.run()
    assert run.agent.seen[0][0] == 12


def test_loop_at_its_first_step_has_saved_already(tmp_path):
    run = Run(tmp_path, stop=lambda loop: loop.env_steps == 1)
    assert run.loop.run() is False
    assert [path.name for path in Checkpoints(tmp_path / "checkpoints").paths()] == ["000000000000", "000000000001"]


@pytest.mark.parametrize("update", [1, 10])
def test_loop_whose_loss_is_nan_once_raises_and_saves_nothing_of_it(tmp_path, update):
    run = Run(tmp_path, agent=SumAgent(lambda n: float("nan") if n == update else 0.5))
    with pytest.raises(DivergedError, match=rf"train/loss: is nan at env step \d+, in update {update}; expected"):
        run.loop.run()
    at = [n for n in range(10, 121, 16) for _ in range(3)][update - 1]
    dumped = load_state(tmp_path / "diverged.state")
    assert (dumped["env_steps"], dumped["updates"]) == (at, update)
    assert dumped["batch"]["ids"].tolist() == run.agent.seen[-1][1]
    assert int(Checkpoints(tmp_path / "checkpoints").paths()[-1].name) < at


def test_loop_stopped_during_an_evaluation_saves_and_returns(tmp_path):
    run = Run(tmp_path)
    stopping = []

    def evaluate(policy):
        stopping.append(True)
        policy(np.zeros((1, 4), np.float32), (), None)
        raise AssertionError("the policy was asked although the run was stopped")

    run.loop._evaluate, run.loop._stop = evaluate, lambda: bool(stopping)
    assert run.loop.run() is False
    assert run.loop.evaluation is None
    assert Checkpoints(tmp_path / "checkpoints").latest().env_steps == 40


@pytest.mark.filterwarnings("ignore:.*open episodes did not come back:RuntimeWarning")  # it counts its resets
@pytest.mark.parametrize("at", [5, 26, 73])
def test_loop_resumed_twice_from_one_checkpoint_goes_on_bit_equal(tmp_path, at):
    first = Run(tmp_path / "a", stop=lambda loop: loop.env_steps == at)
    assert first.loop.run() is False
    checkpoint = Checkpoints(tmp_path / "a" / "checkpoints").latest()
    assert checkpoint.env_steps == at
    assert checkpoint.info["environments"] == "re-enacted"
    resumed = [Run(tmp_path / name, checkpoint=checkpoint) for name in ("b", "c")]
    for run in resumed:
        assert run.loop.updates == first.loop.updates
        assert run.loop.run() is True
    one, other = resumed
    assert one.agent.seen == other.agent.seen
    assert torch.equal(one.agent.total, other.agent.total)
    assert one.logger.points["charts/episodic_return"] == other.logger.points["charts/episodic_return"]
    # Counters go on: every update and every step of the run is made exactly once.
    assert [n for n, _ in first.agent.seen + one.agent.seen] == [n for n in range(10, 121, 16) for _ in range(3)]
    assert one.loop.env_steps == one.buffer.stats().inserted == 120
    assert min(one.logger.at("time/fps")) > at


def test_loop_resumed_draws_what_the_uninterrupted_one_would_have_numbered(tmp_path):
    # The draws of a resumed run are the next numbers of the same stream: none is repeated.
    first = Run(tmp_path / "a", stop=lambda loop: loop.updates == 6)
    first.loop.run()
    resumed = Run(tmp_path / "b", checkpoint=Checkpoints(tmp_path / "a" / "checkpoints").latest())
    assert resumed.loop._loader.state_dict()["batch"] == 6


def test_config_with_several_wrong_values_names_all():
    with pytest.raises(ConfigError, match=r"total_steps: is 0; .*batch_size: is -1; .*num_workers: is -2; .*least 0"):
        ReplayLoopConfig(total_steps=0, batch_size=-1, num_workers=-2)


@pytest.mark.parametrize(
    ("starts", "batch", "total", "refused"),
    [(1000, 5000, 50_000, True), (10, 256, 50_000, True), (0, 256, 50_000, False), (12, 256, 120, False)],
)
def test_config_whose_batch_is_larger_than_what_is_stored_before_learning_is_refused(starts, batch, total, refused):
    settings = {"learning_starts": starts, "batch_size": batch, "total_steps": total}
    if not refused:  # nothing is stored before learning begins, or the run is too short to store more
        assert ReplayLoopConfig(**settings).learning_starts == starts
        return
    with pytest.raises(ConfigError, match=rf"batch_size: is {batch}, more than the {starts} steps stored before"):
        ReplayLoopConfig(**settings)
