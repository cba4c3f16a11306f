"""Padding samples that do not come from the replay (I9: padding changes nothing)."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from support.batches import assert_same

from rlfeed.errors import FieldError
from rlfeed.feed import pad_collate
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
