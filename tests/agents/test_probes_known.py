"""The probes themselves: what is said of them is so, by playing them."""

import numpy as np
import pytest
from gymnasium import spaces

from rlfeed.envs import make_envs
from rlfeed.envs.check import check_env
from rlfeed.replay import ReplayBuffer, Transition
from rlfeed.rollout import Rollout
from rlfeed.testing.probes import (
    PROBES,
    AlternateEnv,
    CorridorEnv,
    LeakEnv,
    PowersEnv,
    RecallEnv,
    RegulatorEnv,
    TemperatureEnv,
)

KINDS = [(number, actions) for number, probe in PROBES.items() for actions in probe.actions]
CHOICES = [kind for kind in KINDS if PROBES[kind[0]].passes_at is not None]
ONE_EACH = [(number, probe.actions[0]) for number, probe in PROBES.items() if number != "P8"]  # P7 in another setting


def make(number, actions):
    probe = PROBES[number]
    return probe.make(actions=actions) if len(probe.actions) == 2 else probe.make()


def play(env, policy, episodes, seed=0):
    """Play with ``policy(env, observation, previous action)``; give each episode's observations and rewards."""
    played = []
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        seen, rewards, action, over = [], [], 0, False
        while not over:
            action = policy(env, observation, action)
            assert env.action_space.contains(action)
            seen.append(observation)
            observation, reward, terminated, truncated, _ = env.step(action)
            rewards.append(reward)
            over = terminated or truncated
        played.append((seen, rewards))
    return played


def best(env, observation, previous):
    return env.best_action()


def mean_return(env, policy, episodes=200):
    return np.mean([sum(rewards) for _, rewards in play(env, policy, episodes)])


@pytest.mark.parametrize(("number", "actions"), KINDS)
def test_probe_best_action_reaches_best_return(number, actions):
    probe = PROBES[number]
    reached = mean_return(make(number, actions), best, 500)
    if probe.fails_at is None:
        assert reached == pytest.approx(probe.best_return, abs=0.15)
        assert probe.passes_at is None or reached >= probe.passes_at
    else:
        assert reached > 4 * probe.fails_at  # who knows what cannot be known is found out


@pytest.mark.parametrize(("number", "actions"), CHOICES)
def test_probe_random_actions_do_not_pass(number, actions):
    env = make(number, actions)
    env.action_space.seed(0)
    assert mean_return(env, lambda *_: env.action_space.sample()) < PROBES[number].passes_at


@pytest.mark.parametrize(
    ("env", "wrong", "expected"),
    [
        (RecallEnv(1), lambda env, seen, before: env.pushing(1.0), 0.0),
        (RecallEnv(30), lambda env, seen, before: env.pushing(seen[0] or 1.0), 0.0),  # follows what it sees
        (LeakEnv(), lambda env, seen, before: env.pushing(env.cue), 0.0),
        (AlternateEnv(), lambda env, seen, before: env.action_space.sample(), 5.0),
        (AlternateEnv(), lambda env, seen, before: np.int64(1), 1.0),
        (CorridorEnv(), lambda env, seen, before: env.pushing(1.0), -0.6),
        (CorridorEnv(), lambda env, seen, before: env.pushing(seen[2] or seen[1] or 1.0), -0.6),
    ],
)
def test_memory_probe_policy_without_memory_has_the_return_of_a_coin(env, wrong, expected):
    env.action_space.seed(0)
    assert mean_return(env, wrong, 400) == pytest.approx(expected, abs=0.2)


