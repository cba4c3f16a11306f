"""Draws in proportion to the masses of a sum tree, and the importance weights that make up for it."""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportAssignmentType=false, reportReturnType=false

import numpy as np
from numba import njit

from rlfeed.replay.kernels.draw import lane_of, philox, philox_all, unit_float
from rlfeed.replay.kernels.rows import (
    COMMITTED,
    LANE_SHIFT,
    LANES,
    LIVE,
    NO_START,
    RESERVED,
    ROW_MASK,
    ROWS,
    TRIES,
    is_stale,
    record_of,
    slot_by,
)
from rlfeed.replay.kernels.starts import NEED, PLAIN, list_starts, starts_here
from rlfeed.replay.kernels.tree import FAN, FOLDED, is_blank, root_of
from rlfeed.replay.kernels.words import kernel, load_acquire, load_f64, prefetch, store_f32


@njit
def unfolded(plan: np.ndarray, rule: np.ndarray, words: np.ndarray, begins: np.ndarray, upto: np.ndarray) -> int:
    """Count the rows of each lane that were written since it was folded and may start a sample.

    The learner folds before it draws and finds none. Another process may not fold: it draws those by arithmetic, each
    with the greatest mass.
    """
    total = np.int64(0)
    for lane in range(plan[LANES]):
        head = load_acquire(plan[COMMITTED] + lane * 8)
        known, tail = words[FOLDED + lane] >> 1, max(0, load_acquire(plan[RESERVED] + lane * 8) - plan[LIVE])
        begins[lane] = max(known - rule[NEED], tail) if head > known else head
        total += max(0, head - 1 - begins[lane])
        upto[lane] = total
    return total


@njit
def step_down(address: int, rest: float, steps: np.ndarray) -> tuple[int, float]:
    """Find which of 16 children a mass falls on: a group of four, then one of those.

    The only branch is one that is hardly ever taken: where a mass falls cannot be predicted. So the sums go through
    ``steps`` (``[4]``, the first is 0), and children are read by address, which spares the check for negative indices.
    """
    steps[1] = (load_f64(address) + load_f64(address + 8)) + (load_f64(address + 16) + load_f64(address + 24))
    steps[2] = (load_f64(address + 32) + load_f64(address + 40)) + (load_f64(address + 48) + load_f64(address + 56))
    steps[3] = (load_f64(address + 64) + load_f64(address + 72)) + (load_f64(address + 80) + load_f64(address + 88))
    steps[2] += steps[1]
    steps[3] += steps[2]
    group = np.uint64(rest >= steps[1]) + np.uint64(rest >= steps[2]) + np.uint64(rest >= steps[3])
    rest -= steps[group]
    four = address + 32 * np.int64(group)
    steps[1] = load_f64(four)
    steps[2] = steps[1] + load_f64(four + 8)
    steps[3] = steps[2] + load_f64(four + 16)
    place = np.uint64(rest >= steps[1]) + np.uint64(rest >= steps[2]) + np.uint64(rest >= steps[3])
    rest -= steps[place]
    child = 4 * np.int64(group) + np.int64(place)
    while not load_f64(address + 8 * child) > 0.0 and child > 0:  # rounding led behind the last one that weighs
        child -= 1
        rest = load_f64(address + 8 * child) * (1.0 - 2.0**-53)
    return child, rest if rest > 0.0 else 0.0


@njit
def descend(nodes: np.ndarray, levels: np.ndarray, places: np.ndarray, masses: np.ndarray) -> None:
    """Find the leaf under each mass: all of them level by level, so that their cache misses overlap."""
    steps = np.zeros(4, np.float64)
    for level in range(len(levels) - 1, 0, -1):
        here = nodes.ctypes.data + levels[level - 1, 0] * 8
        below = nodes.ctypes.data + levels[max(level - 2, 0), 0] * 8
        for i in range(len(places)):
            child, masses[i] = step_down(here + places[i] * FAN * 8, masses[i], steps)
            places[i] = places[i] * FAN + child
            if level > 1:
                prefetch(below + places[i] * FAN * 8)
                prefetch(below + places[i] * FAN * 8 + 64)


