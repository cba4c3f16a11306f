"""Environments that are vectors by themselves, by name: ale-py's, Gymnasium's CartPole, and one like them."""

import itertools

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, VectorEnv
from support.foreign_envs import FakeAtari
from support.known_streams import act, read_streams

from rlfeed.envs import as_envs, episode_seed, make_envs
from rlfeed.errors import ConfigError, EnvMakeError, UnsupportedError
from rlfeed.rollout import Rollout


@pytest.fixture
def atari(monkeypatch):
    monkeypatch.setattr(VectorEnv, "metadata", {})  # which the fake writes into, as ale-py does
    spec = gymnasium.envs.registration.EnvSpec("Fake/Pong-v0", None, vector_entry_point=FakeAtari)
    monkeypatch.setitem(gymnasium.registry, "Fake/Pong-v0", spec)
    return "Fake/Pong-v0"


def lengths_of(rollout, steps):
    list(itertools.islice(rollout, steps))
    return [(r.env_id, r.length) for r in rollout.statistics.window]


@pytest.mark.parametrize(("autoreset", "mode"), [("same_step", "SAME_STEP"), ("next_step", "NEXT_STEP")])
def test_make_envs_vector_gives_whole_episodes_in_the_mode_that_is_asked_for(autoreset, mode, atari):
    envs = make_envs(atari, 2, mode="vector", autoreset=autoreset)
    assert envs._mode is AutoresetMode[mode]
    streams = read_streams(Rollout(envs, act), 9)
    for env, stream in enumerate(streams):
        expected = [(env, episode, t) for episode, length in enumerate((3, 1, 2, 3)) for t in range(1, length + 1)]
        assert [step["next_observation"][:3] for step in stream] == expected
        assert [step["is_first"] for step in stream] == [t == 1 for _, _, t in expected]


def test_vector_envs_of_two_modes_are_not_mixed_up(atari):
    both = [FakeAtari(1, autoreset_mode=mode) for mode in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP)]
    assert both[0].metadata["autoreset_mode"] is AutoresetMode.SAME_STEP  # what the second one wrote
    assert [as_envs(vector)._mode for vector in both] == [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP]


def test_vector_envs_that_take_a_seed_for_each_row_get_them(atari):
    envs = make_envs(atari, 3, mode="vector")
    rollout = Rollout(envs, act, seed=2)
    next(rollout)
    assert envs._base.seeds == [[episode_seed(2, env, 0) for env in range(3)]]


def test_make_envs_vector_what_is_wrong_is_named(atari):
    with pytest.raises(ConfigError, match=r"Acrobot-v1: has no vector implementation of its own.*'CartPole-v1'"):
        make_envs("Acrobot-v1", 2, mode="vector")
    with pytest.raises(ConfigError, match="wrappers with mode='vector'"):
        make_envs(atari, 2, mode="vector", wrappers=[gymnasium.wrappers.RecordEpisodeStatistics])
    with pytest.raises(EnvMakeError, match=r"(?s)raised TypeError.*unexpected keyword argument 'speed'"):
        make_envs(atari, 2, mode="vector", kwargs={"speed": 2})
    with pytest.raises(UnsupportedError, match="gives batches of 1 of its 2 environments"):
        make_envs(atari, 2, mode="vector", kwargs={"batch_size": 1})


def test_make_envs_vector_cartpole_repeats_itself_for_a_seed():
    """rollout 3A.13"""
    rollouts = [Rollout(make_envs("CartPole-v1", 3, mode="vector"), act_zero, seed=seed) for seed in (1, 1, 2)]
    steps = [list(itertools.islice(rollout, 30)) for rollout in rollouts]
    for one, other in zip(steps[0], steps[1], strict=True):
        np.testing.assert_array_equal(one.next_observation, other.next_observation)
    assert not np.array_equal(steps[0][0].observation, steps[2][0].observation)
    assert rollouts[0].statistics.episodes >= 6


def act_zero(observation):
    return np.zeros(len(observation), np.int64)


@pytest.mark.parametrize("autoreset", ["same_step", "next_step"])
def test_real_atari_gives_whole_episodes_and_repeats_them(autoreset):
    pytest.importorskip("ale_py", reason="ale-py is not installed (extra: atari)")
    kwargs = {"max_num_frames_per_episode": 40, "num_threads": 2, "img_height": 42, "img_width": 42, "noop_max": 5}
    seen = []
    for _ in range(2):
        envs = make_envs("ale_py:ALE/Pong-v5", 3, mode="vector", autoreset=autoreset, kwargs=kwargs)
        rollout = Rollout(envs, lambda o: np.zeros(len(o), np.int64), seed=3)
        before, frames = {}, []
        for step in itertools.islice(rollout, 35):
            assert step.observation.shape[1:] == (4, 42, 42)
            for row, env in enumerate(step.env_ids.tolist()):
                assert step.is_first[row] == (before.get(env) is None)
                if before.get(env) is not None:
                    np.testing.assert_array_equal(step.observation[row], before[env])
                    # All but the newest of the four frames is what was there before, also at the very end.
                    np.testing.assert_array_equal(step.next_observation[row][:3], step.observation[row][1:])
                before[env] = None if step.truncated[row] else step.next_observation[row]
            frames.append(step.next_observation)
        assert {record.length for record in rollout.statistics.window} <= {9, 10}
        assert rollout.statistics.episodes >= 6
        rollout.close()
        seen.append(frames)
    for one, other in zip(*seen, strict=True):
        np.testing.assert_array_equal(one, other)
