"""Worker processes and their ring: leases, kills, errors, limits; the same batches whatever happens."""

import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from support.start_method import start_method

from rlfeed import errors
from rlfeed.feed import gatherers, make_loader, ring
from rlfeed.feed.workers import Workers
from rlfeed.replay import Episode, Prioritized, ReplayBuffer, Sequence, Transition
from rlfeed.types import Batch, Step

HANG_S = 60


def buffer_of(capacity=400, rows=60, length=7, **kwargs):
    buffer = ReplayBuffer(Box(-np.inf, np.inf, (1,), np.float32), Discrete(9), capacity=capacity, num_envs=2, **kwargs)
    add(buffer, 0, rows, length)
    return buffer


def add(buffer, begin, end, length=7):
    """Steps whose observation and reward are their number."""

    def column(value, dtype):
        return np.full(2, value, dtype)

    for i in range(begin, end):
        observation = np.full((2, 1), i, np.float32)
        buffer.add(
            Step(
                observation, column(i % 9, np.int64), column(i, np.float32), observation + 1,
                column(i % length == length - 1, bool), column(False, bool), is_first=column(i % length == 0, bool),
            )
        )  # fmt: skip


def loader_of(buffer, unit=Transition(), workers=2, context="fork", batch_size=6, **kwargs):  # noqa: B008
    loader = make_loader(buffer, unit, batch_size=batch_size, num_workers=workers, seed=5, **kwargs)
    if workers:
        loader.multiprocessing_context = context
    return loader


def numbers(batch):
    return batch.ids.tolist(), batch.reward.tolist()


def expected(buffer, count, unit=Transition(), **kwargs):  # noqa: B008
    batches = iter(loader_of(buffer, unit, workers=0, **kwargs))
    return [numbers(next(batches)) for _ in range(count)]


def pids(loader):
    return [process.pid for process in loader._making.gatherer._processes]


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
            held[i] = (batch.reward if i % 3 else batch.ids)  # one tensor alone keeps the slot
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


# ------------------------------------------------------------------------------------------------ writers and readers


def test_writer_waits_before_it_overwrites_what_is_drawn_and_not_gathered():
    """Rows of a small lane turn over many times; a redraw would show as another batch."""

    def slow(batch):
        time.sleep(0.002)
        return batch

    def train(workers):
        buffer = buffer_of(capacity=60, rows=40)
        seen = []
        loader = loader_of(buffer, Transition(n_step=2), workers, transform=slow)
        for i, batch in zip(range(40), loader, strict=False):
            seen.append(numbers(batch))
            add(buffer, 40 + 5 * i, 45 + 5 * i)
        loader.close()
        return seen

    assert train(2) == train(1) == train(0)


def test_transform_with_random_numbers_gives_the_same_for_any_worker_count_and_leaves_the_state_alone():
    """Feed traps T4 and T6."""

    def noise(batch):
        drawn = torch.rand(1).item() + np.random.rand() + __import__("random").random()  # noqa: NPY002
        return Batch(**{**vars_of(batch), "reward": batch.reward + drawn})

    buffer = buffer_of()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    seen = []
    for workers in (0, 1, 3):
        loader = loader_of(buffer, transform=noise, workers=workers)
        seen.append([numbers(batch) for _, batch in zip(range(8), loader, strict=False)])
        loader.close()
    assert seen[0] == seen[1] == seen[2]
    assert len({tuple(rewards) for _, rewards in seen[0]}) == 8
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002


def vars_of(batch):
    names = ("observation", "action", "reward", "terminated", "truncated", "ids")
    return {name: getattr(batch, name) for name in names}


def test_transform_may_give_anything_that_can_be_pickled():
    buffer = buffer_of()
    wanted = expected(buffer, 10)
    loader = loader_of(buffer, transform=lambda batch: {"sum": float(batch.reward.sum())})
    batches = iter(loader)
    with pytest.warns(RuntimeWarning, match="a batch comes by pipe"):
        seen = [next(batches)["sum"] for _ in range(10)]
    assert seen == [sum(rewards) for _, rewards in wanted]
    assert loader.stats().parcels == 10
    loader.close()


def test_transform_that_makes_batches_larger_gets_slots_of_that_size():
    buffer = buffer_of()

    def widen(batch):
        return Batch(**{**vars_of(batch), "observation": batch.observation.expand(-1, 5000).clone()})

    loader = loader_of(buffer, transform=widen)
    for number, batch in zip(range(6), loader, strict=False):
        assert (batch.observation == batch.reward[:, None]).all()
        assert batch.observation.shape == (6, 5000), number
    assert (loader.stats().parcels, loader.stats().copies) == (0, 0)
    loader.close()


