"""Loaders with worker processes over rows that say what they are."""

import itertools

import numpy as np
from gymnasium.spaces import Box, Discrete

from rlfeed.feed import make_loader
from rlfeed.replay import ReplayBuffer, Transition
from rlfeed.types import Step


def buffer_of(capacity=400, rows=60, length=7, **kwargs):
    buffer = ReplayBuffer(Box(-np.inf, np.inf, (1,), np.float32), Discrete(9), capacity=capacity, num_envs=2, **kwargs)
    add(buffer, 0, rows, length)
    return buffer


def add(buffer, begin, end, length=7):
    """Steps whose observation and reward are their number."""
    never = np.zeros(2, bool)
    for i in range(begin, end):
        observation, over = np.full((2, 1), i, np.float32), np.full(2, i % length == length - 1)
        actions, rewards, first = np.full(2, i % 9), np.full(2, i, np.float32), np.full(2, i % length == 0)
        buffer.add(Step(observation, actions, rewards, observation + 1, over, never, is_first=first))


def loader_of(buffer, unit=Transition(), workers=2, context="fork", batch_size=6, **kwargs):  # noqa: B008
    loader = make_loader(buffer, unit, batch_size=batch_size, num_workers=workers, **({"seed": 5} | kwargs))
    if workers:
        loader.multiprocessing_context = context
    return loader


def numbers(batch):
    return batch.ids.tolist(), batch.reward.tolist()


def take(loader, count):
    return [numbers(batch) for batch in itertools.islice(loader, count)]


def expected(buffer, count, unit=Transition(), **kwargs):  # noqa: B008
    return take(loader_of(buffer, unit, workers=0, **kwargs), count)


def pids(loader):
    return [process.pid for process in loader._making.gatherer._processes]


def vars_of(batch):
    names = ("observation", "action", "reward", "terminated", "truncated", "ids")
    return {name: getattr(batch, name) for name in names}
