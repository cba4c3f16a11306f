"""The loop over blocks: what is learned from, when, and how a run goes on."""

import dataclasses

import numpy as np
import pytest
import torch
from support.recorder import Recorder

from rlfeed.envs import make_envs
from rlfeed.errors import ConfigError
from rlfeed.rollout import Rollout, adapt
from rlfeed.testing import IdentifiableEnv
from rlfeed.train.agent import BlockAgent, Counter, Learned
from rlfeed.train.block_loop import BlockLoop, BlockLoopConfig
from rlfeed.train.checkpoint import Checkpoints
from rlfeed.train.evaluate import Evaluation

CONFIG = BlockLoopConfig(
    total_steps=40, block_length=5, eval_every=20, checkpoint_every=30, log_every=10, publish_every=1, eval_episodes=2
)


class Watcher(BlockAgent):
    """Note every block and the clock it came with; two updates each."""

    def __init__(self):
        self.policy = adapt(lambda observation: np.zeros(len(observation), np.int64))
        self.seen, self.count = [], Counter()

    def learn(self, batch, *, env_steps):
        self.count.value += 1
        self.seen.append((env_steps, batch.observation[:, :-1, 1:3].tolist(), batch.reward.tolist()))
        return Learned({"train/loss": batch.reward.mean()}, updates=2)

    def parts(self):
        return {"count": self.count}


class Run:
    def __init__(self, directory, *, num_envs=2, stop=lambda loop: False, checkpoint=None, config=CONFIG):
        numbers = iter(range(num_envs))
        self.agent, self.logger = Watcher(), Recorder()
        self.rollout = Rollout(make_envs(lambda: IdentifiableEnv(next(numbers)), num_envs), self.agent.policy, seed=1)
        self.loop = BlockLoop(
            config, self.agent, self.rollout, device=torch.device("cpu"), logger=self.logger,
            evaluate=lambda policy: Evaluation(np.array([1.0]), np.array([3]), 1.0, 0.0),
            checkpoints=Checkpoints(directory / "checkpoints"), stop=lambda: stop(self.loop),
        )  # fmt: skip
        if checkpoint:
            self.loop.restore(checkpoint)


def test_block_loop_learns_from_each_block_once_with_the_clock_of_its_beginning(tmp_path):
    run = Run(tmp_path)
    assert run.loop.run() is True
    assert [env_steps for env_steps, *_ in run.agent.seen] == [0, 10, 20, 30]
    assert run.loop.updates == 8
    # Every reward names environment, episode and step: the blocks hold them all, in order.
    numbers = iter(range(2))
    twin = Rollout(make_envs(lambda: IdentifiableEnv(next(numbers)), 2), run.agent.policy, seed=1)
    steps = np.array([next(twin).reward for _ in range(20)])
    assert np.array_equal(np.concatenate([np.array(reward) for *_, reward in run.agent.seen], axis=1), steps.T)
    assert run.logger.at("time/fps") == [10, 20, 30, 40]
    assert run.logger.at("eval/mean_reward") == [20, 40]
    assert [path.name for path in Checkpoints(tmp_path / "checkpoints").paths()] == ["000000000030", "000000000040"]
    assert run.logger.points["train/loss"][0] == (10, pytest.approx(steps[:5].mean()))
    assert "feed/wait_ms" not in run.logger.points


def test_block_loop_tells_of_every_episode_once_where_it_ended(tmp_path):
    run = Run(tmp_path, num_envs=1, config=dataclasses.replace(CONFIG, total_steps=30))
    run.loop.run()
    lengths = [3, 1, 5, 2] * 3
    ends = np.cumsum(lengths)
    assert run.logger.points["charts/episodic_length"] == list(zip(ends[ends <= 30], lengths, strict=False))


@pytest.mark.filterwarnings("ignore:.*open episodes did not come back:RuntimeWarning")  # it counts its resets
def test_block_loop_stopped_between_blocks_goes_on_with_the_next_clock(tmp_path):
    first = Run(tmp_path, stop=lambda loop: loop.updates == 4)
    assert first.loop.run() is False
    resumed = Run(tmp_path, checkpoint=Checkpoints(tmp_path / "checkpoints").latest())
    assert (resumed.loop.env_steps, resumed.loop.updates, resumed.agent.count.value) == (20, 4, 2)
    assert resumed.loop.run() is True
    assert [env_steps for env_steps, *_ in resumed.agent.seen] == [20, 30]


def test_block_loop_config_with_wrong_values_names_all():
    with pytest.raises(ConfigError, match=r"total_steps: is 0; .*block_length: is -2; expected at least 1"):
        BlockLoopConfig(total_steps=0, block_length=-2)
