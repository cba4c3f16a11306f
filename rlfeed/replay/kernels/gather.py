"""From rows to transitions: one pass over the rows, dense fields out, and the re-check that nobody overwrote them."""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

import numpy as np
from numba import njit

from rlfeed.replay.kernels.rows import (
    BASE,
    BLOCK,
    FLAGS,
    LANE_SHIFT,
    NBYTES,
    OTHER,
    PITCH,
    RECORDS,
    REWARD,
    ROLE,
    ROLE_SUCCESSOR,
    ROW_MASK,
    ROWS,
    STRIDE,
    TERMINATED,
    TRUNCATED,
    closing_row,
    is_stale,
    slot_of,
)
from rlfeed.replay.kernels.words import (
    copy_row,
    fence,
    kernel,
    load_f32,
    load_u8,
    prefetch,
    store_f32,
    store_i64,
    store_u8,
)


@njit
def sum_steps(
    plan: np.ndarray, base: int, slot: int, steps: int, gamma: float, block: int, i: int, out: np.ndarray
) -> int:
    """Store what is computed for one transition, and give the slot of the row after its last step."""
    rows, records, stride, reward = plan[ROWS], plan[RECORDS] + base * plan[STRIDE], plan[STRIDE], plan[REWARD]
    total, weight, flags = np.float64(0.0), np.float64(1.0), np.uint8(0)
    for _ in range(steps):
        record = records + slot * stride
        total += weight * np.float64(load_f32(record + reward))
        weight *= gamma
        flags = load_u8(record + FLAGS)
        slot = slot + 1 if slot + 1 < rows else 0
    terminated = flags & TERMINATED != 0
    store_f32(block + out[0] + i * 4, np.float32(total))
    store_u8(block + out[1] + i, np.uint8(terminated))
    store_u8(block + out[2] + i, np.uint8(flags & TRUNCATED != 0))
    store_f32(block + out[3] + i * 4, np.float32(0.0) if terminated else np.float32(weight))
    store_f32(block + out[4] + i * 4, np.float32(1.0))
    return slot


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
    here, there = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
    for begin in range(0, count, BLOCK):  # what a block touches stays in the first cache, and is checked at once
        size = min(BLOCK, count - begin)
        for i in range(size):
            at = todo[begin + i]
            store_i64(block + out[5] + at * 8, ids[at])
            there[i] = slot_of(plan, ids[at] & ROW_MASK)
            here[i] = (ids[at] >> LANE_SHIFT) * rows + there[i]
            for line in range(0, (n_step + 1) * stride, 64):
                prefetch(records + here[i] * stride + line)
        for i in range(size):
            at, slot, steps = todo[begin + i], there[i], 1
            if n_step > 1:
                lane, row, limit = ids[at] >> LANE_SHIFT, ids[at] & ROW_MASK, limits[at]
                steps = max(1, min(n_step, min(closing_row(plan, lane, row, limit), limit - 1) - row))
            base = here[i] - slot
            there[i] = base + sum_steps(plan, base, slot, steps, gamma, block, at, out)
        for f in range(fields.shape[0]):
            base, pitch, nbytes = fields[f, BASE], fields[f, PITCH], fields[f, NBYTES]
            index = there if fields[f, ROLE] == ROLE_SUCCESSOR else here
            for i in range(size):
                copy_row(block + fields[f, OTHER] + todo[begin + i] * nbytes, base + index[i] * pitch, nbytes)
        fence()
        for i in range(size):
            at = todo[begin + i]
            if is_stale(plan, ids[at] >> LANE_SHIFT, ids[at] & ROW_MASK):
                todo[stale] = at
                stale += 1
    return stale
