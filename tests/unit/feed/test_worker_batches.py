"""What workers make: transforms, batches that fit no slot, limits, states, accounting."""

import itertools
import multiprocessing
import pickle
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from support.start_method import start_method
from support.worker_loaders import add, buffer_of, expected, loader_of, numbers, vars_of

from rlfeed import errors, make_envs
from rlfeed.feed import gatherers, ring
from rlfeed.feed.workers import Workers
from rlfeed.processes import choose_context
from rlfeed.replay import Episode, Limiter, Prioritized, Sequence, Transition
from rlfeed.types import Batch

HANG_S = 60


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


@pytest.mark.parametrize("workers", [0, 2])
def test_draws_that_do_not_fit_are_refused_with_the_numbers(workers):
    """Before anything is reserved: the system would kill the process."""
    with pytest.raises(errors.CapacityError, match=r"36 batches of 1000000000 samples need 864.0 GB, but .* are free"):
        loader_of(buffer_of(), workers=workers, batch_size=10**9)


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


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupt_between_taking_and_counting_loses_no_batch(workers):
    """Ctrl-C in a notebook, after which the same iterator goes on."""
    buffer = buffer_of()
    wanted, loader = expected(buffer, 8), loader_of(buffer, workers=workers)
    batches = iter(loader)
    seen = [numbers(next(batches)) for _ in range(3)]
    count = loader._clock.count_delivered
    loader._clock.count_delivered = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    loader._clock.count_delivered = count
    assert seen + [numbers(next(batches)) for _ in range(5)] == wanted
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_that_share_an_iterator_have_a_batch_each(workers):
    buffer = buffer_of()
    wanted, loader, seen = expected(buffer, 60), loader_of(buffer, workers=workers), []
    batches = iter(loader)

    def take():
        for _ in range(20):
            batch = next(batches)
            seen.append(numbers(batch))
            del batch

    threads = [threading.Thread(target=take) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each holds one
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANG_S)
    assert sorted(seen) == sorted(wanted)
    loader.close()


def test_limiter_that_close_lifted_holds_again_for_the_next_iterator():
    buffer = buffer_of()
    loader = loader_of(buffer, workers=0, limiter=Limiter(0.1, min_size=1, tolerance=6))
    for _ in range(2):
        batches = iter(loader)
        with pytest.raises(errors.NotEnoughDataError, match=r"the limiter allows 0\.1 samples per insert"):
            list(itertools.islice(batches, 10))
        loader.close()


def test_failed_transform_sees_the_batch_anew_after_it_changed_it_in_place():
    buffer, calls = buffer_of(), []
    wanted = expected(buffer, 2)

    def double(batch):
        batch.reward.mul_(2)
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("after the change")
        return batch

    batches = iter(loader_of(buffer, workers=0, transform=double))
    next(batches)
    with pytest.raises(ValueError, match="after the change"):
        next(batches)
    assert next(batches).reward.tolist() == [2 * reward for reward in wanted[1][1]]


def test_environments_in_processes_choose_no_start_method_for_loaders():
    with start_method(None):
        envs = make_envs("CartPole-v1", 2, mode="async")
        envs.close()
        assert multiprocessing.get_start_method(allow_none=True) is None


def test_start_method_is_fork_where_the_script_has_no_file(monkeypatch):
    """``python - < script.py``: other processes could not import it."""
    with start_method(None):
        assert choose_context(None).get_start_method() == "forkserver"
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
        monkeypatch.setattr(sys.modules["__main__"], "__file__", "<stdin>", raising=False)
        assert choose_context(None).get_start_method() == "fork"
