"""Which rows may start a sample: the rule of a unit, as one int64 table, and whether a row fulfils it."""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

import numpy as np
from numba import njit

from rlfeed.replay.kernels.rows import (
    CLOSING,
    FAR,
    FIRST,
    FLAGS,
    LANE_SHIFT,
    RESERVED,
    ROWS,
    closing_row,
    first_row,
    record_of,
)
from rlfeed.replay.kernels.words import load_acquire, load_u8

# A rule: PLAIN 1 where every stored step may start; WHOLE 1 where only first rows of ended episodes may; NEED, the
# steps from the start on; BACK, the burn-in before it (-1: the unit looks at nothing before); STRICT 1 where all NEED
# steps must be in the episode.
PLAIN, WHOLE, NEED, BACK, STRICT, RULE_SIZE = range(6)


@njit
def starts_here(plan: np.ndarray, rule: np.ndarray, lane: int, row: int, limit: int) -> bool:
    """Tell whether a sample may start at a row: all rows it touches are live, and its steps are there or an end."""
    flags = load_u8(record_of(plan, lane, row) + FLAGS)
    if flags & CLOSING:
        return False
    need, back, strict = rule[NEED], rule[BACK], rule[STRICT]
    if rule[WHOLE]:
        if not flags & FIRST or closing_row(plan, lane, row, limit) == FAR:
            return False
    elif need > 1 or strict:
        end = closing_row(plan, lane, row, limit)
        if (end == FAR or strict) and row + need > min(end, limit - 1):
            return False
    oldest = row
    if back >= 0:
        first = first_row(plan, lane, row)
        oldest = row - back - 1 if first < 0 or row - back > first else first
    return oldest >= load_acquire(plan[RESERVED] + lane * 8) - plan[ROWS]


@njit
def list_starts(plan: np.ndarray, rule: np.ndarray, heads: np.ndarray, tails: np.ndarray) -> np.ndarray:
    """List the ids of every valid start: the bounded end of rejection."""
    count = 0
    for lane in range(len(heads)):
        count += max(0, heads[lane] - 1 - tails[lane])
    starts, found = np.empty(count, np.int64), 0
    for lane in range(len(heads)):
        for row in range(tails[lane], heads[lane] - 1):
            if starts_here(plan, rule, lane, row, heads[lane]):
                starts[found] = (lane << LANE_SHIFT) | row
                found += 1
    return starts[:found]
