"""Padding and packing of sequences of unequal lengths, against values computed by hand."""

import copy
import dataclasses
import pickle

import pytest
import torch
from support.batches import assert_same, tensors
from torch.utils.data._utils.pin_memory import pin_memory

from rlfeed.errors import ConfigError, FieldError
from rlfeed.types import Batch

LENGTHS = [2, 0, 3]


def sequences(lengths=LENGTHS, dtype=torch.float32, **fields):
    """Observation 100 row + step, action 10 row + step, reward its step: every value says where it belongs."""
    rows, longest = len(lengths), max(lengths)
    row, step = torch.arange(rows)[:, None], torch.arange(longest + 1)
    mask = step[:-1] < torch.tensor(lengths)[:, None]
    seen = step < torch.tensor(lengths)[:, None] + 1
    steps = step[:-1].expand(rows, longest)
    given = {
        "observation": {"x": (100 * row + step).mul(seen)[..., None].to(dtype), "y": (row + step).mul(seen).byte()},
        "action": (10 * row + steps).mul(mask),
        "reward": (steps + 1.0) * mask,
        "terminated": mask & (steps == torch.tensor(lengths)[:, None] - 1),
        "truncated": torch.zeros(rows, longest, dtype=torch.bool),
        "mask": mask,
        "lengths": torch.tensor(lengths),
        "ids": 7 + torch.arange(rows),
        "carry": (torch.arange(rows)[:, None] + 0.5,),
        "extras": {"log_prob": -(steps + 1.0) * mask},
    }
    return Batch(**(given | fields))


def test_packed_has_the_steps_row_after_row_and_each_rows_final_observation():
    packed = sequences().packed()
    assert packed.reward.tolist() == [1, 2, 1, 2, 3]
    assert packed.action.tolist() == [0, 1, 20, 21, 22]
    assert packed.observation["x"][:, 0].tolist() == [0, 1, 2, 100, 200, 201, 202, 203]
    assert packed.terminated.tolist() == [False, True, False, False, True]
    assert packed.extras["log_prob"].tolist() == [-1, -2, -1, -2, -3]
    assert packed.cu_lengths.tolist() == [0, 2, 2, 5]
    assert packed.cu_lengths.dtype == packed.cu_observations.dtype == torch.int32
    assert packed.cu_observations.tolist() == [0, 3, 4, 8]
    assert packed.mask.all()
    assert packed.lengths.tolist() == LENGTHS
    assert packed.carry[0].tolist() == [[0.5], [1.5], [2.5]]
    assert len(packed) == 3


def test_packed_step_index_gives_each_step_its_observation_and_its_successor():
    packed = sequences().packed()
    seen = packed.observation["x"][:, 0]
    assert seen[packed.step_index].tolist() == [0, 1, 200, 201, 202]
    assert seen[packed.step_index + 1].tolist() == [1, 2, 201, 202, 203]


def test_packed_padded_again_is_the_same_batch():
    batch = sequences()
    assert_same(batch.packed().padded(), batch)
    assert batch.packed().packed().reward.tolist() == batch.packed().reward.tolist()


def test_packed_keeps_gaps_in_the_mask():
    """A window that crosses the end of an episode has a closing row in its midst: it is a row, and masked."""
    batch = sequences([3, 3], mask=torch.tensor([[True, False, True], [True, True, True]]))
    assert batch.packed().mask.tolist() == [True, False, True, True, True, True]
    assert_same(batch.packed().padded(), batch)


def test_padded_to_a_multiple_makes_steps_a_multiple_and_observations_one_more():
    padded = sequences().padded(multiple_of=4)
    assert padded.reward.tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [1, 2, 3, 0]]
    assert padded.observation["x"][..., 0].tolist() == [[0, 1, 2, 0, 0], [100, 0, 0, 0, 0], [200, 201, 202, 203, 0]]
    assert padded.mask.tolist() == [[True, True, False, False], [False] * 4, [True, True, True, False]]
    assert padded.lengths.tolist() == LENGTHS
    assert padded.observation["y"].dtype == torch.uint8


@pytest.mark.parametrize("multiple_of", [1, 3])
def test_padded_that_fits_is_the_batch_itself(multiple_of):
    batch = sequences()
    assert batch.padded(multiple_of=multiple_of) is batch


def test_padded_packed_batch_to_a_multiple_is_the_padded_one():
    assert_same(sequences().packed().padded(multiple_of=5), sequences().padded(multiple_of=5))


