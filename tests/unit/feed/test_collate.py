"""Padding samples that do not come from the replay (I9: padding changes nothing)."""

import itertools
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from support.batches import assert_same, tensors
from support.replay_twin import ReplayTwin, make_step
from torch.utils.data import DataLoader

from rlfeed.errors import ConfigError, FieldError
from rlfeed.feed import ReplayDataset, make_loader, pad_collate
from rlfeed.ragged import Ragged
from rlfeed.replay import Episode, ReplayBuffer, Sequence, Transition, kernels
from rlfeed.types import Batch


def episode(length, offset=0):
    return {
        "observation": {"x": np.arange(offset, offset + length + 1, dtype=np.float32)[:, None]},
        "action": np.arange(length) % 3,
        "reward": np.arange(1, length + 1, dtype=np.float32),
        "terminated": np.arange(length) == length - 1,
        "truncated": np.zeros(length, bool),
    }


def test_pad_collate_unequal_episodes_gives_the_hand_computed_batch():
    batch = pad_collate([episode(1, 10), episode(3, 20)])
    assert batch.observation["x"][..., 0].tolist() == [[10, 11, 0, 0], [20, 21, 22, 23]]
    assert batch.reward.tolist() == [[1, 0, 0], [1, 2, 3]]
    assert batch.terminated.tolist() == [[True, False, False], [False, False, True]]
    assert batch.mask.tolist() == [[True, False, False], [True, True, True]]
    assert batch.lengths.tolist() == [1, 3]
    assert batch.action.dtype == torch.int64


def test_pad_collate_batches_of_one_are_padded_again_without_their_old_padding():
    whole = pad_collate([episode(2), episode(4), episode(3)])
    parts = [pad_collate([episode(n)]) for n in (2, 4, 3)]
    assert_same(pad_collate(parts), whole)
    wide = [Batch(**{**vars_of(parts[0]), "lengths": torch.tensor([1])}), parts[1]]
    assert pad_collate(wide).reward.tolist() == [[1, 0, 0, 0], [1, 2, 3, 4]]


def vars_of(batch):
    return {f.name: getattr(batch, f.name) for f in fields(batch) if f.init}


def masked_loss(model, batch):
    value = model(batch.observation["x"])[:, :-1, 0]
    error = torch.where(batch.mask, (value - batch.reward) ** 2, 0.0)
    return error.sum() / batch.mask.sum()


def test_padding_to_twice_the_length_gives_the_same_loss_and_gradients():
    """B33, (a)."""
    model = torch.nn.Linear(1, 1)
    batch = pad_collate([episode(2), episode(5)])
    widened = Batch(
        **{
            name: {"x": torch.nn.functional.pad(value["x"], (0, 0, 0, 5))}
            if name == "observation"
            else torch.nn.functional.pad(value, (0, 5))
            for name, value in vars_of(batch).items()
            if name in ("observation", "action", "reward", "terminated", "truncated", "mask")
        }
    )
    gradients = []
    for each in (batch, widened):
        model.zero_grad()
        loss = masked_loss(model, each)
        loss.backward()
        gradients.append((loss.item(), model.weight.grad.item(), model.bias.grad.item()))
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-6)


def test_pad_collate_transitions_are_stacked():
    sample = {"observation": np.ones(2, np.float32), "action": np.int64(1), "reward": np.float32(2.0)}
    batch = pad_collate([sample, sample])
    assert batch.observation.shape == (2, 2)
    assert batch.reward.tolist() == [2.0, 2.0]
    assert batch.mask is None


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "got no samples"),
        ([1, 2], "sample 0 is a int"),
        ([{"observation": np.zeros(2)}], "have no .'action', 'reward'."),
        ([episode(2), {k: v for k, v in episode(2).items() if k != "truncated"}], "sample 1 has"),
        ([pad_collate([episode(2), episode(3)])], "a batch of 2 rows as a sample"),
        ([episode(2) | {"nonsense": np.zeros(2)}], "have .'nonsense'.; expected those of Batch"),
        ([episode(2) | {"action": np.zeros(3, np.int64)}], r"sample 0: action has shape \(3,\)"),
        ([episode(2), episode(2) | {"observation": {"y": np.zeros((3, 1))}}], "sample 1: observation: has .*'y'"),
        ([episode(2), episode(3) | {"action": np.zeros((3, 2), np.int64)}], r"sample 1: action has shape \(3, 2\)"),
    ],
)
def test_pad_collate_samples_that_do_not_fit_are_refused(samples, message):
    with pytest.raises(FieldError, match=message):
        pad_collate(samples)


