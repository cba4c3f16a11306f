"""Every compiled loop of the data path, and nowhere else.

Kernels take addresses and small int64 tables instead of arrays: one table costs 0.2 us a call where sixteen arrays cost
0.95, and a signature that never changes never recompiles in the middle of training. They release the GIL.

Memory order. Heads are words that one writer stores and any number of readers load, in any process. A plain load of a
head is hoisted out of its loop by LLVM (the reader never sees it move), and ARM may reorder stores. So heads are
touched only through `load_acquire` and `store_release`:

    writer   reserve all lanes (store_release), fence, write the rows, commit all lanes (store_release)
    reader   load_acquire committed, copy, fence, load_acquire reserved: what is older than reserved - rows is torn

Every kernel has a slow and obvious twin in the tests.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# The plan: what every kernel knows of a storage, as one int64 table. Index names, in order.
COMMITTED, RESERVED, EPISODES, STEPS, DIRECTORY, RECORDS, LANES, ROWS, ENTRIES, STRIDE, REWARD, PLAN_SIZE = range(12)
# The head of a record: the episode's ordinal (low 32 bits), then the flags.
ORDINAL, FLAGS, HEAD_BYTES = 0, 4, 8
TERMINATED, TRUNCATED, CLOSING, FIRST, CUT = 1, 2, 4, 8, 16
# One line of a field table: where the rows of a field are, how far apart, how long, and where its batch or input is.
BASE, PITCH, NBYTES, OTHER, ROLE, FIELD_SIZE = range(6)
# Roles of a field in a gather.
ROLE_STEP, ROLE_OBSERVATION, ROLE_SUCCESSOR, ROLE_CARRY, ROLE_PREVIOUS = range(5)
LANE_SHIFT = 44
ROW_MASK = (1 << LANE_SHIFT) - 1
TRIES = 64
BLOCK = 64
NO_START = -1
FAR = 1 << 62


def kernel(signature: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function for one signature, without the GIL, cached on disk where a cache folder is writable.

    Args:
        signature: The only signature it will ever have.
        **options: Further numba options.

    Returns:
        A decorator.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(signature, nogil=True, cache=True, **options)(function)
        except RuntimeError as error:  # numba raises at import where it finds no place for its cache
            if "cache" not in str(error):
                raise
            warnings.warn(
                "rlfeed: no writable folder for compiled kernels, so each process compiles them anew (about 10 s). "
                "Set NUMBA_CACHE_DIR to a writable folder.",
                RuntimeWarning,
                stacklevel=2,
            )
            return njit(signature, nogil=True, **options)(function)

    return decorate


def _pointer(builder: Any, address: Any, bits: int) -> Any:
    from llvmlite import ir

    return builder.inttoptr(address, ir.IntType(bits).as_pointer())


@intrinsic
def load_acquire(typingctx: Any, address: Any) -> Any:
    """Load a 64-bit word so that nothing after it is read before it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], 64), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store_release(typingctx: Any, address: Any, value: Any) -> Any:
    """Store a 64-bit word so that nothing before it is written after it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0], 64), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def fence(typingctx: Any) -> Any:
    """Keep every load and store on its side."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for a cache line that will be read soon."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        from llvmlite import ir

        pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        builder.call(function, [builder.inttoptr(args[0], pointer), flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def memcpy(typingctx: Any, destination: Any, source: Any, nbytes: Any) -> Any:
    """Copy bytes between places that do not overlap."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cgutils.raw_memcpy(builder, _pointer(builder, args[0], 8), _pointer(builder, args[1], 8), args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _memcpy_of(nbytes: int) -> Any:
    @intrinsic
    def copy(typingctx: Any, destination: Any, source: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            size = context.get_constant(types.intp, nbytes)
            cgutils.raw_memcpy(builder, _pointer(builder, args[0], 8), _pointer(builder, args[1], 8), size, 1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return copy


memcpy16, memcpy32 = _memcpy_of(16), _memcpy_of(32)


@intrinsic
def memzero(typingctx: Any, destination: Any, nbytes: Any) -> Any:
    """Set bytes to zero."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cgutils.memset(builder, _pointer(builder, args[0], 8), args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _load(kind: Any) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], context.get_value_type(kind).as_pointer())
            return builder.load(pointer, align=1)

        return kind(types.int64), codegen

    return load


def _store(kind: Any) -> Any:
    @intrinsic
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], context.get_value_type(kind).as_pointer())
            builder.store(context.cast(builder, args[1], signature.args[1], kind), pointer, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, value), codegen

    return store


