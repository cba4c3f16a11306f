"""The feed over a real loader with worker processes, onto a device whose copies come as late as they may."""

import itertools

import numpy as np
import pytest
import torch
from support.batches import assert_same
from support.slow_copies import slow_feeds

from rlfeed.feed import make_loader
from rlfeed.replay import Episode, Prioritized, ReplayBuffer, Transition
from rlfeed.specs import ArraySpec
from rlfeed.types import Batch, Step

on_slow = pytest.fixture(slow_feeds)
STEPS, LENGTH = 600, 9


def make_buffer(**options):
    """Step n: the observation and the reward are n."""
    spec, actions = ArraySpec((5,), np.dtype(np.float32)), ArraySpec((), np.dtype(np.int64))
    buffer = ReplayBuffer(spec, actions, capacity=2 * STEPS, **options)
    for n in range(STEPS):
        now, last = np.full((1, 5), n, np.float32), np.array([n % LENGTH == LENGTH - 1])
        first, no = np.array([n % LENGTH == 0]), np.array([False])
        buffer.add(Step(now, np.array([n % 4]), np.array([n], np.float32), now + 1, last, no, is_first=first))
    return buffer


def loader_of(buffer, unit, workers):
    loader = make_loader(buffer, unit, batch_size=16, num_workers=workers, seed=4)
    loader.multiprocessing_context = "fork" if workers else None
    return loader


@pytest.mark.parametrize("unit", [Transition(n_step=2), Episode()], ids=["transition", "episode"])
@pytest.mark.parametrize("schedule", ["lazy", "at once", "random 1"])
def test_feed_over_workers_gives_every_batch_right_and_no_slot_is_used_too_early(on_slow, monkeypatch, unit, schedule):
    """Feed traps T25, T27 and T35: slots suffice; those let go of are poisoned, and refilled at once."""
    monkeypatch.setenv("RLFEED_DEBUG", "1")
    buffer, count, depth = make_buffer(), 300, 3
    loader = loader_of(buffer, unit, 2)
    feed, engine = on_slow(loader, schedule, depth=depth)
    results, layouts, ids, leased = [], [], [], []
    with feed:
        for batch in itertools.islice(feed, count):
            block, layout = batch.block_and_layout()
            engine.read(block, results)
            layouts.append(layout)
            ids.append(batch.ids)
            slots = loader._making.gatherer.slots
            leased.append(sum(map(len, slots._leased)) - len(slots._returned))
            del batch, block
        stats = loader.stats()
        assert engine.locked == [(loader._making.gatherer.ring.address, stats.ring_bytes)]
    engine.synchronize()
    assert (stats.copies, stats.parcels) == (0, 0)
    assert max(leased) <= depth + 2
    assert engine.pinned.all == []  # nothing was copied on the way
    assert engine.released == [engine.locked[0][0]]  # at the end
    assert feed.stats().transfers == count + depth
    for content, layout, named, wanted in zip(results, layouts, ids, loader_of(buffer, unit, 0), strict=False):
        arrived = Batch.carve(torch.frombuffer(bytearray(content), dtype=torch.uint8), layout)
        assert_same(arrived, wanted)
        assert named.tolist() == wanted.ids.tolist()


def test_feed_priorities_from_a_slow_device_draw_the_same_batches_for_any_workers(on_slow):
    def ids(workers, schedule):
        buffer, found = make_buffer(sampler=Prioritized()), []
        feed, engine = on_slow(loader_of(buffer, Transition(), workers), schedule, depth=2)
        with feed:
            for n, batch in enumerate(itertools.islice(feed, 40)):
                values = engine.memory.like(batch.reward)
                engine.write(values, (torch.arange(16) + n) % 7 + 1.0)
                feed.update_priorities(batch, values)
                found.append(batch.ids.tolist())
        return found

    straight = ids(0, "at once")
    assert ids(0, "lazy") == straight
    assert ids(2, "lazy") == straight
    assert ids(2, "random 2") == straight


def test_feed_resumes_with_the_batch_that_the_consumer_did_not_have(on_slow):
    buffer = make_buffer()
    straight = [batch.ids.tolist() for batch in itertools.islice(loader_of(buffer, Transition(), 0), 12)]
    loader = loader_of(buffer, Transition(), 2)
    with on_slow(loader, "random 1", depth=3)[0] as feed:
        first = [next(feed).ids.tolist() for _ in range(5)]
        state = loader.state_dict()
        stats = loader.stats()
        assert stats.drawn == stats.delivered + stats.in_flight
        assert stats.delivered == 5 * 16
    resumed = loader_of(buffer, Transition(), 0)
    resumed.load_state_dict(state)
    rest = [batch.ids.tolist() for batch in itertools.islice(resumed, 7)]
    assert first + rest == straight


@pytest.mark.parametrize("workers", [0, 2])
def test_feed_after_another_one_goes_on_with_the_very_next_batch(on_slow, workers):
    """What the first had taken ahead was never handed over: I7."""
    buffer = make_buffer()
    wanted = [batch.ids.tolist() for batch in itertools.islice(loader_of(buffer, Transition(), 0), 12)]
    loader, seen = loader_of(buffer, Transition(), workers), []
    for count in (5, 7):
        feed, engine = on_slow(loader, "lazy", depth=3)
        seen += [next(feed).ids.tolist() for _ in range(count)]
        feed.close()
        stats = loader.stats()
        assert stats.drawn == stats.delivered + stats.in_flight + stats.discarded
        assert stats.delivered == 16 * len(seen)
        engine.synchronize()
    assert seen == wanted
    next(iter(loader))
    assert buffer.stats().delivered == 12 * 16 + 13 * 16
    loader.close()
