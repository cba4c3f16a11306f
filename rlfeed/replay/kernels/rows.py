"""Where a row lies, which episode it belongs to, and where that episode begins and ends: never a scan."""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

import numpy as np
from numba import njit

from rlfeed.replay.kernels.words import fence, kernel, load_acquire, load_u8, load_u32

# The plan: what every kernel knows of a storage, as one int64 table. Index names, in order.
# SHARED is the address of the shared words, REWARD and PRIORITY offsets in a record (-1: no column); a carry is stored
# every CARRY_EVERY steps in one of CARRY_ENTRIES places of its lane, and what the learner writes back lies at OVERLAY,
# OVERLAY_PITCH apart, in places of the same numbers (-1: no carry). A lane is a ring of ROWS rows, of which the newest
# LIVE can be drawn: what is drawn stays readable while a few more rows are written.
COMMITTED, RESERVED, EPISODES, STEPS, OWNERS, DIRECTORY, RECORDS, LANES, ROWS, ENTRIES, STRIDE, REWARD = range(12)
PRIORITY, SHARED, CARRY_EVERY, CARRY_ENTRIES, OVERLAY, OVERLAY_PITCH, LIVE, PLAN_SIZE = range(12, 20)
# The head of a record: the episode's ordinal (low 32 bits), then a word with the flags in its low byte and the row's
# number in its episode above (24 bits: an episode can be longer than a lane, so the directory cannot tell it).
ORDINAL, FLAGS, HEAD_BYTES = 0, 4, 8
INDEX_SHIFT = 8
TERMINATED, TRUNCATED, CLOSING, FIRST, CUT = 1, 2, 4, 8, 16
INDEX_LIMIT = 1 << 24
# Shared words: whether anything was ever written back, how many late updates were dropped, the last owner's number.
WRITTEN_BACK, STALE_UPDATES, LAST_OWNER = 192, 193, 194
# One line of a field table: where the rows of a field are, how far apart, how long, where its batch or input is, for a
# carry where it lies in an entry of the overlay, and for an observation how many frames are stacked.
BASE, PITCH, NBYTES, OTHER, ROLE, INSIDE, FRAMES, FIELD_SIZE = range(8)
# Roles of a field in a gather.
ROLE_STEP, ROLE_OBSERVATION, ROLE_SUCCESSOR, ROLE_CARRY, ROLE_PREVIOUS = range(5)
LANE_SHIFT = 44
ROW_MASK = (1 << LANE_SHIFT) - 1
TRIES = 64
MOST_TRIES = 1 << 15  # a repeated draw's attempts begin at the next multiple of 2^16
NO_START = -1
FAR = 1 << 62


@njit
def slot_of(plan: np.ndarray, row: int) -> int:
    """Give the place of an absolute row in its lane; unsigned division spares the sign's fix-up."""
    return np.int64(np.uint64(row) % np.uint64(plan[ROWS]))


@njit
def slot_by(rows: int, inverse: float, row: int) -> int:
    """Give what `slot_of` gives, in loops over many rows: a multiplication costs a tenth of a division.

    A 44-bit row is exact in float64, so the quotient by ``inverse = 1 / rows`` is off by at most one.
    """
    slot = row - np.int64(np.float64(row) * inverse) * rows
    slot += rows if slot < 0 else 0
    return slot - rows if slot >= rows else slot


@njit
def record_of(plan: np.ndarray, lane: int, row: int) -> int:
    """Give the address of a row's record."""
    return plan[RECORDS] + (lane * plan[ROWS] + slot_of(plan, row)) * plan[STRIDE]


@njit
def index_of(record: int) -> int:
    """Give a row's number in its episode from its record; `next_index` says how 24 bits are enough."""
    return np.int64(load_u32(record + FLAGS) >> np.uint32(INDEX_SHIFT))


@njit
def next_index(plan: np.ndarray, index: int) -> int:
    """Give the number of the row after: where 24 bits end it falls back by half, its remainder by CARRY_EVERY kept.

    So a number below 2^22 is true, and a larger one says that the episode's first row is far.
    """
    if index + 1 < INDEX_LIMIT:
        return index + 1
    every = plan[CARRY_EVERY]
    return INDEX_LIMIT // 2 // every * every + (index + 1) % every