load_u8, load_u32, load_i64 = _load(types.uint8), _load(types.uint32), _load(types.int64)
load_f32, load_u64 = _load(types.float32), _load(types.uint64)
store_u8, store_u32, store_i64 = _store(types.uint8), _store(types.uint32), _store(types.int64)
store_f32, store_u64 = _store(types.float32), _store(types.uint64)


@njit
def copy_row(destination: int, source: int, nbytes: int) -> None:
    """Copy one row of one field: in vector registers where it is short, which saves the call of memcpy.

    The last piece overlaps the one before instead of going byte by byte: 68 bytes are three moves, not thirteen.
    """
    if nbytes > 512:
        memcpy(destination, source, nbytes)
    elif nbytes >= 32:
        offset = 0
        while offset + 32 <= nbytes:
            memcpy32(destination + offset, source + offset)
            offset += 32
        memcpy32(destination + nbytes - 32, source + nbytes - 32)
    elif nbytes >= 16:
        memcpy16(destination, source)
        memcpy16(destination + nbytes - 16, source + nbytes - 16)
    elif nbytes >= 8:
        store_u64(destination, load_u64(source))
        store_u64(destination + nbytes - 8, load_u64(source + nbytes - 8))
    elif nbytes >= 4:
        store_u32(destination, load_u32(source))
        store_u32(destination + nbytes - 4, load_u32(source + nbytes - 4))
    else:
        for offset in range(nbytes):
            store_u8(destination + offset, load_u8(source + offset))


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
def below(bits: int, bound: int) -> int:
    """Scale 64 random bits to 0 .. bound-1 (bias below bound / 2^64): the high word of their product."""
    half, mask = np.uint64(32), np.uint64(0xFFFFFFFF)
    b, n = np.uint64(bits), np.uint64(bound)
    low = (b & mask) * (n & mask)
    middle = (b >> half) * (n & mask) + (low >> half)
    other = (b & mask) * (n >> half) + (middle & mask)
    return np.int64((b >> half) * (n >> half) + (middle >> half) + (other >> half))


@njit
def slot_of(plan: np.ndarray, row: int) -> int:
    """Give the place of an absolute row in its lane; unsigned division spares the sign's fix-up."""
    return np.int64(np.uint64(row) % np.uint64(plan[ROWS]))


@njit
def record_of(plan: np.ndarray, lane: int, row: int) -> int:
    """Give the address of a row's record."""
    return plan[RECORDS] + (lane * plan[ROWS] + slot_of(plan, row)) * plan[STRIDE]


@njit
def entry_row(plan: np.ndarray, lane: int, ordinal: int, near: int) -> int:
    """Give the absolute row where an episode starts: the directory keeps it modulo rows, ``near`` is a row beyond it."""
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
    """Give the first row of the episode that ``row`` belongs to, or -1 where that row is no longer there."""
    ordinal = full_ordinal(plan, lane, record_of(plan, lane, row))
    first = entry_row(plan, lane, ordinal, row)
    if first < 0:
        return -1
    record = record_of(plan, lane, first)
    if not load_u8(record + FLAGS) & FIRST or load_u32(record + ORDINAL) != np.uint32(ordinal):
        return -1
    return first


