"""Ape-X: the ladder of epsilons over the environments of all actors, and a run that learns from two of them."""

import dataclasses

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents import apex
from agents.config import EnvConfig
from agents.training import build_agent, train
from rlfeed.envs import make_envs
from rlfeed.replay import Prioritized
from rlfeed.testing import ConstantRewardEnv
from rlfeed.train.evaluate import evaluate
from rlfeed.types import PolicyContext

LADDER = [0.4, 0.16, 0.064, 0.0256, 0.01024, 0.004096, 0.0016384, 0.00065536]


def test_apex_actors_explore_on_their_rungs_of_one_ladder():
    config = apex()
    box, two = spaces.Box(-1.0, 1.0, (4,)), spaces.Discrete(2)
    agent = build_agent(config, box, two, torch.device("cpu"), config.env.num_envs)
    assert isinstance(agent.sampler, Prioritized)
    rungs = [agent.actor(number, 2)[0].epsilon(env_steps) for number in range(2) for env_steps in (0, 90_000)]
    assert rungs[0] == pytest.approx(LADDER[:4])
    assert rungs[1] == pytest.approx(LADDER[:4])
    assert rungs[2] == pytest.approx(LADDER[4:])


def test_apex_environments_act_at_random_as_often_as_their_rung_says():
    config = dataclasses.replace(apex(), env=EnvConfig(num_envs=2))
    agent = build_agent(config, spaces.Box(-1.0, 1.0, (1,)), spaces.Discrete(50), torch.device("cpu"), 2)
    policy, observation = agent.actor(0, 1)[0], np.zeros((2, 1), np.float32)
    generator, ids = np.random.default_rng(0), np.arange(2)

    def act(mode):
        first = np.zeros(2, bool)
        context = PolicyContext(first, mode, ids, 0, np.zeros(2, np.int64), np.zeros(2, np.float32), None, generator)
        return policy(observation, (), context).action

    best = act("greedy")
    other = np.mean([act("explore") != best for _ in range(1000)], axis=0)
    # Epsilon is 0.4 and 0.4^8, and one action in fifty is the best one.
    assert other == pytest.approx([0.4 * 0.98, 0.4**8 * 0.98], abs=0.06)


def test_apex_evaluated_while_it_explores_on_more_environments_than_it_has_rungs_begins_the_ladder_anew():
    config = dataclasses.replace(apex(), env=EnvConfig(num_envs=2))
    agent = build_agent(config, ConstantRewardEnv().observation_space, spaces.Discrete(2), torch.device("cpu"), 2)
    found = evaluate(make_envs(ConstantRewardEnv, 5), agent.policy, episodes=5, mode="explore")
    assert found.lengths.tolist() == [10] * 5


@pytest.mark.slow
def test_apex_learns_cartpole_from_two_actors():
    agent, evaluation = train(dataclasses.replace(apex(), total_steps=60_000, eval_every=60_000, seed=101))
    assert agent.updates.value > 5000
    assert evaluation.mean > 400
