"""From rows to padded windows of steps: resolved first, then one pass over the rows, and the re-check."""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

import numpy as np
from numba import njit

from rlfeed.replay.kernels.rows import (
    CLOSING,
    FIRST,
    FLAGS,
    FRAMES,
    LANE_SHIFT,
    NBYTES,
    OTHER,
    REWARD,
    ROLE,
    ROLE_CARRY,
    ROLE_OBSERVATION,
    ROLE_PREVIOUS,
    ROLE_STEP,
    ROW_MASK,
    TERMINATED,
    TRUNCATED,
    closing_row,
    first_row,
    is_torn,
    record_of,
)
from rlfeed.replay.kernels.stacks import copy_rows, copy_stack
from rlfeed.replay.kernels.starts import BACK, CROSS
from rlfeed.replay.kernels.words import (
    fence,
    kernel,
    load_f32,
    load_u8,
    memzero,
    store_f32,
    store_i64,
    store_u8,
)
from rlfeed.replay.kernels.writeback import read_carry

# What is known of a window: its first row, how many rows it has, how many of them are burn-in, the first row of the
# episode that it begins in (it may be long gone), and the oldest row that its gather touches.
BEGIN, EXTENT, BURN_IN, ORIGIN, OLDEST, WINDOW_SIZE = range(6)


@kernel("int64(int64[::1], int64[::1], int64[::1], int64[::1], int64[::1], int64, int64, int64[:, ::1])")
def resolve_windows(
    plan: np.ndarray,
    rule: np.ndarray,
    ids: np.ndarray,
    limits: np.ndarray,
    todo: np.ndarray,
    length: int,
    burn_in: int,
    windows: np.ndarray,
) -> int:
    """Find the rows of each window.

    Args:
        plan: The storage.
        rule: The unit's valid starts.
        ids: ``[B]``, the first trained steps.
        limits: ``[B]``, the heads at the draws.
        todo: Which to find; receives, in its front, those that were overwritten meanwhile.
        length: Trained steps at most.
        burn_in: Burn-in steps at most.
        windows: ``[B, WINDOW_SIZE]``: receives what is found.

    Returns:
        How many were overwritten: their windows are not to be trusted.
    """
    stale = 0
    for i in range(len(todo)):
        at = todo[i]
        identity, limit = ids[at], limits[at]
        lane, row = identity >> LANE_SHIFT, identity & ROW_MASK
        origin = first_row(plan, lane, row)
        begin, end = max(origin, row - burn_in), row + length
        if not rule[CROSS]:
            end = min(min(closing_row(plan, lane, row, limit), limit - 1), end)
        windows[at, BEGIN] = begin
        windows[at, EXTENT] = max(1, end - begin)
        windows[at, BURN_IN] = row - begin
        windows[at, ORIGIN] = origin
        windows[at, OLDEST] = max(origin, row - rule[BACK])
        fence()
        if is_torn(plan, lane, windows[at, OLDEST]):
            todo[stale] = at
            stale += 1
    return stale


@njit
def gather_field(
    plan: np.ndarray,
    field: np.ndarray,
    block: int,
    lane: int,
    window: np.ndarray,
    i: int,
    longest: int,
    ends: np.ndarray,
) -> None:
    """Copy one field of one window; clear it at closing rows inside, where there is no step, and behind the window."""
    nbytes, role, frames = field[NBYTES], field[ROLE], field[FRAMES]
    begin, steps, room = window[BEGIN], window[EXTENT], longest
    if role == ROLE_OBSERVATION:
        steps, room = steps + 1, longest + 1
    elif role == ROLE_PREVIOUS:  # once a window, and zeros where the window opens an episode
        begin, steps, room = begin - 1, np.int64(begin != window[ORIGIN]), 1
    destination = block + field[OTHER] + i * room * frames * nbytes
    if frames == 1:
        copy_rows(plan, field, lane, begin, steps, destination)
    else:
        first, crossed = window[ORIGIN], 0
        for t in range(steps):
            if crossed < len(ends) and t > ends[crossed]:
                first = begin + t
                crossed += 1
            copy_stack(plan, field, lane, begin + t, first, destination + t * frames * nbytes)
    memzero(destination + steps * frames * nbytes, (room - steps) * frames * nbytes)
    if role == ROLE_STEP:
        for end in ends:
            memzero(destination + end * nbytes, nbytes)