@njit
def lane_span(plan: np.ndarray, lane: int) -> tuple[int, int, int, int]:
    """Give a lane's oldest live row, its head, and the ordinals of its first whole and last ended episode."""
    while True:
        head = load_acquire(plan[COMMITTED] + lane * 8)
        tail = max(0, load_acquire(plan[RESERVED] + lane * 8) - plan[ROWS])
        episodes = load_acquire(plan[EPISODES] + lane * 8)
        if head <= tail:
            return tail, tail, 0, -1
        record = record_of(plan, lane, tail)
        oldest = full_ordinal(plan, lane, record)
        if not load_u8(record + FLAGS) & FIRST:
            oldest += 1
        newest = episodes - 1
        if not load_u8(record_of(plan, lane, head - 1) + FLAGS) & CLOSING:
            newest -= 1
        fence()
        # A writer that passed meanwhile may have overwritten the tail's record or started an episode: look again.
        if (
            load_acquire(plan[RESERVED] + lane * 8) - plan[ROWS] <= tail
            and load_acquire(plan[EPISODES] + lane * 8) == episodes
        ):
            return tail, head, oldest, newest


@njit
def is_stale(plan: np.ndarray, lane: int, row: int) -> bool:
    """Tell whether a row has been given to a writer since; call it after a fence, after the copy."""
    return row < load_acquire(plan[RESERVED] + lane * 8) - plan[ROWS]


@njit
def is_open(plan: np.ndarray, lane: int) -> bool:
    """Tell whether a lane's newest row waits for its step."""
    head = load_acquire(plan[COMMITTED] + lane * 8)
    return head > 0 and not load_u8(record_of(plan, lane, head - 1) + FLAGS) & CLOSING


@njit
def close_open(plan: np.ndarray, lane: int) -> None:
    """Close a lane's open row: the episode was cut, its last complete step keeps both flags False."""
    record = record_of(plan, lane, load_acquire(plan[COMMITTED] + lane * 8) - 1)
    store_u8(record + FLAGS, np.uint8(load_u8(record + FLAGS) | CLOSING | CUT))


@njit
def starts_here(plan: np.ndarray, lane: int, row: int, limit: int, need: int, back: int, strict: int) -> bool:
    """Tell whether a sample may start at a row: every row that it touches is live, and its steps are there or an end.

    ``need`` is the steps from ``row`` on, ``back`` the burn-in before it (-1: the unit looks at nothing before).
    """
    if load_u8(record_of(plan, lane, row) + FLAGS) & CLOSING:
        return False
    if need > 1 or strict:
        end = closing_row(plan, lane, row, limit)
        if (end == FAR or strict) and row + need > min(end, limit - 1):
            return False
    if back >= 0:
        first = first_row(plan, lane, row)
        oldest = row - back - 1 if first < 0 or row - back > first else first
        return oldest >= load_acquire(plan[RESERVED] + lane * 8) - plan[ROWS]
    return row >= load_acquire(plan[RESERVED] + lane * 8) - plan[ROWS]


@njit
def candidates(plan: np.ndarray, heads: np.ndarray, tails: np.ndarray, upto: np.ndarray) -> int:
    """Snapshot every lane: its head, its oldest live row, and the running count of rows that may hold a step."""
    total = 0
    for lane in range(plan[LANES]):
        heads[lane] = load_acquire(plan[COMMITTED] + lane * 8)
        tails[lane] = max(0, load_acquire(plan[RESERVED] + lane * 8) - plan[ROWS])
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
def pick_by_count(
    plan: np.ndarray, heads: np.ndarray, tails: np.ndarray, bits: int, need: int, back: int, strict: int
) -> int:
    """Count every valid start and give the id of the one that the bits name, or -1: the bounded end of rejection."""
    valid = 0
    for lane in range(len(heads)):
        for row in range(tails[lane], heads[lane] - 1):
            valid += starts_here(plan, lane, row, heads[lane], need, back, strict)
    if valid == 0:
        return -1
    wanted = below(bits, valid)
    for lane in range(len(heads)):
        for row in range(tails[lane], heads[lane] - 1):
            if starts_here(plan, lane, row, heads[lane], need, back, strict):
                if wanted == 0:
                    return (lane << LANE_SHIFT) | row
                wanted -= 1
    return -1  # rows died between the two passes: the caller asks again