def test_padded_with_a_number_fills_values_and_leaves_flags_and_masks():
    padded = sequences(observation=sequences().observation["x"]).padded(padding_value=-1)
    assert padded.reward.tolist() == [[1, 2, -1], [-1, -1, -1], [1, 2, 3]]
    assert padded.action.tolist() == [[0, 1, -1], [-1, -1, -1], [20, 21, 22]]
    assert padded.observation[..., 0].tolist() == [[0, 1, 2, -1], [100, -1, -1, -1], [200, 201, 202, 203]]
    assert padded.extras["log_prob"][0].tolist() == [-1, -2, -1]
    assert not padded.terminated[1].any()
    assert padded.mask.tolist() == sequences().mask.tolist()


def test_padded_with_values_by_name_fills_those_and_a_leaf_goes_before_its_field():
    batch = sequences()
    padded = batch.padded(padding_value={"observation.y": 255, "observation": 9, "terminated": True})
    assert padded.observation["x"][0, :, 0].tolist() == [0, 1, 2, 9]
    assert padded.observation["y"][0].tolist() == [0, 1, 2, 255]
    assert padded.terminated[0].tolist() == [False, True, True]
    assert torch.equal(padded.reward, batch.reward)
    assert batch.observation["x"][0, -1] == 0  # the batch it was made of is as it was


def test_padded_again_has_the_padding_of_the_last_time():
    again = sequences().padded(padding_value={"reward": -1.0}).padded(multiple_of=2)
    assert_same(again, sequences().padded(multiple_of=2))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint16, torch.uint64, torch.bfloat16, torch.float64])
def test_padded_and_packed_keep_dtypes(dtype):
    batch = sequences(dtype=dtype)
    for made in (batch.packed(), batch.padded(multiple_of=2), batch.packed().padded()):
        assert made.observation["x"].dtype == dtype
    assert_same(batch.packed().padded(), batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"multiple_of": 0}, "multiple_of is 0; expected an int >= 1"),
        ({"multiple_of": 2.0}, "multiple_of is 2.0; expected an int"),
        ({"padding_value": {"rewrad": 1}}, "names 'rewrad'; expected one of .*Did you mean 'reward'"),
        ({"padding_value": {"observation.z": 1}}, "names 'observation.z'; expected one of .*'observation.x'"),
        ({"padding_value": {"mask": 1}}, "names 'mask'; expected one of"),
        ({"padding_value": {"lengths": 1}}, "names 'lengths'; expected one of"),
        ({"padding_value": {"observation.y": 256}}, r'observation\["y"\] is 256; expected one of .*uint8'),
        ({"padding_value": -1.0}, r'padding_value of observation\["y"\] is -1.0; expected one of .*uint8'),
        ({"padding_value": {"action": 0.5}}, "padding_value of action is 0.5; expected one of .*int64"),
        ({"padding_value": {"action": float("nan")}}, "padding_value of action is nan; expected one of .*int64"),
        ({"padding_value": {"reward": 1e39}}, "padding_value of reward is 1e.39; expected one of .*float32"),
        ({"padding_value": {"reward": "0"}}, "padding_value of reward is '0'; expected one of .*float32"),
        ({"padding_value": {"terminated": 2}}, "padding_value of terminated is 2; expected one of .*bool"),
        ({"multiple_of": -1, "padding_value": {"a": 1, "b": 2}}, "multiple_of is -1.*names 'a'.*names 'b'"),
    ],
)
def test_padded_wrong_options_are_refused_with_all_findings(options, message):
    with pytest.raises(ConfigError, match=message):
        sequences().padded(**options)


def test_transitions_are_not_padded_and_cannot_be_packed():
    flat = torch.zeros(4)
    batch = Batch(observation=flat, action=flat, reward=flat, terminated=flat.bool(), truncated=flat.bool())
    assert batch.padded(multiple_of=8, padding_value=-1) is batch
    assert batch.key_padding_mask is None
    with pytest.raises(FieldError, match="packed: the batch has transitions; expected sequences"):
        batch.packed()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": torch.tensor([2, 0, 4])}, r"lengths are \[2, 0, 4\]; expected 3 of them, each 0 .. 3"),
        ({"lengths": torch.tensor([1, 0, 3])}, "mask is True past lengths"),
        ({"lengths": torch.tensor([0, 0, 0]), "mask": None}, "lengths of all 3 rows are 0; expected at least one step"),
        ({"extras": {"value": torch.zeros(3)}}, r'extras\["value"\] has shape \(3,\); expected \(3, 3\) first'),
        ({"observation": torch.zeros(3, 3, 1)}, r"observation has shape \(3, 3, 1\); expected \(3, 4\) first"),
    ],
)
def test_fields_that_do_not_fit_the_lengths_are_refused(fields, message):
    batch = dataclasses.replace(sequences(), **fields)
    for arrange in (Batch.packed, lambda batch: batch.padded(multiple_of=7)):
        with pytest.raises(FieldError, match=message):
            arrange(batch)


