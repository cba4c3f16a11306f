"""Evaluation plays a fixed number of whole episodes in every environment."""

import numpy as np
import pytest
import torch
from support.known_streams import AUTORESETS, act, identifiable_envs
from support.scripted_envs import ScriptedEnvs

from rlfeed.envs import SerialEnvs, make_envs
from rlfeed.errors import ConfigError
from rlfeed.rollout import EpsilonGreedy, Rollout
from rlfeed.testing import ConstantRewardEnv, IdentifiableEnv
from rlfeed.train.evaluate import evaluate


def test_evaluate_long_and_short_environments_weigh_alike():
    # The first episodes to end would all be short ones: mean length 1 instead of 50.5.
    envs = SerialEnvs([IdentifiableEnv(0, lengths=(1,)), IdentifiableEnv(1, lengths=(100,))])
    result = evaluate(envs, act, episodes=6)
    assert result.lengths.tolist() == [1, 100] * 3
    assert result.lengths.mean() == 50.5


def test_evaluate_more_environments_than_a_share_gives_the_first_ones_more():
    result = evaluate(identifiable_envs("serial", 3, lengths=(1,)), act, episodes=5)
    played = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    assert result.returns.tolist() == [1000.0 * env + 10.0 * episode + 0.01 for env, episode in played]


@pytest.mark.parametrize("layout", AUTORESETS)
def test_evaluate_returns_are_exact_in_every_autoreset_mode(layout):
    result = evaluate(identifiable_envs(layout, 2, lengths=(3,)), act, episodes=2)
    expected = [sum(1000.0 * env + t / 100 for t in (1, 2, 3)) for env in (0, 1)]
    assert result.returns.tolist() == expected
    assert result.lengths.tolist() == [3, 3]
    assert result.mean == np.mean(expected)
    assert result.std == np.std(expected)


def test_evaluate_is_greedy_unless_told_otherwise():
    def make():
        return ConstantRewardEnv(length=50)

    policy = EpsilonGreedy(lambda o: np.ones(len(o), int), lambda steps: 1.0, make().action_space)
    assert evaluate(make(), policy, episodes=2).mean == 50.0
    assert evaluate(make(), policy, episodes=2, mode="explore").mean < 50.0


def test_evaluate_same_seed_plays_the_same_episodes_again_and_not_those_of_training():
    envs = make_envs("CartPole-v1", 2)
    policy = lambda o: (o[:, 2] > 0).astype(int)  # noqa: E731
    first, again = (evaluate(envs, policy, episodes=6, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.returns, again.returns)
    assert not np.array_equal(evaluate(envs, policy, episodes=6, seed=4).returns, first.returns)
    training = [float(b.reward.sum()) for b in Rollout(make_envs("CartPole-v1", 2), policy, seed=3).episodes(3)]
    assert sorted(training) != sorted(first.returns.tolist())


def test_evaluate_takes_a_module_and_a_single_environment():
    class Best(torch.nn.Module):
        def forward(self, observation):
            return torch.ones(len(observation), dtype=torch.int64)

    result = evaluate(ConstantRewardEnv(length=5), Best(), episodes=3)
    assert (result.mean, result.std, result.lengths.tolist()) == (5.0, 0.0, [5, 5, 5])


@pytest.mark.parametrize(("arguments", "part"), [({"episodes": 0}, "episodes is 0"), ({"seed": -1}, "seed is -1")])
def test_evaluate_wrong_argument_is_named(arguments, part):
    with pytest.raises(ConfigError, match=part):
        evaluate(ConstantRewardEnv(), act, **arguments)


class Tells(ConstantRewardEnv):
    """Succeeds in every second episode."""

    episode = -1

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        return super().reset(seed=seed)

    def step(self, action):
        *result, _ = super().step(action)
        return *result, {"is_success": self.episode % 2 == 0} if result[3] else {}


@pytest.mark.parametrize("mode", ["serial", "sync"])
def test_evaluate_success_is_the_mean_of_what_infos_told(mode):
    assert evaluate(make_envs(Tells, 2, mode=mode), lambda o: np.ones(len(o), int), episodes=6).success == 2 / 3
    assert evaluate(ConstantRewardEnv(), lambda o: np.ones(len(o), int), episodes=2).success is None


def test_evaluate_episode_that_does_not_end_is_told_of(monkeypatch):
    monkeypatch.setattr("rlfeed.train.evaluate._ENDLESS", 40)
    with pytest.warns(RuntimeWarning, match="no episode of ConstantRewardEnv ended within 40 steps"):
        assert evaluate(ConstantRewardEnv(length=50), lambda o: np.ones(len(o), int), episodes=1).mean == 50.0


@pytest.mark.parametrize("event", ["lost", "cut"])
def test_evaluate_episodes_that_were_broken_off_are_replaced(event):
    # Of the first environment every second episode is broken off after one step; the others take three.
    def script(call, env):
        episode, step, _ = envs.place[env]
        if env == 0 and episode % 2 == 0:
            return event
        return "terminated" if step == 2 else "step"

    envs = ScriptedEnvs(2, script)
    result = evaluate(envs, lambda o: np.zeros(len(o), int), episodes=4)
    assert result.lengths.tolist() == [3] * 4
    played = ((0, 1), (1, 0), (0, 3), (1, 1))
    assert result.returns.tolist() == [sum(100 * env + 10 * episode + t for t in range(3)) for env, episode in played]