@kernel("int64(int64[::1], int64, int64, int64, int64, int64, int64, int64[::1], int64[::1])")
def draw_steps(
    plan: np.ndarray,
    key: int,
    number: int,
    attempt: int,
    need: int,
    back: int,
    strict: int,
    ids: np.ndarray,
    limits: np.ndarray,
) -> int:
    """Draw starts uniformly among the valid ones; draw ``number + i`` depends on its number and the rows alone.

    Args:
        plan: The storage.
        key: Of seed, stream and rank.
        number: The first draw's number.
        attempt: The first attempt's number; above 0 only to repeat a draw that turned out torn.
        need: Steps a sample needs from its start on.
        back: Burn-in steps before it, or -1.
        strict: 1 where all ``need`` steps must be in the episode.
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
    bits = np.empty(count, np.uint64)
    for i in range(count):  # a loop of its own: it becomes vector code
        bits[i] = philox(key, number + i, attempt)
    for i in range(count):
        index = below(bits[i], total)
        lane = lane_of(upto, index)
        row = heads[lane] - 1 - (upto[lane] - index)
        ids[i], limits[i] = (lane << LANE_SHIFT) | row, heads[lane]
        prefetch(record_of(plan, lane, row))
    for i in range(count):
        retry = 1
        while not starts_here(plan, ids[i] >> LANE_SHIFT, ids[i] & ROW_MASK, limits[i], need, back, strict):
            if retry == TRIES:
                found = pick_by_count(plan, heads, tails, philox(key, number + i, attempt + TRIES), need, back, strict)
                if found < 0:
                    return NO_START
                ids[i], limits[i] = found, heads[found >> LANE_SHIFT]
                break
            index = below(philox(key, number + i, attempt + retry), total)
            lane = lane_of(upto, index)
            ids[i], limits[i] = (lane << LANE_SHIFT) | (heads[lane] - 1 - (upto[lane] - index)), heads[lane]
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
        _, heads[lane], oldest[lane], newest = lane_span(plan, lane)
        total += max(0, newest - oldest[lane] + 1)
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


@kernel("int64(int64[::1], int64[::1])")
def count_steps(plan: np.ndarray, out: np.ndarray) -> int:
    """Count the stored steps: live rows, less one row per live episode that holds no step.

    Args:
        plan: The storage.
        out: ``[3]``: receives live episodes that ended and are whole, live rows, and steps ever inserted.

    Returns:
        Steps stored.
    """
    steps, whole, live, inserted = 0, 0, 0, 0
    for lane in range(plan[LANES]):
        tail, head, oldest, newest = lane_span(plan, lane)
        inserted += load_acquire(plan[STEPS] + lane * 8)
        if head > tail:
            episodes = load_acquire(plan[EPISODES] + lane * 8)
            ordinal = full_ordinal(plan, lane, record_of(plan, lane, tail))
            steps += head - tail - (episodes - ordinal)
            live += head - tail
            whole += max(0, newest - oldest + 1)
    out[0], out[1], out[2] = whole, live, inserted
    return steps


@njit
def sum_steps(
    plan: np.ndarray, identity: int, limit: int, n_step: int, gamma: float, block: int, i: int, out: np.ndarray
) -> int:
    """Store what is computed for one transition, and give the place of the row after its last step."""
    lane, row, rows = identity >> LANE_SHIFT, identity & ROW_MASK, plan[ROWS]
    steps = 1
    if n_step > 1:
        steps = max(1, min(n_step, min(closing_row(plan, lane, row, limit), limit - 1) - row))
    slot, base = slot_of(plan, row), lane * rows
    total, weight, flags = np.float64(0.0), np.float64(1.0), np.uint8(0)
    for _ in range(steps):
        record = plan[RECORDS] + (base + slot) * plan[STRIDE]
        total += weight * np.float64(load_f32(record + plan[REWARD]))
        weight *= gamma
        flags = load_u8(record + FLAGS)
        slot = slot + 1 if slot + 1 < rows else 0
    terminated = flags & TERMINATED != 0
    store_f32(block + out[0] + i * 4, np.float32(total))
    store_u8(block + out[1] + i, np.uint8(terminated))
    store_u8(block + out[2] + i, np.uint8(flags & TRUNCATED != 0))
    store_f32(block + out[3] + i * 4, np.float32(0.0) if terminated else np.float32(weight))
    store_f32(block + out[4] + i * 4, np.float32(1.0))
    store_i64(block + out[5] + i * 8, identity)
    return base + slot


@kernel("int64(int64[::1], int64[:, ::1], int64, int64[::1], int64[::1], float64, int64, int64[::1])")
def gather_transitions(
    plan: np.ndarray,
    fields: np.ndarray,
    block: int,
    ids: np.ndarray,
    limits: np.ndarray,
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
        gamma: Discount per step.
        n_step: Steps to sum.
        out: Offsets in the block of reward, terminated, truncated, discount, weights and ids.

    Returns:
        The index of the first row that was overwritten meanwhile, or B.
    """
    mask = (1 << LANE_SHIFT) - 1
    count = len(ids)
    here, there = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
    for begin in range(0, count, BLOCK):  # what a block touches stays in the first cache
        size = min(BLOCK, count - begin)
        for i in range(size):
            here[i] = (ids[begin + i] >> LANE_SHIFT) * plan[ROWS] + slot_of(plan, ids[begin + i] & ROW_MASK)
            record = plan[RECORDS] + here[i] * plan[STRIDE]
            for line in range(0, (n_step + 1) * plan[STRIDE], 64):
                prefetch(record + line)
        for i in range(size):
            there[i] = sum_steps(plan, ids[begin + i], limits[begin + i], n_step, gamma, block, begin + i, out)
        for f in range(fields.shape[0]):
            base, pitch, nbytes = fields[f, BASE], fields[f, PITCH], fields[f, NBYTES]
            destination = block + fields[f, OTHER] + begin * nbytes
            index = there if fields[f, ROLE] == ROLE_SUCCESSOR else here
            for i in range(size):
                copy_row(destination + i * nbytes, base + index[i] * pitch, nbytes)
    fence()
    for i in range(count):
        if is_stale(plan, ids[i] >> LANE_SHIFT, ids[i] & ROW_MASK):
            return i
    return count


