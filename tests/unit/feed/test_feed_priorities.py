"""Priorities that a learner on a device gives back: fetched beside its work, applied later."""

import numpy as np
import pytest
import torch
from support.slow_copies import Ring, make_batch, slow_feeds

from rlfeed import errors
from rlfeed.feed import DeviceFeed
from rlfeed.types import Batch

on_slow = pytest.fixture(slow_feeds)


class Prioritized(Ring):
    """A loader that takes priorities, at once or late."""

    def __init__(self, batches=8):
        super().__init__(batches)
        self.updates, self.late = [], []

    def update_priorities(self, batch, values):
        self.updates.append((batch, values))

    def update_late(self, batch, fetch):
        self.late.append((batch, fetch))


def test_feed_priorities_from_the_device_are_fetched_late_and_without_waiting(on_slow):
    loader = Prioritized()
    feed, engine = on_slow(loader, "lazy", depth=1)
    next(feed)
    values, source = engine.allocate(torch.empty(4)), engine.allocate(torch.empty(4, dtype=torch.int64))
    engine.write(values, torch.tensor([1.0, 2.0, 0.5, 4.0]))  # when the consumer comes to it
    engine.write(source, torch.tensor([0, 1, 1, 0]))
    batch = make_batch(value=5.0).map(lambda tensor: tensor)
    object.__setattr__(batch, "source", source)
    waits = engine.host_waits
    feed.update_priorities(batch, values)
    del values, source  # theirs is the consumer's stream: memory may go at once
    engine.allocate(torch.empty(4))
    engine.allocate(torch.empty(4, dtype=torch.int64))
    assert engine.host_waits == waits
    (view, fetch), updates = loader.late[0], loader.updates
    assert updates == []
    assert fetch().tolist() == [1.0, 2.0, 0.5, 4.0]
    assert view.source.tolist() == [0, 1, 1, 0]  # whole when the values are there
    assert view.ids.tolist() == [500, 501, 502, 503]
    assert view.loss_mask is None
    assert fetch().tolist() == [1.0, 2.0, 0.5, 4.0]


def test_feed_priorities_of_steps_bring_their_mask(on_slow):
    loader = Prioritized()
    feed, engine = on_slow(loader, "consumer first", depth=1)
    values, mask = engine.memory.like(torch.empty(2, 3)), engine.memory.like(torch.empty(2, 3, dtype=torch.bool))
    values.fill_(2.0)
    mask.copy_(torch.tensor([[True, True, False], [False, True, True]]))
    flags = torch.zeros(2, 3, dtype=torch.bool)
    batch = Batch(
        observation=torch.zeros(2), action=torch.zeros(2), reward=torch.zeros(2, 3), terminated=flags, truncated=flags,
        loss_mask=mask, ids=torch.arange(2),
    )  # fmt: skip
    feed.update_priorities(batch, values)
    view, fetch = loader.late[0]
    assert fetch().tolist() == [[2.0] * 3] * 2
    assert view.loss_mask.tolist() == [[True, True, False], [False, True, True]]
    assert not engine.holds(view.loss_mask)


def test_feed_priorities_of_half_precision_become_float(on_slow):
    loader = Prioritized()
    feed, engine = on_slow(loader, "consumer first", depth=1)
    values = engine.memory.like(torch.empty(4, dtype=torch.bfloat16)).fill_(0.5)
    engine.holds = lambda tensor: True
    feed.update_priorities(make_batch(), values)
    fetched = loader.late[0][1]()
    assert (fetched.dtype, fetched.tolist()) == (np.float32, [0.5] * 4)


@pytest.mark.parametrize("values", [torch.ones(4), np.ones(4)], ids=["tensor", "array"])
def test_feed_priorities_from_the_cpu_are_given_at_once(on_slow, values):
    loader = Prioritized()
    feed, _ = on_slow(loader, depth=1)
    batch = make_batch()
    feed.update_priorities(batch, values)
    assert loader.updates == [(batch, values)]
    assert loader.late == []


def test_feed_priorities_for_a_loader_that_takes_none_late_are_given_at_once(on_slow):
    class Simple(Ring):
        def update_priorities(self, batch, values):
            given.append(values)

    given = []
    feed, engine = on_slow(Simple(3), depth=1)
    values = engine.memory.like(torch.empty(4)).fill_(1.0)
    feed.update_priorities(make_batch(), values)
    assert given[0] is values


def test_feed_priorities_without_a_replay_loader_are_refused():
    feed = DeviceFeed([torch.zeros(1)], "cpu")
    with pytest.raises(errors.UnsupportedError, match="the loader is a list"):
        feed.update_priorities(next(feed), torch.zeros(1))


@pytest.mark.parametrize("shape", [(3,), (5, 4), ()], ids=str)
def test_feed_priorities_of_another_shape_are_refused_at_once(on_slow, shape):
    loader = Prioritized()
    feed, engine = on_slow(loader, depth=1)
    values = engine.memory.like(torch.empty(shape))
    with pytest.raises(errors.FieldError, match=r"ids \(4,\); expected one per sample"):
        feed.update_priorities(make_batch(), values)
    assert loader.late == []
