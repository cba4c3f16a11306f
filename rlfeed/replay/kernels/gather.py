"""From rows to transitions: one pass over the rows, dense fields out, and the re-check that nobody overwrote them.

Random rows wait for memory, about 100 ns each. While one block of them is copied, the lines of the next one are asked
for, evenly between the copies: all at once they would fill the few slots a core has for pending lines, and stall it.
"""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

import numpy as np
from numba import njit

from rlfeed.replay.kernels.rows import (
    BASE,
    CLOSING,
    FLAGS,
    LANE_SHIFT,
    NBYTES,
    OTHER,
    PITCH,
    RECORDS,
    RESERVED,
    REWARD,
    ROLE,
    ROLE_SUCCESSOR,
    ROW_MASK,
    ROWS,
    STRIDE,
    TERMINATED,
    TRUNCATED,
    slot_by,
)
from rlfeed.replay.kernels.words import (
    copy_row,
    fence_loads,
    kernel,
    load_acquire,
    load_f32,
    load_u8,
    prefetch,
    store_f32,
    store_i64,
    store_u8,
)

BLOCK = 32  # rows at a time: those of two blocks stay in the first cache


@njit
def place_rows(
    rows: int, ids: np.ndarray, todo: np.ndarray, n_step: int, here: np.ndarray, there: np.ndarray
) -> None:
    """Find the places of rows, over all lanes, and those of their successors where no episode ends before."""
    inverse = 1.0 / np.float64(rows)
    for i in range(len(todo)):
        slot = slot_by(rows, inverse, ids[todo[i]] & ROW_MASK)
        here[i] = (ids[todo[i]] >> LANE_SHIFT) * rows + slot
        there[i] = here[i] + n_step - (rows if slot + n_step >= rows else 0)


@njit
def sum_steps(
    plan: np.ndarray, base: int, slot: int, most: int, gamma: float
) -> tuple[int, float, float, int]:
    """Sum the rewards of up to ``most`` steps of one episode.

    The rows themselves say where it ends: they are needed anyway, and the directory would be one more wait for memory.

    Returns the slot of the row after the last step, the sum, gamma^k, and the last step's flags.
    """
    rows, stride, reward = plan[ROWS], plan[STRIDE], plan[REWARD]
    records = plan[RECORDS] + base * stride
    total, weight, flags = np.float64(0.0), np.float64(1.0), np.uint8(0)
    for _ in range(most):
        record = records + slot * stride
        now = load_u8(record + FLAGS)
        if now & CLOSING:
            break
        flags = now
        total += weight * np.float64(load_f32(record + reward))
        weight *= gamma
        slot = slot + 1 if slot + 1 < rows else 0
    return slot, total, weight, flags


@njit
def copy_field(
    field: np.ndarray, block: int, todo: np.ndarray, rows: np.ndarray, upcoming: np.ndarray
) -> None:
    """Copy one field of the rows of a block, and ask for the lines of the next block's rows."""
    base, pitch, nbytes, destination = field[BASE], field[PITCH], field[NBYTES], block + field[OTHER]
    for i in range(len(rows)):
        copy_row(destination + todo[i] * nbytes, base + rows[i] * pitch, nbytes)
        if i < len(upcoming):
            prefetch(base + upcoming[i] * pitch)
            prefetch(base + upcoming[i] * pitch + nbytes - 1)


@njit
def store_single(
    plan: np.ndarray,
    gamma: float,
    block: int,
    out: np.ndarray,
    todo: np.ndarray,
    rows: np.ndarray,
    upcoming: np.ndarray,
) -> None:
    """Store what is computed for one-step transitions: `store_summed` without the sum, at half its price."""
    records, stride, reward, discount = plan[RECORDS], plan[STRIDE], plan[REWARD], np.float32(gamma)
    rewards, terminated, truncated, discounts = block + out[0], block + out[1], block + out[2], block + out[3]
    for i in range(len(rows)):
        at, record = todo[i], records + rows[i] * stride
        flags = load_u8(record + FLAGS)
        store_f32(rewards + at * 4, load_f32(record + reward))
        store_u8(terminated + at, flags & TERMINATED != 0)
        store_u8(truncated + at, flags & TRUNCATED != 0)
        store_f32(discounts + at * 4, np.float32(0.0) if flags & TERMINATED else discount)
        if i < len(upcoming):
            prefetch(records + upcoming[i] * stride)


