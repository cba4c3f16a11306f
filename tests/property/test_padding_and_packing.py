"""Padded and packed batches of any lengths, against lists that are sliced by hand (I9: padding is invisible)."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import assert_same

from rlfeed.feed import pad_collate

lengths_of = st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any)


def episodes(lengths):
    """Every value names its row and step."""
    return [
        {
            "observation": {"x": torch.arange(n + 1.0)[:, None] + 100 * row},
            "action": torch.arange(n) + 10 * row,
            "reward": torch.arange(n) + 1.0 + row,
            "extras": {"value": torch.arange(n).double() / (row + 1)},
        }
        for row, n in enumerate(lengths)
    ]


def twin_padded(rows, longest, padding):
    """Pad lists one by one."""
    return [[*row, *[padding] * (longest - len(row))] for row in (part.flatten().tolist() for part in rows)]


def twin_flat(rows):
    return [value for row in rows for value in row.flatten().tolist()]


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of, multiple=st.integers(1, 5), padding=st.sampled_from([0, -1, 7]))
def test_padded_batch_is_the_lists_padded_one_by_one(lengths, multiple, padding):
    samples = episodes(lengths)
    batch = pad_collate(samples, pad_to_multiple_of=multiple, padding_value=padding)
    longest = -(-max(lengths) // multiple) * multiple
    for name in ("action", "reward"):
        assert getattr(batch, name).tolist() == twin_padded([s[name] for s in samples], longest, padding)
    assert batch.extras["value"].tolist() == twin_padded([s["extras"]["value"] for s in samples], longest, padding)
    seen = twin_padded([s["observation"]["x"] for s in samples], longest + 1, padding)
    assert batch.observation["x"][..., 0].tolist() == seen
    assert batch.mask.tolist() == [[t < n for t in range(longest)] for n in lengths]


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of, multiple=st.integers(1, 5))
def test_packed_batch_is_the_lists_one_after_another_and_pads_back(lengths, multiple):
    samples = episodes(lengths)
    packed = pad_collate(samples, layout="packed")
    for name in ("action", "reward"):
        assert getattr(packed, name).tolist() == twin_flat([s[name] for s in samples])
    assert packed.observation["x"].flatten().tolist() == twin_flat([s["observation"]["x"] for s in samples])
    assert packed.cu_lengths.tolist() == [sum(lengths[:row]) for row in range(len(lengths) + 1)]
    assert_same(packed.padded(), pad_collate(samples))
    assert_same(pad_collate(samples, pad_to_multiple_of=multiple).packed(), packed)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_of, value=st.floats(-10, 10, width=32))
def test_masked_sums_do_not_change_when_a_batch_is_padded_to_twice_its_length(lengths, value):
    """B33, (a)."""
    batch = pad_collate(episodes(lengths))
    wider = batch.padded(multiple_of=2 * batch.reward.shape[1], padding_value={"reward": value, "observation": value})
    assert wider.reward.shape[1] == 2 * batch.reward.shape[1]
    for field in (lambda b: b.reward, lambda b: b.observation["x"][:, 1:, 0] - b.observation["x"][:, :-1, 0]):
        assert (field(wider) * wider.mask).sum() == (field(batch) * batch.mask).sum()
