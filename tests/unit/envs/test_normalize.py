"""Normalised environments: each observation counted once, ends included; frozen in evaluation; saved; merged."""

import itertools

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support.known_streams import AUTORESETS, identifiable_envs

from rlfeed.envs import EnvSource, NormalizedEnvs, Outcome, RunningMoments, SerialEnvs, make_envs
from rlfeed.envs.vector import PoolEnvs
from rlfeed.errors import CheckpointError, ConfigError
from rlfeed.rollout import Rollout
from rlfeed.testing import ConstantRewardEnv, IdentifiableEnv
from rlfeed.train.evaluate import evaluate

VALUES = st.floats(-1e3, 1e3, width=32)


def zeros(observation):
    leaf = observation["vector"] if isinstance(observation, dict) else observation
    return np.zeros(len(leaf), np.int64)


@settings(max_examples=50, deadline=None)
@given(parts=st.lists(arrays(np.float64, st.tuples(st.integers(0, 9), st.just(3)), elements=VALUES), max_size=6))
def test_moments_any_split_in_any_order_equals_the_whole(parts):
    """rollout 3A.43: batches, single rows and other processes' moments all give the whole batch's mean and variance."""
    whole = np.concatenate([np.zeros((0, 3)), *parts])
    by_batch, by_row, merged, total = (RunningMoments((3,)) for _ in range(4))
    for part in parts:
        by_batch.update(part)
        other = RunningMoments((3,))
        other.update(part)
        merged.merge(other)
    for row in whole:
        by_row.update(row[None])
    total.merge(by_row)
    for moments in (by_batch, by_row, merged, total):
        assert moments.count == len(whole)
        if len(whole):
            scale = np.abs(whole).max() + 1e-300
            np.testing.assert_allclose(moments.mean, whole.mean(axis=0), rtol=0, atol=1e-12 * scale)
            np.testing.assert_allclose(moments.variance, whole.var(axis=0), rtol=1e-12, atol=1e-12 * scale**2)


def test_moments_deltas_of_two_processes_add_up_to_what_both_have_seen():
    generator = np.random.default_rng(0)
    actors, learner = [RunningMoments((2,), deltas=True) for _ in range(2)], RunningMoments((2,))
    seen = []
    for _ in range(3):
        for actor in actors:
            rows = generator.normal(3, 2, (5, 2))
            seen.append(rows)
            actor.update(rows)
            learner.merge(actor.take_delta())
        for actor in actors:
            actor.load_state_dict(learner.state_dict())
    whole = np.concatenate(seen)
    for moments in (learner, *actors):
        assert moments.count == 30
        np.testing.assert_allclose(moments.variance, whole.var(axis=0), rtol=1e-12)
    assert actors[0].take_delta().count == 0


@pytest.mark.parametrize("min_ready", [None, 2])
def test_normalized_pool_counts_what_its_processes_gave(min_ready):
    """Whatever came first: each step's successor and each episode's first observation, once."""
    pool = PoolEnvs(EnvSource(ConstantRewardEnv, {"length": 3}), 4, 2, min_ready=min_ready, context="fork")
    envs = NormalizedEnvs(pool, reward=True)
    rollout = Rollout(envs, zeros)
    list(itertools.islice(rollout, 20))
    rollout.close()
    begun = 4 + rollout.statistics.episodes
    assert envs.observation_moments[()].count == rollout.env_steps + begun
    assert envs.reward_moments.count == rollout.env_steps
    assert {record.total_reward for record in rollout.statistics.window} == {0.0}


def test_normalized_envs_tell_where_those_inside_are_stepped_and_how_they_broke():
    inside = make_envs(ConstantRewardEnv, 2, mode="serial")
    envs = NormalizedEnvs(inside)
    assert envs.choice == inside.choice == "this process, as asked for"
    assert tuple(envs.faults) == ()


