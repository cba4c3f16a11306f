"""Drive a replay buffer and its twin together, and compare what was stored."""

import dataclasses

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from support.batches import assert_same
from support.replay_checks import check_transitions
from support.replay_twin import ReplayTwin, make_step

from rlfeed.replay import Episode, ReplayBuffer, Sequence, Transition

SPACE = gymnasium.spaces.Dict(vector=Box(-np.inf, np.inf, (3,), np.float32), image=Box(0, 255, (40, 40), np.uint8))
UNITS = (Transition(n_step=3), Episode(), Sequence(2, burn_in=1))


class Driver:
    """Drive a buffer and its twin by the same random steps, cuts and idle lanes."""

    def __init__(self, seed=0, lanes=3, rows=30, **options):
        self.generator = np.random.default_rng(seed)
        self.twin = ReplayTwin(lanes, rows)
        self.buffer = ReplayBuffer(SPACE, Discrete(11), capacity=lanes * rows, num_envs=lanes, **options)

    def go_on(self, steps, *others):
        """Give random steps to the buffer, and the same ones to others."""
        for _ in range(steps):
            lanes = np.flatnonzero(self.generator.random(len(self.twin.lanes)) < 0.7).tolist() or [0]
            ends = [(draw < 0.15, 0.1 < draw < 0.25) for draw in self.generator.random(len(lanes))]
            step = make_step(self.twin, lanes, ends, rewards=self.generator.integers(0, 99, len(lanes)).tolist())
            ids = self.buffer.add(step)
            for other in others:
                assert np.array_equal(other.add(step), ids)
            if self.generator.random() < 0.05:
                lane = int(self.generator.integers(len(self.twin.lanes)))
                self.twin.lanes[lane].cut()
                for buffer in (self.buffer, *others):
                    buffer.cut([lane])


def held(buffer):
    """What a buffer holds, by its counters: without what was drawn from this copy of it."""
    drawn = ("drawn", "delivered", "replay_ratio", "sample_age", "sample_lag")
    return {name: value for name, value in dataclasses.asdict(buffer.stats()).items() if name not in drawn}


def assert_equal_buffers(buffer, expected, batches=4):
    """Same counters, same heads, same next draws of every unit."""
    assert held(buffer) == held(expected)
    assert np.array_equal(buffer._storage.heads()[:4], expected._storage.heads()[:4])
    for _ in range(batches):
        for unit in UNITS:
            assert_same(buffer.sample(8, unit), expected.sample(8, unit))


def assert_holds(buffer, twin):
    """Every transition that can be drawn is the one that was stored."""
    starts = twin.starts(Transition())
    assert len(buffer) == len(starts)
    batch = buffer.sample(15 * len(starts), Transition())
    assert set(batch.ids.tolist()) == starts
    check_transitions(batch, twin, Transition())


def row_files(directory):
    """The names of a saved directory's files of rows."""
    return sorted(file.name for file in directory.iterdir() if file.name.startswith("rows-"))
