"""Small data sets and a buffer for telling what torch's DataLoader does, and what ours does beside it."""

import functools
import itertools
import time

import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch.utils.data import DataLoader, Dataset, IterableDataset

from rlfeed.feed import make_loader
from rlfeed.replay import ReplayBuffer, Transition
from rlfeed.types import Step

# Forked where the start method is not the point: that costs 0.1 s and not 4.
Forked = functools.partial(DataLoader, multiprocessing_context="fork")


class Items(IterableDataset):
    """What a function makes, anew for every iterator."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return iter(self.make())


class Rows(Dataset):
    """Items by number: what a function makes of the number."""

    def __init__(self, count, make=lambda i: i):
        self.count, self.make = count, make

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return self.make(i)


def make_buffer(steps=100, **options):
    """One lane whose step i has reward i, in episodes of 1, 2, 3, 1, 2, 3, ... steps."""
    buffer = ReplayBuffer(Box(-np.inf, np.inf, (2,), np.float32), Discrete(5), capacity=4000, **options)
    add_steps(buffer, 0, steps)
    return buffer


def add_steps(buffer, begin, end):
    for i in range(begin, end):
        here, there, no = np.full((1, 2), i, np.float32), np.full((1, 2), i + 1, np.float32), np.array([False])
        first, last = np.array([i % 6 in (0, 1, 3)]), np.array([i % 6 in (0, 2, 5)])
        buffer.add(Step(here, np.array([i % 5]), np.array([i], np.float32), there, last, no, is_first=first))


def loader_of(buffer, unit=Transition(), batch_size=10, **options):  # noqa: B008
    loader = make_loader(buffer, unit, batch_size=batch_size, **options)
    loader.multiprocessing_context = "fork" if loader.num_workers else None
    return loader


def take(loader, count, look=lambda batch: batch):
    """What one looks for in the first batches; batches themselves would be held, and holding many is warned of."""
    return [look(batch) for batch in itertools.islice(iter(loader), count)]


def ids_of(batch):
    return batch.ids.tolist()


def values(loader):
    """Everything that a loader gives, as plain numbers."""
    return [item for batch in loader for item in torch.as_tensor(batch).flatten().tolist()]


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()