def test_batch_without_lengths_has_full_rows():
    batch = dataclasses.replace(sequences([3, 3]), mask=None, lengths=None)
    assert batch.packed().cu_lengths.tolist() == [0, 3, 6]


def test_key_padding_mask_is_true_where_torch_is_to_ignore():
    batch = sequences()
    assert batch.key_padding_mask.tolist() == [[False, False, True], [True, True, True], [False, False, False]]
    assert batch.packed().key_padding_mask is None


def test_key_padding_mask_hides_padding_from_attention():
    attention = torch.nn.MultiheadAttention(4, 1, batch_first=True)
    batch, rubbish = sequences([2, 3]), torch.randn(2, 3, 4)
    clean = torch.where(batch.mask[..., None], rubbish, 0.0)
    outs = [attention(x, x, x, key_padding_mask=batch.key_padding_mask)[0][batch.mask] for x in (clean, rubbish)]
    torch.testing.assert_close(outs[0], outs[1])


def test_jagged_is_a_view_of_each_rows_steps():
    packed = sequences().packed()
    action = packed.jagged("action")
    assert [row.tolist() for row in action.unbind()] == [[0, 1], [], [20, 21, 22]]
    assert action.values().data_ptr() == packed.action.data_ptr()
    seen = packed.jagged("observation")["x"]
    assert [row[:, 0].tolist() for row in seen.unbind()] == [[0, 1, 2], [100], [200, 201, 202, 203]]
    assert seen.values().data_ptr() == packed.observation["x"].data_ptr()


def test_jagged_what_is_not_there_is_refused():
    with pytest.raises(FieldError, match=r"jagged\('action'\): the batch is not packed; .*Call packed\(\) first"):
        sequences().jagged("action")
    with pytest.raises(FieldError, match=r"name is 'actoin'; expected one of .*Did you mean 'action'"):
        sequences().packed().jagged("actoin")
    for name in ("step_index", "cu_observations"):
        with pytest.raises(FieldError, match=f"{name}: the batch is not packed"):
            getattr(sequences(), name)


def pinned(tensor):
    copied = tensor.clone()
    copied.is_now_pinned = True
    return copied


TRIPS = {
    "pickle": lambda batch: pickle.loads(pickle.dumps(batch)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "clone": Batch.clone,
    "map": lambda batch: batch.map(torch.clone),
    "through": lambda batch: batch.through(torch.clone),
    "replace": dataclasses.replace,
    "pin": pin_memory,
}


@pytest.mark.parametrize("trip", TRIPS.values(), ids=TRIPS)
@pytest.mark.parametrize("arrange", [Batch.packed, lambda b: b.padded(multiple_of=4)], ids=["packed", "padded"])
def test_arranged_batch_stays_a_batch_on_every_way(trip, arrange, monkeypatch):
    """Feed trap T33: a batch type of one's own is pinned, sent and copied as what it is."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    batch = arrange(sequences())
    copied = trip(batch)
    assert type(copied) is Batch
    assert_same(copied, batch)
    assert len(copied) == 3


def test_batch_pinned_by_torchs_own_loader_is_pinned_in_one_piece(monkeypatch):
    """Feed trap T33: what a DataLoader with ``pin_memory=True`` does with each batch."""
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: calls.append(1) or pinned(tensor))
    moved = pin_memory(sequences().packed())
    assert len(calls) == 1
    assert moved._block.is_now_pinned


def test_arranged_batch_lies_in_one_block_and_moves_as_one():
    for batch in (sequences().packed(), sequences().padded(multiple_of=4)):
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors(batch).values()}) == 1
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors(batch).values())
        moved = batch.to("meta")
        assert moved.reward.device.type == "meta"
        assert moved.ids.device.type == "cpu"


def test_batch_on_a_device_keeps_its_ids_on_the_cpu():
    """There is no second device here: that ids lie apart is told by what a batch of mixed devices becomes."""
    batch = sequences()
    object.__setattr__(batch, "ids", batch.ids.to("meta"))
    assert batch.packed().ids is batch.ids
