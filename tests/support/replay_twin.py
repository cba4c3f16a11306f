"""A slow and obvious twin of the replay buffer: Python lists of rows, every rule spelled out."""

from dataclasses import dataclass, field
from functools import cache

import numpy as np

from rlfeed.replay import Episode, Sequence, Transition
from rlfeed.types import Step

SHIFT = 44


@dataclass
class Row:
    """One row: what was observed, and the step taken there, if any."""

    episode: int
    index: int
    observation: tuple[int, int, int]
    step: tuple[int, float, bool, bool] | None = None  # action, reward, terminated, truncated
    closing: bool = False


@dataclass
class LaneTwin:
    """One lane: every row that was ever written; the last ``capacity`` of them are live."""

    capacity: int
    rows: list[Row] = field(default_factory=list)
    episodes: int = 0

    @property
    def open(self):
        return bool(self.rows) and not self.rows[-1].closing

    @property
    def tail(self):
        return max(0, len(self.rows) - self.capacity)

    def add(self, lane, first, action, reward, terminated, truncated):
        if first:
            self.cut()
            self.rows.append(Row(self.episodes, 0, (lane, self.episodes, 0)))
            self.episodes += 1
        row = self.rows[-1]
        row.step = (action, reward, terminated, truncated)
        index = row.index + 1
        self.rows.append(Row(row.episode, index, (lane, row.episode, index), closing=terminated or truncated))
        return len(self.rows) - 2

    def cut(self):
        if self.open:
            self.rows[-1].closing = True

    def live(self):
        return range(self.tail, len(self.rows))

    def is_step(self, row):
        return row in self.live() and self.rows[row].step is not None and not self.rows[row].closing

    def end_of(self, row):
        """The episode's closing row, or None while it is open."""
        episode = self.rows[row].episode
        while row < len(self.rows) and self.rows[row].episode == episode:
            if self.rows[row].closing:
                return row
            row += 1
        return None

    def first_of(self, row):
        return row - self.rows[row].index

    def steps_from(self, row):
        """Steps of this episode from ``row`` on, and whether the episode has ended."""
        end = self.end_of(row)
        return (end if end is not None else len(self.rows) - 1) - row, end is not None


