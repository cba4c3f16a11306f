"""Numbered draws: uniform over the valid starts, a pure function of the number and of what is stored."""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

import numpy as np
from numba import njit

from rlfeed.replay.kernels.rows import (
    CLOSING,
    COMMITTED,
    FLAGS,
    LANE_SHIFT,
    LANES,
    LIVE,
    MOST_TRIES,
    NO_START,
    RECORDS,
    RESERVED,
    ROW_MASK,
    ROWS,
    STRIDE,
    TRIES,
    entry_row,
    is_stale,
    lane_span,
    slot_by,
)
from rlfeed.replay.kernels.starts import GRID, PLAIN, list_starts, starts_here
from rlfeed.replay.kernels.words import kernel, load_acquire, load_u8, prefetch

BLOCK = 256  # draws at a time: their numbers and the first lines of their rows stay in the first cache


@njit
def philox(key: int, number: int, attempt: int) -> int:
    """Draw 64 random bits: the first half of Philox-4x32-10 at counter (number, attempt).

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
    """
    mask = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c0, c1 = np.uint64(number) & mask, np.uint64(number) >> half
    c2, c3 = np.uint64(attempt) & mask, np.uint64(attempt) >> half
    k0, k1 = np.uint64(key) & mask, np.uint64(key) >> half
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & mask, (p0 >> half) ^ c3 ^ k1, p0 & mask
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask
    return c0 | (c1 << half)