TRANSITION = {"observation": np.ones(2, np.float32), "action": np.int64(1), "reward": np.float32(2.0)}


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([episode(2), TRANSITION], "sample 1 has .*; expected .*, as sample 0 has. All samples of .* one unit"),
        ([TRANSITION, TRANSITION | {"reward": np.ones(3)}], "sample 1: reward has 1 axes, that of sample 0 0;"),
        ([TRANSITION | {"reward": np.ones((2, 2))}] * 2, "sample 0: reward has 2 axes"),
        ([episode(0), episode(0)], "lengths of all 2 samples are 0 .. 0; .* at least one step"),
        ([episode(2) | {"lengths": -1}, episode(2) | {"lengths": 2}], "are -1 .. 2; expected 0 or more"),
        ([episode(2) | {"action": None}], "action has None; expected arrays"),
        ([episode(2) | {"action": torch.zeros(2).bfloat16()}], "action has tensor.*; expected arrays that NumPy can"),
        ([episode(2) | {"nxet_observation": 0}] * 2, "Did you mean 'next_observation'"),
        ([episode(2) | {"cu_lengths": np.zeros(2)}] * 2, "have .'cu_lengths'.; expected those of Batch"),
        ([episode(2) | {"action": np.array(["a", "b"])}] * 2, "action has dtype <U1; expected numbers"),
        ([episode(2) | {"observation": {"x": np.float32(1)}}] * 2, r'sample 0: observation\["x"\] has shape \(\)'),
        ([episode(2) | {"lengths": 3}] * 2, r"sample 0: .* has shape \(.*; expected \("),
        ([TRANSITION, TRANSITION | {"action": np.float32(1)}], "sample 1: action has .*float32; expected .* int64"),
    ],
)
def test_pad_collate_mixed_or_empty_samples_are_refused(samples, message):
    with pytest.raises(FieldError, match=message):
        pad_collate(samples)


@pytest.mark.parametrize("value", [0.5, np.float64(0.5), torch.tensor(0.5, dtype=torch.float64)], ids=type)
def test_pad_collate_reward_of_any_kind_becomes_float32(value):
    batch = pad_collate([TRANSITION | {"reward": value}] * 2)
    assert batch.reward.dtype == torch.float32
    assert batch.reward.tolist() == [0.5, 0.5]


def test_pad_collate_samples_of_tensors_and_of_arrays_give_the_same_batch():
    def as_tensors(sample):
        nested = {"observation": {"x": torch.from_numpy(sample["observation"]["x"])}}
        return nested | {name: torch.from_numpy(sample[name]) for name in sample.keys() - nested.keys()}

    samples = [episode(1, 10), episode(3, 20)]
    assert_same(pad_collate([as_tensors(sample) for sample in samples]), pad_collate(samples))


def test_pad_collate_samples_become_one_block_that_shares_nothing_with_them():
    samples = [episode(1, 10), episode(3, 20)]
    batch = pad_collate(samples)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors(batch.clone()).values()}) == 1
    begin, end = batch._block.data_ptr(), batch._block.data_ptr() + batch._block.numel()
    assert all(begin <= tensor.data_ptr() < end for tensor in tensors(batch).values())
    samples[0]["reward"][:] = -1
    assert batch.reward[0].tolist() == [1, 0, 0]


def test_pad_collate_next_observations_of_sequences_are_padded_like_their_steps():
    samples = [episode(n) | {"next_observation": {"x": np.arange(1.0, n + 1)}} for n in (1, 2)]
    assert pad_collate(samples).next_observation["x"].tolist() == [[1, 0], [1, 2]]


def test_pad_collate_options_pad_to_a_multiple_and_with_values_by_name():
    samples = [episode(1, 10), episode(3, 20)]
    batch = pad_collate(samples, pad_to_multiple_of=4, padding_value={"reward": -9.0, "observation.x": 0.5})
    assert batch.reward.tolist() == [[1, -9, -9, -9], [1, 2, 3, -9]]
    assert batch.observation["x"][..., 0].tolist() == [[10, 11, 0.5, 0.5, 0.5], [20, 21, 22, 23, 0.5]]
    assert batch.mask.tolist() == [[True, False, False, False], [True, True, True, False]]


def test_pad_collate_block_of_a_rollout_is_refused_for_its_finals_would_be_lost():
    finals = {"final_index": torch.zeros(0, 2, dtype=torch.int64), "final_observation": torch.zeros(0, 1)}
    block = Batch(**{**vars_of(pad_collate([episode(2)])), **finals})
    with pytest.raises(FieldError, match=r"a block of a rollout as a sample; .* leave pad_collate out"):
        pad_collate([block])
    with pytest.raises(FieldError, match=r"have .'final_index'.; expected those of Batch"):
        pad_collate([episode(2) | {"final_index": np.zeros((0, 2))}])


