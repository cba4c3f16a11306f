"""The device feed's order of things, on a device in host memory whose streams work when a schedule lets them."""

import collections
import dataclasses
import gc
import threading

import numpy as np
import pytest
import torch
from support.slow_copies import NBYTES, PITCH, SCHEDULES, BatchRing, Ring, SlowCopies, expected, make_batch, slow_feeds

from rlfeed import errors
from rlfeed.feed import DeviceFeed
from rlfeed.feed.device import choose_device
from rlfeed.feed.engines import DirectEngine
from rlfeed.types import Batch

on_slow = pytest.fixture(slow_feeds)


# Order and memory.


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("registers", [True, False])
def test_feed_whatever_the_streams_do_first_every_batch_is_right(on_slow, schedule, depth, static, registers):
    """Feed traps T35 and T36: sources are overwritten when let go of, blocks by their next owner, at any time."""
    ring = Ring(120)
    feed, engine = on_slow(ring, schedule, registers=registers, depth=depth, static_buffers=static)
    results = []
    for batch in feed:
        engine.read(batch, results)
        del batch  # at once: its memory is the next one's
    engine.synchronize()
    assert results == expected(120)
    assert engine.inside == 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("depth", [1, 3])
def test_feed_holds_at_most_depth_plus_two_sources(on_slow, schedule, depth):
    """A ring with so many slots for the feed never runs short, however late the copies are."""
    ring = Ring(100)
    feed, engine = on_slow(ring, schedule, depth=depth)
    for batch in feed:
        engine.read(batch, [])
    assert ring.attached == [depth]
    assert ring.most <= depth + 2
    if schedule == "lazy":
        assert ring.most == depth + 2  # it does not wait earlier than it must


def test_feed_source_is_let_go_of_before_the_next_one_is_asked_for(on_slow):
    held = []

    class Watched(Ring):
        def __next__(self):
            held.append(self.pool.taken)
            return super().__next__()

    feed, _ = on_slow(Watched(10), "at once", depth=1)
    list(feed)
    assert max(held) == 0  # every copy was over by then


def test_feed_copies_of_the_next_batches_are_over_before_they_are_asked_for(on_slow):
    feed, engine = on_slow(Ring(20), "at once", depth=2)
    for n, batch in zip(range(10), feed, strict=False):
        stats = feed.stats()
        assert (stats.delivered, stats.in_flight, stats.transfers) == (n + 1, 2, n + 3)
        assert [engine.is_over(event) for _, _, event in feed._transfers._ready] == [True, True]
        engine.read(batch, [])
    assert engine.host_waits == 0


