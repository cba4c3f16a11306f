"""Count what a buffer holds and what happened to it."""

import math
from dataclasses import dataclass

import numpy as np

from rlfeed.replay import kernels as k
from rlfeed.replay.draws import Draws
from rlfeed.replay.limiter import Gate
from rlfeed.replay.storage import Storage

DRAWERS = 64  # shared words that count draws, one for each process that draws


@dataclass(frozen=True, slots=True)
class ReplayStats:
    """Count what a buffer holds and what happened to it.

    Args:
        steps: Steps stored.
        rows: Rows in use, closing rows included.
        capacity_rows: Rows there are.
        capacity_steps: Steps that fit, at the episode lengths seen.
        episodes: Whole episodes stored that ended or were cut.
        inserted: Steps ever inserted.
        drawn: Samples drawn, by all processes.
        delivered: Samples handed to a learner; of a stock DataLoader those drawn.
        replay_ratio: Samples delivered per inserted step.
        sample_age: Steps inserted since the samples last drawn in this process, on average; nan before the first.
        sample_lag: How many policy versions they are behind the newest stored, on average; nan where ``extras`` has no
            ``policy_version``.
        stale_updates: Late updates dropped because their step had been overwritten.
        nbytes: Bytes of storage, those on a device among them; all are reserved at construction.
    """

    steps: int
    rows: int
    capacity_rows: int
    capacity_steps: int
    episodes: int
    inserted: int
    drawn: int
    delivered: int
    replay_ratio: float
    sample_age: float
    sample_lag: float
    stale_updates: int
    nbytes: int


def count_stats(storage: Storage, gate: Gate, last: Draws | None) -> ReplayStats:
    """Count, without stopping anybody.

    Args:
        storage: Of the buffer.
        gate: Of the buffer.
        last: What was drawn last in this process.

    Returns:
        The counters.
    """
    counts = np.empty(3, np.int64)
    steps = int(k.count_steps(storage.plan, counts))
    episodes, rows, inserted = (int(n) for n in counts)
    capacity, taken = storage.rows * storage.lanes, gate.taken
    return ReplayStats(
        steps=steps,
        rows=rows,
        capacity_rows=capacity,
        capacity_steps=capacity if rows == 0 else capacity * steps // rows,
        episodes=episodes,
        inserted=inserted,
        drawn=int(storage.words(0, DRAWERS).sum()),
        delivered=taken,
        replay_ratio=taken / max(inserted, 1),
        sample_age=math.nan if last is None else _age(storage, last),
        sample_lag=math.nan if last is None else _lag(storage, last),
        stale_updates=int(storage.words(k.STALE_UPDATES, k.STALE_UPDATES + 1)[0]),
        nbytes=storage.nbytes + (0 if storage.device is None else storage.device.nbytes),
    )


def _age(storage: Storage, draws: Draws) -> float:
    return float((draws.limits - 2 - (draws.ids & k.ROW_MASK)).mean()) * storage.lanes


def _lag(storage: Storage, draws: Draws) -> float:
    columns = [column for column in storage.columns if (column.name, column.path) == ("extras", ("policy_version",))]
    if not columns:
        return math.nan
    versions, heads = storage.view(columns[0]), storage.heads()[0]
    lanes, rows = draws.ids >> k.LANE_SHIFT, (draws.ids & k.ROW_MASK) % storage.ring
    written = np.flatnonzero(heads > 1)
    newest = versions[written, (heads[written] - 2) % storage.ring].max()
    return float((newest - versions[lanes, rows].astype(np.float64)).mean())
