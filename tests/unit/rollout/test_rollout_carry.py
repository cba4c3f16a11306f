"""The rollout resets the carry: a policy that counts its calls reads the step in the episode, whatever happens."""

import itertools

import numpy as np
import pytest
import torch
from support.known_streams import AUTORESETS, identifiable_envs

from rlfeed.envs import Outcome, SerialEnvs
from rlfeed.rollout import Rollout
from rlfeed.testing import IdentifiableEnv
from rlfeed.types import PolicyOutput


class Counter:
    """Counts calls since the reset in its carry, in one of several shapes."""

    def __init__(self, kind, in_place=False):
        self.kind, self.in_place = kind, in_place
        self.contexts = []

    def initial_carry(self, num_envs):
        count = np.zeros((num_envs, 1), np.int64)
        if self.kind == "tuple":
            return (count, count.copy())
        if self.kind == "dict":
            return {"count": count, "inner": (count.copy(),)}
        return torch.zeros(num_envs, 1, dtype=torch.int64) if self.kind == "tensor" else count

    def __call__(self, observation, carry, context):
        self.contexts.append(context)
        actions = (observation[:, 2] % 5).astype(np.int64)
        if self.in_place:
            carry += 1
            return PolicyOutput(actions, carry)
        if self.kind == "tuple":
            return PolicyOutput(actions, (carry[0] + 1, carry[1] + 1))
        if self.kind == "dict":
            return PolicyOutput(actions, {"count": carry["count"] + 1, "inner": (carry["inner"][0] + 1,)})
        return PolicyOutput(actions, carry + 1)


class CountingModule(torch.nn.Module):
    def initial_carry(self, num_envs):
        return torch.zeros(num_envs, 1)

    def forward(self, observation, carry, context):
        assert torch.is_inference_mode_enabled()
        return PolicyOutput(torch.zeros(len(observation), dtype=torch.int64), carry + 1, {"step": carry[:, 0]})


def counts(carry):
    if isinstance(carry, tuple):
        assert np.array_equal(carry[0], carry[1])
        return np.asarray(carry[0])[:, 0]
    if isinstance(carry, dict):
        assert np.array_equal(carry["count"], carry["inner"][0])
        return np.asarray(carry["count"])[:, 0]
    return np.asarray(carry)[:, 0]


@pytest.mark.parametrize("kind", ["array", "tuple", "dict", "tensor"])
@pytest.mark.parametrize("layout", AUTORESETS)
def test_rollout_counting_policy_reads_the_step_in_the_episode(layout, kind):
    """B36."""
    rollout = Rollout(identifiable_envs(layout, 3, lengths=(3, 1, 5, 2)), Counter(kind))
    for step in itertools.islice(rollout, 40):
        np.testing.assert_array_equal(counts(step.carry), step.observation[:, 2])
        np.testing.assert_array_equal(step.is_first, step.observation[:, 2] == 0)


def test_rollout_rows_out_of_step_each_keep_their_own_carry():
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    makers = [lambda env=env: IdentifiableEnv(env, lengths=(env + 1,)) for env in range(4)]
    rollout = Rollout(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP), Counter("tuple"))
    steps = list(itertools.islice(rollout, 40))
    assert {len(step) for step in steps} > {2, 3}
    for step in steps:
        np.testing.assert_array_equal(counts(step.carry), step.observation[:, 2])


def test_rollout_policy_that_updates_its_carry_in_place_leaves_the_step_as_it_was():
    rollout = Rollout(identifiable_envs("serial", 2, lengths=(4, 2)), Counter("array", in_place=True))
    steps = list(itertools.islice(rollout, 12))
    assert [counts(step.carry).tolist() for step in steps] == [s.observation[:, 2].astype(int).tolist() for s in steps]


def test_rollout_recurrent_module_reads_the_step_in_the_episode_from_tensors():
    rollout = Rollout(identifiable_envs("serial", 2, lengths=(3, 2)), CountingModule())
    for step in itertools.islice(rollout, 12):
        assert isinstance(step.carry, torch.Tensor)
        assert not step.carry.is_inference()
        np.testing.assert_array_equal(step.carry[:, 0].numpy(), step.observation[:, 2])
        np.testing.assert_array_equal(step.extras["step"], step.observation[:, 2])


