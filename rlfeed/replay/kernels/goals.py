"""Goals in hindsight: a goal that was reached later stands in for the desired one, on the gathered copy."""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

import numpy as np

from rlfeed.replay.kernels.draw import below, philox, unit_float
from rlfeed.replay.kernels.rows import (
    BASE,
    LANE_SHIFT,
    NBYTES,
    PITCH,
    ROW_MASK,
    ROWS,
    closing_row,
    first_row,
    is_stale,
    slot_of,
)
from rlfeed.replay.kernels.starts import BACK
from rlfeed.replay.kernels.words import copy_row, fence_loads, kernel

FUTURE, FINAL, EPISODE = range(3)
# What a relabelling needs beside: the stream and number of the first draw, the strategy and the steps to sum; the
# addresses of the batch's two desired goals; and of two buffers of [B, n_step] goals for the reward function.
KEY, NUMBER, STRATEGY, N_STEP, DESIRED, NEXT_DESIRED, REACHED, WANTED, ORDER_SIZE = range(9)


@kernel(
    "int64(int64[::1], int64[::1], int64[::1], int64[::1], float64, int64[::1], int64[::1], int64[::1], int64[::1])"
)
def relabel_goals(
    plan: np.ndarray,
    rule: np.ndarray,
    field: np.ndarray,
    order: np.ndarray,
    fraction: float,
    ids: np.ndarray,
    limits: np.ndarray,
    todo: np.ndarray,
    counts: np.ndarray,
) -> int:
    """Replace desired goals by achieved ones of the same episode, and lay out what the rewards depend on.

    Args:
        plan: The storage.
        rule: The unit's valid starts.
        field: The line of the achieved goal in a field table.
        order: What is asked for.
        fraction: Share of the samples that get a new goal.
        ids: ``[B]``.
        limits: ``[B]``, the heads at the draws.
        todo: Which rows of the batch; receives, in its front, those that were overwritten meanwhile.
        counts: ``[B]``: receives the steps whose rewards change, 0 where the goal stays.

    Returns:
        How many were overwritten.
    """
    rows, nbytes, n_step, stale = plan[ROWS], field[NBYTES], order[N_STEP], 0
    for n in range(len(todo)):
        i = todo[n]
        lane, row = ids[i] >> LANE_SHIFT, ids[i] & ROW_MASK
        first = first_row(plan, lane, row)
        oldest, counts[i] = max(first, row - rule[BACK]), 0
        if unit_float(philox(order[KEY], order[NUMBER] + i, 0)) < fraction:
            end = max(row + 1, min(closing_row(plan, lane, row, limits[i]), limits[i] - 1))
            begin = row + 1
            if order[STRATEGY] == FINAL:
                begin = end
            elif order[STRATEGY] == EPISODE:  # as far as it was stored at the draw
                begin = max(first + 1, limits[i] - rows)
            goal = begin + below(philox(order[KEY], order[NUMBER] + i, 1), end - begin + 1)
            oldest, counts[i] = min(oldest, goal), min(n_step, end - row)
            base = field[BASE] + lane * rows * field[PITCH]
            source = base + slot_of(plan, goal) * field[PITCH]
            copy_row(order[DESIRED] + i * nbytes, source, nbytes)
            copy_row(order[NEXT_DESIRED] + i * nbytes, source, nbytes)
            for t in range(counts[i]):
                at = (i * n_step + t) * nbytes
                copy_row(order[REACHED] + at, base + slot_of(plan, row + 1 + t) * field[PITCH], nbytes)
                copy_row(order[WANTED] + at, source, nbytes)
        fence_loads()
        if is_stale(plan, lane, oldest):
            todo[stale] = i
            stale += 1
    return stale
