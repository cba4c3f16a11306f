"""A rollout's blocks as padded finite epochs: what a recurrent on-policy learner goes through several times."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.known_streams import act, expected_stream, identifiable_envs

from rlfeed.errors import FieldError, UnsupportedError
from rlfeed.feed import epoch, pad_collate
from rlfeed.replay import Episode, Sequence, Transition
from rlfeed.rollout import Rollout
from rlfeed.types import PolicyOutput

LENGTHS, ENDS = (4, 2, 3, 1), ("terminated", "truncated", "both")
NUM_ENVS, T = 3, 7


class Counting:
    """A policy whose carry counts its steps since the episode began, and whose extras name the step."""

    def initial_carry(self, num_envs):
        return np.zeros((num_envs, 1), np.float32)

    def __call__(self, observation, carry, context):
        return PolicyOutput(act(observation), carry + 1, {"value": observation[:, 2].astype(np.float32)})


def blocks(count):
    envs = identifiable_envs("serial", NUM_ENVS, lengths=LENGTHS, ends=ENDS)
    views = Rollout(envs, Counting()).blocks(T)
    return [next(views) for _ in range(count)]


def expected_pieces(block_number):
    """Each environment's steps of a block, cut where episodes end, by (environment, step of the block)."""
    pieces = {}
    for env in range(NUM_ENVS):
        steps = expected_stream(env, LENGTHS, ENDS, T * (block_number + 1))
        here, begin = steps[T * block_number :], 0
        for t, step in enumerate(here):
            if step["terminated"] or step["truncated"] or t + 1 == T:
                pieces[env, begin] = here[begin : t + 1]
                begin = t + 1
    return pieces


@pytest.mark.parametrize("bucket", [1, 3])
def test_epoch_of_a_block_gives_its_pieces_padded_with_true_final_observations(bucket):
    block = blocks(3)[2]
    expected = expected_pieces(2)
    seen = {}
    for batch in epoch(block, Episode(gamma=0.9), 4, bucket=bucket):
        assert batch.mask.shape[1] == batch.lengths.max()  # the longest piece, not the longest episode
        for i, identity in enumerate(batch.ids.tolist()):
            seen[identity >> 44, identity & 0xFFFFFFFF] = (batch, i)
    assert seen.keys() == expected.keys()
    for key, steps in expected.items():
        batch, i = seen[key]
        n = len(steps)
        assert batch.lengths[i] == n
        observed = [tuple(int(x) for x in row) for row in batch.observation[i, : n + 1]]
        assert observed == [step["observation"] for step in steps] + [steps[-1]["next_observation"]]
        for name in ("action", "reward", "terminated", "truncated", "is_first"):
            assert getattr(batch, name)[i, :n].tolist() == [step[name] for step in steps], name
        discounts = [0.0 if step["terminated"] else 0.9 for step in steps]
        assert batch.discount[i, :n].tolist() == pytest.approx(discounts)
        assert batch.extras["value"][i, :n].tolist() == [step["observation"][2] for step in steps]
        assert batch.carry[i].tolist() == [steps[0]["observation"][2]]  # steps since the episode began
        assert batch.mask[i].tolist() == batch.loss_mask[i].tolist() == [t < n for t in range(batch.mask.shape[1])]
        opens = steps[0]["is_first"]
        assert batch.prev_action[i] == (0 if opens else steps[0]["observation"][3])
        for name in ("reward", "terminated", "truncated", "is_first", "discount", "action"):
            assert not getattr(batch, name)[i, n:].any(), name
        assert not batch.observation[i, n + 1 :].any()
        assert not batch.extras["value"][i, n:].any()


def test_epoch_of_a_block_transitions_are_its_steps_with_true_successors():
    block = blocks(2)[1]
    expected = [step for pieces in expected_pieces(1).values() for step in pieces]
    given = [batch for batch in epoch(block, Transition(), 5)]
    seen = [
        (tuple(int(x) for x in batch.observation[i]), tuple(int(x) for x in batch.next_observation[i]))
        for batch in given
        for i in range(len(batch))
    ]
    assert sorted(seen) == sorted((step["observation"], step["next_observation"]) for step in expected)
    assert [len(batch) for batch in given] == [5, 5, 5, 5, 1]
    assert given[0].mask is None
    assert given[0].carry == ()


