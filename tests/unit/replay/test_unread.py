"""A writer waits for readers of its own process before it overwrites what they may have drawn."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from rlfeed.replay import ReplayBuffer
from rlfeed.types import Batch, Step

ROWS = 6400  # of the only lane: 50 more are kept readable


class Reader:
    """Have drawn from the oldest rows just after each settling, which is the worst that a loader can do."""

    def __init__(self, buffer):
        self.buffer, self.settled_at = buffer, []

    def settle(self):
        self.settled_at.append(int(self.buffer._storage.heads()[1].max()))


def episodes(count, steps):
    return Batch(
        observation=torch.zeros(count, steps + 1, 1), action=torch.zeros(count, steps, dtype=torch.int64),
        reward=torch.zeros(count, steps), terminated=torch.zeros(count, steps, dtype=torch.bool),
        truncated=torch.zeros(count, steps, dtype=torch.bool),
    )  # fmt: skip


def write_one(buffer, number):
    flags, observation = np.zeros(1, bool), np.zeros((1, 1), np.float32)
    buffer.add(
        Step(observation, np.zeros(1, np.int64), np.zeros(1, np.float32), observation, flags, flags, is_first=~flags)
    )


def write_five_episodes(buffer, number):
    buffer.extend(episodes(5, 5))


@pytest.mark.parametrize("write", [write_one, write_five_episodes])
def test_rows_drawn_after_the_last_settling_are_never_overwritten(write):
    buffer = ReplayBuffer(Box(-1, 1, (1,)), Discrete(2), capacity=ROWS, num_envs=1)
    for _ in range(16):
        buffer.extend(episodes(8, 50))
    storage, reader = buffer._storage, Reader(buffer)
    buffer.unread.protect(reader.settle)
    spare = storage.ring - storage.rows
    for number in range(300):
        write(buffer, number)
        head = int(storage.heads()[1].max())
        assert head > storage.ring
        assert head - reader.settled_at[-1] <= spare


def test_another_loader_does_not_put_off_the_settling_of_the_first():
    """Where a lane is about to be full, places that were never written are few, and spare rows are not fresh."""
    buffer = ReplayBuffer(Box(-1, 1, (1,)), Discrete(2), capacity=ROWS, num_envs=1)
    storage, first, second = buffer._storage, Reader(buffer), Reader(buffer)
    buffer.unread.protect(first.settle)
    for number in range((storage.ring - 4) // 2):
        write_one(buffer, number)
    buffer.unread.protect(second.settle)
    while int(storage.heads()[1].max()) <= storage.ring:
        write_one(buffer, 0)
    assert first.settled_at
    assert second.settled_at


def test_carries_are_written_back_after_what_was_drawn_has_been_gathered():
    buffer = ReplayBuffer(
        Box(-1, 1, (1,)), Discrete(2), capacity=100, extras={"carry": Box(-1, 1, (1,))}, storage="private"
    )
    flags, zeros = np.zeros(1, bool), np.zeros((1, 1), np.float32)
    for number in range(3):
        step = Step(
            zeros, np.zeros(1, np.int64), np.zeros(1, np.float32), zeros, flags, flags,
            is_first=np.array([number == 0]), carry=zeros,
        )  # fmt: skip
        ids = buffer.add(step)
    reader = Reader(buffer)
    buffer.unread.protect(reader.settle)
    buffer.update(ids, carry=np.ones((1, 1), np.float32))
    assert len(reader.settled_at) == 1
