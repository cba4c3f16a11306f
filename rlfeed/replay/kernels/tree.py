"""The sum tree of priorities: folded and updated by the learner alone, read by everybody.

Leaf ``lane * rows + slot`` holds the mass (priority ^ alpha) of the start at that row. It is +0.0 where no sample may
start; a start whose priority is zero holds -0.0, so that both weigh nothing and are still told apart. Every inner node
covers 16 children and is computed from them anew, in their order, whenever one changes: nothing drifts.
"""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false

import math

import numpy as np
from numba import njit

from rlfeed.replay.kernels.rows import (
    CLOSING,
    COMMITTED,
    FLAGS,
    LANE_SHIFT,
    LANES,
    LIVE,
    PRIORITY,
    RESERVED,
    ROW_MASK,
    ROWS,
    first_row,
    is_stale,
    record_of,
    slot_by,
)
from rlfeed.replay.kernels.starts import ENDED, NEED, WHOLE, starts_here
from rlfeed.replay.kernels.words import kernel, load_acquire, load_f32, load_f64, load_u8, prefetch

FAN, FAN_BITS = 16, 4
LEAST_MASS, MOST_MASS = 1e-150, 1e150
# Words of a tree beside its nodes: how many starts it holds, then per lane the head it was folded at, twice that plus 1
# where the row before was a closing one.
STARTS, FOLDED = 0, 1


@njit
def is_blank(mass: float) -> bool:
    """Tell whether a leaf is +0.0: no start, or one that has not been folded in yet."""
    return mass == 0.0 and math.copysign(1.0, mass) > 0.0


@njit
def mass_of(priority: float, alpha: float) -> float:
    """Give the mass of a priority: -0.0 for none, else within what sums and weights can bear."""
    if not priority > 0.0:
        return -0.0
    return min(max(priority**alpha, LEAST_MASS), MOST_MASS)


@njit
def sum_children(address: int) -> float:
    """Sum up 16 neighbours, in four chains: one chain would wait for each addition."""
    a, b = load_f64(address), load_f64(address + 8)
    c, d = load_f64(address + 16), load_f64(address + 24)
    for place in range(address + 32, address + 8 * FAN, 32):
        a, b = a + load_f64(place), b + load_f64(place + 8)
        c, d = c + load_f64(place + 16), d + load_f64(place + 24)
    return (a + b) + (c + d)


@njit
def max_children(address: int) -> float:
    """Find the greatest of 16 neighbours."""
    a, b = load_f64(address), load_f64(address + 8)
    c, d = load_f64(address + 16), load_f64(address + 24)
    for place in range(address + 32, address + 8 * FAN, 32):
        e, f, g, h = load_f64(place), load_f64(place + 8), load_f64(place + 16), load_f64(place + 24)
        a, b, c, d = e if e > a else a, f if f > b else b, g if g > c else c, h if h > d else d
    a, b = b if b > a else a, d if d > c else c
    return b if b > a else a


@njit
def min_children(address: int) -> float:
    """Find the least of 16 neighbours that is above 0."""
    least = np.inf
    for place in range(address, address + 8 * FAN, 8):
        mass = load_f64(place)
        least = mass if 0.0 < mass < least else least
    return least


@njit
def refresh(nodes: np.ndarray, levels: np.ndarray, touched: np.ndarray, count: int) -> None:
    """Compute the nodes above changed leaves anew, level by level: sum, greatest, and the least where it is kept.

    ``touched`` holds the changed nodes' numbers on the first level above the leaves, in order, and is used up.
    """
    inner = levels[-1, 0] + levels[-1, 1] - levels[0, 1]
    lows = len(nodes) > levels[0, 1] + 2 * inner
    for level in range(1, len(levels)):
        below, here, kept, last = levels[level - 1, 0], levels[level, 0], 0, -1
        most = inner if level > 1 else 0
        for i in range(count):
            node = touched[i]
            if node == last:
                continue
            last, child = node, nodes.ctypes.data + (below + node * FAN) * 8
            nodes[here + node] = sum_children(child)
            nodes[here + node + inner] = max_children(child + most * 8)
            if lows:
                nodes[here + node + 2 * inner] = min_children(child + 2 * most * 8)
            parent = node >> FAN_BITS
            if kept == 0 or touched[kept - 1] != parent:
                touched[kept] = parent
                kept += 1
        count = kept


