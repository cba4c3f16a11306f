"""Storage: what a row costs, that memory stays where it is, that counters never wrap."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from support.replay_twin import ReplayTwin, make_step

from rlfeed.replay import Episode, ReplayBuffer, Sequence, Transition
from rlfeed.replay import kernels as k
from rlfeed.types import Step

SPACE = Dict(vector=Box(-np.inf, np.inf, (3,), np.float32), image=Box(0, 255, (40, 40), np.uint8))
UNITS = [Transition(), Transition(n_step=3), Episode(), Sequence(3, burn_in=1)]


@pytest.mark.parametrize(
    ("observation", "field_bytes", "most"),
    [
        (Box(0, 255, (32, 32), np.uint8), 1024 + 8 + 4, 1.02),  # one large column, the action and the reward
        (Box(0, 255, (84, 84), np.uint8), 7056 + 8 + 4, 1.02),
        (Box(-1, 1, (21,), np.float32), 84 + 8 + 4, 1.11),  # one packed record
        (Box(-1, 1, (60,), np.float32), 240 + 8 + 4, 1.06),
    ],
)
def test_planned_bytes_of_a_row_stay_near_those_of_its_fields(observation, field_bytes, most):
    """Trap 41, 43: heads, directory, flags and alignment included; both flags are a byte each in what is compared."""
    buffer = ReplayBuffer(observation, Discrete(4), capacity=200_000, num_envs=8)
    stats = buffer.stats()
    ratio = stats.nbytes / stats.capacity_rows / (field_bytes + 2)
    assert 1 < ratio <= most
    assert os.fstat(buffer._storage.memory._fd).st_blocks * 512 == stats.nbytes


STATM = Path("/proc/self/statm")


def resident_bytes():
    return int(STATM.read_text().split()[1]) * mmap.PAGESIZE


def plain_steps(count, width):
    observation, no = np.ones((1, width), np.uint8), np.zeros(1, bool)
    for i in range(count):
        yield Step(
            observation, np.array([1]), np.ones(1, np.float32), observation, np.array([i % 50 == 49]), no,
            is_first=np.array([i % 50 == 0]),
        )  # fmt: skip


@pytest.mark.skipif(not STATM.exists(), reason="counts pages as Linux does")
def test_resident_memory_is_what_was_planned_and_stays_flat_over_wraps():
    """Trap 43: ten times the capacity, with reads between."""
    width, rows = 2000, 8000
    before = resident_bytes()
    buffer = ReplayBuffer(Box(0, 255, (width,), np.uint8), Discrete(4), capacity=rows)
    planned, seen = buffer.stats().nbytes, []
    for wrap in range(10):
        for step in plain_steps(rows, width):
            buffer.add(step)
        buffer.sample(64, Transition())
        if wrap in (1, 9):
            seen.append(resident_bytes())
    assert abs(seen[0] - before - planned) < 0.05 * planned + 4e6  # 4 MB for what the first calls load
    assert abs(seen[1] - seen[0]) < 2e6


@pytest.mark.parametrize("head", [2**31 - 7, 2**32 - 9, 2**40 - 5])
def test_counters_beyond_32_bits_change_nothing(head):
    """Trap 36: a lane that has seen 2^31, 2^32 and 2^40 rows behaves as a new one, ids and all."""
    rows, episodes = 14, 2**33 - 3
    buffer = ReplayBuffer(SPACE, Discrete(11), capacity=rows, storage="private")
    twin, heads, plan = ReplayTwin(1, rows), buffer._storage.heads(), buffer._storage.plan
    heads[:4, 0] = head, head, episodes, head - episodes
    words = buffer._storage.memory.bytes[plan[k.RECORDS] - plan[k.SHARED] :]
    for row in range(head - rows, head):  # what was there before: rows of one episode, which has ended
        record = words[row % rows * plan[k.STRIDE] :][:8].view(np.uint32)
        record[:] = (episodes - 1) % 2**32, k.CLOSING
    for number in range(40):
        ends = [(number % 6 == 5, number % 9 == 8)]
        identity = int(buffer.add(make_step(twin, [0], ends, rewards=[float(number)]))[0])
        lane = twin.lanes[0]
        assert identity == head + len(lane.rows) - 2
        if number < rows + 2:
            continue
        assert len(buffer) == len(twin)
        for unit in UNITS:
            starts = twin.starts(unit)
            ids = set((buffer.sample(200, unit).ids - head).tolist())
            assert ids <= starts
            assert len(ids) > len(starts) // 2
        batch = buffer.sample(50, Transition())
        for i, start in enumerate((batch.ids - head).tolist()):
            expected = twin.transition(start, Transition())
            assert np.array_equal(batch.observation["vector"][i], expected["observation"]["vector"])
            assert np.array_equal(batch.next_observation["vector"][i], expected["next_observation"]["vector"])
    assert buffer.stats().inserted == head - episodes + 40