def test_pad_collate_packed_batches_of_one_are_joined():
    parts = [pad_collate([episode(n)], layout="packed") for n in (2, 3)]
    assert_same(pad_collate(parts), pad_collate([episode(2), episode(3)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "nested"}, "layout is 'nested'; expected one of .*'padded', 'packed'"),
        ({"layout": "packed", "pad_to_multiple_of": 8}, "layout is 'packed', with pad_to_multiple_of=8"),
        ({"layout": "packed", "padding_value": 1.0}, "'packed', with .*padding_value=1.0; expected neither"),
        ({"pad_to_multiple_of": 0}, "multiple_of is 0; expected an int >= 1"),
        ({"padding_value": {"rewards": 1.0}}, "names 'rewards'; .*Did you mean 'reward'"),
    ],
)
def test_pad_collate_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        pad_collate([episode(2)], **options)


ENDS = (3, 9, 10, 22, 40, 59)


def make_buffer():
    space = Dict(vector=Box(-1e9, 1e9, (3,)), image=Box(0, 255, (40, 40), "uint8"))
    buffer, twin = ReplayBuffer(space, Discrete(11), capacity=200), ReplayTwin(1, 200)
    for i in range(60):
        buffer.add(make_step(twin, [0], [(i in ENDS, False)], rewards=[float(i)]))
    return buffer


FILLS = {"observation.image": 255, "reward": -1.0}
OPTIONS = {
    "multiple": ({"pad_to_multiple_of": 8}, lambda batch: batch.padded(multiple_of=8)),
    "value": ({"padding_value": FILLS}, lambda batch: batch.padded(padding_value=FILLS)),
    "packed": ({"layout": "packed"}, Batch.packed),
}


def take(loader, count=3):
    return list(itertools.islice(loader, count))


@pytest.mark.parametrize("unit", [Sequence(5, burn_in=2), Episode()], ids=str)
@pytest.mark.parametrize(("options", "transform"), OPTIONS.values(), ids=OPTIONS)
def test_option_and_transform_give_the_same_batches_at_every_level(unit, options, transform):
    buffer = make_buffer()
    expected = [transform(batch) for batch in take(make_loader(buffer, unit, batch_size=6))]
    one = DataLoader(ReplayDataset(buffer, unit), batch_size=6, collate_fn=partial(pad_collate, **options))
    two = DataLoader(ReplayDataset(buffer, unit, batch_size=6, transform=transform), batch_size=None)
    for loader in (one, two, make_loader(buffer, unit, batch_size=6, transform=transform)):
        for batch, wanted in zip(take(loader), expected, strict=True):
            assert type(batch) is Batch
            assert_same(batch, wanted)


def test_packed_batches_come_from_a_worker_as_batches():
    """Feed trap T33, through torch's own queue."""
    buffer, collate = make_buffer(), partial(pad_collate, layout="packed")
    expected = take(DataLoader(ReplayDataset(buffer, Episode()), batch_size=4, collate_fn=collate))
    dataset = ReplayDataset(buffer, Episode())
    loader = DataLoader(dataset, batch_size=4, collate_fn=collate, num_workers=1, multiprocessing_context="fork")
    for batch, wanted in zip(take(loader), expected, strict=True):
        assert type(batch) is Batch
        assert len(batch) == 4
        assert_same(batch, wanted)


def test_option_gathers_a_batch_once(monkeypatch):
    calls, original = [], kernels.gather_windows
    monkeypatch.setattr(kernels, "gather_windows", lambda *args: calls.append(1) or original(*args))
    collate = partial(pad_collate, pad_to_multiple_of=8)
    take(DataLoader(ReplayDataset(make_buffer(), Episode()), batch_size=6, collate_fn=collate), 5)
    assert len(calls) == 5


def test_pad_collate_without_options_gives_what_was_gathered(monkeypatch):
    """Nothing is added to a gather that was asked for as it is."""
    monkeypatch.delattr(Ragged, "padded")
    loader = DataLoader(ReplayDataset(make_buffer(), Transition()), batch_size=6, collate_fn=pad_collate)
    assert len(next(iter(loader))) == 6


def test_option_of_padding_leaves_transitions_as_they_are():
    collate = partial(pad_collate, pad_to_multiple_of=8, padding_value={"reward": -1.0})
    dataset = ReplayDataset(make_buffer(), Transition())
    plain = make_loader(dataset.buffer, Transition(), batch_size=6)
    assert_same(next(iter(DataLoader(dataset, batch_size=6, collate_fn=collate))), next(iter(plain)))


def test_window_that_crosses_ends_keeps_its_masked_rows_when_it_is_packed():
    batch = make_buffer().sample(16, Sequence(6, boundary="cross"))
    packed = batch.packed()
    assert not batch.mask.all()
    assert torch.equal(packed.mask, batch.mask.flatten())
    assert_same(packed.padded(), batch)