@njit
def root_of(nodes: np.ndarray, levels: np.ndarray) -> tuple[float, float]:
    """Give the mass of all starts, and the greatest of one."""
    root = levels[-1, 0]
    return nodes[root], nodes[root + root + levels[-1, 1] - levels[0, 1]]


@njit
def is_closed(plan: np.ndarray, lane: int, head: int) -> bool:
    """Tell whether the row before a head closes an episode."""
    return head > 0 and load_u8(record_of(plan, lane, head - 1) + FLAGS) & CLOSING != 0


@njit
def first_changed(plan: np.ndarray, rule: np.ndarray, lane: int, folded: int, head: int) -> tuple[int, int]:
    """Give the rows among which starts may have appeared since a lane was folded: from, and up to."""
    ended = False
    for row in range(max(0, folded - 1), head):
        ended = ended or load_u8(record_of(plan, lane, row) + FLAGS) & CLOSING != 0
    begin, end = folded - 1 - rule[NEED], head - 1
    if not ended:
        end = max(begin, head - rule[NEED])
    elif rule[WHOLE] or rule[ENDED]:
        begin = first_row(plan, lane, folded - 1) if folded > 0 else 0
    return begin, min(end, head - 1)


@kernel("int64(int64[::1], int64[::1], float64[::1], int64[::1], int64[:, ::1], float64)")
def fold(
    plan: np.ndarray, rule: np.ndarray, nodes: np.ndarray, words: np.ndarray, levels: np.ndarray, alpha: float
) -> int:
    """Take in what was written since: rows that were given away lose their mass, new starts get the greatest one.

    Args:
        plan: The storage.
        rule: The unit's valid starts.
        nodes: Leaves, then sums, maxima and perhaps minima.
        words: STARTS, then FOLDED of every lane.
        levels: ``[K, 2]``: where each level's sums begin and how many there are.
        alpha: Exponent, where actors give priorities.

    Returns:
        How many starts were added.
    """
    lanes, rows, room = plan[LANES], plan[ROWS], np.int64(0)
    heads, begins, ends = np.empty(lanes, np.int64), np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    for lane in range(lanes):
        head = load_acquire(plan[COMMITTED] + lane * 8)
        known, was_closed = words[FOLDED + lane] >> 1, words[FOLDED + lane] & 1
        heads[lane], begins[lane], ends[lane] = -1, 0, 0
        if head == known and is_closed(plan, lane, head) == was_closed:
            continue
        heads[lane] = head
        tail = max(0, load_acquire(plan[RESERVED] + lane * 8) - plan[LIVE])
        begin, ends[lane] = first_changed(plan, rule, lane, max(known, tail), head)
        begins[lane] = max(begin, tail)
        room += 3 * ((head - min(begins[lane], max(known, head - rows))) // FAN + 4)
    if room == 0:
        return 0
    touched, count, added, gone = np.empty(room, np.int64), 0, 0, 0.0
    for lane in range(lanes):
        known, head = words[FOLDED + lane] >> 1, heads[lane]
        dead, fresh = max(known - plan[LIVE], head - rows, 0), max(known, head - rows)
        gap = max(0, head - plan[LIVE] - dead)  # rows that can no longer be drawn, then the places of new ones
        for i in range(gap + head - fresh):
            row = dead + i if i < gap else fresh + i - gap
            leaf = lane * rows + row % rows
            if not is_blank(nodes[leaf]):
                gone, nodes[leaf] = max(gone, nodes[leaf]), 0.0
                words[STARTS] -= 1
                if count == 0 or touched[count - 1] != leaf >> FAN_BITS:
                    touched[count] = leaf >> FAN_BITS
                    count += 1
    if gone > 0.0 and gone >= root_of(nodes, levels)[1]:  # the greatest mass went: it is not to live on in new rows
        refresh(nodes, levels, touched, count)
        count = 0
    newest = root_of(nodes, levels)[1]
    newest = newest if newest > 0.0 else 1.0
    for lane in range(lanes):
        head = heads[lane]
        for row in range(begins[lane], min(ends[lane], head)):
            leaf = lane * rows + row % rows
            if is_blank(nodes[leaf]) and starts_here(plan, rule, lane, row, head):
                nodes[leaf] = newest
                if plan[PRIORITY] >= 0:
                    nodes[leaf] = mass_of(np.float64(load_f32(record_of(plan, lane, row) + plan[PRIORITY])), alpha)
                words[STARTS] += 1
                added += 1
                if count == 0 or touched[count - 1] != leaf >> FAN_BITS:
                    touched[count] = leaf >> FAN_BITS
                    count += 1
        if head >= 0:
            words[FOLDED + lane] = 2 * head + np.int64(is_closed(plan, lane, head))
    refresh(nodes, levels, touched, count)
    return added


@kernel("int64(int64[::1], int64[::1])")
def is_behind(plan: np.ndarray, words: np.ndarray) -> int:
    """Tell whether anything was written since the lanes were folded.

    Args:
        plan: The storage.
        words: STARTS, then FOLDED of every lane.

    Returns:
        1 or 0.
    """
    for lane in range(plan[LANES]):
        head = load_acquire(plan[COMMITTED] + lane * 8)
        if head != words[FOLDED + lane] >> 1:
            return 1
        if is_closed(plan, lane, head) and not words[FOLDED + lane] & 1:
            return 1
    return 0


@kernel("int64(int64[::1], int64[::1], float64[::1])")
def check_updates(plan: np.ndarray, ids: np.ndarray, values: np.ndarray) -> int:
    """Count the ids whose step is still stored.

    Args:
        plan: The storage.
        ids: ``[B]``; -1 stands for a row that was lost when it was added.
        values: ``[B]``.

    Returns:
        How many; or ``-1 - 2 i`` where id i was never given out, ``-2 - 2 i`` where value i is no priority.
    """
    live = 0
    for i in range(len(ids)):
        lane, row = ids[i] >> LANE_SHIFT, ids[i] & ROW_MASK
        if not 0.0 <= values[i] < np.inf:
            return -2 - 2 * i
        if ids[i] == -1:
            continue
        if lane < 0 or lane >= plan[LANES] or row >= load_acquire(plan[COMMITTED] + lane * 8) - 1:
            return -1 - 2 * i
        live += not is_stale(plan, lane, row)
    return live


@kernel("void(int64[::1], float64[::1], int64[::1], int64[:, ::1], int64[::1], float64[::1], float64)")
def set_priorities(
    plan: np.ndarray,
    nodes: np.ndarray,
    words: np.ndarray,
    levels: np.ndarray,
    ids: np.ndarray,
    values: np.ndarray,
    alpha: float,
) -> None:
    """Give starts new priorities; ids overwritten or that start nothing are left out, the last of a duplicate wins.

    Args:
        plan: The storage.
        nodes: Leaves, then sums, maxima and perhaps minima.
        words: STARTS, then FOLDED of every lane.
        levels: ``[K, 2]``: where each level's sums begin and how many there are.
        ids: ``[B]``.
        values: ``[B]``, >= 0.
        alpha: Exponent.
    """
    rows, count = plan[ROWS], 0
    touched, leaves, base = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64), nodes.ctypes.data
    inverse = 1.0 / np.float64(rows)
    greatest = base + (levels[-1, 0] + levels[-1, 1] - levels[0, 1] + levels[1, 0]) * 8
    for i in range(len(ids)):  # the leaf, and the greatest masses of the nodes beside the one above it
        leaf = (ids[i] >> LANE_SHIFT) * rows + slot_by(rows, inverse, ids[i] & ROW_MASK)
        leaves[i] = leaf
        prefetch(base + leaf * 8)
        prefetch(greatest + (leaf >> 2 * FAN_BITS) * FAN * 8)
        prefetch(greatest + (leaf >> 2 * FAN_BITS) * FAN * 8 + 64)
    for i in range(len(ids)):
        lane, row = ids[i] >> LANE_SHIFT, ids[i] & ROW_MASK
        if ids[i] < 0 or is_stale(plan, lane, row) or row >= words[FOLDED + lane] >> 1:
            continue
        leaf = leaves[i]
        if not is_blank(nodes[leaf]):
            nodes[leaf] = mass_of(values[i], alpha)
            touched[count] = leaf >> FAN_BITS
            count += 1
    touched = np.sort(touched[:count])
    refresh(nodes, levels, touched, count)


@kernel("void(float64[::1], int64[:, ::1])")
def rebuild(nodes: np.ndarray, levels: np.ndarray) -> None:
    """Compute every inner node from the leaves.

    Args:
        nodes: Leaves, then sums, maxima and perhaps minima.
        levels: ``[K, 2]``: where each level's sums begin and how many there are.
    """
    refresh(nodes, levels, np.arange(levels[0, 1] // FAN), levels[0, 1] // FAN)
