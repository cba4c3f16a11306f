"""Batches as one block, and steps."""

import dataclasses
import pickle

import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from support.batches import assert_same
from support.replay_twin import ReplayTwin, make_step

from rlfeed.replay import Episode, ReplayBuffer, Transition
from rlfeed.types import Batch

SPACE = Dict(vector=Box(-1e9, 1e9, (3,)), image=Box(0, 255, (40, 40), "uint8"))


@pytest.fixture(params=[Transition(), Episode()], ids=["transition", "episode"])
def batch(request):
    buffer, twin = ReplayBuffer(SPACE, Discrete(11), capacity=60, storage="private"), ReplayTwin(1, 60)
    for i in range(30):
        buffer.add(make_step(twin, [0], [(i % 4 == 3, False)], rewards=[float(i)]))
    return buffer.sample(5, request.param)


def test_batch_clone_is_equal_and_shares_nothing(batch):
    clone = batch.clone()
    assert_same(clone, batch)
    clone.reward.add_(1)
    clone.ids.add_(1)
    assert not torch.equal(clone.reward, batch.reward)
    assert not torch.equal(clone.ids, batch.ids)


def test_batch_pickled_is_equal_and_one_block(batch):
    copy = pickle.loads(pickle.dumps(batch))
    assert type(copy) is Batch
    assert_same(copy, batch)
    assert copy.reward.untyped_storage().data_ptr() == copy.action.untyped_storage().data_ptr()


def test_batch_through_copies_once_where_it_is_one_block(batch):
    copied = []
    moved = batch.through(lambda tensor: copied.append(tensor) or tensor.clone())
    assert len(copied) == 1
    assert moved.ids.data_ptr() == batch.ids.data_ptr()  # ids stay where they are
    assert_same(moved, batch)


def test_batch_replaced_field_is_not_lost_in_a_copy(batch):
    doubled = dataclasses.replace(batch, reward=batch.reward * 2)
    for copy in (doubled.clone(), pickle.loads(pickle.dumps(doubled)), doubled.through(torch.clone)):
        assert torch.equal(copy.reward, batch.reward * 2)


def test_batch_to_its_own_device_is_itself(batch):
    assert batch.to("cpu") is batch


def test_batch_to_another_device_moves_all_but_ids(batch):
    moved = batch.to("meta")
    assert moved.reward.device.type == moved.observation["image"].device.type == "meta"
    assert moved.ids.device.type == "cpu"
    assert moved.observation["image"].shape == batch.observation["image"].shape


def test_len_is_the_number_of_rows(batch):
    assert len(batch) == 5


def test_batch_edited_dict_is_not_lost_in_a_copy(batch):
    batch.observation["vector"] = batch.observation["vector"] + 1
    batch.extras["advantage"] = torch.ones(5)
    for copy in (batch.clone(), pickle.loads(pickle.dumps(batch)), batch.through(torch.clone)):
        assert torch.equal(copy.observation["vector"], batch.observation["vector"])
        assert torch.equal(copy.extras["advantage"], torch.ones(5))


def test_batch_pickled_sends_its_block_once(batch):
    assert len(pickle.dumps(batch)) < 1.2 * batch._block.numel() + 5000