@pytest.mark.parametrize("gamma", [0.8, 0.9])
@pytest.mark.parametrize(("number", "actions"), [kind for kind in ONE_EACH if PROBES[kind[0]].answers])
def test_probe_answers_are_the_discounted_returns_that_follow(number, actions, gamma):
    env = make(number, actions)
    shown, values = PROBES[number].answers(gamma)
    if isinstance(env, RegulatorEnv):
        env.gamma = gamma
    known = 20  # steps of each episode: truncation hides what would follow the others
    if env.time_limit:
        env.time_limit = known + 150
    found = {}
    for observations, rewards in play(env, best, {"P19": 2000, "P13": 150}.get(number, 8)):
        following = [0.0]
        for reward in reversed(rewards):
            following.append(reward + gamma * following[-1])
        for observation, value in list(zip(observations, reversed(following), strict=False))[:known]:
            found.setdefault(tuple(np.ravel(observation).tolist()), []).append(value)
    if number == "P14":  # any x: the value is proportional to its square
        curvatures = [value / x**2 for (x,), (value, *_) in found.items() if abs(x) > 1e-3]
        np.testing.assert_allclose(values, np.mean(curvatures) * shown[:, 0] ** 2, atol=1e-4)
        np.testing.assert_allclose(curvatures, np.mean(curvatures), rtol=1e-3)
        return
    means = [np.mean(found[tuple(np.ravel(observation).tolist())]) for observation in shown]
    np.testing.assert_allclose(means, values, atol=0.03 if number == "P19" else 1e-6)


@pytest.mark.parametrize(("number", "actions"), [kind for kind in ONE_EACH if kind[0] not in ("P1", "P3")])  # as P6
def test_probe_check_env_finds_no_error(number, actions):
    findings = check_env(lambda: make(number, actions), episodes=1, workers=False)
    assert [str(finding) for finding in findings if finding.severity == "error"] == []


def test_regulator_best_policy_has_the_known_gain():
    """P14: u = -0.588403 x, value -1.588403 x^2 at gamma 0.9."""
    assert RegulatorEnv.curvature(0.9) == pytest.approx(1.588403, abs=1e-6)


def test_temperature_of_an_entropy_is_that_of_the_soft_optimum():
    """P16: the entropy of N(0, alpha / 2)."""
    assert TemperatureEnv.temperature(-1.0) == pytest.approx(0.01585, abs=1e-5)
    assert TemperatureEnv.temperature(-0.5) == pytest.approx(0.04308, abs=1e-5)
    assert np.sqrt(TemperatureEnv.temperature(-0.5) / 2) == pytest.approx(0.1468, abs=1e-4)


@pytest.mark.parametrize(
    ("end", "discounts"), [("terminated", [1.0, 1.0, 0.0, 0.0, 0.0]), ("truncated", [1.0, 1.0, 1.0, 1.0, 1.0])]
)
def test_powers_sampled_three_step_sums_have_every_step_of_the_episode(end, discounts):
    """P9, B7, B8, B11: the last n - 1 steps begin sums too, and none reaches into the next episode."""
    assert PowersEnv.sums(3) == [111.0, 1110.0, 11100.0, 11000.0, 10000.0]
    envs = make_envs(lambda: PowersEnv(end))
    buffer = ReplayBuffer(envs.observation_space, envs.action_space, capacity=100)
    Rollout(envs, lambda observation: np.zeros(len(observation), np.int64)).collect(buffer, steps=30)
    batch = buffer.sample(500, Transition(n_step=3, gamma=1.0))
    for step in range(5):
        at = batch.observation == step
        assert at.any()
        assert batch.reward[at].unique().tolist() == [PowersEnv.sums(3)[step]]
        assert batch.discount[at].unique().tolist() == [discounts[step]]
        assert batch.next_observation[at].unique().tolist() == [min(step + 3, 5)]


@pytest.mark.parametrize("autoreset", ["same_step", "next_step", "disabled"])
def test_endless_any_autoreset_mode_stores_the_true_successors(autoreset):
    """P8, B24, B25: no pair of a final observation and a reset one, no pseudo-step, in each of Gymnasium's modes."""
    envs = make_envs(PROBES["P8"].make, 2, mode="sync", autoreset=autoreset)
    assert isinstance(envs.observation_space, spaces.Discrete)
    buffer = ReplayBuffer(envs.observation_space, envs.action_space, capacity=400, num_envs=2)
    Rollout(envs, lambda observation: np.zeros(len(observation), np.int64)).collect(buffer, steps=160)
    batch = buffer.sample(2000, Transition(gamma=0.98))
    assert len(buffer) == 160
    assert (batch.next_observation == (batch.observation + 1) % 5).all()
    assert (batch.reward == 1.0).all()
    assert batch.observation[batch.truncated].unique().tolist() == [2]
