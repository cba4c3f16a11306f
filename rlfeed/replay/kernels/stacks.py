"""Frame stacks: built when they are sampled, from frames that are stored once."""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

import numpy as np
from numba import njit

from rlfeed.replay.kernels.rows import (
    BASE,
    FRAMES,
    LANE_SHIFT,
    NBYTES,
    OTHER,
    PITCH,
    ROLE,
    ROLE_SUCCESSOR,
    ROW_MASK,
    ROWS,
    first_row,
    is_torn,
    last_row,
    slot_of,
)
from rlfeed.replay.kernels.starts import BACK
from rlfeed.replay.kernels.words import copy_row, fence, kernel


@njit
def copy_rows(plan: np.ndarray, field: np.ndarray, lane: int, row: int, count: int, destination: int) -> None:
    """Copy consecutive rows of a field, piece by piece where they lie side by side, else one by one."""
    rows, pitch, nbytes = plan[ROWS], field[PITCH], field[NBYTES]
    base = field[BASE] + lane * rows * pitch
    while count > 0:
        slot = slot_of(plan, row)
        piece = min(count, rows - slot)
        if pitch == nbytes:
            copy_row(destination, base + slot * pitch, piece * nbytes)
        else:
            for i in range(piece):
                copy_row(destination + i * nbytes, base + (slot + i) * pitch, nbytes)
        destination += piece * nbytes
        row += piece
        count -= piece


@njit
def copy_stack(plan: np.ndarray, field: np.ndarray, lane: int, newest: int, first: int, destination: int) -> None:
    """Copy the frames up to ``newest``, oldest first; before the episode's first row there is that row."""
    frames, nbytes = field[FRAMES], field[NBYTES]
    count = min(frames, newest - first + 1)
    copy_rows(plan, field, lane, newest - count + 1, count, destination + (frames - count) * nbytes)
    for i in range(frames - count):
        copy_row(destination + i * nbytes, destination + (frames - count) * nbytes, nbytes)


@njit
def stack_transition(
    plan: np.ndarray, fields: np.ndarray, block: int, i: int, lane: int, row: int, successor: int, first: int, back: int
) -> bool:
    """Build the stacks of sample ``i``, of a step and its successor, of frames from ``first`` on.

    Tells whether what it read was overwritten meanwhile.
    """
    for f in range(fields.shape[0]):
        newest = successor if fields[f, ROLE] == ROLE_SUCCESSOR else row
        destination = block + fields[f, OTHER] + i * fields[f, FRAMES] * fields[f, NBYTES]
        copy_stack(plan, fields[f], lane, newest, first, destination)
    fence()
    return is_torn(plan, lane, max(first, row - back))


@kernel("int64(int64[::1], int64[::1], int64[:, ::1], int64, int64[::1], int64[::1], int64[::1], int64)")
def gather_stacks(
    plan: np.ndarray,
    rule: np.ndarray,
    fields: np.ndarray,
    block: int,
    ids: np.ndarray,
    limits: np.ndarray,
    todo: np.ndarray,
    n_step: int,
) -> int:
    """Gather the frame stacks of transitions into a block.

    Args:
        plan: The storage.
        rule: The unit's valid starts.
        fields: Field table of the stacked fields; OTHER is the field's offset in the block.
        block: Address of the block.
        ids: ``[B]``.
        limits: ``[B]``, the heads at the draws.
        todo: Which rows of the batch to gather; receives, in its front, those that were overwritten meanwhile.
        n_step: Steps to the successor.

    Returns:
        How many were overwritten.
    """
    stale = 0
    for n in range(len(todo)):
        i = todo[n]
        lane, row = ids[i] >> LANE_SHIFT, ids[i] & ROW_MASK
        successor = last_row(plan, lane, row, limits[i], n_step)
        if stack_transition(plan, fields, block, i, lane, row, successor, first_row(plan, lane, row), rule[BACK]):
            todo[stale] = i
            stale += 1
    return stale
