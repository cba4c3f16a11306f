"""Worker processes and their ring: leases, kills, errors; the same batches whatever happens."""

import gc
import itertools
import os
import signal
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from support.worker_loaders import add, buffer_of, expected, loader_of, numbers, pids

from rlfeed import errors
from rlfeed.feed import ring
from rlfeed.replay import Episode, Prioritized, Sequence

HANG_S = 60


# ---------------------------------------------------------------------------------------------------------- leases


def test_batch_is_intact_for_as_long_as_one_of_its_tensors_lives(monkeypatch):
    """Feed trap T25: freed slots are poisoned, so whatever is reused too early shows."""
    monkeypatch.setenv("RLFEED_DEBUG", "1")
    buffer = buffer_of()
    wanted = expected(buffer, 60)
    loader = loader_of(buffer)
    held = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, batch in zip(range(60), loader, strict=False):
            held[i] = batch.reward if i % 3 else batch.ids  # one tensor alone keeps the slot
            del batch
            if i % 5 == 0:
                held.pop(i)
            for number, tensor in held.items():
                assert tensor.tolist() == wanted[number][1 if number % 3 else 0]
    assert loader.stats().copies > 0
    loader.close()
    assert [tensor.tolist() for tensor in held.values()] == [wanted[n][1 if n % 3 else 0] for n in held]


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_loop_that_holds_one_batch_is_never_handed_a_copy(workers):
    loader = loader_of(buffer_of(), workers=workers)
    for _, batch in zip(range(50), loader, strict=False):
        total = (batch.observation * torch.ones(1, requires_grad=True)).sum()  # a graph that holds the batch
    assert total.requires_grad
    assert loader.stats().copies == 0
    loader.close()


def test_batches_in_reference_cycles_never_stop_the_loader():
    buffer = buffer_of()
    wanted, loader = expected(buffer, 40), loader_of(buffer, workers=1)

    def keep_all():
        for number, batch in zip(range(40), loader, strict=False):
            assert numbers(batch) == wanted[number]
            cycle = [batch]
            cycle.append(cycle)

    gc.disable()
    try:
        with pytest.warns(RuntimeWarning, match="the consumer is handed copies") as caught:
            keep_all()
        assert len(caught) == 1
        assert loader.stats().copies > 30
    finally:
        gc.enable()
    gc.collect()
    before = loader.stats().copies
    for batch in itertools.islice(loader, 20):
        assert len(batch) == 6
    assert loader.stats().copies == before
    loader.close()


def test_fork_of_the_learner_frees_no_slot_and_cannot_iterate(monkeypatch):
    """Feed trap T19: a child that drops its copy of a batch leaves the parent's alone."""
    monkeypatch.setenv("RLFEED_DEBUG", "1")
    buffer = buffer_of()
    wanted = expected(buffer, 20)
    batches = iter(loader_of(buffer, workers=1))
    held = next(batches)
    child = os.fork()
    if child == 0:
        del held
        gc.collect()
        try:
            next(batches)
        except errors.ConfigError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    for number in range(1, 20):
        assert numbers(next(batches)) == wanted[number]
        assert numbers(held) == wanted[0]


def test_slots_follow_from_workers_lookahead_and_feed_depth():
    assert ring.slots_for(1, 4, 0) == (8, 5)  # 5 under way, one held, one delivered, one kept aside
    assert ring.slots_for(2, 4, 2) == (6, 3)
    assert ring.slots_for(4, 4, 2) == (4, 2)


# ----------------------------------------------------------------------------------------------- exact, whatever dies


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_killed_workers_are_replaced_and_the_batches_stay_the_same(context):
    """Feed traps T15 and T16: the same draws on a buffer that grows, with priorities, while workers are killed."""

    def train(workers, kill):
        buffer = buffer_of(sampler=Prioritized())
        loader = loader_of(buffer, Sequence(3), workers, context, on_worker_death="restart")
        seen, generator = [], np.random.default_rng(3)
        for i, batch in zip(range(30), loader, strict=False):
            seen.append((*numbers(batch), batch.weights.tolist()))
            loader.update_priorities(batch, np.random.default_rng(i).uniform(0, 5, len(batch)))
            add(buffer, 60 + i, 61 + i)
            if kill and (i == 9 or (context != "spawn" and i % 7 == 3)):  # spawning takes seconds
                os.kill(int(generator.choice(pids(loader))), signal.SIGKILL)
        restarts = loader.stats().restarts
        loader.close()
        return seen, restarts

    seen, restarts = train(2, kill=True)
    assert restarts >= 1
    assert seen == train(0, kill=False)[0]


