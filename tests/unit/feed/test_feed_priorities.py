"""Priorities that a learner on a device gives back: fetched beside its work, applied later."""

import dataclasses

import numpy as np
import pytest
import torch
from support.slow_copies import Ring, make_batch, slow_feeds

from rlfeed import errors
from rlfeed.feed import DeviceFeed
from rlfeed.layout import Layout, Slot
from rlfeed.types import Batch

on_slow = pytest.fixture(slow_feeds)


class Prioritized(Ring):
    """A loader that takes priorities, at once or late."""

    def __init__(self, batches=8, **options):
        super().__init__(batches, **options)
        self.updates, self.late = [], []

    def update_priorities(self, batch, values):
        self.updates.append((batch, values))

    def update_late(self, batch, fetch):
        self.late.append((batch, fetch))


def test_feed_priorities_from_the_device_are_fetched_late_and_without_waiting(on_slow):
    loader = Prioritized()
    feed, engine = on_slow(loader, "lazy", depth=1)
    next(feed)
    batch, values = make_batch(value=5.0), engine.allocate(torch.empty(4))
    engine.write(values, torch.tensor([1.0, 2.0, 0.5, 4.0]))  # when the consumer comes to it
    waits = engine.host_waits
    feed.update_priorities(batch, values)
    del values  # its stream is the consumer's: its memory may go to the next one at once
    engine.allocate(torch.empty(4))
    assert engine.host_waits == waits
    (given, fetch), updates = loader.late[0], loader.updates
    assert (given, updates) == (batch, [])
    for _ in range(2):
        assert fetch().tolist() == [1.0, 2.0, 0.5, 4.0]


class Sequences(Prioritized):
    """Batches of windows, of several buffers, in slots."""

    def wrap(self, block):
        shapes = [("reward", torch.float32, (2, 3)), ("loss_mask", torch.bool, (2, 3))]
        shapes += [(name, torch.int64, (2,)) for name in ("source", "ids")]
        layout = Layout(
            tuple(Slot(name, (), dtype, shape, 64 * n) for n, (name, dtype, shape) in enumerate(shapes)), 256
        )
        batch = Batch.carve(block, layout)
        batch.loss_mask.copy_(torch.tensor([[True, True, False], [False, True, True]]))
        batch.source.copy_(torch.tensor([1, 0]))
        batch.ids.copy_(torch.tensor([self.number, -self.number]))
        return batch


@pytest.mark.parametrize("late", [True, False])
def test_feed_priorities_of_steps_find_their_mask_and_buffer_on_the_cpu(on_slow, late):
    """The loader looks at them when it is told of the priorities: on the device it would have to wait for them."""
    loader = Sequences(nbytes=256)
    feed, engine = on_slow(loader, "lazy", depth=1)
    batches = [next(feed), next(feed)]
    values = engine.memory.like(torch.empty(2, 3))
    for batch in reversed(batches):
        feed.update_priorities(batch, values if late else torch.ones(2, 3))
    names = [given for given, _ in (loader.late if late else loader.updates)]
    assert [given.ids.tolist() for given in names] == [[2, -2], [1, -1]]
    assert all(given.loss_mask.tolist() == [[True, True, False], [False, True, True]] for given in names)
    assert all(given.source.tolist() == [1, 0] for given in names)
    assert loader.most <= 3  # they hold no slot
    assert len(feed._names) == 2
    del batches, batch
    assert len(feed._names) == 0


def test_feed_priorities_of_a_batch_that_was_changed_go_with_it(on_slow):
    loader = Sequences(nbytes=256)
    feed, engine = on_slow(loader, "at once", depth=1)
    flags = torch.zeros(2, 3, dtype=torch.bool)
    changed = dataclasses.replace(next(feed), terminated=flags, truncated=flags)
    feed.update_priorities(changed, engine.memory.like(torch.empty(2, 3)))
    assert loader.late[0][0] is changed


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
