"""Workers that die, hang or are held up, at any time: the same batches, no hang, nothing left behind."""

import collections
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.worker_loaders import add, buffer_of, expected, loader_of, numbers, pids

from rlfeed import errors
from rlfeed.replay import Prioritized, Sequence

HANG_S = 60


def children_of_this_process():
    """Give the state of every child, zombies too."""
    found = [child for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()]
    return [Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] for child in found]


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def slots_that_came_back(loader):
    gc.collect()
    slots = loader._making.gatherer.slots
    slots._collect()
    return sum(map(len, slots._free)) + len(slots._promised)


# -------------------------------------------------------------------------------------------------- workers are killed


def train(workers, batches, kill=None, keep=0, **kwargs):
    """Learn on a buffer that grows, with priorities, while workers are killed; give the batches."""
    buffer = buffer_of(sampler=Prioritized())
    loader = loader_of(buffer, Sequence(3), workers, **kwargs)
    seen, kept = [], []
    for i, batch in zip(range(batches), loader, strict=False):
        seen.append((*numbers(batch), batch.weights.tolist()))
        loader.update_priorities(batch, np.random.default_rng(i).uniform(0, 5, len(batch)))
        add(buffer, 60 + i, 61 + i)
        kept = [*kept, batch][-keep:] if keep else []
        if kill:
            kill(loader, i)
    return seen, loader


class Killer:
    """Kill a worker at random, now or a moment later, some stopped first."""

    def __init__(self, chance, seed=0):
        self.generator, self.chance, self.kills = np.random.default_rng(seed), chance, 0

    def __call__(self, loader, number):
        if self.generator.random() < self.chance:
            self.kills += 1
            victim, moment = int(self.generator.choice(pids(loader))), self.generator.uniform(0, 0.003)
            if self.generator.random() < 0.5:
                time.sleep(moment)
            if self.generator.random() < 0.3:
                os.kill(victim, signal.SIGSTOP)
                time.sleep(moment)
            os.kill(victim, signal.SIGKILL)


@pytest.mark.parametrize(("batches", "keep"), [(40, 0), (40, 1), pytest.param(250, 1, marks=pytest.mark.slow)])
def test_workers_killed_at_random_leave_the_stream_the_slots_and_the_system_as_they_were(batches, keep):
    """Feed traps T15 and T16."""
    killer = Killer(0.45)
    gc.collect()
    before = descriptors(), len(children_of_this_process())
    seen, loader = train(2, batches, killer, keep, on_worker_death="restart")
    wanted = train(0, batches)[0]
    stats = loader.stats()
    assert seen == wanted
    assert stats.restarts >= killer.kills * 0.3  # some are killed while they are dead
    assert stats.copies == 0
    assert slots_that_came_back(loader) == stats.slots
    loader.close()
    del loader
    gc.collect()
    assert descriptors() <= before[0]
    assert len(children_of_this_process()) <= before[1]


def test_both_workers_killed_at_once_and_in_their_first_moment_are_replaced():
    def kill(loader, number):
        if number % 6 == 3:
            for pid in pids(loader):
                os.kill(pid, signal.SIGKILL)

    seen, loader = train(2, 24, kill, on_worker_death="restart")
    assert loader.stats().restarts >= 6  # what died last may have nothing to do any more
    assert seen == train(0, 24)[0]
    loader.close()


def test_each_death_is_an_error_and_the_stream_goes_on_after_it():
    buffer = buffer_of()
    wanted = expected(buffer, 40)
    loader, seen, raised, killed = loader_of(buffer), [], 0, 0
    batches = iter(loader)
    while len(seen) < 40:
        try:
            seen.append(numbers(next(batches)))
        except errors.WorkerError as error:
            assert "was killed by SIGKILL before batch" in str(error)  # noqa: PT017 - each time
            raised += 1
            continue
        if len(seen) % 10 == 5:
            os.kill(pids(loader)[killed % 2], signal.SIGKILL)
            killed += 1
    assert seen == wanted
    assert raised == killed == 4
    loader.close()


def test_leases_of_a_worker_that_dies_stay_valid(monkeypatch):
    monkeypatch.setenv("RLFEED_DEBUG", "1")
    buffer = buffer_of()
    wanted = expected(buffer, 30)
    loader = loader_of(buffer, on_worker_death="restart")
    batches = iter(loader)
    held = [next(batches), next(batches)]
    for pid in pids(loader):
        os.kill(pid, signal.SIGKILL)
    seen = [numbers(next(batches)) for _ in range(28)]
    assert [*map(numbers, held), *seen] == wanted
    loader.close()
    assert [*map(numbers, held)] == wanted[:2]


@pytest.mark.parametrize("transform", [None, lambda batch: {"bytes": bytes(3_000_000), "sum": batch.reward.sum()}])
@pytest.mark.filterwarnings("ignore:make_loader. a batch comes by pipe")
def test_stopped_worker_is_named_in_time_and_goes_on_where_it_was(transform):
    """Also one that has sent half of what it sends by pipe."""
    buffer = buffer_of()
    loader = loader_of(buffer, workers=1, timeout_s=1.0, transform=transform)
    batches = iter(loader)
    next(batches)
    time.sleep(0.3)  # what was drawn is made by now, or fills the pipe
    os.kill(pids(loader)[0], signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(errors.FeedTimeoutError, match=r"waited 1 s for worker 0 to make batch \d+ \(draws"):
        collections.deque(itertools.islice(batches, 10), maxlen=0)
    assert time.monotonic() - begin < 10
    os.kill(pids(loader)[0], signal.SIGCONT)
    assert next(batches)
    loader.close()


# -------------------------------------------------------------------------------------------------- learners are killed

DRIVER = Path(__file__).with_name("feed_supervision_driver.py")
BUSY = [
    {"end": "SIGKILL", "transform": "gil", "busy": "transforming"},
    {"end": "SIGTERM", "transform": "sleeps", "busy": "transforming"},
    {"end": "SIGKILL", "busy": "computing"},
]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(method, marks=pytest.mark.slow) for method in ("spawn", "forkserver"))]
)
def test_nothing_outlives_a_learner_that_is_killed(method):
    """Feed trap T18: also a worker that keeps the GIL in compiled code."""
    after_s = 1.0 if method == "fork" else 20.0  # imports come first there
    cases = [case | {"method": method, "workers": 2, "after_s": after_s} for case in BUSY]
    done = subprocess.run(
        [sys.executable, DRIVER], input=json.dumps(cases), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    for end in json.loads(done.stdout):
        assert (end["code"], end["said"]) == (-getattr(signal, end["end"]), ""), end
        assert end["outlived_s"] is not None, end
