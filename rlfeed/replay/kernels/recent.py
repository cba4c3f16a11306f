"""Draws that prefer newer rows: the weight of a row halves with its age."""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

import math

import numpy as np
from numba import njit

from rlfeed.replay.kernels.draw import candidates, philox, unit_float
from rlfeed.replay.kernels.rows import LANE_SHIFT, LANES, MOST_TRIES, NO_START, ROW_MASK, TRIES, entry_row, lane_span
from rlfeed.replay.kernels.starts import GRID, WHOLE, list_starts, starts_here
from rlfeed.replay.kernels.words import kernel


@njit
def list_episodes(plan: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """List the ids of every whole episode's first row, lane by lane, through the directory."""
    lanes, count = plan[LANES], 0
    oldest, past = np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    for lane in range(lanes):
        _, first, whole, heads[lane], newest, ended = lane_span(plan, lane)
        oldest[lane], past[lane] = first + 1 - whole, newest + ended
        count += max(0, past[lane] - oldest[lane])
    starts, found = np.empty(count, np.int64), 0
    for lane in range(lanes):
        for ordinal in range(oldest[lane], past[lane]):
            starts[found] = (lane << LANE_SHIFT) | entry_row(plan, lane, ordinal, heads[lane] - 1)
            found += 1
    return starts


@njit
def sum_recent(starts: np.ndarray, heads: np.ndarray, slope: float) -> np.ndarray:
    """Sum up the weights of starts by their age."""
    sums, total, youngest = np.empty(len(starts), np.float64), 0.0, np.int64(1) << 62
    for i in range(len(starts)):  # ages count from the youngest start, or all weights could vanish
        youngest = min(youngest, heads[starts[i] >> LANE_SHIFT] - (starts[i] & ROW_MASK))
    for i in range(len(starts)):
        total += math.exp(slope * (heads[starts[i] >> LANE_SHIFT] - (starts[i] & ROW_MASK) - youngest))
        sums[i] = total
    return sums


@kernel(
    "int64(int64[::1], int64[::1], float64, int64, int64, int64, int64[::1], int64[::1])"
)
def draw_recent(
    plan: np.ndarray,
    rule: np.ndarray,
    slope: float,
    key: int,
    number: int,
    attempt: int,
    ids: np.ndarray,
    limits: np.ndarray,
) -> int:
    """Draw starts with a weight of exp(slope * age), age counted in rows of their lane.

    Args:
        plan: The storage.
        rule: The unit's valid starts.
        slope: Below 0.
        key: Of seed, stream and rank.
        number: The first draw's number.
        attempt: The first attempt's number; above 0 only to repeat a draw that turned out torn.
        ids: ``[B]``: receives the ids drawn.
        limits: ``[B]``: receives each lane's head at the draw.

    Returns:
        B, or NO_START where no row is valid.
    """
    lanes, count = plan[LANES], len(ids)
    heads, tails, upto = np.empty(lanes, np.int64), np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    if candidates(plan, heads, tails, upto) == 0:
        return NO_START
    # A lane of n rows weighs (1 - q^n) / (1 - q), q = exp(slope); what is common to all lanes is left out.
    weights, total = np.empty(lanes, np.float64), 0.0
    for lane in range(lanes):
        total -= math.expm1(slope * max(0, heads[lane] - 1 - tails[lane]))
        weights[lane] = total
    starts, sums = np.empty(0, np.int64), np.empty(0, np.float64)
    tries = 0 if rule[WHOLE] else min(TRIES * rule[GRID], MOST_TRIES)  # few rows start an episode: list those
    for i in range(count):
        drawn, retry = False, 0
        while not drawn:
            u = unit_float(philox(key, number + i, attempt + retry))
            if retry == tries:
                if len(starts) == 0:
                    starts = list_episodes(plan, heads) if rule[WHOLE] else list_starts(plan, rule, heads, tails)
                    sums = sum_recent(starts, heads, slope)
                if len(starts) == 0:
                    return NO_START
                chosen = min(np.searchsorted(sums, u * sums[-1], "right"), len(starts) - 1)
                ids[i], limits[i] = starts[chosen], heads[starts[chosen] >> LANE_SHIFT]
                break
            lane = min(np.searchsorted(weights, u * total, "right"), lanes - 1)
            rest = u * total - (weights[lane - 1] if lane > 0 else 0.0)
            rows = heads[lane] - 1 - tails[lane]
            row = heads[lane] - 2 - max(0, min(rows - 1, np.int64(math.log1p(-min(rest, 1.0 - 2.0**-53)) / slope)))
            ids[i], limits[i] = (lane << LANE_SHIFT) | row, heads[lane]
            drawn = rows > 0 and starts_here(plan, rule, lane, row, heads[lane])
            retry += 1
    return count