@njit
def find_row(plan: np.ndarray, words: np.ndarray, leaf: int, inverse: float) -> int:
    """Give the id that a leaf stands for, or -1; ``inverse`` is one over the rows, for a division takes 10 ns."""
    rows = plan[ROWS]
    lane = np.int64(np.float64(leaf) * inverse)
    lane += np.int64((lane + 1) * rows <= leaf) - np.int64(lane * rows > leaf)
    if lane >= plan[LANES]:
        return -1
    newest = (words[FOLDED + lane] >> 1) - 1
    back = slot_by(rows, inverse, max(newest, 0)) - (leaf - lane * rows)
    row = newest - (back if back >= 0 else back + rows)
    return (lane << LANE_SHIFT) | row if row >= 0 else -1


@njit
def is_start(plan: np.ndarray, rule: np.ndarray, identity: int, limit: int) -> bool:
    """Tell whether an id found in the tree still starts a sample."""
    if identity < 0:
        return False
    lane, row = identity >> LANE_SHIFT, identity & ROW_MASK
    if rule[PLAIN]:  # a leaf with a mass was a start when it was folded, and stays one while it is live
        return not is_stale(plan, lane, row)
    return starts_here(plan, rule, lane, row, limit)


@njit
def list_masses(
    plan: np.ndarray, rule: np.ndarray, nodes: np.ndarray, words: np.ndarray, heads: np.ndarray, newest: float
) -> tuple[np.ndarray, np.ndarray]:
    """List every valid start and the running sum of their masses: the bounded end of rejection."""
    lanes, rows = plan[LANES], plan[ROWS]
    tails = np.empty(lanes, np.int64)
    for lane in range(lanes):
        heads[lane] = load_acquire(plan[COMMITTED] + lane * 8)
        tails[lane] = max(0, load_acquire(plan[RESERVED] + lane * 8) - plan[LIVE])
    starts = list_starts(plan, rule, heads, tails)
    upto, total = np.empty(len(starts), np.float64), 0.0
    for i in range(len(starts)):
        lane, row = starts[i] >> LANE_SHIFT, starts[i] & ROW_MASK
        mass, known = nodes[lane * rows + row % rows], words[FOLDED + lane] >> 1
        total += newest if row >= known or is_blank(mass) else mass
        upto[i] = total
    return starts, upto


