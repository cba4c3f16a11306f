"""Reading in order: each step once, in its lane's order, whatever the lanes' speed and wherever episodes end."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from rlfeed.errors import ConfigError, StaleReadError
from rlfeed.replay import ReplayBuffer
from rlfeed.replay.in_order import InOrder
from rlfeed.types import Step

BOX = spaces.Box(-np.inf, np.inf, (2,), np.float32)


class Lane:
    """Write steps whose observations name their episode and their number in it."""

    def __init__(self, buffer, lane):
        self.buffer, self.lane, self.episode, self.t, self.log = buffer, lane, 0, 0, []

    def step(self, end="no"):
        numbers = [(self.episode, self.t), (self.episode, self.t + 1)]
        observation, following = (np.array([pair], np.float32) for pair in numbers)
        self.buffer.add(
            Step(
                observation, np.array([self.t % 3]), np.array([self.t + 0.5], np.float32), following,
                np.array([end == "terminated"]), np.array([end == "truncated"]),
                is_first=np.array([self.t == 0]), env_ids=np.array([self.lane]),
            )
        )  # fmt: skip
        self.log.append((self.lane, self.episode, self.t, end))
        if end == "cut":
            self.buffer.cut([self.lane])
        self.episode, self.t = (self.episode, self.t + 1) if end == "no" else (self.episode + 1, 0)


def read(batch):
    """List the steps of a batch, and check each one's neighbours."""
    steps = []
    for row in range(len(batch)):
        lane = int(batch.ids[row]) >> 44
        for t in batch.mask[row].nonzero().flatten().tolist():
            episode, number = batch.observation[row, t].tolist()
            assert batch.observation[row, t + 1].tolist() == [episode, number + 1]
            assert batch.reward[row, t] == number + 0.5
            assert bool(batch.is_first[row, t]) == (number == 0)
            assert batch.discount[row, t] == (not batch.terminated[row, t])
            end = "terminated" if batch.terminated[row, t] else "truncated" if batch.truncated[row, t] else "no"
            steps.append((lane, int(episode), int(number), end))
    return steps


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 5),
    count=st.integers(1, 4),
    history=st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["no", "no", "no", "terminated", "truncated", "cut"])),
        max_size=120,
    ),
)
def test_in_order_of_any_history_gives_each_step_once_in_the_order_of_its_lane(length, count, history):
    buffer = ReplayBuffer(BOX, spaces.Discrete(3), capacity=3 * 24, num_envs=3, storage="private")
    lanes, reader, given_steps = [Lane(buffer, i) for i in range(3)], InOrder(buffer, length), {0: [], 1: [], 2: []}
    for lane, end in history:
        lanes[lane].step(end)
        while (batch := reader.take(count)) is not None:
            assert batch.observation.shape[:2] == (count, length + 1)
            for step in read(batch):
                given_steps[step[0]].append(step)
        if any(len(one.log) * 2 > 20 + 2 * len(given_steps[i]) for i, one in enumerate(lanes)):
            break  # writers are to be held back here
    for i, lane in enumerate(lanes):
        flags = [(*step[:3], "no" if step[3] == "cut" else step[3]) for step in lane.log]
        assert given_steps[i] == flags[: len(given_steps[i])]
    left = reader.count()
    assert left < count
    rows = sum(len(lane.log) + sum(step[3] != "no" for step in lane.log) for lane in lanes)
    assert sum(map(len, given_steps.values())) >= (rows - 3 * (length + 1) - left * length) / 2


def test_in_order_over_an_end_masks_the_closing_row_and_keeps_the_final_observation():
    buffer = ReplayBuffer(BOX, spaces.Discrete(3), capacity=40, storage="private")
    lane, reader = Lane(buffer, 0), InOrder(buffer, 4)
    for end in ("no", "truncated", "no", "no", "no"):
        lane.step(end)
    batch = reader.take(1)
    assert batch.mask.tolist() == [[True, True, False, True]]
    assert batch.observation[0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
    assert batch.is_first.tolist() == [[True, False, False, True]]
    assert batch.truncated.tolist() == [[False, True, False, False]]
    assert reader.take(1) is None  # the row after the next window is not there yet


def test_in_order_of_lanes_of_different_speed_takes_what_the_fast_ones_have():
    buffer = ReplayBuffer(BOX, spaces.Discrete(3), capacity=80, num_envs=2, storage="private")
    fast, slow, reader = Lane(buffer, 0), Lane(buffer, 1), InOrder(buffer, 2)
    for _ in range(7):
        fast.step()
    slow.step()
    batch = reader.take(3)
    assert (batch.ids >> 44).tolist() == [0, 0, 0]
    assert torch.equal(batch.observation[:, 0, 1], torch.tensor([0.0, 2.0, 4.0]))


def test_in_order_where_writers_ran_too_far_ahead_raises():
    buffer = ReplayBuffer(BOX, spaces.Discrete(3), capacity=12, storage="private")
    lane, reader = Lane(buffer, 0), InOrder(buffer, 2)
    for _ in range(reader.room + 40):
        lane.step()
    with pytest.raises(StaleReadError, match=rf"2 rows were overwritten .* at most {reader.room} rows ahead"):
        reader.take(1)


def test_in_order_of_lanes_without_room_for_two_windows_is_refused():
    buffer = ReplayBuffer(BOX, spaces.Discrete(3), capacity=12, storage="private")
    with pytest.raises(ConfigError, match=r"windows have 6 rows and a lane 12; expected lanes of at least 14"):
        InOrder(buffer, 6)
