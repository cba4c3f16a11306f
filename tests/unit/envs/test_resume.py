"""Open episodes that come back: exact, played again, or not at all; what is kept of them costs little and is right."""

import itertools
import os
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from rlfeed.durable import load_state, save_state
from rlfeed.envs import EnvSource, NormalizedEnvs, PoolEnvs, make_envs
from rlfeed.envs.resume import LONGEST, Diary
from rlfeed.rollout import Rollout
from rlfeed.types import PolicyOutput


class Walk(gymnasium.Env):
    """Walks at random, from its own generator."""

    observation_space = spaces.Dict(place=spaces.Box(-np.inf, np.inf, (3,), np.float64), count=spaces.Discrete(1000))
    action_space = spaces.Discrete(3, start=-1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.count = self.np_random.normal(size=3), 0
        return self.observe(), {}

    def step(self, action):
        self.place = self.place + action + self.np_random.normal(size=3)
        self.count += 1
        return self.observe(), float(self.place.sum()), bool(self.place[0] > 6), False, {}

    def observe(self):
        return {"place": self.place, "count": self.count}


class Stored(Walk):
    """Can be saved, and could not be played again: it counts its resets."""

    resets = 0

    def reset(self, *, seed=None, options=None):
        self.resets += 1
        super().reset(seed=seed)
        self.place = self.place + self.resets
        return self.observe(), {}

    def get_state(self):
        rng = self.np_random.bit_generator.state
        return {"place": self.place, "count": self.count, "resets": self.resets, "rng": rng}

    def set_state(self, state):
        self.place, self.count, self.resets = state["place"], state["count"], state["resets"]
        self.np_random.bit_generator.state = state["rng"]


class Fickle(Walk):
    """Hangs on what no seed decides, from its fifth step on."""

    outside = itertools.count()

    def step(self, action):
        result = super().step(action)
        self.place[1] += next(self.outside) if self.count == 5 else 0
        return result


class Fragile(Walk):
    """Breaks in the third step of every process but the first."""

    first = True

    def step(self, action):
        if self.count == 2 and not Fragile.first:
            raise RuntimeError("no more")
        return super().step(action)


def limited(env, steps=9):
    return gymnasium.wrappers.TimeLimit(env, steps)


def seen(step):
    parts = [step.observation["place"], step.observation["count"], step.action, step.reward, step.is_first]
    return [part.tolist() for part in (*parts, step.terminated, step.truncated)]


def resumed(make, at, tmp_path, num_envs=3, wrap=lambda envs: envs, policy=lambda o: 1 / 0, mode="random"):
    """Play, save at a step, and play on in new environments: those steps, and those of the uninterrupted run."""

    def rollout():
        return Rollout(wrap(make_envs(make, num_envs)), policy, seed=4, mode=mode)

    first = rollout()
    for _ in itertools.islice(first, at):
        pass
    save_state(tmp_path / "state", first.state_dict())
    second = rollout()
    second.load_state_dict(load_state(tmp_path / "state"))
    return second, [seen(next(second)) for _ in range(20)], [seen(next(first)) for _ in range(20)]


@pytest.mark.parametrize("at", [1, 8, 9, 70, 150])
def test_resume_episodes_that_follow_from_seed_and_actions_are_played_again(at, tmp_path):
    rollout, steps, true = resumed(lambda: limited(Walk()), at, tmp_path)
    assert rollout.comebacks == ("re-enacted",) * 3
    assert steps == true


def test_resume_environments_with_a_state_come_back_exactly_with_their_time_limits(tmp_path):
    rollout, steps, true = resumed(lambda: limited(Stored()), 13, tmp_path)
    assert rollout.comebacks == ("exact",) * 3
    assert steps == true
    assert any(True in step[-1] for step in steps[:5])  # the limit of an episode that was open


def test_resume_environment_that_follows_from_more_than_its_seed_is_found_out_and_restarted(tmp_path):
    with pytest.warns(RuntimeWarning, match="3 of 3 open episodes did not come back and are cut"):
        rollout, steps, _ = resumed(lambda: limited(Fickle(), 20), 7, tmp_path)
    assert all("more than its seed and actions" in way for way in rollout.comebacks)
    assert steps[0][4] == [True] * 3  # is_first
    assert steps[0][1] == [0] * 3
    assert rollout.statistics.episodes == rollout.statistics.state_dict()["episodes"]


def test_resume_environment_before_what_makes_it_differ_comes_back(tmp_path):
    assert resumed(lambda: limited(Fickle(), 20), 4, tmp_path)[0].comebacks == ("re-enacted",) * 3


def test_resume_environment_that_raises_when_played_again_is_restarted(tmp_path, monkeypatch):
    monkeypatch.setattr(Fragile, "first", True)
    rollout = Rollout(make_envs(lambda: limited(Fragile()), 2), lambda o: 1 / 0, mode="random")
    for _ in itertools.islice(rollout, 4):
        pass
    state = rollout.state_dict()
    monkeypatch.setattr(Fragile, "first", False)
    other = Rollout(make_envs(lambda: limited(Fragile()), 2), lambda o: 1 / 0, mode="random")
    with pytest.warns(RuntimeWarning, match="raised while it was played again"):
        other.load_state_dict(state)
    assert next(other).is_first.all()


def test_resume_normalised_environments_come_back_and_their_statistics_count_nothing_twice(tmp_path):
    def wrap(envs):
        return NormalizedEnvs(envs, reward=True)

    rollout, steps, true = resumed(lambda: limited(Walk()), 13, tmp_path, wrap=wrap)
    assert rollout.comebacks == ("re-enacted",) * 3
    assert steps == true


def test_resume_normalised_environments_of_a_kind_that_does_not_come_back_begin_their_next_episodes():
    first = Rollout(NormalizedEnvs(make_envs("CartPole-v1", 2)), lambda o: 1 / 0, mode="random")
    for _ in itertools.islice(first, 5):
        pass
    other = Rollout(NormalizedEnvs(make_envs("CartPole-v1", 2, mode="sync")), lambda o: 1 / 0, mode="random")
    with pytest.warns(RuntimeWarning, match="2 of 2 open episodes did not come back and are cut"):
        other.load_state_dict(first.state_dict())
    assert other.comebacks == ("restarted (environments of this kind do not come back)",) * 2
    assert next(other).is_first.all()


def test_resume_carry_and_previous_action_go_on(tmp_path):
    class Counter:
        def initial_carry(self, num_envs):
            return {"count": torch.zeros(num_envs, 1)}

        def __call__(self, observation, carry, context):
            assert carry["count"][:, 0].tolist() == observation["count"].tolist()
            assert (context.prev_action[observation["count"] == 0] == 0).all()
            action = (observation["count"] + context.prev_action) % 3 - 1
            return PolicyOutput(action, {"count": carry["count"] + 1})

    rollout, steps, true = resumed(lambda: limited(Walk()), 13, tmp_path, policy=Counter(), mode="explore")
    assert rollout.comebacks == ("re-enacted",) * 3
    assert steps == true


def test_resume_state_of_a_rollout_that_has_not_begun_begins(tmp_path):
    rollout, steps, true = resumed(Walk, 0, tmp_path)
    assert rollout.comebacks == ("restarted (no episode was open)",) * 3
    assert steps == true


@settings(max_examples=40, deadline=None)
@given(
    overs=st.lists(st.lists(st.booleans(), min_size=2, max_size=2), max_size=90),
    partial=st.sets(st.integers(0, 89)),
    longest=st.sampled_from([3, 70, LONGEST]),
)
def test_diary_any_pattern_keeps_the_actions_of_open_episodes(overs, partial, longest):
    diary, open_ones = Diary(2, longest), [[], []]
    for t, over in enumerate(overs):
        ids = np.array([t % 2]) if t in partial else np.arange(2)
        observation = np.array([[t, i] for i in ids], np.float32)
        action = {"a": np.array([[t, 7 * i] for i in ids]), "b": np.array([t % 3 for _ in ids], np.int8)}
        flags = np.array(over)[ids]
        diary.note(observation, action, ids * 0.5 + t, flags if flags.any() else None, ids if t in partial else None)
        for i in ids:
            open_ones[i] = [] if over[i] else [*open_ones[i], (t, i)]
    state = diary.save()
    past = Diary(2, longest).load(state) if overs else [None, None]
    for i, steps in enumerate(open_ones):
        assert state["lengths"][i] == len(steps)
        # The same steps in a diary of one, noted one by one, have the same digest; in another order they have not.
        alone, other = Diary(1), Diary(1)
        for diaries, order in ((alone, steps), (other, steps[::-1])):
            for t, env in order:
                diaries.note(np.array([[t, env]], np.float32), (), np.array([env * 0.5 + t]), None)
        if len(steps) <= longest:
            assert state["digests"][i] == alone.save()["digests"][0]
            assert len(steps) < 2 or state["digests"][i] != other.save()["digests"][0]
        if overs and len(steps) <= longest:
            assert past[i]["a"].tolist() == [[t, 7 * env] for t, env in steps]
            assert past[i]["b"].tolist() == [t % 3 for t, _ in steps]
        elif overs:
            assert past[i] is None


def test_resume_episode_longer_than_what_is_kept_is_restarted(tmp_path, monkeypatch):
    monkeypatch.setattr("rlfeed.envs.serial.Diary", lambda num_envs: Diary(num_envs, longest=6))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, steps, _ = resumed(lambda: limited(Walk(), 20), 8, tmp_path, num_envs=1)
    assert "more steps than are kept" in str(caught[0].message)
    assert steps[0][4] == [True]


def limited_walk():
    return limited(Walk())


def limited_stored():
    return limited(Stored())


def pool(target, num_envs=4, workers=2, **options):
    return PoolEnvs(EnvSource(target), num_envs, workers, context="fork", **options)


@pytest.mark.parametrize(("target", "way"), [(limited_walk, "re-enacted"), (limited_stored, "exact")])
def test_resume_in_a_pool_goes_on_as_in_one_process_in_any_layout(target, way, tmp_path):
    def rollout(envs):
        return Rollout(envs, lambda o: 1 / 0, seed=4, mode="random")

    whole = rollout(make_envs(target, 4, mode="serial"))
    true = [seen(step) for step in itertools.islice(whole, 40)]
    first, second, third = rollout(pool(target)), rollout(pool(target, workers=3)), rollout(make_envs(target, 4))
    assert [seen(step) for step in itertools.islice(first, 13)] == true[:13]
    save_state(tmp_path / "one", first.state_dict())
    second.load_state_dict(load_state(tmp_path / "one"))
    assert second.comebacks == (way,) * 4
    assert [seen(step) for step in itertools.islice(second, 9)] == true[13:22]
    save_state(tmp_path / "two", second.state_dict())
    third.load_state_dict(load_state(tmp_path / "two"))
    assert third.comebacks == (way,) * 4
    assert [seen(step) for step in itertools.islice(third, 18)] == true[22:]
    first.close()
    second.close()


def test_resume_with_actions_under_way_repeats_them(tmp_path):
    class Counter:
        def initial_carry(self, num_envs):
            return np.zeros((num_envs, 1), np.int64)

        def __call__(self, observation, carry, context):
            assert carry[:, 0].tolist() == observation["count"].tolist()
            return PolicyOutput(observation["count"] % 3 - 1, carry + 1)

    rollout = Rollout(pool(limited_walk, min_ready=1, workers=4), Counter())
    for _ in itertools.islice(rollout, 30):
        pass
    save_state(tmp_path / "state", rollout.state_dict())
    other = Rollout(pool(limited_walk, min_ready=1, workers=4), Counter())
    other.load_state_dict(load_state(tmp_path / "state"))
    assert other.comebacks == ("re-enacted",) * 4
    for step in itertools.islice(other, 40):
        np.testing.assert_array_equal(step.is_first, step.observation["count"] == 0)
    rollout.close()
    other.close()


def dies_when_repeated():
    return limited(Fatal())


class Fatal(Walk):
    """Takes its process with it in the third step, in every process but the first."""

    def step(self, action):
        if self.count == 2 and not Fragile.first and self.place[0] > 0:
            os._exit(3)
        return super().step(action)


def test_resume_in_a_pool_whose_process_dies_of_it_begins_new_episodes_there(monkeypatch):
    monkeypatch.setattr(Fragile, "first", True)
    rollout = Rollout(pool(dies_when_repeated), lambda o: 1 / 0, mode="random", seed=1)
    for _ in itertools.islice(rollout, 4):
        pass
    state = rollout.state_dict()
    rollout.close()
    monkeypatch.setattr(Fragile, "first", False)
    other = Rollout(pool(dies_when_repeated), lambda o: 1 / 0, mode="random", seed=1)
    with pytest.warns(RuntimeWarning):
        other.load_state_dict(state)
    gone = [way.startswith("restarted") for way in other.comebacks]
    assert any(gone)
    assert next(other).is_first.tolist() == gone
    other.close()


class Unsavable(Walk):
    """Offers a state that no checkpoint can hold, or raises when it is asked for it."""

    def __init__(self, state=object):
        self.give = state

    def get_state(self):
        return {"place": self.place, "engine": self.give()}

    def set_state(self, state):
        raise AssertionError("nothing was saved")


@pytest.mark.parametrize(
    ("state", "words"),
    [(object, r'FieldError: get_state\(\)\["engine"\]: is a builtins.object'), (lambda: 1 / 0, "ZeroDivisionError")],
)
def test_resume_state_that_cannot_be_saved_is_told_and_done_without(state, words, tmp_path):
    with pytest.warns(RuntimeWarning, match=rf"Unsavable.get_state\(\): {words}"):
        rollout, steps, true = resumed(lambda: Unsavable(state), 5, tmp_path)
    assert rollout.comebacks == ("re-enacted",) * 3
    assert steps == true