@pytest.mark.parametrize("off_main_thread", [False, True])
def test_killed_worker_is_a_typed_error_on_any_thread(off_main_thread):
    """Feed trap T15."""
    loader, caught = loader_of(buffer_of()), []

    def run():
        batches = iter(loader)
        next(batches)
        os.kill(pids(loader)[1], signal.SIGKILL)
        begin = time.monotonic()
        try:
            for _ in range(20):
                next(batches)
        except errors.WorkerError as error:
            caught.append((str(error), time.monotonic() - begin))
        caught.append(numbers(next(batches)))  # another worker goes on

    if off_main_thread:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(HANG_S)
    else:
        run()
    message, seconds = caught[0]
    assert "worker 1 was killed by SIGKILL before batch" in message
    assert "draws " in message
    assert seconds < 10
    wanted = expected(loader._mix.buffers[0], 30)
    assert caught[1] in wanted
    loader.close()


class Fails:
    """A transform that fails in the way it is told to, at one batch."""

    def __init__(self, how, at=3):
        self.how, self.at, self.calls = how, at, 0

    def __call__(self, batch):
        if batch.source is None and numbers(batch) == self.at:
            if self.how == "exit":
                sys.exit(0)
            if self.how == "stop":
                raise StopIteration
            if self.how == "lambda":
                return lambda: None
            if self.how == "memory":
                raise MemoryError("no room")
            if self.how == "odd":
                raise OddError("left", "right")
            raise KeyError("speed")
        return batch


class OddError(Exception):
    """Cannot be rebuilt from its arguments, and has an attribute that torch trips over."""

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")
        self.message = "a message"


@pytest.mark.parametrize(
    ("how", "message", "cause"),
    [
        ("key", r"KeyError: 'speed'", KeyError),
        ("odd", "OddError: left and right", type(None)),
        ("memory", "MemoryError: no room", MemoryError),
        ("lambda", "gave a function that cannot be sent", AttributeError),
        ("stop", "StopIteration", StopIteration),
        ("exit", "SystemExit: 0", SystemExit),
    ],
)
def test_failure_in_a_worker_names_worker_draws_and_traceback(how, message, cause):
    """Feed traps T9 to T12 and T28; the others' batches come all the same, and the next worker tries again."""
    buffer = buffer_of()
    wanted = expected(buffer, 10)
    loader = loader_of(buffer, transform=Fails(how, wanted[3]))
    batches = iter(loader)
    assert [numbers(next(batches)) for _ in range(3)] == wanted[:3]
    for _ in range(2):
        with pytest.raises(errors.WorkerError, match=message) as caught:
            next(batches)
        assert "worker 1, batch 3 (draws 18 .. 23)" in str(caught.value)
        assert "Traceback" in str(caught.value) or how in ("stop", "lambda")
        found = caught.value.__cause__
        assert isinstance(found, cause) or isinstance(found.__cause__, cause | type(None))
    loader.close()


def test_own_errors_of_a_worker_keep_their_type():
    buffer = buffer_of(length=5)
    loader = loader_of(buffer, Episode(max_length=6), batch_size=8)
    next(iter(loader))
    add(buffer, 60, 120, length=30)
    with pytest.raises(errors.ConfigError, match="max_length is 6") as caught:
        for _ in zip(range(50), loader, strict=False):
            pass
    assert "In worker" in caught.value.__notes__[0]
    loader.close()


def test_worker_that_dies_of_the_same_batch_again_and_again_ends_the_loop():
    def kills(batch):
        if numbers(batch) == wanted[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    buffer = buffer_of()
    wanted = expected(buffer, 5)
    # The learner calls it once, with the first batch.
    loader = loader_of(buffer, transform=kills, on_worker_death="restart")
    batches = iter(loader)
    next(batches), next(batches)
    with pytest.raises(errors.WorkerError, match="3 times in a row"):
        next(batches)
    loader.close()


def test_slow_worker_is_named_when_the_time_is_up():
    def sleeps(batch):
        if os.getpid() != learner:
            time.sleep(HANG_S)
        return batch

    learner = os.getpid()
    loader = loader_of(buffer_of(), transform=sleeps, timeout_s=0.5)
    with pytest.raises(errors.FeedTimeoutError, match=r"worker 0 to make batch 0 .*it has been transforming"):
        next(iter(loader))
    begin = time.monotonic()
    loader.close()  # feed trap T17: it does not wait for those who sleep
    assert time.monotonic() - begin < 10