class Recorded:
    """Notes everything that went through the environments, as it was, by the one who shows it."""

    def __init__(self, envs):
        self.envs, self.name, self.num_envs = envs, envs.name, envs.num_envs
        self.observation_space, self.action_space = envs.observation_space, envs.action_space
        self.seen, self.outcomes = [], []

    def reset(self, seed, first_episodes):
        ready = self.envs.reset(seed, first_episodes)
        self.seen += list(ready.observation)
        return ready

    def step(self, action):
        outcome = self.envs.step(action)
        self.outcomes.append(outcome)
        self.seen += list(outcome.next_observation)
        firsts = outcome.ready.observation[outcome.ready.observation[:, 2] == 0]
        self.seen += list(firsts)
        return outcome

    def close(self):
        pass


@pytest.mark.parametrize("layout", AUTORESETS)
def test_normalized_observations_are_counted_once_each_in_every_mode(layout):
    """Step 0 is only ever shown as an episode's first observation: that tells them from successors."""
    recorded = Recorded(identifiable_envs(layout, 3, lengths=(3, 1, 5, 2)))
    envs = NormalizedEnvs(recorded)
    steps = list(itertools.islice(Rollout(envs, zeros), 40))
    moments = envs.observation_moments[()]
    seen = np.array(recorded.seen, np.float64)
    assert moments.count == len(seen)
    np.testing.assert_allclose(moments.mean, seen.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, seen.var(axis=0), rtol=1e-10, atol=1e-12)
    raw = recorded.outcomes[-1].next_observation
    expected = np.clip((raw - moments.mean) / np.sqrt(np.where(moments.m2 > 0, moments.variance + 1e-8, 1)), -10, 10)
    np.testing.assert_array_equal(steps[-1].next_observation, expected.astype(np.float32))


@pytest.mark.parametrize("layout", AUTORESETS)
def test_normalized_successor_is_what_is_acted_on_next_and_ends_stay_ends(layout):
    """The buffer stores only successors: they must equal the observations acted on, bit for bit."""
    rollout = Rollout(NormalizedEnvs(identifiable_envs(layout, 2, lengths=(3, 1, 5, 2))), zeros)
    plain = Rollout(identifiable_envs(layout, 2, lengths=(3, 1, 5, 2)), zeros)
    last = {}
    for step, other in zip(itertools.islice(rollout, 30), plain, strict=False):
        for name in ("env_ids", "is_first", "terminated", "truncated", "reward"):
            np.testing.assert_array_equal(getattr(step, name), getattr(other, name))
        for row, env in enumerate(step.env_ids):
            if not step.is_first[row]:
                np.testing.assert_array_equal(step.observation[row], last[env])
            last[env] = step.next_observation[row]


def test_normalized_nested_observation_leaves_images_integers_and_masks_alone():
    class Mixed(gymnasium.Env):
        observation_space = spaces.Dict(
            image=spaces.Box(0, 255, (2, 2), np.uint8),
            pair=spaces.Tuple([spaces.Box(-9, 9, (1,), np.float64), spaces.Discrete(5)]),
            action_mask=spaces.Box(0, 1, (2,)),
        )
        action_space = spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return self._look(0), {}

        def step(self, action):
            self.t += 1
            return self._look(self.t), 0.0, False, False, {}

        def _look(self, t):
            self.t = t
            mask = np.ones(2, np.float32)
            return {"image": np.full((2, 2), t, np.uint8), "pair": (np.array([t - 4.0]), t), "action_mask": mask}

    envs = NormalizedEnvs(SerialEnvs([Mixed()]))
    steps = list(itertools.islice(Rollout(envs, lambda o: np.zeros(1, np.int64)), 4))
    assert list(envs.observation_moments) == [("pair", 0)]
    assert envs.observation_space["pair"][0] == spaces.Box(-10, 10, (1,), np.float64)
    assert envs.observation_space["image"].dtype == np.uint8
    last = steps[-1].next_observation
    assert (last["image"].max(), last["pair"][1].tolist(), last["action_mask"].tolist()) == (4, [4], [[1, 1]])
    np.testing.assert_allclose(last["pair"][0], [[2 / np.sqrt(2 + 1e-8)]])
    assert all(envs.observation_space.contains(unbatched(step.next_observation)) for step in steps)


