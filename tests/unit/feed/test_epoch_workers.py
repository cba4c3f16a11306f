"""One finite pass by worker processes: the same batches, and no process left."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from support.batches import assert_same
from support.pass_twin import PassTwin
from support.replay_checks import make_buffer
from support.replay_twin import make_step
from support.start_method import start_method

from rlfeed.errors import StaleReadError, UnsupportedError, WorkerError
from rlfeed.feed import epoch
from rlfeed.replay import Episode, Sequence, Transition

DEADLINE_S = 20.0


@pytest.fixture
def forked():
    """Workers by fork, which start at once."""
    with start_method("fork"):
        yield


def stored(rows=50, steps=200):
    """Three lanes that wrapped, with episodes of many lengths; the reward is the step's number."""
    generator, twin = np.random.default_rng(1), PassTwin(3, rows)
    buffer = make_buffer(3, rows, storage="shared")
    add(buffer, twin, steps, generator)
    return buffer, twin, generator


def add(buffer, twin, steps, generator):
    for number in range(steps):
        ends = [(bool(end), False) for end in generator.random(3) < 0.1]
        buffer.add(make_step(twin, [0, 1, 2], ends, rewards=[float(3 * number + lane) for lane in range(3)]))


def no_children():
    deadline = time.monotonic() + DEADLINE_S
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not multiprocessing.active_children()


def noisy(batch):
    batch.reward.add_(torch.rand(batch.reward.shape) + np.random.rand())  # noqa: NPY002 - what a user may write
    return batch


def rewards(batch):
    return batch.reward.tolist()


@pytest.mark.filterwarnings("ignore:.* comes by pipe:RuntimeWarning")  # what is no Batch
@pytest.mark.parametrize(
    ("unit", "options"),
    [
        (Transition(n_step=2), {"transform": noisy}),
        (Transition(), {"transform": rewards}),
        (Sequence(4, burn_in=2), {"shuffle": False}),
        (Episode(), {"bucket": 2, "drop_last": True}),
    ],
    ids=["noise", "rewards", "in order", "bucket"],
)
def test_epoch_batches_do_not_depend_on_the_number_of_workers(forked, unit, options):
    """Feed traps T2 and T3: each sample once, one tail, for any number of workers."""
    buffer, twin, _ = stored()
    expected = list(epoch(buffer, unit, 8, **options))
    if "drop_last" not in options and "transform" not in options:
        assert sorted(i for batch in expected for i in batch.ids.tolist()) == sorted(twin.samples(unit))
    for num_workers in (1, 2, 3):
        given = epoch(buffer, unit, 8, num_workers=num_workers, **options)
        assert len(given) == len(expected)
        batches = list(given)
        assert no_children()  # they are let go at the end
        for batch, wanted in zip(batches, expected, strict=True):
            if options.get("transform") is rewards:
                assert batch == wanted
            else:
                assert_same(batch, wanted)


def test_epoch_workers_give_what_was_stored_when_it_began(forked):
    buffer, twin, generator = stored(rows=400)
    given = epoch(buffer, Transition(), 50, num_workers=2, shuffle=False)
    first = next(given)
    add(buffer, twin, 30, generator)
    assert len(first) + sum(len(batch) for batch in given) == 3 * 200


def test_epoch_overwritten_meanwhile_is_named_by_the_worker_too(forked):
    buffer, twin, generator = stored()
    given = epoch(buffer, Transition(), 4, num_workers=1)
    next(given)
    add(buffer, twin, 60, generator)
    with pytest.raises(StaleReadError, match="was overwritten before it was given"):
        list(given)


def test_epoch_left_early_lets_its_workers_go(forked):
    buffer, _, _ = stored()
    for _ in epoch(buffer, Transition(), 4, num_workers=2):
        break
    assert no_children()
    given = epoch(buffer, Transition(), 4, num_workers=2)
    next(given)
    given.close()
    assert next(given, "ended") == "ended"
    assert no_children()


def test_epoch_worker_that_was_killed_is_an_error(forked):
    buffer, _, _ = stored()
    given = epoch(buffer, Transition(), 2, num_workers=1)
    next(given)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="was killed by SIGKILL"):
        list(given)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_epoch_batches_do_not_depend_on_the_start_method(method):
    buffer, _, _ = stored()
    expected = list(epoch(buffer, Sequence(4), 8))
    with start_method(method):
        for batch, wanted in zip(epoch(buffer, Sequence(4), 8, num_workers=2), expected, strict=True):
            assert_same(batch, wanted)


def test_epoch_in_a_daemon_gathers_itself_with_one_warning(forked, monkeypatch):
    """Feed trap T29: a daemon may have no children."""
    buffer, _, _ = stored()
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with pytest.warns(RuntimeWarning, match="epoch: this process is a daemon") as warned:
        batches = list(epoch(buffer, Transition(), 8, num_workers=2))
    assert len(warned) == 1
    for batch, wanted in zip(batches, epoch(buffer, Transition(), 8), strict=True):
        assert_same(batch, wanted)


def test_epoch_workers_need_storage_that_they_can_see():
    with pytest.raises(UnsupportedError, match="storage='private'; expected storage that other processes see"):
        epoch(make_buffer(1, 10), Transition(), 4, num_workers=1)
    block = next(epoch(stored()[0], Episode(), 4))
    with pytest.raises(UnsupportedError, match="the steps lie in a Batch"):
        epoch(block, Episode(), 4, num_workers=1)