@njit
def store_summed(
    plan: np.ndarray,
    gamma: float,
    n_step: int,
    block: int,
    out: np.ndarray,
    todo: np.ndarray,
    ids: np.ndarray,
    limits: np.ndarray,
    rows: np.ndarray,
    successors: np.ndarray,
    upcoming: np.ndarray,
) -> None:
    """Store what is computed for n-step transitions, and say where their successors really lie."""
    records, stride = plan[RECORDS], plan[STRIDE]
    for i in range(len(rows)):
        at, row = todo[i], ids[todo[i]] & ROW_MASK
        base = (ids[at] >> LANE_SHIFT) * plan[ROWS]
        slot, total, weight, flags = sum_steps(plan, base, rows[i] - base, min(n_step, limits[at] - 1 - row), gamma)
        successors[i] = base + slot
        store_f32(block + out[0] + at * 4, np.float32(total))
        store_u8(block + out[1] + at, flags & TERMINATED != 0)
        store_u8(block + out[2] + at, flags & TRUNCATED != 0)
        store_f32(block + out[3] + at * 4, np.float32(0.0) if flags & TERMINATED else np.float32(weight))
        if i < len(upcoming):
            for step in range(n_step):
                prefetch(records + (upcoming[i] + step) * stride)


@kernel("int64(int64[::1], int64[:, ::1], int64, int64[::1], int64[::1], int64[::1], float64, int64, int64[::1])")
def gather_transitions(
    plan: np.ndarray,
    fields: np.ndarray,
    block: int,
    ids: np.ndarray,
    limits: np.ndarray,
    todo: np.ndarray,
    gamma: float,
    n_step: int,
    out: np.ndarray,
) -> int:
    """Gather n-step transitions into the dense fields of a block.

    Args:
        plan: The storage.
        fields: Field table; OTHER is the field's offset in the block.
        block: Address of the block.
        ids: ``[B]``.
        limits: ``[B]``, the heads at the draws.
        todo: Which rows of the batch to gather; receives, in its front, those that were overwritten meanwhile.
        gamma: Discount per step.
        n_step: Steps to sum.
        out: Offsets in the block of reward, terminated, truncated, discount, weights and ids.

    Returns:
        How many were overwritten.
    """
    count, rows, records, stride, stale = len(todo), plan[ROWS], plan[RECORDS], plan[STRIDE], 0
    weights, numbers = block + out[4], block + out[5]
    here, there = np.empty((2, BLOCK), np.int64), np.empty((2, BLOCK), np.int64)
    size = min(BLOCK, count)
    place_rows(rows, ids, todo[:size], n_step, here[0], there[0])
    for i in range(size):
        for line in range(0, (n_step + 1) * stride, 64):
            prefetch(records + here[0, i] * stride + line)
    for begin in range(0, count, BLOCK):
        half, size = begin // BLOCK & 1, min(BLOCK, count - begin)
        now, after = todo[begin : begin + size], todo[begin + size : begin + size + BLOCK]
        at, then = here[half, :size], there[half, :size]
        next_at, next_then = here[1 - half, : len(after)], there[1 - half, : len(after)]
        place_rows(rows, ids, after, n_step, next_at, next_then)
        if n_step == 1:
            store_single(plan, gamma, block, out, now, at, next_at)
        else:
            store_summed(plan, gamma, n_step, block, out, now, ids, limits, at, then, next_at)
        for i in now:
            store_f32(weights + i * 4, np.float32(1.0))
            store_i64(numbers + i * 8, ids[i])
        for f in range(fields.shape[0]):
            if fields[f, ROLE] == ROLE_SUCCESSOR:
                copy_field(fields[f], block, now, then, next_then)
            else:
                copy_field(fields[f], block, now, at, next_at)
        fence_loads()
        for i in range(size):
            identity = ids[now[i]]
            if identity & ROW_MASK < load_acquire(plan[RESERVED] + (identity >> LANE_SHIFT) * 8) - rows:
                todo[stale] = now[i]
                stale += 1
    return stale