def unbatched(nest):
    if isinstance(nest, dict):
        return {key: unbatched(part) for key, part in nest.items()}
    if isinstance(nest, tuple):
        return tuple(unbatched(part) for part in nest)
    return nest[0]


def test_normalized_rewards_are_scaled_by_the_return_and_statistics_stay_raw():
    envs = NormalizedEnvs(identifiable_envs("serial", 2, lengths=(3, 2)), observation=False, reward=True, gamma=0.9)
    plain = Rollout(identifiable_envs("serial", 2, lengths=(3, 2)), zeros)
    rollout = Rollout(envs, zeros)
    returns, running = [], np.zeros(2)
    for step, other in zip(itertools.islice(rollout, 20), plain, strict=False):
        raw = (other.next_observation.astype(np.float64) @ [1000.0, 10.0, 0.01, 0.0])
        running = running * 0.9 + raw
        returns += running.tolist()
        expected = np.clip(raw / np.sqrt(np.var(returns) + 1e-8), -10, 10)
        np.testing.assert_allclose(step.reward, expected, rtol=1e-5)
        np.testing.assert_array_equal(step.observation, other.observation)
        running[step.terminated | step.truncated] = 0
    assert rollout.statistics.episodes == 16
    assert list(rollout.statistics.window) == list(plain.statistics.window)


class LosesAndCuts(SerialEnvs):
    """Loses env 0 in step 3, with rubbish for an observation, and cuts env 1 there."""

    calls = 0

    def step(self, action):
        self.calls += 1
        out = super().step(action)
        if self.calls != 3:
            return out
        fresh, rubbish = out.ready.observation.copy(), out.next_observation.copy()
        fresh[:], rubbish[0] = 7.0, np.nan
        ready = type(out.ready)(out.ready.env_ids, fresh)
        flags = (out.terminated, out.truncated)
        where = np.array([True, False])
        return Outcome(rubbish, np.array([np.nan, 5.0]), *flags, ready, lost=where, cut=~where)


def test_normalized_lost_step_is_not_counted_and_firsts_after_loss_and_cut_are():
    envs = NormalizedEnvs(LosesAndCuts([IdentifiableEnv(env, lengths=(50,)) for env in range(2)]), reward=True)
    envs.reset(0, [0, 0])
    for _ in range(3):
        envs.step(np.zeros(2, np.int64))
    assert envs.observation_moments[()].count == 2 + 2 + 2 + 1 + 2
    assert envs.reward_moments.count == 5
    assert np.isfinite(envs.observation_moments[()].mean).all()
    np.testing.assert_array_equal(envs.state_dict()["returns"], [0, 0])


def test_normalized_first_ready_rows_are_counted_by_their_ids():
    """Rows of an outcome need not be those just acted on: row 1 begins anew there, and row 2 goes on."""

    class Scripted:
        name, num_envs, action_space = "scripted", 3, spaces.Discrete(2)
        observation_space = spaces.Box(-99, 99, (1,))

        def reset(self, seed, first_episodes):
            from rlfeed.envs import Ready

            self.ready = Ready
            return Ready(np.array([0]), np.full((1, 1), 1.0, np.float32))

        def step(self, action):
            ready = self.ready(np.array([1, 2]), np.array([[20.0], [4.0]], np.float32))
            flags = np.array([True, False]), np.zeros(2, bool)
            successor = np.array([[2.0], [4.0]], np.float32)
            return Outcome(successor, np.array([1.0, 2.0]), *flags, ready, env_ids=np.array([1, 2]))

        def close(self):
            pass

    envs = NormalizedEnvs(Scripted(), reward=True)
    envs.reset(0, [0, 0, 0])
    envs._returns[0] = 5.0  # of row 0, which is still under way
    envs.step(np.zeros(1, np.int64))
    moments = envs.observation_moments[()]
    assert (moments.count, moments.mean.tolist()) == (4, [27 / 4])
    np.testing.assert_array_equal(envs.state_dict()["returns"], [5, 0, 2])


