"""Lanes: who owns one, how rows of it are reserved and committed, and how it is cut, or mended after a kill.

A writer may be killed between any two stores. What it had not committed is behind the head, where nobody looks, or in
the open row, which `free_lane` closes; rows it had reserved stay dead.
"""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

import numpy as np
from numba import njit

from rlfeed.replay.kernels.rows import (
    CLOSING,
    COMMITTED,
    CUT,
    EPISODES,
    FIRST,
    FLAGS,
    OWNERS,
    RESERVED,
    STEPS,
    full_ordinal,
    is_open,
    record_of,
)
from rlfeed.replay.kernels.words import (
    fence,
    kernel,
    load_acquire,
    load_u8,
    store_release,
    store_u8,
    swap_if,
)


@njit
def close_open(plan: np.ndarray, lane: int) -> None:
    """Close a lane's open row: the episode was cut, its last complete step keeps both flags False."""
    record = record_of(plan, lane, load_acquire(plan[COMMITTED] + lane * 8) - 1)
    store_u8(record + FLAGS, np.uint8((load_u8(record + FLAGS) & FIRST) | CLOSING | CUT))


@njit
def reserve(plan: np.ndarray, lane: int, head: int) -> None:
    """Give rows up before they are written; never back: what a killed writer or a lost save gave up stays so."""
    store_release(plan[RESERVED] + lane * 8, max(head, load_acquire(plan[RESERVED] + lane * 8)))


@njit
def commit_lane(plan: np.ndarray, lane: int, opens: int, steps: int, head: int) -> None:
    """Publish a lane's new rows; the counts run ahead of the head."""
    at = lane * 8
    if opens:
        store_release(plan[EPISODES] + at, load_acquire(plan[EPISODES] + at) + opens)
    store_release(plan[STEPS] + at, load_acquire(plan[STEPS] + at) + steps)
    store_release(plan[COMMITTED] + at, head)


@kernel("int64(int64[::1], int64[::1], int64)")
def choose_lane(plan: np.ndarray, lanes: np.ndarray, owner: int) -> int:
    """Choose the lane for a whole episode: of those where none is open, the one with the fewest rows written.

    Args:
        plan: The storage.
        lanes: Which lanes come into question.
        owner: Who must have them.

    Returns:
        The lane, -1 where there is none.
    """
    chosen, fewest = np.int64(-1), np.int64(0)
    for lane in lanes:
        head = load_acquire(plan[COMMITTED] + lane * 8)
        if load_acquire(plan[OWNERS] + lane * 8) == owner and (chosen < 0 or head < fewest) and not is_open(plan, lane):
            chosen, fewest = lane, head
    return chosen


@kernel("int64(int64[::1], int64)")
def cut_lane(plan: np.ndarray, lane: int) -> int:
    """Close a lane's open row, if it has one.

    Args:
        plan: The storage.
        lane: Which.

    Returns:
        1 where an episode was cut, 0 where none was open.
    """
    if not is_open(plan, lane):
        return 0
    close_open(plan, lane)
    fence()
    return 1


@kernel("int64(int64[::1], int64, int64, int64)")
def claim_lane(plan: np.ndarray, lane: int, owner: int, next_owner: int) -> int:
    """Give a lane from one owner to the next.

    Args:
        plan: The storage.
        lane: Which.
        owner: Who must have it, 0 for nobody.
        next_owner: Who gets it, 0 for nobody.

    Returns:
        Who had it: where that is not ``owner``, nothing has changed.
    """
    return swap_if(plan[OWNERS] + lane * 8, owner, next_owner)


@kernel("int64(int64[::1], int64)")
def free_lane(plan: np.ndarray, lane: int) -> int:
    """Mend a lane whose writer has left or was killed anywhere, and take it from its owner.

    The counts may have run ahead of the head: a step and an episode that were never committed. What is committed says
    what they are: every episode has one row that holds no step.

    Args:
        plan: The storage.
        lane: Which.

    Returns:
        1 where an episode was cut, 0 where none was open.
    """
    at = lane * 8
    store_release(plan[OWNERS] + at, -1)  # nobody's while it is mended: the writer, should it live, is refused
    fence()
    head = load_acquire(plan[COMMITTED] + at)
    open_ = np.int64(is_open(plan, lane))
    if open_:
        close_open(plan, lane)
    episodes = full_ordinal(plan, lane, record_of(plan, lane, head - 1)) + 1 if head > 0 else np.int64(0)
    store_release(plan[EPISODES] + at, episodes)
    store_release(plan[STEPS] + at, head - episodes)
    store_release(plan[OWNERS] + at, 0)
    return open_


@kernel("int64(int64)")
def count_up(word: int) -> int:
    """Add 1 to a shared word, whoever else does so.

    Args:
        word: Its address.

    Returns:
        The new value.
    """
    while True:
        value = load_acquire(word)
        if swap_if(word, value, value + 1) == value:
            return value + 1
