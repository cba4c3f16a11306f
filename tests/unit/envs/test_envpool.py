"""EnvPool's environments: the step that resets is none, and rollouts of one seed are alike."""

import sys

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import vector as wrappers
from support.foreign_envs import FakePool
from support.known_streams import act, expected_stream, read_streams

from rlfeed.envs import EnvPoolEnvs, as_envs, episode_seed, make_envs
from rlfeed.errors import ConfigError, EnvNotFoundError, UnsupportedError
from rlfeed.rollout import Rollout
from rlfeed.testing import IdentifiableEnv

LENGTHS, ENDS = (3, 1, 2), ("terminated", "truncated")


def pool(num_envs=2, **kwargs):
    return FakePool([IdentifiableEnv(env, lengths=LENGTHS, ends=ENDS) for env in range(num_envs)], **kwargs)


@pytest.mark.parametrize("wrapped", [False, True])
def test_envpool_gives_the_true_steps(wrapped):
    """rollout 3A.1, 3A.3: it is an Env too, and would be taken for a single one."""
    envs = as_envs(wrappers.RecordEpisodeStatistics(pool()) if wrapped else pool())
    assert isinstance(envs, EnvPoolEnvs)
    assert read_streams(Rollout(envs, act), 14) == [expected_stream(env, LENGTHS, ENDS, 14) for env in range(2)]


def test_envpool_steps_and_returns_are_those_of_whole_episodes():
    """rollout 3A.3, 3A.8, 3A.9: the sum of the lengths is the count of steps."""
    rollout = Rollout(pool(1), act)
    while rollout.statistics.episodes < 7:
        next(rollout)
    assert [record.length for record in rollout.statistics.window] == [3, 1, 2, 3, 1, 2, 3]
    assert rollout.env_steps == 15
    returns = [record.total_reward for record in rollout.statistics.window]
    np.testing.assert_allclose(returns[:3], [0.06, 10.01, 40.03], rtol=1e-5)


def test_envpool_made_for_a_rollout_gets_the_seeds_of_its_episodes():
    made = []

    def make(seeds):
        made.append((pool(), seeds))
        return made[-1][0]

    rollout = Rollout(EnvPoolEnvs(make([0, 0]), make=make, first_env_id=6), act, seed=4)
    next(rollout)
    rollout.restart()
    next(rollout)
    assert [seeds for _, seeds in made[1:]] == [[episode_seed(4, 6 + env, n) for env in range(2)] for n in range(2)]
    assert [each.closed for each, _ in made] == [True, True, False]


def test_envpool_bounds_that_mean_none_are_opened():
    """rollout 3A.24: LunarLander-v3 says that its floats are at least 1.1754944e-38."""
    strange = pool()
    low = np.array([np.finfo(np.float32).tiny, -1, 0, np.finfo(np.float32).min], np.float32)
    high = np.array([np.finfo(np.float32).max, 1, 1, 5], np.float32)
    strange.single_observation_space = spaces.Box(low, high)
    space = as_envs(strange).observation_space
    assert (space.low.tolist(), space.high.tolist()) == ([-np.inf, -1, 0, -np.inf], [np.inf, 1, 1, 5])


@pytest.mark.parametrize(
    ("kwargs", "part"),
    [({"batch_size": 1}, "gives batches of 1 of its 2 environments"), ({"players": 2}, "have up to 2 players")],
)
def test_envpool_that_cannot_be_rows_is_refused(kwargs, part):
    with pytest.raises(UnsupportedError, match=part):
        as_envs(pool(**kwargs))


def test_make_envs_envpool_takes_no_wrappers_and_no_mode(monkeypatch):
    with pytest.raises(ConfigError, match=r"wrappers .* are for single environments"):
        make_envs("envpool:CartPole-v1", wrappers=[gymnasium.wrappers.RecordEpisodeStatistics])
    monkeypatch.setattr("rlfeed.envs.foreign.make_envpool", lambda task, n, kwargs, first: EnvPoolEnvs(pool(n), task))
    assert make_envs("envpool:CartPole-v1", 3).num_envs == 3
    for wrong in ({"mode": "sync"}, {"layout": 2}, {"min_ready": 1}):
        with pytest.raises(ConfigError, match="expected none of them for CartPole-v1"):
            make_envs("envpool:CartPole-v1", 3, **wrong)


def test_make_envs_envpool_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(EnvNotFoundError, match=r"pip install 'rlfeed\[envpool\]'"):
        make_envs("envpool:CartPole-v1")


# The real one, where it is installed.


def real():
    return pytest.importorskip("envpool", reason="EnvPool is not installed (extra: envpool)")


@pytest.mark.parametrize(
    ("task", "kwargs", "action"),
    [
        ("CartPole-v1", {"max_episode_steps": 12}, lambda o: (o[:, 2] > 0).astype(np.int64)),
        ("CartPole-v1", {}, lambda o: np.zeros(len(o), np.int64)),
        ("Pendulum-v1", {"max_episode_steps": 9}, lambda o: np.zeros((len(o), 1), np.float32)),
        ("HalfCheetah-v5", {"max_episode_steps": 7}, lambda o: np.zeros((len(o), 6))),
        ("FrozenLake-v1", {}, lambda o: (o % 4).astype(np.int64)),
        ("LunarLander-v3", {"max_episode_steps": 30}, lambda o: np.zeros(len(o), np.int64)),
    ],
)
def test_real_envpool_gives_whole_episodes_and_repeats_them(task, kwargs, action):
    real()
    streams = []
    for _ in range(2):
        rollout = Rollout(make_envs(f"envpool:{task}", 3, kwargs=kwargs), action, seed=7)
        before, lengths, seen = {}, dict.fromkeys(range(3), 0), []
        for _ in range(60):
            step = next(rollout)
            for row, env in enumerate(step.env_ids.tolist()):
                assert step.is_first[row] == (before.get(env) is None)
                if before.get(env) is not None:
                    np.testing.assert_array_equal(step.observation[row], before[env])
                ended = step.terminated[row] or step.truncated[row]
                lengths[env] += 1
                before[env] = None if ended else step.next_observation[row]
                if step.truncated[row]:
                    assert lengths[env] == kwargs.get("max_episode_steps", lengths[env])
                lengths[env] = 0 if ended else lengths[env]
                seen.append((env, step.next_observation[row].tolist(), float(step.reward[row]), bool(ended)))
        assert rollout.statistics.episodes >= 3
        assert sum(r.length for r in rollout.statistics.window) + sum(lengths.values()) == rollout.env_steps
        rollout.close()
        streams.append(seen)
    assert streams[0] == streams[1]


def test_real_envpool_another_seed_gives_other_episodes():
    real()
    firsts = [next(Rollout(make_envs("envpool:CartPole-v1", 2), act_zero, seed=seed)).observation for seed in (0, 1)]
    assert not np.array_equal(*firsts)
    assert not np.array_equal(*firsts[0])


def act_zero(observation):
    return np.zeros(len(observation), np.int64)


def test_real_envpool_errors_name_task_and_setting():
    real()
    with pytest.raises(EnvNotFoundError, match="Did you mean 'CartPole-v1'"):
        make_envs("envpool:CartPol-v1")
    with pytest.raises(ConfigError, match=r"has no setting num_thread; expected some of .*Did you mean 'num_threads'"):
        make_envs("envpool:CartPole-v1", kwargs={"num_thread": 2})