@njit
def gather_flags(
    plan: np.ndarray,
    block: int,
    identity: int,
    window: np.ndarray,
    i: int,
    longest: int,
    gamma: float,
    out: np.ndarray,
    ends: np.ndarray,
) -> int:
    """Store what is computed for one window, step by step, and clear what lies behind it.

    Returns how many closing rows are inside; ``ends`` receives where.
    """
    lane, begin, steps, burn_in = identity >> LANE_SHIFT, window[BEGIN], window[EXTENT], window[BURN_IN]
    found = 0
    for t in range(longest):
        at = i * longest + t
        inside = t < steps
        flags, reward = np.uint8(0), np.float32(0.0)
        if inside:
            record = record_of(plan, lane, begin + t)
            flags, reward = load_u8(record + FLAGS), load_f32(record + plan[REWARD])
            if flags & CLOSING:
                inside, flags, reward = False, np.uint8(0), np.float32(0.0)
                ends[found] = t
                found += 1
        terminated = flags & TERMINATED != 0
        store_f32(block + out[0] + at * 4, reward)
        store_u8(block + out[1] + at, np.uint8(terminated))
        store_u8(block + out[2] + at, np.uint8(flags & TRUNCATED != 0))
        store_f32(block + out[3] + at * 4, np.float32(gamma) if inside and not terminated else np.float32(0.0))
        store_u8(block + out[4] + at, np.uint8(inside))
        store_u8(block + out[5] + at, np.uint8(inside and t >= burn_in))
        store_u8(block + out[6] + at, np.uint8(flags & FIRST != 0))
    store_i64(block + out[7] + i * 8, steps)
    store_i64(block + out[8] + i * 8, burn_in)
    opens = begin == window[ORIGIN]
    previous = np.float32(0.0) if opens else load_f32(record_of(plan, lane, begin - 1) + plan[REWARD])
    store_f32(block + out[9] + i * 4, previous)
    store_f32(block + out[10] + i * 4, np.float32(1.0))
    store_i64(block + out[11] + i * 8, identity)
    return found


@kernel("int64(int64[::1], int64[:, ::1], int64, int64[::1], int64[:, ::1], int64[::1], int64, float64, int64[::1])")
def gather_windows(
    plan: np.ndarray,
    fields: np.ndarray,
    block: int,
    ids: np.ndarray,
    windows: np.ndarray,
    todo: np.ndarray,
    longest: int,
    gamma: float,
    out: np.ndarray,
) -> int:
    """Gather windows of steps into padded, dense fields of a block; padding is zeros.

    Args:
        plan: The storage.
        fields: Field table; OTHER is the field's offset in the block.
        block: Address of the block.
        ids: ``[B]``.
        windows: From `resolve_windows`.
        todo: Which to gather; receives, in its front, those that were overwritten meanwhile.
        longest: T, steps per padded row.
        gamma: Discount per step.
        out: Offsets in the block of reward, terminated, truncated, discount, mask, loss_mask, is_first, lengths,
            burn_in, prev_reward, weights and ids.

    Returns:
        How many were overwritten.
    """
    stale, ends, carries = 0, np.empty(longest, np.int64), False
    for n in range(len(todo)):
        i = todo[n]
        lane, window = ids[i] >> LANE_SHIFT, windows[i]
        inside = ends[: gather_flags(plan, block, ids[i], window, i, longest, gamma, out, ends)]
        for f in range(fields.shape[0]):
            if fields[f, ROLE] == ROLE_CARRY:
                carries = True
            else:
                gather_field(plan, fields[f], block, lane, window, i, longest, inside)
        if carries:
            read_carry(plan, fields, block, i, lane, window[BEGIN])
        fence()
        if is_torn(plan, lane, window[OLDEST]):
            todo[stale] = i
            stale += 1
    return stale