@kernel(
    "int64(int64[::1], int64[::1], float64[::1], int64[::1], int64[:, ::1], int64, int64, int64, int64[::1],"
    " int64[::1], float64[::1])"
)
def draw_masses(
    plan: np.ndarray,
    rule: np.ndarray,
    nodes: np.ndarray,
    words: np.ndarray,
    levels: np.ndarray,
    key: int,
    number: int,
    attempt: int,
    ids: np.ndarray,
    limits: np.ndarray,
    masses: np.ndarray,
) -> int:
    """Draw starts in proportion to their masses; draw ``number + i`` depends on its number, the rows and the tree.

    Args:
        plan: The storage.
        rule: The unit's valid starts.
        nodes: Leaves, then sums, maxima and perhaps minima.
        words: STARTS, then FOLDED of every lane.
        levels: ``[K, 2]``: where each level's sums begin and how many there are.
        key: Of seed, stream and rank.
        number: The first draw's number.
        attempt: The first attempt's number; above 0 only to repeat a draw that turned out torn.
        ids: ``[B]``: receives the ids drawn.
        limits: ``[B]``: receives each lane's head at the draw.
        masses: ``[B]``: receives the mass of each.

    Returns:
        B, or NO_START where no valid start has any mass.
    """
    count, lanes, rows, inverse = len(ids), plan[LANES], plan[ROWS], 1.0 / np.float64(plan[ROWS])
    begins, upto, heads = np.empty(lanes, np.int64), np.empty(lanes, np.int64), np.empty(lanes, np.int64)
    extra = unfolded(plan, rule, words, begins, upto)
    folded, newest = root_of(nodes, levels)
    newest = newest if newest > 0.0 else 1.0
    starts, sums = np.empty(0, np.int64), np.empty(0, np.float64)
    bits, places, rest = np.empty(count, np.uint64), np.zeros(count, np.int64), np.empty(count, np.float64)
    philox_all(key, number, attempt, bits)
    one_place, one_rest = np.empty(1, np.int64), np.empty(1, np.float64)
    total = folded + extra * newest
    if not total > 0.0:
        return NO_START
    for i in range(count):
        rest[i] = unit_float(bits[i]) * total
    if extra == 0:
        descend(nodes, levels, places, rest)
    for i in range(count):
        ids[i], masses[i], limits[i] = find_row(plan, words, places[i], inverse), nodes[places[i]], 0
        if ids[i] >= 0:
            limits[i] = load_acquire(plan[COMMITTED] + (ids[i] >> LANE_SHIFT) * 8)
            prefetch(record_of(plan, ids[i] >> LANE_SHIFT, ids[i] & ROW_MASK))
    for i in range(count):
        drawn = extra == 0 and masses[i] > 0.0 and is_start(plan, rule, ids[i], limits[i])
        retry = 0 if extra > 0 else 1
        while not drawn:
            if retry == TRIES:
                if len(starts) == 0:
                    starts, sums = list_masses(plan, rule, nodes, words, heads, newest)
                    if len(starts) == 0 or not sums[-1] > 0.0:
                        return NO_START
                chosen = np.searchsorted(sums, unit_float(philox(key, number + i, attempt + TRIES)) * sums[-1], "right")
                chosen = min(chosen, len(starts) - 1)
                while chosen > 0 and not sums[chosen] > sums[chosen - 1]:
                    chosen -= 1
                ids[i], limits[i] = starts[chosen], heads[starts[chosen] >> LANE_SHIFT]
                masses[i] = sums[chosen] - (sums[chosen - 1] if chosen > 0 else 0.0)
                break
            mass = unit_float(philox(key, number + i, attempt + retry)) * total
            retry += 1
            if mass >= folded:  # a row that no tick has folded in yet
                index = min(extra - 1, np.int64((mass - folded) / newest))
                lane = lane_of(upto, index)
                row = begins[lane] + index - (upto[lane - 1] if lane > 0 else 0)
                limits[i], ids[i] = load_acquire(plan[COMMITTED] + lane * 8), (lane << LANE_SHIFT) | row
                fresh = row >= words[FOLDED + lane] >> 1 or is_blank(nodes[lane * rows + row % rows])
                drawn, masses[i] = fresh and starts_here(plan, rule, lane, row, limits[i]), newest
            else:
                one_place[0], one_rest[0] = 0, mass
                descend(nodes, levels, one_place, one_rest)
                ids[i], masses[i] = find_row(plan, words, one_place[0], inverse), nodes[one_place[0]]
                if ids[i] >= 0 and masses[i] > 0.0:
                    limits[i] = load_acquire(plan[COMMITTED] + (ids[i] >> LANE_SHIFT) * 8)
                    drawn = is_start(plan, rule, ids[i], limits[i])
    return count


@kernel("void(float64[::1], float64, int64, int64)")
def store_weights(masses: np.ndarray, scale: float, count: int, destination: int) -> None:
    """Store weights as float32, over the greatest of them or over a scale.

    Args:
        masses: ``[B]``, the weights.
        scale: What they are divided by; 0 is the greatest of them.
        count: B.
        destination: Address.
    """
    if scale == 0.0:
        for i in range(count):
            scale = max(scale, masses[i])
    for i in range(count):
        store_f32(destination + i * 4, np.float32(masses[i] / scale))


@kernel("void(float64[::1], float64, float64)")
def weigh(masses: np.ndarray, least: float, beta: float) -> None:
    """Turn masses into importance weights, in place: ``(mass / least) ^ -beta``.

    Args:
        masses: ``[B]``.
        least: The mass whose weight is 1.
        beta: Exponent.
    """
    for i in range(len(masses)):
        masses[i] = (masses[i] / least) ** -beta