@kernel("int64(int64[::1], int64[::1], int64[::1], int64, int64, int64[:, ::1])")
def resolve_windows(
    plan: np.ndarray, ids: np.ndarray, limits: np.ndarray, length: int, back: int, windows: np.ndarray
) -> int:
    """Find the rows of each window: where it begins, how many steps it has and how many of them are burn-in.

    Args:
        plan: The storage.
        ids: ``[B]``, the first trained steps.
        limits: ``[B]``, the heads at the draws.
        length: Trained steps at most.
        back: Burn-in steps at most.
        windows: ``[B, 4]``: receives first row, steps, burn-in, and 1 where a step of the episode lies before.

    Returns:
        The most steps of any window.
    """
    longest = 0
    for i in range(len(ids)):
        identity, limit = ids[i], limits[i]
        lane, row = identity >> LANE_SHIFT, identity & ROW_MASK
        first = first_row(plan, lane, row)
        begin = row - back if first < 0 else max(first, row - back)
        end = min(min(closing_row(plan, lane, row, limit), limit - 1), row + length)
        windows[i, 0] = begin
        windows[i, 1] = max(1, end - begin)
        windows[i, 2] = row - begin
        windows[i, 3] = begin != first
        longest = max(longest, windows[i, 1])
    return longest


@njit
def gather_field(
    plan: np.ndarray, field: np.ndarray, block: int, lane: int, window: np.ndarray, i: int, longest: int
) -> None:
    """Copy one field of one window and clear what lies behind it."""
    nbytes, role, rows = field[NBYTES], field[ROLE], plan[ROWS]
    base = field[BASE] + lane * rows * field[PITCH]
    begin, steps, room = window[0], window[1], longest
    if role == ROLE_OBSERVATION:
        steps, room = steps + 1, longest + 1
    elif role == ROLE_CARRY:
        steps, room = 1, 1
    elif role == ROLE_PREVIOUS:
        begin, steps, room = begin - 1, window[3], 1
    destination = block + field[OTHER] + i * room * nbytes
    slot = begin % rows
    for t in range(steps):
        copy_row(destination + t * nbytes, base + slot * field[PITCH], nbytes)
        slot = slot + 1 if slot + 1 < rows else 0
    memzero(destination + steps * nbytes, (room - steps) * nbytes)