class ReplayTwin:
    """Lanes of Python lists that take the same steps as a `ReplayBuffer`."""

    def __init__(self, lanes, rows, *, frames=None, carry_every=1):
        self.lanes = [LaneTwin(rows) for _ in range(lanes)]
        self.frames = {"vector": 1, "image": 1} | (frames or {})
        self.carry_every = carry_every
        self.written_back = {}

    def __len__(self):
        return sum(lane.is_step(row) for lane in self.lanes for row in lane.live())

    def find(self, identity):
        """The lane and the row that an id names."""
        return self.lanes[identity >> SHIFT], identity & ((1 << SHIFT) - 1)

    def carried(self):
        """The ids of all stored steps at which a carry is stored."""
        return [
            (number << SHIFT) | row
            for number, lane in enumerate(self.lanes)
            for row in lane.live()
            if lane.is_step(row) and lane.rows[row].index % self.carry_every == 0
        ]

    def starts(self, unit):
        """Every valid start of a unit, as ids."""
        return {
            (number << SHIFT) | row
            for number, lane in enumerate(self.lanes)
            for row in lane.live()
            if lane.is_step(row) and self._may_start(lane, row, unit)
        }

    def span(self, unit):
        """Rows that a sample touches where nothing clips it: frames, burn-in, steps and the successor."""
        older = max(self.frames.values()) - 1
        if isinstance(unit, Transition):
            return older + unit.n_step + 1
        return max(older, 1) + unit.burn_in + unit.length + 1 if isinstance(unit, Sequence) else 0

    def _may_start(self, lane, row, unit):
        steps, ended = lane.steps_from(row)
        older = max(self.frames.values()) - 1
        if isinstance(unit, Episode):
            return ended and lane.rows[row].index == 0
        if isinstance(unit, Transition):
            oldest = max(lane.first_of(row), row - older)
            return oldest >= lane.tail and (ended or steps >= unit.n_step)
        # The step before a window gives the previous action.
        oldest = max(lane.first_of(row), row - unit.burn_in - max(older, 1))
        return oldest >= lane.tail and self._on_grid(lane, row, unit)

    def _on_grid(self, lane, row, unit):
        """Whether the stride and the boundary of a sequence let a window start at a step."""
        length, stride, index = unit.length, unit.stride or 1, lane.rows[row].index
        steps, ended = lane.steps_from(row)
        if unit.boundary == "cross":
            return index % stride == 0 and row + length <= len(lane.rows) - 1
        if not ended:
            return index % stride == 0 and steps >= length
        total = index + steps
        if stride == 1:
            starts = set(range(total))
        elif self.carry_every > 1:
            starts = {g for g in range(0, total, stride) if g == 0 or g - stride + length < total}
        else:
            starts = {min(g, max(total - length, 0)) for g in range(0, total, stride)}
        return index in starts and (unit.boundary == "pad" or index + length <= total)

    def shown(self, lane, row, key):
        """What a batch shows at a row: one frame, or the last few, oldest first, the episode's first one repeated."""
        count = self.frames[key]
        frames = [max(lane.first_of(row), row - back) for back in reversed(range(count))]
        shown = np.stack([observation(lane.rows[frame].observation)[key] for frame in frames])
        return shown if count > 1 else shown[0]

    def transition(self, identity, unit):
        """The sample that a `Transition` start must give."""
        lane, row = self.find(identity)
        count = min(unit.n_step, lane.steps_from(row)[0])
        reward = sum(unit.gamma**i * lane.rows[row + i].step[1] for i in range(count))
        _, _, terminated, truncated = lane.rows[row + count - 1].step
        return {
            "observation": {key: self.shown(lane, row, key) for key in self.frames},
            "next_observation": {key: self.shown(lane, row + count, key) for key in self.frames},
            "action": lane.rows[row].step[0],
            "reward": reward,
            "terminated": terminated,
            "truncated": truncated,
            "discount": 0.0 if terminated else unit.gamma**count,
        }

    def window(self, identity, unit):
        """The unpadded window that a `Sequence` or `Episode` start must give."""
        lane, row = self.find(identity)
        burn, length = (unit.burn_in, unit.length) if isinstance(unit, Sequence) else (0, 10**9)
        begin = max(lane.first_of(row), row - burn)
        crosses = isinstance(unit, Sequence) and unit.boundary == "cross"
        end = row + (length if crosses else min(length, lane.steps_from(row)[0]))
        nothing = (0, 0.0, False, False)
        rows = [lane.rows[i] for i in range(begin, end)]
        steps = [nothing if r.closing else r.step for r in rows]
        opens = begin == lane.first_of(row)
        before = nothing if opens else lane.rows[begin - 1].step
        carry = carry_of(*lane.rows[begin].observation)
        return {
            "observation": {k: np.stack([self.shown(lane, i, k) for i in range(begin, end + 1)]) for k in self.frames},
            "action": [s[0] for s in steps],
            "reward": [s[1] for s in steps],
            "terminated": [s[2] for s in steps],
            "truncated": [s[3] for s in steps],
            "discount": [0.0 if r.closing or r.step[2] else unit.gamma for r in rows],
            "is_first": [r.index == 0 and not r.closing for r in rows],
            "mask": [not r.closing for r in rows],
            "loss_mask": [not r.closing and begin + i >= row for i, r in enumerate(rows)],
            "burn_in": row - begin,
            "prev_action": before[0],
            "prev_reward": before[1],
            "carry": 0.0 if opens else self.written_back.get(identity - row + begin, carry),
        }


def carry_of(lane, episode, index):
    """A recurrent state that names its step, and is nowhere zero."""
    return 1.0 + 10_000 * lane + 100 * episode + index


@cache
def image(vector):
    """A large observation that names its lane, episode and step, to be stored in a column of its own."""
    pixels = np.resize(np.array(vector, np.uint8), (40, 40))
    pixels.flags.writeable = False  # the same array for every caller
    return pixels


def observation(vector):
    """The nested observation of a row."""
    return {"vector": np.array(vector, np.float32), "image": image(vector)}


def make_step(twin, lanes, ends, *, rewards, first=None):
    """Advance the twin by one step of some lanes, and give the `Step` that does the same to a buffer."""
    rows = []
    for lane, (terminated, truncated), reward in zip(lanes, ends, rewards, strict=True):
        state = twin.lanes[lane]
        opens = not state.open or (first is not None and lane in first)
        episode, index = (state.episodes, 0) if opens else (state.rows[-1].episode, state.rows[-1].index)
        action = (3 * lane + 5 * episode + 7 * index) % 11
        rows.append((opens, (lane, episode, index), (lane, episode, index + 1), action, reward, terminated, truncated))
        state.add(lane, opens, action, reward, terminated, truncated)
    return Step(
        {k: np.stack([observation(r[1])[k] for r in rows]) for k in ("vector", "image")},
        np.array([r[3] for r in rows]),
        np.array([r[4] for r in rows], np.float32),
        {k: np.stack([observation(r[2])[k] for r in rows]) for k in ("vector", "image")},
        np.array([r[5] for r in rows]),
        np.array([r[6] for r in rows]),
        is_first=np.array([r[0] for r in rows]),
        env_ids=np.array(lanes),
        carry=np.array([[carry_of(*r[1])] for r in rows], np.float32),
    )
