"""Means of updates, and the first number that is not finite."""

from collections import deque

import pytest
import torch

from rlfeed.durable import load_state
from rlfeed.errors import DivergedError
from rlfeed.train.means import Means
from rlfeed.types import Batch


def batch(number):
    zeros = torch.zeros(2)
    flags = torch.zeros(2, dtype=torch.bool)
    observation = {"a": zeros + number}
    return Batch(observation=observation, action=zeros, reward=zeros + number, terminated=flags, truncated=flags)


def test_means_of_tags_that_come_now_and_then_are_over_the_updates_that_gave_them():
    means = Means()
    for number in range(4):
        scalars = {"train/loss": torch.tensor(float(number))}
        if number % 2:
            scalars["train/actor_loss"] = torch.tensor(10.0 * number)
        means.add(batch(number), scalars, number, number + 1)
    assert means.take() == {"train/loss": 1.5, "train/actor_loss": 20.0}
    assert means.take() == {}


def test_means_with_an_infinity_write_the_batch_and_name_every_tag(tmp_path):
    means = Means(tmp_path / "diverged.state")
    means.add(batch(1), {"train/loss": torch.tensor(1.0)}, 10, 1)
    scalars = {"train/loss": torch.tensor(2.0), "train/a": torch.tensor(torch.inf), "train/b": torch.tensor(torch.nan)}
    with pytest.raises(DivergedError, match=r"train/a: is inf at env step 20, in update 2, with train/b; .*diverged"):
        means.add(batch(7), scalars, 20, 2)
    found = load_state(tmp_path / "diverged.state")
    assert found["batch"]["observation"]["a"].tolist() == [7.0, 7.0]
    assert found["scalars"]["train/a"] == torch.inf


def test_means_of_large_finite_values_whose_sum_overflows_raise_nothing():
    means = Means()
    means.add(batch(0), {"train/a": torch.tensor(3e38), "train/b": torch.tensor(3e38)}, 0, 1)
    assert means.take()["train/a"] == pytest.approx(3e38)


class Later:
    """An event of a slow device, which has happened once it was waited for."""

    def query(self):
        return False

    def synchronize(self):
        pass


def test_means_from_a_slow_device_name_the_batch_of_the_update_that_went_wrong(tmp_path):
    """What is looked at late must not blame the batch of now."""
    means = Means(tmp_path / "diverged.state")
    means._unread = deque(
        (torch.tensor([value]), Later(), ("train/loss",), batch(number), number, number)
        for number, value in enumerate([1.0, torch.nan, 3.0])
    )
    with pytest.raises(DivergedError, match="train/loss: is nan at env step 1, in update 1"):
        means.settle()
    assert load_state(tmp_path / "diverged.state")["batch"]["reward"].tolist() == [1.0, 1.0]