@kernel("int64(int64[::1], int64[:, ::1], int64, int64[::1], int64[:, ::1], int64, float64, int64[::1])")
def gather_windows(
    plan: np.ndarray,
    fields: np.ndarray,
    block: int,
    ids: np.ndarray,
    windows: np.ndarray,
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
        longest: T, steps per padded row.
        gamma: Discount per step.
        out: Offsets in the block of reward, terminated, truncated, discount, mask, loss_mask, is_first, lengths,
            burn_in, prev_reward, weights and ids.

    Returns:
        The index of the first window that was overwritten meanwhile, or B.
    """
    count = windows.shape[0]
    for i in range(count):
        lane, begin, steps, burn, before = ids[i] >> LANE_SHIFT, windows[i, 0], windows[i, 1], windows[i, 2], windows[i, 3]
        for t in range(longest):
            at = i * longest + t
            inside = t < steps
            flags, reward = np.uint8(0), np.float32(0.0)
            if inside:
                record = record_of(plan, lane, begin + t)
                flags, reward = load_u8(record + FLAGS), load_f32(record + plan[REWARD])
            terminated = flags & TERMINATED != 0
            store_f32(block + out[0] + at * 4, reward)
            store_u8(block + out[1] + at, np.uint8(terminated))
            store_u8(block + out[2] + at, np.uint8(flags & TRUNCATED != 0))
            store_f32(block + out[3] + at * 4, np.float32(gamma) if inside and not terminated else np.float32(0.0))
            store_u8(block + out[4] + at, np.uint8(inside))
            store_u8(block + out[5] + at, np.uint8(inside and t >= burn))
            store_u8(block + out[6] + at, np.uint8(flags & FIRST != 0))
        store_f32(block + out[10] + i * 4, np.float32(1.0))
        store_i64(block + out[11] + i * 8, ids[i])
        store_i64(block + out[7] + i * 8, steps)
        store_i64(block + out[8] + i * 8, burn)
        previous = load_f32(record_of(plan, lane, begin - 1) + plan[REWARD]) if before else np.float32(0.0)
        store_f32(block + out[9] + i * 4, previous)
    for f in range(fields.shape[0]):
        for i in range(count):
            gather_field(plan, fields[f], block, ids[i] >> LANE_SHIFT, windows[i], i, longest)
    fence()
    for i in range(count):
        if is_stale(plan, ids[i] >> LANE_SHIFT, windows[i, 0] - windows[i, 3]):
            return i
    return count


@njit
def find_fault(plan: np.ndarray, count: int, lanes: int, first: int, lost: int) -> int:
    """Find the first row of a step that does not continue its lane: ``4 * i + cause``, or -1 where all do.

    Causes: 0 no such lane, 1 the lane twice, 2 no episode is open.
    """
    for i in range(count):
        lane = load_i64(lanes + i * 8)
        if lane < 0 or lane >= plan[LANES]:
            return 4 * i
        if i > 0 and lane <= load_i64(lanes + (i - 1) * 8):  # out of order: look at all before it
            for j in range(i):
                if load_i64(lanes + j * 8) == lane:
                    return 4 * i + 1
        gone = lost != 0 and load_u8(lost + i) != 0
        if not gone and not load_u8(first + i) and not is_open(plan, lane):
            return 4 * i + 2
    return -1


@kernel("int64(int64[::1], int64[:, ::1], int64[:, ::1], int64[::1], int64, int64[::1])")
def write_step(
    plan: np.ndarray, fields: np.ndarray, opening: np.ndarray, inputs: np.ndarray, count: int, ids: np.ndarray
) -> int:
    """Store one step of each lane: its part of the open row, and the next row with the successor's observation.

    Args:
        plan: The storage.
        fields: Field table of what each step writes; OTHER is the input's index, ROLE tells the row.
        opening: Field table of the observation that opens an episode; OTHER is the input's index.
        inputs: Where each input's address is kept; the last five: env_ids, is_first, terminated, truncated, lost (0
            where nothing was lost).
        count: Rows.
        ids: ``[count]``: receives the ids, -1 where a row was lost.

    Returns:
        -1; or what `find_fault` found, and then nothing has been written.
    """
    lanes, first, lost = load_i64(inputs[-5]), load_i64(inputs[-4]), np.int64(0)
    terminated, truncated = load_i64(inputs[-3]), load_i64(inputs[-2])
    if inputs[-1] != 0:
        lost = load_i64(inputs[-1])
    fault = find_fault(plan, count, lanes, first, lost)
    if fault >= 0:
        return fault
    rows = plan[ROWS]
    for i in range(count):
        lane = load_i64(lanes + i * 8)
        head = load_acquire(plan[COMMITTED] + lane * 8)
        opens = load_u8(first + i) != 0
        gone = lost != 0 and load_u8(lost + i) != 0
        if (opens or gone) and is_open(plan, lane):  # the episode before was left without an end
            close_open(plan, lane)
        row = np.int64(-1)
        if not gone:
            row = head if opens else head - 1
            store_release(plan[RESERVED] + lane * 8, row + 2)
        ids[i] = row
    fence()
    for i in range(count):
        row = ids[i]
        if row < 0:
            continue
        lane = load_i64(lanes + i * 8)
        opens = load_u8(first + i) != 0
        ordinal = load_acquire(plan[EPISODES] + lane * 8) - (0 if opens else 1)
        slot = row % rows
        here = lane * rows + slot
        there = here + 1 if slot + 1 < rows else lane * rows
        ends = np.uint8(TERMINATED * (load_u8(terminated + i) != 0) + TRUNCATED * (load_u8(truncated + i) != 0))
        record = plan[RECORDS] + here * plan[STRIDE]
        if opens:
            store_u32(record + ORDINAL, np.uint32(ordinal))
            store_u32(plan[DIRECTORY] + (lane * plan[ENTRIES] + ordinal % plan[ENTRIES]) * 4, np.uint32(slot))
            for f in range(opening.shape[0]):
                nbytes = opening[f, NBYTES]
                source = load_i64(inputs[opening[f, OTHER]]) + i * nbytes
                copy_row(opening[f, BASE] + here * opening[f, PITCH], source, nbytes)
            store_u8(record + FLAGS, np.uint8(FIRST | ends))
        else:
            store_u8(record + FLAGS, np.uint8((load_u8(record + FLAGS) & FIRST) | ends))
        for f in range(fields.shape[0]):
            nbytes = fields[f, NBYTES]
            index = there if fields[f, ROLE] == ROLE_SUCCESSOR else here
            source = load_i64(inputs[fields[f, OTHER]]) + i * nbytes
            copy_row(fields[f, BASE] + index * fields[f, PITCH], source, nbytes)
        record = plan[RECORDS] + there * plan[STRIDE]
        store_u32(record + ORDINAL, np.uint32(ordinal))
        store_u8(record + FLAGS, np.uint8(CLOSING | ends) if ends else np.uint8(0))
    for i in range(count):
        row = ids[i]
        if row < 0:
            continue
        lane = load_i64(lanes + i * 8)
        if load_u8(first + i):
            store_release(plan[EPISODES] + lane * 8, load_acquire(plan[EPISODES] + lane * 8) + 1)
        store_release(plan[STEPS] + lane * 8, load_acquire(plan[STEPS] + lane * 8) + 1)
        store_release(plan[COMMITTED] + lane * 8, row + 2)
        ids[i] = (lane << LANE_SHIFT) | row
    return -1


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
