"""DQN through the whole path on problems whose values are known."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.dqn import DQN, DQNConfig
from rlfeed.envs import make_envs
from rlfeed.replay import ReplayBuffer
from rlfeed.rollout import Rollout
from rlfeed.testing import ConstantRewardEnv
from rlfeed.train.checkpoint import Checkpoints
from rlfeed.train.evaluate import evaluate
from rlfeed.train.replay_loop import ReplayLoop, ReplayLoopConfig

CPU = torch.device("cpu")


class Silent:
    def flush(self):
        pass

    def scalar(self, tag, value, env_steps):
        pass

    def close(self):
        pass


class Blind(gymnasium.Env):
    """Always the same observation, a reward of 1 for every step, cut off after 8: only time ends it."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)
    action_space = spaces.Discrete(1)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.ones(1, np.float32), 1.0, False, self.steps == 8, {}


class Chain(gymnasium.Env):
    """Walk over cells 0 .. 5 and terminate with a reward of 1."""

    observation_space = spaces.Discrete(7)
    action_space = spaces.Discrete(1)

    def reset(self, *, seed=None, options=None):
        self.cell = 0
        return self.cell, {}

    def step(self, action):
        self.cell += 1
        return self.cell, float(self.cell == 6), self.cell == 6, False, {}


def train(env, directory, num_envs=1, total_steps=1500, **config):
    torch.set_num_threads(1)
    envs = make_envs(env, num_envs)
    settings = {"widths": (), "lr": 0.05, "gamma": 0.8, "n_step": 3, "target_every": 20, "epsilon_end": 0.2, **config}
    agent = DQN(
        DQNConfig(**settings),
        envs.observation_space,
        envs.action_space,
        total_steps=total_steps,
        seed=1,
        device=CPU,
    )
    loop = ReplayLoop(
        ReplayLoopConfig(
            total_steps=total_steps,
            learning_starts=100,
            train_every=8,
            updates_per_round=6,
            batch_size=64,
            eval_every=10**9,
        ),
        agent,
        Rollout(envs, agent.policy, seed=1),
        ReplayBuffer(envs.observation_space, envs.action_space, capacity=5_000, num_envs=num_envs),
        device=CPU,
        seed=1,
        evaluate=lambda policy: evaluate(make_envs(env), policy, episodes=5),
        checkpoints=Checkpoints(directory),
        logger=Silent(),
    )
    assert loop.run() is True
    return agent, loop.evaluation


SLOW = pytest.mark.slow  # the probes of tests/agents/test_probes.py ask the same of every module


@pytest.mark.parametrize(
    ("n_step", "num_envs"), [*(pytest.param(*pair, marks=SLOW) for pair in ((1, 1), (1, 3), (3, 1))), (3, 3)]
)
def test_value_where_only_time_ends_episodes_is_that_of_the_endless_problem(tmp_path, num_envs, n_step):
    agent, _ = train(Blind, tmp_path, num_envs, n_step=n_step)
    # 1 / (1 - 0.8). Truncation taken for termination would give 1 / (1 - 0.8 * 7 / 8) = 3.3 with single steps.
    assert agent.network(torch.ones(1, 1)).item() == pytest.approx(5.0, abs=0.05)


@pytest.mark.parametrize("n_step", [pytest.param(1, marks=SLOW), 3])
def test_value_along_a_chain_that_terminates_is_discounted_per_step(tmp_path, n_step):
    agent, _ = train(Chain, tmp_path, n_step=n_step)
    values = agent.network(torch.arange(6)).squeeze(1).tolist()
    assert values == pytest.approx([0.8**steps for steps in (5, 4, 3, 2, 1, 0)], abs=0.02)


@SLOW
def test_policy_finds_the_action_that_is_rewarded(tmp_path):
    _, evaluation = train(lambda: ConstantRewardEnv(best_action=2, actions=3), tmp_path, widths=(16,), lr=0.01)
    assert evaluation.mean == 10.0
    assert evaluation.std == 0.0