@njit
def carry_entry(plan: np.ndarray, lane: int, row: int) -> int:
    """Give the place of a row's carry, over all lanes: it is no other live row's.

    Two rows of a lane that store one are at least CARRY_EVERY apart, so their ``row // CARRY_EVERY`` differ; and those
    of the live rows are at most CARRY_ENTRIES numbers in a row.
    """
    return lane * plan[CARRY_ENTRIES] + (row // plan[CARRY_EVERY]) % plan[CARRY_ENTRIES]


@njit
def entry_row(plan: np.ndarray, lane: int, ordinal: int, near: int) -> int:
    """Give the absolute row where an episode starts: the last one up to ``near`` at the place the directory names."""
    start = np.int64(load_u32(plan[DIRECTORY] + (lane * plan[ENTRIES] + ordinal % plan[ENTRIES]) * 4))
    return near - (near - start) % plan[ROWS]


@njit
def full_ordinal(plan: np.ndarray, lane: int, record: int) -> int:
    """Give the ordinal of a record's episode: the newest ordinal supplies the high bits that the record leaves out."""
    newest = load_acquire(plan[EPISODES] + lane * 8) - 1
    low = np.int64(load_u32(record + ORDINAL))
    return newest - ((newest - low) & 0xFFFFFFFF)


@njit
def closing_row(plan: np.ndarray, lane: int, row: int, limit: int) -> int:
    """Give the closing row of the episode that ``row`` belongs to, as it was when the head stood at ``limit``.

    Returns FAR where the episode was still open then.
    """
    ordinal = full_ordinal(plan, lane, record_of(plan, lane, row))
    if ordinal + 1 < load_acquire(plan[EPISODES] + lane * 8):
        closing = entry_row(plan, lane, ordinal + 1, row + plan[ROWS] - 1) - 1
        if closing < limit:
            return closing
    if load_u8(record_of(plan, lane, limit - 1) + FLAGS) & CLOSING:
        return limit - 1
    return FAR


@njit
def first_row(plan: np.ndarray, lane: int, row: int) -> int:
    """Give the first row of the episode that ``row`` belongs to, also where it is no longer there.

    Where it is millions of rows away this is only somewhere far before ``row``, which is all that callers ask.
    """
    return row - index_of(record_of(plan, lane, row))


@njit
def last_row(plan: np.ndarray, lane: int, row: int, limit: int, most: int) -> int:
    """Give the row up to ``most`` steps after ``row``: fewer where the episode ends, or the head stood, before."""
    if most == 1:
        return row + 1
    return max(row + 1, min(row + most, min(closing_row(plan, lane, row, limit), limit - 1)))


@njit
def is_stale(plan: np.ndarray, lane: int, row: int) -> bool:
    """Tell whether a row is no longer among those that can be drawn and updated."""
    return row < load_acquire(plan[RESERVED] + lane * 8) - plan[LIVE]


@njit
def is_torn(plan: np.ndarray, lane: int, row: int) -> bool:
    """Tell whether a row has been given to a writer since; call it after a fence, after the copy."""
    return row < load_acquire(plan[RESERVED] + lane * 8) - plan[ROWS]


@njit
def lane_span(plan: np.ndarray, lane: int) -> tuple[int, int, int, int, int, int]:
    """Give what a lane holds.

    That is: its oldest live row, that row's episode, whether that episode is whole; its head, the last row's episode,
    whether that one has ended. Everything is read off rows that are committed and still live: the count of episodes
    runs ahead of the head.
    """
    while True:
        head = load_acquire(plan[COMMITTED] + lane * 8)
        tail = max(0, load_acquire(plan[RESERVED] + lane * 8) - plan[LIVE])
        if head <= tail:
            return tail, 0, 0, tail, -1, 0
        first, last = record_of(plan, lane, tail), record_of(plan, lane, head - 1)
        oldest, whole = full_ordinal(plan, lane, first), np.int64(load_u8(first + FLAGS) & FIRST != 0)
        newest, ended = full_ordinal(plan, lane, last), np.int64(load_u8(last + FLAGS) & CLOSING != 0)
        fence()
        if not is_stale(plan, lane, tail):  # else a writer has overwritten the tail meanwhile: look again
            return tail, oldest, whole, head, newest, ended


@njit
def is_open(plan: np.ndarray, lane: int) -> bool:
    """Tell whether a lane's newest row waits for its step."""
    head = load_acquire(plan[COMMITTED] + lane * 8)
    return head > 0 and not load_u8(record_of(plan, lane, head - 1) + FLAGS) & CLOSING


@kernel("int64(int64[::1], int64[::1])")
def count_steps(plan: np.ndarray, out: np.ndarray) -> int:
    """Count the stored steps: live rows, less one row per live episode that holds no step.

    Args:
        plan: The storage.
        out: ``[3]``: receives live episodes that ended and are whole, live rows, and steps ever inserted.

    Returns:
        Steps stored.
    """
    steps, episodes, live, inserted = 0, 0, 0, 0
    for lane in range(plan[LANES]):
        tail, oldest, whole, head, newest, ended = lane_span(plan, lane)
        inserted += load_acquire(plan[STEPS] + lane * 8)
        if head > tail:
            steps += head - tail - (newest - oldest + 1)
            live += head - tail
            episodes += max(0, newest - oldest + 1 - (1 - whole) - (1 - ended))
    out[0], out[1], out[2] = episodes, live, inserted
    return steps