def test_feed_consumer_far_behind_is_waited_for_rather_than_run_away_from(on_slow):
    feed, engine = on_slow(Ring(50), "lazy", depth=2)
    list(feed)
    assert engine.host_waits > 40  # each time for the oldest copy alone
    assert engine.current.finished < len(engine.current.queue)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_feed_that_is_dropped_lets_its_copies_end_first(on_slow, schedule):
    """The batch that was handed over is still being copied, and memory of those that were not goes to others."""
    ring, results = Ring(20), []
    feed, engine = on_slow(ring, schedule, depth=2)
    batch = next(feed)
    del feed
    gc.collect()
    assert ring.pool.taken == 0
    others = [engine.memory.take(64) for _ in range(8)]
    for n, other in enumerate(others):
        other[:] = 200 + n
    engine.read(batch, results)
    engine.synchronize()
    assert results == expected(1)
    assert [set(other.tolist()) for other in others] == [{200 + n} for n in range(8)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_feed_of_batches_gives_fields_in_one_transfer_and_ids_of_their_own(on_slow, schedule):
    ring = BatchRing(40)
    feed, engine = on_slow(ring, schedule, depth=2)
    rewards, ids = [], []
    for batch in feed:
        assert isinstance(batch, Batch)
        engine.read(batch.reward, rewards)
        engine.read(batch.observation["x"], [])
        ids.append(batch.ids)  # kept: they hold no slot
    engine.synchronize()
    assert [np.frombuffer(reward, np.float32).tolist() for reward in rewards] == [[float(n)] * 4 for n in range(40)]
    assert [part.tolist() for part in ids] == [[100 * n + row for row in range(4)] for n in range(40)]
    assert ring.most <= 4
    assert (feed.stats().transfers, feed.stats().copied_bytes) == (40, 40 * NBYTES)
    assert feed.stats().bytes_per_transfer == NBYTES


@pytest.mark.parametrize("static", [False, True])
def test_feed_batch_that_was_taken_apart_crosses_in_one_transfer_too(on_slow, static):
    loose = make_batch(value=3.0).map(lambda tensor: tensor.clone())
    feed, engine = on_slow([loose], "at once", depth=1, static_buffers=static)
    results = []
    batch = next(feed)
    engine.read(batch.reward, results)
    engine.synchronize()
    assert np.frombuffer(results[0], np.float32).tolist() == [3.0] * 4
    assert batch.ids.tolist() == [300, 301, 302, 303]
    assert not engine.holds(batch.ids)
    assert feed.stats().transfers == 1


def test_feed_what_lies_on_the_device_already_is_not_copied(on_slow):
    """A replay with storage="cuda" gathers there."""
    engine_memory = SlowCopies()
    block = engine_memory.memory.like(torch.empty(NBYTES, dtype=torch.uint8))
    feed, engine = on_slow([make_batch(block), block], depth=1)
    engine.memory = engine_memory.memory
    batch, plain = list(feed)
    assert batch.reward.data_ptr() == block.data_ptr() + PITCH
    assert plain is block
    assert feed.stats().transfers == 0


def test_feed_copies_without_a_thread_of_its_own(on_slow):
    """Feed trap T37: one that pins would hold the interpreter while the learner launches its work."""
    before = threading.enumerate()
    feed, _ = on_slow(Ring(9), "at once", depth=2)
    next(feed)
    assert threading.enumerate() == before


# Static buffers.


@pytest.mark.parametrize("depth", [1, 2])
def test_static_buffers_addresses_come_again_after_depth_plus_one(on_slow, depth):
    feed, _ = on_slow(BatchRing(12), "at once", depth=depth, static_buffers=True)
    places = [batch.observation["x"].data_ptr() for batch in feed]
    assert len(set(places)) == depth + 1
    assert places == (places[: depth + 1] * 12)[:12]


def test_static_buffers_batch_is_valid_until_the_next_call(on_slow):
    results, kept = [], []
    feed, engine = on_slow(Ring(9), "at once", depth=2, static_buffers=True)
    for batch in feed:
        engine.read(batch, results)
        kept.append(batch)
    engine.synchronize()
    assert results == expected(9)
    late = [bytes(batch.numpy()) for batch in kept]
    assert late == expected(9)[6:] * 3  # later ones lie there now


def test_static_buffers_on_cpu_are_one_place():
    feed = DeviceFeed([torch.full((3,), n) for n in range(4)], "cpu", static_buffers=True)
    seen = [(batch.data_ptr(), batch.tolist()) for batch in feed]
    assert [values for _, values in seen] == [[n] * 3 for n in range(4)]
    assert len({address for address, _ in seen}) == 1


def test_static_buffers_other_shape_is_refused_and_asked_for_again(on_slow):
    feed, _ = on_slow([make_batch(), make_batch(rows=5)], depth=1, static_buffers=True)
    next(feed)
    for _ in range(2):  # it is not dropped
        with pytest.raises(
            errors.FieldError,
            match=r'observation\["x"\] is torch.float32 \(5, 3\) and was torch.float32 \(4, 3\).*pad_to_multiple_of',
        ):
            next(feed)
    assert feed.stats().in_flight == 1


def test_static_buffers_more_tensors_are_refused(on_slow):
    feed, _ = on_slow([[torch.ones(2)], [torch.ones(2), torch.ones(2)]], depth=1, static_buffers=True)
    next(feed)
    with pytest.raises(errors.FieldError, match="a batch has 2 tensors and the first one 1"):
        next(feed)


# What a loader may be and do.

Pair = collections.namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass(frozen=True)
class Record:
    values: torch.Tensor
    name: str


def test_feed_takes_any_containers_and_leaves_the_rest_alone(on_slow):
    ordered = collections.OrderedDict(a=torch.ones(2), b="text")
    default = collections.defaultdict(list, c=torch.full((2,), 2.0))
    number, array = 7, np.arange(3)
    value = [ordered, default, Pair(torch.full((2,), 3.0), None), Record(torch.full((2,), 4.0), "r"), (number, array)]
    feed, engine = on_slow([value], "at once", depth=1)
    moved = next(feed)
    engine.synchronize()
    assert [type(part) for part in moved] == [collections.OrderedDict, collections.defaultdict, Pair, Record, tuple]
    tensors = [moved[0]["a"], moved[1]["c"], moved[2].left, moved[3].values]
    assert [tensor.tolist() for tensor in tensors] == [[n, n] for n in (1.0, 2.0, 3.0, 4.0)]
    assert all(engine.holds(tensor) for tensor in tensors)
    assert (moved[0]["b"], moved[2].right, moved[3].name, moved[4][0]) == ("text", None, "r", 7)
    assert moved[4][1] is array
    assert value[0]["a"].data_ptr() != moved[0]["a"].data_ptr()  # the loader's own containers are as they were


def test_feed_object_that_moves_itself_is_left_to_it(on_slow):
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    feed, _ = on_slow([packed], depth=1)
    assert isinstance(next(feed), torch.nn.utils.rnn.PackedSequence)


def test_feed_none_and_empty_tensors_are_batches_too(on_slow):
    feed, _ = on_slow([None, torch.empty(0), {}], depth=1)
    first, second, third = feed
    assert first is None
    assert second.shape == (0,)
    assert third == {}


def test_feed_strided_source_is_made_dense_before_it_crosses(on_slow):
    feed, engine = on_slow([torch.arange(12).reshape(3, 4)[:, ::2]], "at once", depth=1)
    batch = next(feed)
    engine.synchronize()
    assert batch.tolist() == [[0, 2], [4, 6], [8, 10]]


def test_feed_goes_on_where_it_stopped():
    feed = DeviceFeed([torch.tensor(n) for n in range(4)], "cpu")
    assert next(iter(feed)).item() == 0
    assert [batch.item() for batch in feed] == [1, 2, 3]
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(feed)


def test_feed_on_cpu_reads_nothing_ahead_and_copies_nothing():
    asked = []

    class Loader:
        def attach(self, **how):
            asked.append(how)

        def __iter__(self):
            for n in range(10):
                asked.append(n)
                yield tensors[n]

    tensors = [torch.tensor(n) for n in range(10)]
    feed = DeviceFeed(Loader(), "cpu", depth=4)
    assert asked == []  # nothing begins before the first batch is asked for
    assert next(feed) is tensors[0]
    assert asked == [{"depth": 0, "register": None}, 0]
    stats = feed.stats()
    assert (stats.delivered, stats.in_flight, stats.transfers, stats.bytes_per_transfer) == (1, 0, 0, 0.0)
    assert stats.wait_s > 0


def test_feed_on_cpu_hands_over_the_batch_itself():
    batch = make_batch(value=2.0)
    assert next(DeviceFeed([batch], "cpu")) is batch


def test_feed_without_streams_copies_at_once():
    engine = DirectEngine(torch.device("meta"))
    target = engine.allocate(torch.ones(2, 3))
    assert (target.device.type, target.shape) == ("meta", (2, 3))
    assert not engine.holds(torch.ones(2))
    assert engine.is_over(engine.record(engine.side))


# Errors, ends.


class Failing:
    """Batches 0, 1, ... with errors in between, as an iterator that goes on after them."""

    def __init__(self, *items):
        self.items, self.at = items, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == len(self.items):
            raise StopIteration
        self.at += 1
        item = self.items[self.at - 1]
        if isinstance(item, Exception):
            raise item
        return torch.tensor([item])


def test_feed_error_of_the_loader_comes_after_the_batches_before_it(on_slow):
    feed, _ = on_slow(Failing(0, 1, 2, RuntimeError("worker 0 died"), 3, 4), "at once", depth=2)
    assert [next(feed).item() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="worker 0 died"):
        next(feed)
    assert [batch.item() for batch in feed] == [3, 4]


def test_feed_loader_without_enough_data_is_asked_again_not_blamed_later(on_slow):
    """The caller may be the one who writes: what lacked when the feed read ahead may be there at the next call."""
    feed, _ = on_slow(Failing(0, errors.NotEnoughDataError("collect 3 steps"), 1), "at once", depth=2)
    assert [batch.item() for batch in feed] == [0, 1]


def test_feed_error_at_the_first_batch_is_raised_and_the_feed_lives(on_slow):
    feed, _ = on_slow(Failing(errors.NotEnoughDataError("empty"), 0), "at once", depth=1)
    with pytest.raises(errors.NotEnoughDataError):
        next(feed)
    assert next(feed).item() == 0


@pytest.mark.parametrize("static", [False, True])
def test_feed_out_of_memory_loses_no_batch(on_slow, static):
    feed, engine = on_slow(Ring(8), "at once", depth=2, static_buffers=static)
    stage, results, failures = engine.stage, [], iter([1, 0, 0, 1, 1, 0, 0, 1])

    def short_of_memory(tensor):
        if next(failures, 0):
            raise MemoryError("no room")
        return stage(tensor)

    engine.stage = short_of_memory
    with pytest.raises(MemoryError):
        next(feed)
    assert feed.stats().in_flight == 1  # a failure later on comes after the batches before it
    while len(results) < 8:
        try:
            engine.read(next(feed), results)
        except MemoryError:
            assert feed.stats().in_flight == 1
    engine.synchronize()
    assert results == expected(8)
    assert list(feed) == []


def test_feed_loader_knows_what_was_taken_ahead(on_slow):
    ring = Ring(6)
    feed, _ = on_slow(ring, "at once", depth=2)
    ahead = []
    for _ in feed:
        ahead.append(ring.batches_ahead)
    assert ahead == [2, 2, 2, 2, 1, 0]


def test_feed_closed_waits_for_its_copies_closes_the_loader_and_ends(on_slow):
    class Closing(Ring):
        def close(self):
            closed.append((self.pool.taken, self.batches_ahead))

    closed, results, ring = [], [], Closing(9)
    with on_slow(ring, "lazy", depth=2)[0] as feed:
        batch, engine = next(feed), feed._engine
    assert closed == [(0, 2)]  # no slot is out any more; what was not handed over is told
    engine.read(batch, results)
    engine.synchronize()
    assert results == expected(1)
    with pytest.raises(StopIteration):
        next(feed)
    assert feed.stats().in_flight == 0


# Devices.


@pytest.mark.parametrize("name", ["warp", "cuda:x"])
def test_choose_device_nonsense_is_refused(name):
    with pytest.raises(errors.DeviceError, match="expected 'auto'"):
        choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_choose_device_cuda_where_there_is_none_says_so():
    with pytest.raises(errors.DeviceError, match=r"is 'cuda', but torch finds .* here"):
        choose_device("cuda")


def test_choose_device_auto_says_why():
    chosen, reason = choose_device("auto")
    assert (chosen.type == "cpu") == ("no accelerator" in reason)
    feed = DeviceFeed([])
    assert (feed.device, feed.reason) == (chosen, reason)


def test_feed_wrong_depth_is_refused():
    with pytest.raises(errors.ConfigError, match="depth is 0; expected at least 1"):
        DeviceFeed([], "cpu", depth=0)