def test_whole_episodes_that_outgrow_their_slots_come_by_pipe():
    buffer = buffer_of(capacity=4000, length=5)
    loader = loader_of(buffer, Episode(), batch_size=4)
    next(iter(loader))
    add(buffer, 600, 1200, length=600)
    batches = iter(loader)

    def check():
        for _ in range(60):
            batch = next(batches)
            assert (batch.reward[batch.mask] == batch.observation[:, :-1, 0][batch.mask]).all()

    with pytest.warns(RuntimeWarning, match="comes by pipe"):
        check()
    assert loader.stats().parcels > 0
    loader.close()


# ------------------------------------------------------------------------------------------------------------- limits


def test_ring_that_does_not_fit_is_refused_with_the_numbers(monkeypatch):
    """Feed trap T13."""
    buffer = buffer_of()
    monkeypatch.setattr(ring, "available_bytes", lambda: 100_000)
    with pytest.raises(errors.CapacityError, match=r"10 slots of .* need .*, but 100.0 KB are free"):
        loader_of(buffer, Sequence(50), batch_size=256)


def test_episode_longer_than_allowed_is_refused_when_the_loader_is_made():
    with pytest.raises(errors.ConfigError, match="max_length is 6, but an episode of 7 steps is stored"):
        loader_of(buffer_of(), Episode(max_length=6))


def test_transform_that_cannot_be_pickled_says_so_under_spawn():
    loader = loader_of(buffer_of(), transform=lambda batch: batch, context="spawn")
    with pytest.raises(errors.ConfigError, match="worker 0 could not be started"):
        next(iter(loader))


@pytest.mark.parametrize("sampler", [None, Prioritized()])
def test_state_is_small_and_resumes_with_another_worker_count(sampler):
    """Feed trap T39."""
    kwargs = {} if sampler is None else {"sampler": sampler}
    buffer = buffer_of(capacity=4000, rows=1000, **kwargs)
    loader = loader_of(buffer, batch_size=256, workers=2)
    for i, _ in zip(range(5), loader, strict=False):
        add(buffer, 1000 + i, 1001 + i)
    state = loader.state_dict()
    if sampler is None:
        assert len(pickle.dumps(state)) <= 4096
    rest = [numbers(batch) for _, batch in zip(range(4), loader, strict=False)]
    loader.close()
    for workers in (0, 1, 3):
        again = loader_of(buffer, batch_size=256, workers=workers)
        again.load_state_dict(state)
        assert [numbers(batch) for _, batch in zip(range(4), again, strict=False)] == rest
        again.close()


def test_drawn_is_delivered_and_in_flight_and_discarded():
    """I7, feed trap T8."""
    loader = loader_of(buffer_of())
    batches = iter(loader)
    for _ in range(7):
        next(batches)
        stats = loader.stats()
        assert stats.drawn == stats.delivered + stats.in_flight + stats.discarded
    state = loader.state_dict()
    for _ in range(3):
        next(batches)
    loader.load_state_dict(state)
    stats = loader.stats()
    assert (stats.delivered, stats.in_flight, stats.discarded) == (60, 24, 24)
    assert stats.drawn == 108
    loader.close()


def test_loader_has_no_length():
    """Feed trap T38."""
    with pytest.raises(TypeError, match="goes on for ever"):
        len(loader_of(buffer_of(), workers=0))


def test_worker_that_is_busy_is_not_woken(monkeypatch):
    """It would not read the byte: after some hundred of them the learner would wait for it in a full pipe."""

    def slow(batch):
        time.sleep(0.002)
        return batch

    asleep, wake = [], Workers._wake
    monkeypatch.setattr(
        Workers, "_wake", lambda self, worker: (asleep.append(self.ring.is_asleep(worker)), wake(self, worker))
    )
    loader = loader_of(buffer_of(), workers=1, transform=slow)
    for _ in zip(range(60), loader, strict=False):
        pass
    loader.close()
    assert asleep.count(False) <= 2  # it may have woken up by itself


def test_error_of_a_gathering_thread_is_for_whoever_takes_the_batch():
    class Failing:
        def gather(self, batch):
            raise errors.StaleReadError(f"batch {batch}")

        def draws_of(self, batch):
            return "draws"

    gatherer = gatherers.InThread(Failing(), HANG_S)
    gatherer.begin(0)
    gatherer.settle()  # a writer's
    with pytest.raises(errors.StaleReadError, match="batch 0"):
        gatherer.take(0)
    gatherer.close()


def test_starting_workers_chooses_no_start_method_for_others():
    """Whoever asks later whether the user has chosen one would be told that it was to be fork."""
    with start_method(None):
        loader = loader_of(buffer_of(), workers=1, context="forkserver")
        next(iter(loader))
        assert multiprocessing.get_start_method(allow_none=True) is None
        loader.close()


def test_loader_of_a_script_without_a_guard_is_refused_in_its_workers(monkeypatch):
    """A worker that is spawned imports the script: if that forked workers of its own, all would run twice."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(errors.ConfigError, match="expected `if __name__ == '__main__':`"):
        next(iter(loader_of(buffer_of(), workers=1)))
