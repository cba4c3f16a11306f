"""Words that processes tell each other with: one stores, the others load."""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

from numba import types

from rlfeed.replay.kernels.words import fence, kernel, load_acquire, store_release

_poll = types.ExternalFunction("poll", types.int32(types.intp, types.uintp, types.int32))
_exit = types.ExternalFunction("_exit", types.void(types.int32))


@kernel("int64(int64)")
def peek(address: int) -> int:
    """Load a word, so that nothing after it is read before it.

    Args:
        address: Of the word.

    Returns:
        Its value.
    """
    return load_acquire(address)


@kernel("void(int64, int64)")
def post(address: int, value: int) -> None:
    """Store a word after all stores before it, and before all loads after it.

    Whoever posts "there is work" and then looks whether the other side sleeps, while that side posts "I sleep" and then
    looks for work, cannot both look too early.

    Args:
        address: Of the word.
        value: What to store.
    """
    store_release(address, value)
    fence()


@kernel("int64(int64, int64, int64)")
def await_word(address: int, least: int, spins: int) -> int:
    """Look at a word until it reaches a value, without giving the processor away.

    Args:
        address: Of the word.
        least: The value.
        spins: How often to look.

    Returns:
        What it was at last.
    """
    word = load_acquire(address)
    while word < least and spins > 0:
        word = load_acquire(address)
        spins -= 1
    return word


@kernel("void(int64, int64)")
def exit_after(pollfd: int, waits: int) -> None:
    """Wait for a descriptor, then end this process at once, even where another thread keeps the GIL for ever.

    Args:
        pollfd: Address of the one ``struct pollfd`` that says which; it must stay.
        waits: Address of a word that becomes 1 when the wait has begun and needs the GIL no more.
    """
    store_release(waits, 1)
    while _poll(pollfd, 1, -1) != 1:  # a signal came between
        pass
    _exit(0)