def test_epoch_of_a_block_padding_is_invisible_to_a_recurrent_loss():
    """I9: padded minibatches give the gradient of the steps one by one."""
    block = blocks(1)[0]
    block = replace(block, extras={**block.extras, "advantage": torch.randn(NUM_ENVS, T, generator=torch.Generator())})
    cell = torch.nn.GRUCell(4, 1)

    def loss_of(batch):
        carry, total = batch.carry, torch.zeros(())
        for t in range(batch.reward.shape[1]):
            carry = cell(batch.observation[:, t].float() / 10, carry)
            total = total + (carry[:, 0] * batch.extras["advantage"][:, t] * batch.mask[:, t]).sum()
        return total

    gradients = []
    for batch_size in (1, 4, 100):
        cell.zero_grad()
        sum(loss_of(batch) for batch in epoch(block, Episode(), batch_size)).backward()
        gradients.append(torch.cat([p.grad.ravel().clone() for p in cell.parameters()]))
    assert gradients[0].abs().max() > 0
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


class Recurrent:
    """A recurrent policy that stores what its network said of each step, as a learner will hear it again."""

    def __init__(self):
        self.cell, self.head = torch.nn.GRUCell(4, 8), torch.nn.Linear(8, 1)

    def initial_carry(self, num_envs):
        return np.zeros((num_envs, 8), np.float32)

    def unroll(self, observation, carry):
        carry = self.cell(observation.float() / 10, carry)
        return self.head(carry)[:, 0], carry

    def __call__(self, observation, carry, context):
        with torch.no_grad():
            value, after = self.unroll(torch.from_numpy(observation), torch.from_numpy(carry))
        return PolicyOutput(act(observation), after.numpy(), {"value": value.numpy()})


def test_epoch_of_blocks_a_learner_hears_what_the_actor_said_step_by_step():
    """The ratio of the first epoch is 1 in every step, with episodes that end anywhere in a block."""
    policy = Recurrent()
    envs = identifiable_envs("serial", NUM_ENVS, lengths=(9, 4, 2, 6), ends=ENDS)
    views, carried = Rollout(envs, policy).blocks(T), False
    for _ in range(4):
        block = next(views)
        for batch in epoch(block, Episode(), 3):
            carry = batch.carry
            carried = carried or bool(carry.any())
            for t in range(batch.mask.shape[1]):
                value, carry = policy.unroll(batch.observation[:, t], carry)
                said, valid = batch.extras["value"][:, t], batch.mask[:, t]
                torch.testing.assert_close(value[valid], said[valid])
    assert carried  # some pieces went on from the block before


def test_epoch_of_collated_episodes_gives_each_whole_episode():
    envs = identifiable_envs("serial", 2, lengths=LENGTHS, ends=ENDS)
    episodes = list(Rollout(envs, act).episodes(4))
    given = [b for turn in range(2) for b in epoch(pad_collate(episodes), Episode(), 3, seed=turn, drop_last=True)]
    assert [len(batch) for batch in given] == [3] * 4
    whole = next(epoch(pad_collate(episodes), Episode(), 8))
    assert sorted(whole.lengths.tolist()) == sorted(LENGTHS * 2)
    finals = {tuple(int(x) for x in whole.observation[i, n]) for i, n in enumerate(whole.lengths.tolist())}
    assert finals == {tuple(int(x) for x in e.observation[0, -1]) for e in episodes}


def test_epoch_of_a_block_leaves_lost_steps_out():
    block = blocks(1)[0]
    mask = block.mask.clone()
    mask[1, 2] = False
    batches = list(epoch(replace(block, mask=mask, loss_mask=mask), Episode(), 100))
    assert int(batches[0].mask.sum()) == NUM_ENVS * T - 1
    assert (1 << 44) + 2 not in batches[0].ids.tolist()
    assert (1 << 44) + 3 in batches[0].ids.tolist()


@pytest.mark.parametrize("unit", [Sequence(3), Transition(n_step=2), Episode(max_length=3)])
def test_epoch_of_a_block_other_units_are_refused(unit):
    with pytest.raises(UnsupportedError, match=r"expected Episode\(\) or Transition\(\)"):
        epoch(blocks(1)[0], unit, 4)


def test_epoch_of_a_batch_without_steps_is_refused():
    block = blocks(1)[0]
    flat = next(epoch(block, Transition(), 3))
    with pytest.raises(FieldError, match=r"shape \(3,\); expected \[N, T\]"):
        epoch(flat, Episode(), 4)
    nothing = torch.zeros_like(block.mask)
    with pytest.raises(FieldError, match="False everywhere"):
        epoch(replace(block, mask=nothing), Episode(), 4)
