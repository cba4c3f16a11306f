"""Blocks of what actors store, which are forked: each step once, in order, with the weights of a while ago."""

import numpy as np
import torch
from support.recorder import Recorder
from torch import nn

from rlfeed.envs.serial import SerialEnvs
from rlfeed.replay import ReplayBuffer
from rlfeed.replay.in_order import InOrder
from rlfeed.rollout import Actors, Weights
from rlfeed.specs import ArraySpec
from rlfeed.testing import IdentifiableEnv
from rlfeed.train.agent import BlockAgent, Learned
from rlfeed.train.block_loop import BlockLoop, BlockLoopConfig
from rlfeed.train.checkpoint import Checkpoints
from rlfeed.train.collectors import ActorBlocks

CONFIG = BlockLoopConfig(
    total_steps=600, block_length=10, actors=2, actors_ahead=120, publish_every=1, eval_every=1000, eval_episodes=1,
    checkpoint_every=1000, log_every=100,
)  # fmt: skip


class Zeros(nn.Module):
    """Act without looking; its one weight says how often it was updated."""

    def __init__(self):
        super().__init__()
        self.updates = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, observation):
        return torch.zeros(len(observation), dtype=torch.int64)


class Watcher(BlockAgent):
    def __init__(self):
        self.policy, self.seen, self.clocks = Zeros(), [], []

    def actor(self, number, count):
        return self.policy, self.policy

    def learn(self, batch, *, env_steps):
        self.policy.updates += 1
        self.clocks.append(env_steps)
        for row in range(len(batch)):
            kept = batch.mask[row]
            self.seen += batch.observation[row, :-1][kept].tolist()
            assert (batch.extras["policy_version"][row][kept] < self.policy.updates).all()
        assert torch.equal(batch.observation[:, 1:, 2][batch.mask], batch.observation[:, :-1, 2][batch.mask] + 1)
        return Learned({"train/loss": torch.tensor(0.5)})

    def parts(self):
        return {"policy": self.policy}


def play(directory, total_steps, checkpoint=None):
    agent, env = Watcher(), IdentifiableEnv()
    buffer = ReplayBuffer(
        env.observation_space, env.action_space, capacity=4 * 400, num_envs=4,
        extras={"policy_version": ArraySpec((), np.dtype(np.int64))},
    )  # fmt: skip
    actors = Actors(
        lambda first: SerialEnvs([IdentifiableEnv(first), IdentifiableEnv(first + 1)]),
        lambda actor, num_actors: Watcher().actor(actor, num_actors),
        buffer, Weights(agent.policy), num_actors=2, envs_per_actor=2, pull_every=1, seed=3, start_method="fork",
    )  # fmt: skip
    blocks = ActorBlocks(actors, agent.policy, InOrder(buffer, CONFIG.block_length), count=4, ahead=CONFIG.actors_ahead)
    logger = Recorder()
    loop = BlockLoop(
        CONFIG, agent, blocks, device=torch.device("cpu"), logger=logger,
        checkpoints=Checkpoints(directory / "checkpoints"), stop=lambda: loop.env_steps >= total_steps,
    )  # fmt: skip
    if checkpoint:
        loop.restore(checkpoint)
    try:
        loop.run()
    finally:
        actors.close()
    return agent, loop, logger


def test_block_loop_with_actors_learns_from_each_step_once_and_goes_on_after_a_resume(tmp_path):
    agent, loop, logger = play(tmp_path, total_steps=300)
    by_env = {env: [row[1:3] for row in agent.seen if row[0] == env] for env in range(4)}
    for steps in by_env.values():
        # Episodes of 3, 1, 5, 2 steps in turn, none left out and none twice; the last may be open.
        expected = [[e, t] for e in range(200) for t in range((3, 1, 5, 2)[e % 4])]
        assert steps == expected[: len(steps)]
    assert loop.env_steps == len(agent.seen) >= 300
    assert agent.clocks == sorted(set(agent.clocks))
    assert max(value for _, value in logger.points["replay/policy_lag"]) > 0

    again, resumed, _ = play(tmp_path, 600, Checkpoints(tmp_path / "checkpoints").latest())
    assert again.clocks[0] == loop.env_steps
    assert resumed.env_steps == loop.env_steps + len(again.seen) >= 600
    assert resumed.updates == loop.updates + len(again.clocks)
