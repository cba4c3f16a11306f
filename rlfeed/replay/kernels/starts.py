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
    LIVE,
    RESERVED,
    closing_row,
    first_row,
    index_of,
    record_of,
)
from rlfeed.replay.kernels.words import load_acquire, load_u8

# A rule, by index:
#   PLAIN    1 where every stored step may start: no other rule is looked at
#   WHOLE    1 where only first rows of ended episodes may
#   ENDED    1 where the episode must have ended
#   NEED     steps from the start on (CROSS: rows)
#   BACK     rows before the start that are touched, as far as its episode goes back
#   STRICT   1 where all NEED steps must be in the episode
#   CROSS    1 where the NEED rows run on over ends of episodes
#   GRID     starts lie every so many steps, counted from the episode's first one
#   ALIGNED  1 where the last window of an ended episode ends with it, off the grid; else it stays there and is shorter
PLAIN, WHOLE, ENDED, NEED, BACK, STRICT, CROSS, GRID, ALIGNED, RULE_SIZE = range(10)


@njit
def is_on_grid(rule: np.ndarray, row: int, index: int, end: int) -> bool:
    """Tell whether the grid of an ended episode has a start at a row, the step ``index`` of the episode."""
    grid, steps, need = rule[GRID], index + end - row, rule[NEED]
    if not rule[ALIGNED]:
        return index % grid == 0 and (index == 0 or index - grid + need < steps)
    last = max(0, steps - need)
    if index % grid == 0:
        return index <= last
    return index == last and steps - 1 - (steps - 1) % grid >= last


@njit
def starts_here(plan: np.ndarray, rule: np.ndarray, lane: int, row: int, limit: int) -> bool:
    """Tell whether a sample may start at a row: all rows it touches are live, and its steps are there or an end."""
    record = record_of(plan, lane, row)
    flags = load_u8(record + FLAGS)
    if flags & CLOSING or (rule[WHOLE] and not flags & FIRST):
        return False
    need, grid = rule[NEED], rule[GRID]
    if rule[CROSS]:
        if row + need >= limit or index_of(record) % grid != 0:
            return False
    elif row + need >= limit or rule[STRICT] or grid > 1 or rule[ENDED]:  # else steps or an end are there, whichever
        end = closing_row(plan, lane, row, limit)
        if end == FAR:
            if rule[ENDED] or row + need >= limit or index_of(record) % grid != 0:
                return False
        elif (rule[STRICT] and row + need > end) or (grid > 1 and not is_on_grid(rule, row, index_of(record), end)):
            return False
    oldest = row
    if rule[BACK]:
        oldest = max(row - rule[BACK], first_row(plan, lane, row))
    return oldest >= load_acquire(plan[RESERVED] + lane * 8) - plan[LIVE]


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