def test_evaluation_uses_the_training_statistics_and_counts_nothing():
    """rollout 3A.43: greedy mode, evaluate() in any mode, and frozen environments leave the statistics alone."""
    train = NormalizedEnvs(make_envs(ConstantRewardEnv, 2, mode="serial"), reward=True)
    rollout = Rollout(train, zeros)
    list(itertools.islice(rollout, 7))
    before = train.state_dict()
    apart = train.evaluation(make_envs(ConstantRewardEnv, 3, mode="serial"))
    shown = []
    for envs, mode in ((apart, "greedy"), (apart, "explore"), (train, "explore")):
        result = evaluate(envs, lambda o: shown.append(o) or np.ones(len(o), np.int64), episodes=3, mode=mode)
        assert result.returns.tolist() == [10.0, 10.0, 10.0]
    same_statistics(train.state_dict(), before)
    moments = train.observation_moments[()]
    np.testing.assert_allclose(shown[1], [(0.1 - moments.mean) / np.sqrt(moments.variance + 1e-8)] * 3, rtol=1e-5)
    rollout.mode = "greedy"
    list(itertools.islice(rollout, 5))
    same_statistics(train.state_dict(), before)
    rollout.mode = "explore"
    next(rollout)
    assert train.observation_moments[()].count > before["observation"][0]["count"]


def same_statistics(state, other):
    for name in ("count", "mean", "m2"):
        np.testing.assert_array_equal(state["observation"][0][name], other["observation"][0][name])
        np.testing.assert_array_equal(state["reward"][name], other["reward"][name])


def test_rollout_state_brings_the_statistics_back():
    def fresh(reward=True):
        return Rollout(NormalizedEnvs(make_envs(ConstantRewardEnv, 2, mode="serial"), reward=reward), zeros)

    first = fresh()
    list(itertools.islice(first, 13))
    second = fresh()
    second.load_state_dict(first.state_dict())
    same_statistics(second.envs.state_dict(), first.envs.state_dict())
    with pytest.raises(CheckpointError, match="1 parts of observations and the reward"):
        fresh(reward=False).load_state_dict(first.state_dict())
    with pytest.raises(CheckpointError, match="keep none"):
        Rollout(make_envs(ConstantRewardEnv, 2, mode="serial"), zeros).load_state_dict(first.state_dict())


def test_normalized_deltas_merge_to_what_one_process_would_have():
    alone, learner = (NormalizedEnvs(make_envs(ConstantRewardEnv, 2, mode="serial"), reward=True) for _ in range(2))
    actor = NormalizedEnvs(make_envs(ConstantRewardEnv, 2, mode="serial"), reward=True, deltas=True)
    for envs in (alone, actor):
        rollout = Rollout(envs, zeros)
        for _ in range(3):
            list(itertools.islice(rollout, 4))
            learner.merge(actor.take_delta())
    for mine, other in ((learner.observation_moments[()], alone.observation_moments[()]),):
        assert mine.count == other.count == 2 * (1 + 12 + 1)
        np.testing.assert_allclose(mine.variance, other.variance, rtol=1e-12)


def test_normalized_wrong_settings_are_named_all_at_once():
    with pytest.raises(ConfigError, match=r"gamma is 2; expected 0 to 1.*clip is 0.*epsilon is -1"):
        NormalizedEnvs(make_envs(ConstantRewardEnv), gamma=2, clip=0, epsilon=-1)
