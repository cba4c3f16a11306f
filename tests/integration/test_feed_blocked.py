"""Feeds that wait, are used from elsewhere, or run into limits: what they say, and that they go on."""

import gc
import itertools
import multiprocessing
import os
import resource
import signal
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from support.worker_loaders import add, buffer_of, loader_of, numbers, take

from rlfeed import errors
from rlfeed.feed import make_loader
from rlfeed.replay import Limiter, Prioritized, Transition

HANG_S = 60


def in_child(call, *args):
    """Call in a forked process, which is no daemon; its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = call(*args)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_empty_buffer_is_an_error_at_once_where_nobody_else_writes():
    buffer = buffer_of(rows=0)
    loader = loader_of(buffer, timeout_s=0.5)
    with pytest.raises(errors.NotEnoughDataError):
        next(iter(loader))


@pytest.mark.parametrize("workers", [0, 2])
def test_empty_buffer_that_somebody_else_writes_is_waited_for_by_name(workers):
    buffer = buffer_of(rows=0)
    writer = buffer.writer([0, 1])
    batches = iter(loader_of(buffer, workers=workers, timeout_s=0.5))
    with pytest.raises(errors.FeedTimeoutError, match=r"waited 0.5 s for writers.*holds 0 steps.*at least one step"):
        next(batches)
    add(writer, 0, 10)
    assert len(next(batches)) == 6


def test_two_loaders_on_one_buffer_each_give_their_own_stream():
    buffer = buffer_of()
    wanted = take(loader_of(buffer, workers=0), 12), take(loader_of(buffer, workers=0, seed=6), 12)
    with loader_of(buffer) as one, loader_of(buffer, seed=6) as other:
        pairs = [(numbers(a), numbers(b)) for a, b in itertools.islice(zip(one, other, strict=True), 12)]
    assert tuple(map(list, zip(*pairs, strict=True))) == wanted


def test_loader_that_was_closed_begins_again_where_it_was():
    buffer = buffer_of()
    wanted = take(loader_of(buffer, workers=0), 12)
    loader = loader_of(buffer)
    seen = take(loader, 5)
    for _ in range(2):
        loader.close()
    seen += take(loader, 7)
    loader.close()
    assert seen == wanted


def test_workers_outlive_the_thread_that_started_them():
    buffer = buffer_of()
    wanted, seen = take(loader_of(buffer, workers=0), 30), []
    loader = loader_of(buffer)
    thread = threading.Thread(target=lambda: seen.extend(take(loader, 6)))
    thread.start()
    thread.join(HANG_S)
    time.sleep(0.2)  # for the kernel to tell whoever it thinks must die
    seen += take(loader, 24)
    assert seen == wanted
    assert loader.stats().restarts == 0
    loader.close()


def test_daemonic_process_gathers_in_a_thread_with_one_warning():
    """Feed trap T29."""
    buffer = buffer_of()
    wanted = take(loader_of(buffer, workers=0), 8)

    def learn():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            seen = take(loader_of(buffer), 8)
        os._exit(10 * (seen == wanted) + len(caught))

    process = multiprocessing.get_context("fork").Process(target=learn, daemon=True)
    process.start()
    process.join(HANG_S)
    assert process.exitcode == 11


def test_transform_may_start_a_thread():
    def threaded(batch):
        thread = threading.Thread(target=lambda: batch.reward.add_(1))
        thread.start()
        thread.join()
        threading.Thread(target=time.sleep, args=(HANG_S,)).start()  # never joined: it keeps no worker alive
        return batch

    buffer = buffer_of()
    wanted = [(ids, [reward + 1 for reward in rewards]) for ids, rewards in take(loader_of(buffer, workers=0), 6)]
    learner = os.getpid()
    loader = loader_of(buffer, transform=lambda batch: threaded(batch) if os.getpid() != learner else batch)
    assert take(loader, 6) == wanted
    begin = time.monotonic()
    loader.close()
    assert time.monotonic() - begin < 10


def test_loader_closed_by_another_thread_ends_the_wait_with_a_typed_error():
    learner, caught = os.getpid(), []

    def sleeps(batch):
        if os.getpid() != learner:
            time.sleep(HANG_S)
        return batch

    loader = loader_of(buffer_of(), transform=sleeps, timeout_s=20.0)

    def wait():
        try:
            next(iter(loader))
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.5)
    loader.close()
    thread.join(HANG_S)
    assert not thread.is_alive()
    assert [type(error) for error in caught] == [errors.ConfigError], caught


@pytest.mark.filterwarnings("ignore:make_loader. more than")
def test_batches_that_are_held_cost_no_descriptors():
    """Feed trap T14: 40 descriptors beside those that other tests left open, a thousand batches held."""

    def learn():
        most = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 40
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        held = list(itertools.islice(loader_of(buffer_of()), 1000))
        return 7 if len({batch.ids.data_ptr() for batch in held}) == 1000 else 8

    assert in_child(learn) == 7


def test_address_space_that_does_not_hold_the_ring_is_a_typed_error():
    def learn():
        buffer = buffer_of()
        loader = make_loader(buffer, Transition(), batch_size=500_000, num_workers=2)
        loader.multiprocessing_context = "fork"
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000,) * 2)
        try:
            next(iter(loader))
        except (errors.CapacityError, MemoryError):
            return 7
        return 8

    assert in_child(learn) == 7


class Noise:
    """A transform that takes its time and uses random numbers."""

    def __init__(self, cost_s):
        self.cost_s = cost_s

    def __call__(self, batch):
        time.sleep(self.cost_s)
        batch.reward.add_(float(np.random.rand()))  # noqa: NPY002
        return batch


def test_auto_gives_the_batches_of_no_workers():
    def train(workers, cost_s):
        buffer, seen = buffer_of(sampler=Prioritized()), []
        loader = loader_of(buffer, workers=workers, transform=Noise(cost_s))
        for i, batch in enumerate(itertools.islice(loader, 20)):
            seen.append(numbers(batch))
            loader.update_priorities(batch, np.random.default_rng(i).uniform(0, 5, len(batch)))
            add(buffer, 60 + i, 61 + i)
        loader.close()
        return seen, loader.num_workers, loader.choice

    wanted = train(0, 0)[0]
    seen, workers, choice = train("auto", 0)
    assert (seen, workers) == (wanted, 0)
    assert "thread" in choice
    seen, workers, choice = train("auto", 0.005)
    assert seen == wanted
    assert "auto: a batch takes" in choice
    assert workers > 0 or "one processor" in choice


def test_worker_that_dies_while_a_writer_waits_for_it_is_replaced():
    """The ring of rows is full and turns over five times a batch."""

    def train(workers, kill):
        buffer, seen = buffer_of(capacity=60, rows=40), []
        loader = loader_of(buffer, workers=workers, transform=slow, on_worker_death="restart")
        for i, batch in enumerate(itertools.islice(loader, 25)):
            seen.append(numbers(batch))
            if kill and i % 5 == 2:
                os.kill(loader._making.gatherer._processes[i % workers].pid, signal.SIGKILL)
            add(buffer, 40 + 20 * i, 60 + 20 * i)
        loader.close()
        return seen

    def slow(batch):
        time.sleep(0.002)
        return batch

    assert train(2, kill=True) == train(0, kill=False)


@pytest.mark.parametrize("limited", [False, True])
def test_thread_that_writes_and_thread_that_learns_never_wait_for_each_other(limited):
    buffer = buffer_of(capacity=60, rows=40)
    limiter = Limiter(samples_per_insert=2.0, min_size=10, tolerance=500.0) if limited else None
    loader, stop, wrong = loader_of(buffer, limiter=limiter, timeout_s=20.0), threading.Event(), []

    def write():
        i = 40
        try:
            while not stop.is_set():
                add(buffer, i, i + 5)
                i += 5
        except BaseException as error:
            wrong.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    batches = iter(loader)
    for _ in range(300):
        while True:
            try:
                batch = next(batches)
                break
            except errors.NotEnoughDataError:  # the limiter does not know of threads
                time.sleep(0.001)
        assert all(reward < 1e9 for reward in batch.reward.tolist())
    stop.set()
    writer.join(HANG_S)
    assert not writer.is_alive()
    assert wrong == []
    loader.close()
    gc.collect()


def test_auto_with_a_transform_that_cannot_be_sent_stays_in_this_process():
    def local(batch):
        time.sleep(0.005)
        return batch

    loader = loader_of(buffer_of(), workers="auto", transform=local)
    assert len(next(iter(loader))) == 6
    assert loader.num_workers == 0
    assert "thread" in loader.choice
    loader.close()