def test_rollout_greedy_and_random_modes_keep_the_carry_right():
    rollout = Rollout(identifiable_envs("serial", 2, lengths=(3, 4)), Counter("array"))
    for mode in ("greedy", "random", "explore"):
        rollout.mode = mode
        for step in itertools.islice(rollout, 7):
            np.testing.assert_array_equal(counts(step.carry), step.observation[:, 2])


@pytest.mark.parametrize("layout", AUTORESETS)
def test_rollout_context_previous_action_and_reward_are_the_last_ones_and_zero_at_firsts(layout):
    """B49."""
    policy = Counter("array")
    rollout = Rollout(identifiable_envs(layout, 2, lengths=(3, 1, 2)), policy)
    for step in itertools.islice(rollout, 20):
        context = policy.contexts[-1]
        first = step.observation[:, 2] == 0
        np.testing.assert_array_equal(context.prev_action, np.where(first, 0, step.observation[:, 3]))
        env, episode, t = step.observation[:, 0], step.observation[:, 1], step.observation[:, 2]
        reward = (1000.0 * env + 10.0 * episode + t.astype(np.float64) / 100).astype(np.float32)
        np.testing.assert_array_equal(context.prev_reward, np.where(first, np.float32(0), reward))
        np.testing.assert_array_equal(context.env_ids, step.env_ids)
        np.testing.assert_array_equal(context.is_first, first)


class LosesRows(SerialEnvs):
    """Loses env 1 in every fourth step: its episode is cut and another begins."""

    calls = 0

    def step(self, action):
        self.calls += 1
        out = super().step(action)
        if self.calls % 4:
            return out
        self._group.episodes[1] += 1
        observation, _ = self._group.envs[1].reset()
        fresh = out.ready.observation.copy()
        fresh[1] = observation
        lost = np.array([False, True])
        terminated, truncated = out.terminated & ~lost, out.truncated & ~lost
        ready = type(out.ready)(out.ready.env_ids, fresh)
        return Outcome(out.next_observation, out.reward, terminated, truncated, ready, lost)


def test_rollout_lost_row_cuts_its_episode_and_counts_neither_step_nor_episode():
    envs = LosesRows([IdentifiableEnv(env, lengths=(50,)) for env in range(2)])
    rollout = Rollout(envs, Counter("array"))
    steps = list(itertools.islice(rollout, 9))
    assert [s.lost.tolist() if s.lost is not None else None for s in steps].count([False, True]) == 2
    for step in steps:
        np.testing.assert_array_equal(counts(step.carry), step.observation[:, 2])
    assert [bool(step.is_first[1]) for step in steps] == [True, False, False, False] * 2 + [True]
    assert [bool(step.is_first[0]) for step in steps] == [True] + [False] * 8
    assert rollout.env_steps == 2 * 9 - 2
    assert (rollout.statistics.episodes, rollout.statistics.lost) == (0, 2)


def test_blocks_lost_row_is_masked_but_no_padding_so_that_packing_keeps_what_follows():
    envs = LosesRows([IdentifiableEnv(env, lengths=(50,)) for env in range(2)])
    batch = next(Rollout(envs, Counter("array")).blocks(6))
    assert batch.mask.tolist() == [[True] * 6, [True, True, True, False, True, True]]
    assert batch.lengths.tolist() == [6, 6]
    assert torch.equal(batch.packed().mask, batch.mask.flatten())


def test_rollout_module_in_training_mode_acts_in_evaluation_mode_and_is_restored():
    class Dropping(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.frozen = torch.nn.Dropout(0.5), torch.nn.Dropout(0.5)
            self.seen = []

        def forward(self, observation):
            self.seen.append((self.training, self.drop.training, self.frozen.training))
            return torch.zeros(len(observation), dtype=torch.int64)

    module = Dropping().train()
    module.frozen.eval()
    next(Rollout(identifiable_envs("serial", 1), module))
    assert module.seen == [(False, False, False)]
    assert (module.training, module.drop.training, module.frozen.training) == (True, True, False)
