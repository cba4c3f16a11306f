"""A feed that runs for long, or whose batches are kept, takes no more memory and no more descriptors than at first."""

import gc
import itertools
import multiprocessing
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from rlfeed.feed import make_loader
from rlfeed.replay import ReplayBuffer, Transition
from rlfeed.types import Step

WORKERS = 2


def descriptors(process):
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


def memory_kib(process):
    """Count the memory in use, and of memory that is no file's (other programs map those too) this process's share."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return sizes["Rss"], sizes["Pss_Anon"] + sizes["Pss_Shmem"]


@pytest.fixture
def few_descriptors():
    gc.collect()
    used = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())  # other tests' among them
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 48, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture
def loader(few_descriptors):
    buffer, no = ReplayBuffer(Box(-np.inf, np.inf, (16,), np.float32), Discrete(9), capacity=4100), np.zeros(1, bool)
    for t in range(4000):
        observation = np.full((1, 16), t, np.float32)
        is_first, end = np.array([t % 50 == 0]), np.array([t % 50 == 49])
        buffer.add(Step(observation, np.array([t % 9]), observation[:, 0], observation + 1, end, no, is_first=is_first))
    with make_loader(buffer, Transition(), batch_size=32, num_workers=WORKERS) as loader:
        loader.multiprocessing_context = "fork"
        yield loader


def processes():
    children = [child.pid for child in multiprocessing.active_children()]
    assert len(children) == WORKERS
    return [os.getpid(), *children]


def begin(batches):
    for _ in itertools.islice(batches, 1000):  # every page of the buffer has been touched, every cache is filled
        pass
    gc.collect()  # what tests before this one left


@pytest.mark.parametrize("batches", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_loader_long_run_takes_no_more_memory_and_descriptors(loader, batches):
    """Feed traps T7 and T14."""
    taken = iter(loader)
    begin(taken)
    before = {process: (descriptors(process), memory_kib(process)) for process in processes()}

    for _ in range(10):
        for batch in itertools.islice(taken, batches // 10):
            assert torch.equal(batch.reward, batch.observation[:, 0])
        del batch
        for process, (held, (rss, pss)) in before.items():
            assert descriptors(process) == held
            now_rss, now_pss = memory_kib(process)
            assert now_rss <= 1.02 * rss
            assert now_pss <= 1.02 * pss


@pytest.mark.parametrize("kept", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_loader_batches_that_are_kept_take_no_descriptors(loader, kept):
    """Feed trap T14: torch's own transport takes one for each tensor."""
    taken = iter(loader)
    begin(taken)
    before = {process: descriptors(process) for process in processes()}

    with pytest.warns(RuntimeWarning, match="copies"):
        held = list(itertools.islice(taken, kept))

    assert {process: descriptors(process) for process in before} == before
    assert all(torch.equal(batch.reward, batch.observation[:, 0]) for batch in held)
    assert loader.stats().copies > kept / 2
