"""Batches as one block, and steps."""

import dataclasses
import pickle
import subprocess
import sys
from copy import deepcopy
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from support.batches import assert_same
from support.replay_twin import ReplayTwin, make_step
from torch.utils._python_dispatch import TorchDispatchMode

from rlfeed.layout import Layout
from rlfeed.nest import leaves
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
    copied, ids, expected = [], batch.ids.tolist(), batch.clone()
    moved = batch.through(lambda tensor: copied.append(tensor) or tensor.clone())
    assert len(copied) == 1
    copied[0].zero_()
    assert moved.ids.tolist() == ids  # theirs, on the CPU: the old block may be somebody's slot, the new one a device's
    assert_same(moved, expected)


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


def test_batch_sent_through_a_queue_keeps_its_memory_here(batch):
    """Torch moves what it shares to other memory: fields that were carved before must not be left behind."""
    before, reward, address = batch.reward.clone(), batch.reward, batch._block.data_ptr()
    sent = bytes(ForkingPickler.dumps(batch))
    assert batch._block.data_ptr() == address
    assert not batch._block.is_shared()
    assert reward.equal(before)
    assert pickle.loads(sent).reward.equal(before)


def test_batch_pickled_sends_its_block_once(batch):
    assert len(pickle.dumps(batch)) < 1.2 * batch._block.numel() + 5000


NAMES = [f.name for f in dataclasses.fields(Batch) if f.init]
ROUND_TRIPS = {
    "pickle": lambda batch: pickle.loads(pickle.dumps(batch)),
    "clone": lambda batch: batch.clone(),
    "through": lambda batch: batch.through(torch.clone),
    "deepcopy": deepcopy,
    "replace": lambda batch: dataclasses.replace(batch),
}


@pytest.mark.parametrize("trip", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
@pytest.mark.parametrize("plain", [True, False], ids=["numpy", "torch"])
def test_batch_field_looked_at_or_not_is_the_same_in_a_copy(batch, trip, plain):
    expected = Batch(**{name: getattr(batch, name) for name in NAMES})
    for touched in ([], *([name] for name in NAMES), NAMES):
        fresh = Batch.carve(batch._block, batch._layout, plain=plain)
        for name in touched:
            getattr(fresh, name)
        assert_same(trip(fresh), expected)
        assert_same(fresh, expected)


def test_batch_field_looked_at_again_is_the_same_object(batch):
    """What a user edits in place or compares by identity must not be a new tensor each time."""
    for name in NAMES:
        assert getattr(batch, name) is getattr(batch, name)


def test_batch_drawn_makes_no_tensor_before_it_is_looked_at(batch):
    """The work bound of a sample: one allocation; then one tensor per field looked at, once."""
    buffer, twin = ReplayBuffer(SPACE, Discrete(11), capacity=60, storage="private"), ReplayTwin(1, 60)
    buffer.add(make_step(twin, [0], [(False, False)], rewards=[0.0]))
    buffer.sample(5, Transition())
    with TorchCalls() as calls:
        batch = buffer.sample(5, Transition())
    assert calls.names == ["empty"]
    elsewhere = Batch.carve(batch._block, batch._layout)
    with TorchCalls() as calls:
        assert elsewhere.reward.shape == elsewhere.discount.shape == elsewhere.reward.shape
    assert (calls.names.count("view"), calls.names.count("as_strided")) == (1, 2)


def test_batch_fields_in_plain_memory_lie_in_the_block_at_their_offsets(batch):
    begin = batch._block.data_ptr()
    for slot in batch._layout.slots:
        tensor = dict(leaves(getattr(batch, slot.name)))[slot.path]
        assert (tensor.data_ptr() - begin, tensor.shape, tensor.dtype) == (slot.offset, slot.shape, slot.dtype)


COMPILED = """
import torch
from rlfeed.layout import Layout, Slot
from rlfeed.types import Batch

block = torch.arange(64, dtype=torch.float32).view(torch.uint8)
layout = Layout((Slot("reward", (), torch.float32, (4,), 0), Slot("discount", (), torch.float32, (2, 2), 64)), 256)
total = torch.compile(lambda batch: batch.reward.sum() + 100 * batch.discount.sum(), backend="eager", fullgraph=True)
assert total(Batch.carve(block, layout, plain=True)) == 0 + 1 + 2 + 3 + 100 * (16 + 17 + 18 + 19)
"""


@pytest.mark.slow
def test_batch_not_looked_at_before_can_be_read_by_a_compiled_function():
    """In a process of its own: the compiler does not follow the type checks of these tests."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=300)


class TorchCalls(TorchDispatchMode):
    """Name the operators that torch runs meanwhile."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("plain", [True, False], ids=["numpy", "torch"])
def test_batch_field_of_a_dtype_that_numpy_lacks_is_carved_all_the_same(plain):
    numbers = torch.arange(4.0).bfloat16()
    fields = [("reward", ()), ("observation", ("x",))]
    layout = Layout.of([(name, path, torch.bfloat16, (4,)) for name, path in fields])
    block = torch.zeros(layout.nbytes, dtype=torch.uint8)
    batch = Batch.carve(block, layout, plain=plain)
    for tensor in (batch.reward, batch.observation["x"]):
        tensor.copy_(numbers)
    assert torch.equal(block[:8], numbers.view(torch.uint8))
    assert torch.equal(block[64:72], numbers.view(torch.uint8))


def test_batch_unknown_field_is_an_attribute_error(batch):
    with pytest.raises(AttributeError, match="next_obs"):
        batch.next_obs  # noqa: B018
    assert not hasattr(batch.map(torch.clone), "next_obs")


def test_batch_field_is_frozen_before_and_after_it_is_looked_at(batch):
    for _ in range(2):
        with pytest.raises(dataclasses.FrozenInstanceError):
            batch.reward = torch.zeros(5)
        assert batch.reward is not None


def test_batch_renamed_key_is_not_lost_in_a_copy(batch):
    batch.observation["seen"] = batch.observation.pop("image")
    assert batch.clone().observation.keys() == {"vector", "seen"}
