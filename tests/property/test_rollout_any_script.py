"""Any order of readiness, ends, losses and cuts: steps, carries and blocks are those of a slow, plain account."""

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scripted_envs import EVENTS, ScriptedEnvs

from rlfeed.rollout import Rollout
from rlfeed.types import PolicyOutput

SCRIPTS = st.lists(st.sampled_from((*EVENTS, "wait", "wait")), min_size=1, max_size=40)
KINDS = st.sampled_from(["array", "tuple", "dict", "tensor"])


def script_of(events, num_envs):
    return lambda call, env: events[(call * num_envs + env) % len(events)]


class Counter:
    """Counts its calls since the reset in a carry of any kind, and notes what it was told."""

    def __init__(self, kind):
        self.kind, self.told = kind, {}

    def initial_carry(self, num_envs):
        count = np.zeros((num_envs, 1), np.int64)
        if self.kind == "tensor":
            return torch.from_numpy(count)
        return {"array": count, "tuple": (count, count.copy()), "dict": {"a": count, "b": (count.copy(),)}}[self.kind]

    def __call__(self, observation, carry, context):
        for row, env in enumerate(context.env_ids):
            told = (bool(context.is_first[row]), int(context.prev_action[row]), float(context.prev_reward[row]))
            self.told.setdefault(int(env), []).append(told)
        step = observation[:, 2]
        action = ((observation[:, 1] + step) % 5).astype(np.int64)
        return PolicyOutput(action, added(carry), {"step": step.copy(), "nest": {"env": observation[:, :1].copy()}})


def added(carry):
    if isinstance(carry, tuple):
        return tuple(added(part) for part in carry)
    return {key: added(part) for key, part in carry.items()} if isinstance(carry, dict) else carry + 1


def counts(carry):
    if isinstance(carry, tuple):
        return counts(carry[0])
    return counts(carry["a"]) if isinstance(carry, dict) else np.asarray(carry)[:, 0]


@settings(max_examples=30, deadline=None)
@given(num_envs=st.integers(1, 4), events=SCRIPTS, kind=KINDS)
def test_rollout_any_script_gives_the_steps_that_happened_and_counts_them(num_envs, events, kind):
    """rollout 3A.40: the counter reads the step in the episode, whatever happens and whoever is ready first."""
    envs, policy = ScriptedEnvs(num_envs, script_of(events, num_envs)), Counter(kind)
    rollout = Rollout(envs, policy)
    given_steps = [[] for _ in range(num_envs)]
    for step in itertools.islice(rollout, 24):
        np.testing.assert_array_equal(counts(step.carry), step.observation[:, 2])
        np.testing.assert_array_equal(step.is_first, step.observation[:, 2] == 0)
        np.testing.assert_array_equal(step.extras["step"], step.observation[:, 2])
        np.testing.assert_array_equal(step.extras["nest"]["env"], step.observation[:, :1])
        lost = np.zeros(len(step), bool) if step.lost is None else step.lost
        for row, env in enumerate(step.env_ids):
            given_steps[env].append(
                (
                    tuple(int(x) for x in step.observation[row]),
                    int(step.action[row]),
                    float(step.reward[row]),
                    tuple(int(x) for x in step.next_observation[row]),
                    bool(step.terminated[row]),
                    bool(step.truncated[row]),
                    bool(lost[row]),
                )
            )
    assert given_steps == [[entry[:7] for entry in log] for log in envs.log]
    told = {env: policy.told[env][: len(log)] for env, log in enumerate(envs.log)}
    assert told == {env: [before_step(log, t) for t in range(len(log))] for env, log in enumerate(envs.log)}
    whole = [entry for log in envs.log for entry in log if not entry[6]]
    assert rollout.env_steps == len(whole)
    assert rollout.statistics.episodes == sum(entry[4] or entry[5] for entry in whole)
    assert rollout.statistics.cut == sum(entry[7] for entry in whole)
    assert rollout.statistics.lost == sum(entry[6] for log in envs.log for entry in log)
    assert sorted((r.env_id, r.total_reward, r.length) for r in rollout.statistics.window) == sorted(returns(envs.log))


def before_step(log, t):
    """What the policy is told before a step: the action and the reward before, nothing where an episode begins."""
    first = log[t][0][2] == 0
    return (first, 0, 0.0) if first else (False, log[t - 1][1], log[t - 1][2])


def returns(logs):
    for env, log in enumerate(logs):
        total, length = 0.0, 0
        for entry in log:
            total, length = total + entry[2], length + 1
            if entry[4] or entry[5]:
                yield env, total, length
            if any(entry[4:]):
                total, length = 0.0, 0


@settings(max_examples=30, deadline=None)
@given(num_envs=st.integers(1, 4), events=SCRIPTS, kind=KINDS, length=st.integers(1, 5))
def test_blocks_any_script_hold_the_steps_that_happened(num_envs, events, kind, length):
    envs, policy = ScriptedEnvs(num_envs, script_of(events, num_envs)), Counter(kind)
    at = [0] * num_envs
    for batch in itertools.islice(Rollout(envs, policy).blocks(length), 4):
        assert int(batch.lengths.max()) == length
        finals = dict(zip(map(tuple, batch.final_index.tolist()), batch.final_observation.tolist(), strict=True))
        for env, log in enumerate(envs.log):
            steps = int(batch.lengths[env])
            for t, entry in enumerate(log[at[env] : at[env] + steps]):
                before, action, reward, after, terminated, truncated, lost, cut = entry
                assert batch.observation[env, t].tolist() == list(before)
                assert (int(batch.action[env, t]), float(batch.reward[env, t])) == (action, reward)
                flags = (batch.terminated[env, t], batch.truncated[env, t], ~batch.mask[env, t])
                assert tuple(map(bool, flags)) == (terminated, truncated, lost)
                assert bool(batch.is_first[env, t]) == (before[2] == 0)
                assert float(batch.extras["step"][env, t]) == before[2]
                assert float(batch.extras["nest"]["env"][env, t, 0]) == env
                if terminated or truncated or cut:
                    assert finals.pop((env, t)) == list(after)
                elif not lost:
                    assert batch.observation[env, t + 1].tolist() == list(after)
            assert not batch.mask[env, steps:].any()
            assert not batch.reward[env, steps:].any()
            assert not batch.observation[env, steps + 1 :].any()
            if at[env] < len(log):
                first, prev_action, prev_reward = before_step(log, at[env])
                assert int(counts(batch.carry)[env]) == (0 if first else log[at[env]][0][2])
                assert (int(batch.prev_action[env]), float(batch.prev_reward[env])) == (prev_action, prev_reward)
            at[env] += steps
        assert finals == {}
        assert torch.equal(batch.mask, batch.loss_mask)