@njit
def philox_all(key: int, number: int, attempt: int, bits: np.ndarray) -> None:
    """Draw ``bits[i]`` as `philox` does for ``number + i``: round by round over all of them, which is vector code."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    count = len(bits)
    c1, c2, c3 = np.empty(count, np.uint64), np.empty(count, np.uint64), np.empty(count, np.uint64)
    for i in range(count):
        counter = np.uint64(number + i)
        bits[i], c1[i] = counter & mask, counter >> half
        c2[i], c3[i] = np.uint64(attempt) & mask, np.uint64(attempt) >> half
    k0, k1 = np.uint64(key) & mask, np.uint64(key) >> half
    for _ in range(10):
        for i in range(count):
            p0, p1 = np.uint64(0xD2511F53) * (bits[i] & mask), np.uint64(0xCD9E8D57) * (c2[i] & mask)
            bits[i], c2[i] = (p1 >> half) ^ c1[i] ^ k0, (p0 >> half) ^ c3[i] ^ k1
            c1[i], c3[i] = p1 & mask, p0 & mask
        k0 = (k0 + np.uint64(0x9E3779B9)) & mask
        k1 = (k1 + np.uint64(0xBB67AE85)) & mask
    for i in range(count):
        bits[i] |= c1[i] << half


@njit
def unit_float(bits: int) -> float:
    """Scale 64 random bits to [0, 1)."""
    return np.float64(np.uint64(bits) >> np.uint64(11)) * 2.0**-53


@njit
def below(bits: int, bound: int) -> int:
    """Scale 64 random bits to 0 .. bound-1 (bias below bound / 2^64): the high word of their product."""
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    b, n = np.uint64(bits), np.uint64(bound)
    low = (b & mask) * (n & mask)
    middle = (b >> half) * (n & mask) + (low >> half)
    other = (b & mask) * (n >> half) + (middle & mask)
    return np.int64((b >> half) * (n >> half) + (middle >> half) + (other >> half))


@njit
def candidates(plan: np.ndarray, heads: np.ndarray, tails: np.ndarray, upto: np.ndarray) -> int:
    """Snapshot every lane: its head, its oldest live row, and the running count of rows that may hold a step."""
    total = 0
    for lane in range(plan[LANES]):
        heads[lane] = load_acquire(plan[COMMITTED] + lane * 8)
        tails[lane] = max(0, load_acquire(plan[RESERVED] + lane * 8) - plan[LIVE])
        total += max(0, heads[lane] - 1 - tails[lane])
        upto[lane] = total
    return total


@njit
def lane_of(upto: np.ndarray, index: int) -> int:
    """Give the lane that holds candidate ``index``: at once where lanes are equally full, else by bisection."""
    lanes, total = len(upto), upto[-1]
    guess = min(lanes - 1, int(np.float64(index) * lanes / np.float64(total)))
    if upto[guess] > index and (guess == 0 or upto[guess - 1] <= index):
        return guess
    low, high = 0, lanes - 1
    while low < high:
        middle = (low + high) >> 1
        if upto[middle] > index:
            high = middle
        else:
            low = middle + 1
    return low


@njit
def is_overtaken(plan: np.ndarray, heads: np.ndarray, tails: np.ndarray) -> bool:
    """Tell whether a writer has moved since the snapshot."""
    for lane in range(len(heads)):
        if load_acquire(plan[COMMITTED] + lane * 8) != heads[lane] or is_stale(plan, lane, tails[lane]):
            return True
    return False


@kernel("int64(int64[::1], int64[::1], int64, int64, int64, int64[::1], int64[::1])")
def draw_steps(
    plan: np.ndarray, rule: np.ndarray, key: int, number: int, attempt: int, ids: np.ndarray, limits: np.ndarray
) -> int:
    """Draw starts uniformly among the valid ones; draw ``number + i`` depends on its number and the rows alone.

    Args:
        plan: The storage.
        rule: The unit's valid starts.
        key: Of seed, stream and rank.
        number: The first draw's number.
        attempt: The first attempt's number; above 0 only to repeat a draw that turned out torn.
        ids: ``[B]``: receives the ids drawn.
        limits: ``[B]``: receives each lane's head at the draw.

    Returns:
        How many were drawn: B, or NO_START where no row is valid.
    """
    lanes, count = plan[LANES], len(ids)
    heads, tails, upto = np.empty(lanes, np.int64), np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    total = candidates(plan, heads, tails, upto)
    if total == 0:
        return NO_START
    rows, records, stride, inverse = plan[ROWS], plan[RECORDS], plan[STRIDE], 1.0 / np.float64(plan[ROWS])
    bits, spots = np.empty(BLOCK, np.uint64), np.empty(BLOCK, np.int64)
    # Of a grid of starts a try meets one in so many.
    plain, tries = rule[PLAIN] != 0, min(TRIES * rule[GRID], MOST_TRIES)
    starts, listed = np.empty(0, np.int64), False
    for begin in range(0, count, BLOCK):
        end = min(count, begin + BLOCK)
        philox_all(key, number + begin, attempt, bits[: end - begin])
        for i in range(begin, end):
            index = below(bits[i - begin], total)
            lane = lane_of(upto, index)
            row = heads[lane] - 1 - (upto[lane] - index)
            spots[i - begin] = records + (lane * rows + slot_by(rows, inverse, row)) * stride
            prefetch(spots[i - begin])
            ids[i], limits[i] = (lane << LANE_SHIFT) | row, heads[lane]
        for i in range(begin, end):
            lane, row, retry = ids[i] >> LANE_SHIFT, ids[i] & ROW_MASK, 1
            if plain and not load_u8(spots[i - begin] + FLAGS) & CLOSING and not is_stale(plan, lane, row):
                continue
            while not starts_here(plan, rule, lane, row, limits[i]):
                if retry == tries:
                    if not listed:
                        starts, listed = list_starts(plan, rule, heads, tails), True
                    if len(starts) > 0:
                        row = starts[below(philox(key, number + i, attempt + tries), len(starts))]
                        ids[i], limits[i] = row, heads[row >> LANE_SHIFT]
                        break
                    if not is_overtaken(plan, heads, tails):
                        return NO_START
                    total, retry, listed = candidates(plan, heads, tails, upto), 0, False
                    if total == 0:
                        return NO_START
                index = below(philox(key, number + i, attempt + retry), total)
                lane = lane_of(upto, index)
                row = heads[lane] - 1 - (upto[lane] - index)
                ids[i], limits[i] = (lane << LANE_SHIFT) | row, heads[lane]
                retry += 1
    return count


@kernel("int64(int64[::1], int64, int64, int64, int64[::1], int64[::1])")
def draw_episodes(
    plan: np.ndarray, key: int, number: int, attempt: int, ids: np.ndarray, limits: np.ndarray
) -> int:
    """Draw whole episodes uniformly: ended or cut ones whose first row is live.

    Args:
        plan: The storage.
        key: Of seed, stream and rank.
        number: The first draw's number.
        attempt: The attempt's number.
        ids: ``[B]``: receives the ids of the episodes' first steps.
        limits: ``[B]``: receives each lane's head at the draw.

    Returns:
        B, or NO_START where no whole episode is stored.
    """
    lanes = plan[LANES]
    heads, oldest, upto = np.empty(lanes, np.int64), np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    total = 0
    for lane in range(lanes):
        _, first, whole, heads[lane], newest, ended = lane_span(plan, lane)
        oldest[lane] = first + 1 - whole
        total += max(0, newest + ended - oldest[lane])
        upto[lane] = total
    if total == 0:
        return NO_START
    for i in range(len(ids)):
        index = below(philox(key, number + i, attempt), total)
        lane = lane_of(upto, index)
        ordinal = oldest[lane] + index - (upto[lane - 1] if lane > 0 else 0)
        row = entry_row(plan, lane, ordinal, heads[lane] - 1)
        ids[i], limits[i] = (lane << LANE_SHIFT) | row, heads[lane]
    return len(ids)
