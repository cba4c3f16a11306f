"""From steps to rows: checked first, then reserved, written and committed for all lanes at once."""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

import numpy as np
from numba import njit

from rlfeed.replay.kernels.lanes import close_open, commit_lane, reserve
from rlfeed.replay.kernels.objects import (
    DATA,
    DIMENSIONS,
    EXPECT_SIZE,
    NONE,
    RUNTIME_SIZE,
    data_of,
    item_of,
)
from rlfeed.replay.kernels.rows import (
    BASE,
    CARRY_EVERY,
    CLOSING,
    COMMITTED,
    CUT,
    DIRECTORY,
    ENTRIES,
    EPISODES,
    FIELD_SIZE,
    FIRST,
    FLAGS,
    INDEX_SHIFT,
    LANE_SHIFT,
    LANES,
    NBYTES,
    ORDINAL,
    OTHER,
    OWNERS,
    PITCH,
    PLAN_SIZE,
    RECORDS,
    ROLE,
    ROLE_CARRY,
    ROLE_OBSERVATION,
    ROLE_SUCCESSOR,
    ROWS,
    STRIDE,
    TERMINATED,
    TRUNCATED,
    carry_entry,
    index_of,
    is_open,
    next_index,
    slot_by,
    slot_of,
)
from rlfeed.replay.kernels.words import (
    copy_row,
    fence,
    kernel,
    load_acquire,
    load_i64,
    load_u8,
    load_u32,
    prefetch,
    store_i64,
    store_u8,
    store_u32,
)

# A writer's program, one int64 vector: its size line, what this process is like, the plan, then the tables. OWNER is
# the writer's number, 0 where nobody claimed its lanes; OWN_LANES is the address of its OWN_COUNT lanes; REWARD_INPUT
# and PRIORITY_INPUT are inputs (-1: no such input).
WRITTEN, INPUTS, OWNER, OWN_LANES, OWN_COUNT, REWARD_INPUT, PRIORITY_INPUT, SIZES = range(8)
ABOUT = SIZES
PLAN = ABOUT + RUNTIME_SIZE
TABLES = PLAN + PLAN_SIZE
# The last inputs of every step; the first two may be None.
ENV_IDS, LOST, IS_FIRST_INPUT, TERMINATED_INPUT, TRUNCATED_INPUT, CONTROL = range(6)
# What a kernel answers where it wrote nothing: MISFIT, or 1 + 8 * row + a cause.
STORED, MISFIT = 0, -1
NO_LANE, TWICE, NOT_OPEN, NOT_OWNED, BAD_REWARD, BAD_PRIORITY = range(6)
BLOCK = 64  # lanes that are written field by field before the next ones
INFINITE = 0x7F800000  # the exponent of a float32 that is infinite or no number


@njit
def point(program: np.ndarray, items: int, count: int, sources: np.ndarray) -> bool:
    """Find the address of every input's data, or tell that one is not exactly what its column stores."""
    about, inputs = program[ABOUT:PLAN], program[INPUTS]
    tables = program[TABLES:]
    expects = tables[: inputs * EXPECT_SIZE].reshape((inputs, EXPECT_SIZE))
    for j in range(inputs):
        array = item_of(about, items, j)
        control = j - (inputs - CONTROL)
        if control >= 0 and control <= LOST and array == about[NONE]:
            sources[j] = program[OWN_LANES] if control == ENV_IDS else 0
            if control == ENV_IDS and (program[OWNER] and count != program[OWN_COUNT]):
                return False
            continue
        sources[j] = data_of(about, expects[j], program, array, count)
        if sources[j] == 0:
            return False
    return True


@njit
def find_fault(
    plan: np.ndarray, program: np.ndarray, count: int, control: np.ndarray, numbers: np.ndarray, slots: np.ndarray
) -> int:
    """Find the first row of a step that does not continue its lane: ``1 + 8 * i + cause``, or STORED.

    ``slots`` receives the slot of each lane's newest row, -1 where it has none.
    """
    lanes, lost, first = control[ENV_IDS], control[LOST], control[IS_FIRST_INPUT]
    owner, highest = program[OWNER], np.int64(-1)
    # By name: nothing is kept in a register over a load that orders memory.
    owners, committed, records, stride = plan[OWNERS], plan[COMMITTED], plan[RECORDS], plan[STRIDE]
    rows, inverse, most = plan[ROWS], 1.0 / np.float64(plan[ROWS]), plan[LANES]
    named = program[OWN_COUNT] if lanes == program[OWN_LANES] else count
    for i in range(count):
        if i >= named:
            return 1 + 8 * i + NO_LANE
        lane = load_i64(lanes + i * 8)
        if lane < 0 or lane >= most:
            return 1 + 8 * i + NO_LANE
        if lane > highest:
            highest = lane
        else:  # out of order: look at all before it
            for j in range(i):
                if load_i64(lanes + j * 8) == lane:
                    return 1 + 8 * i + TWICE
        if load_acquire(owners + lane * 8) != owner:
            return 1 + 8 * i + NOT_OWNED
        head = load_acquire(committed + lane * 8)
        slots[i] = slot_by(rows, inverse, head - 1) if head > 0 else -1
        if lost != 0 and load_u8(lost + i):
            continue
        if not load_u8(first + i):
            record = records + (lane * rows + slots[i]) * stride
            if head == 0 or load_u8(record + FLAGS) & CLOSING:
                return 1 + 8 * i + NOT_OPEN
        if load_u32(numbers[0] + i * 4) & INFINITE == INFINITE:
            return 1 + 8 * i + BAD_REWARD
        if numbers[1] != 0:
            priority = load_u32(numbers[1] + i * 4)  # a sign, and then no zero, is a negative number
            if priority & INFINITE == INFINITE or (priority >> 31 and priority << 1 & 0xFFFFFFFF):
                return 1 + 8 * i + BAD_PRIORITY
    return STORED


@njit
def open_rows(
    plan: np.ndarray, control: np.ndarray, out: int, places: np.ndarray, begin: int, end: int
) -> None:
    """Write the heads of the records of some rows of a step: what the open row becomes, and the row behind it.

    ``places`` holds each lane's slot of the step, and receives where it and its successor lie, over all lanes.
    """
    lanes, first = control[ENV_IDS], control[IS_FIRST_INPUT]
    terminated, truncated = control[TERMINATED_INPUT], control[TRUNCATED_INPUT]
    rows, stride, records, entries = plan[ROWS], plan[STRIDE], plan[RECORDS], plan[ENTRIES]
    for i in range(begin, end):
        if load_i64(out + i * 8) < 0:
            continue
        lane, slot, opens = load_i64(lanes + i * 8), places[0, i], load_u8(first + i) != 0
        ends = TERMINATED * (load_u8(terminated + i) != 0) + TRUNCATED * (load_u8(truncated + i) != 0)
        here = lane * rows + slot
        there = here + 1 if slot + 1 < rows else lane * rows
        places[0, i], places[1, i] = here, there
        record, ordinal, index = records + here * stride, np.uint32(0), np.int64(0)
        if opens:
            episode = load_acquire(plan[EPISODES] + lane * 8)
            ordinal = np.uint32(episode)
            store_u32(plan[DIRECTORY] + (lane * entries + episode % entries) * 4, np.uint32(slot))
            store_u32(record + ORDINAL, ordinal)
            store_u32(record + FLAGS, np.uint32(FIRST | ends))
        else:
            ordinal, index = load_u32(record + ORDINAL), index_of(record)
            store_u8(record + FLAGS, np.uint8((load_u8(record + FLAGS) & FIRST) | ends))
        record = records + there * stride
        following = np.uint32(next_index(plan, index)) << np.uint32(INDEX_SHIFT)
        store_u32(record + ORDINAL, ordinal)
        store_u32(record + FLAGS, following | np.uint32(CLOSING | ends if ends else 0))


@njit
def copy_field(
    plan: np.ndarray, field: np.ndarray, source: int, control: np.ndarray, out: int, places: np.ndarray, begin: int,
    end: int,
) -> None:  # fmt: skip
    """Copy one field of some rows of a step: rows that were lost have no place, carries only one every so often."""
    base, pitch, nbytes, role = field[BASE], field[PITCH], field[NBYTES], field[ROLE]
    if role == ROLE_CARRY:
        for i in range(begin, end):
            row = load_i64(out + i * 8)
            index = index_of(plan[RECORDS] + places[0, i] * plan[STRIDE])
            if row >= 0 and index > 0 and index % plan[CARRY_EVERY] == 0:
                place = carry_entry(plan, load_i64(control[ENV_IDS] + i * 8), row)
                copy_row(base + place * pitch, source + i * nbytes, nbytes)
    elif role == ROLE_OBSERVATION:
        for i in range(begin, end):
            if load_u8(control[IS_FIRST_INPUT] + i) and places[0, i] >= 0:
                copy_row(base + places[0, i] * pitch, source + i * nbytes, nbytes)
    else:
        line = places[1 if role == ROLE_SUCCESSOR else 0]
        for i in range(begin, end):
            if line[i] >= 0:
                copy_row(base + line[i] * pitch, source + i * nbytes, nbytes)


@kernel("int64(int64[::1], int64, int64)")
def write_step(program: np.ndarray, items: int, ids: int) -> int:
    """Store one step of each lane: its part of the open row, and the next row with the successor's observation.

    Args:
        program: The writer's.
        items: Address of the tuple of inputs; the caller keeps it alive.
        ids: Address of a ``[k]`` int64 array: receives the ids, -1 where a row was lost.

    Returns:
        STORED; MISFIT where an input is not exactly what its column stores; or what `find_fault` found. Nothing has
        been written then.
    """
    head_bytes = program[ABOUT]
    count, out = load_i64(load_i64(ids + head_bytes + DIMENSIONS)), load_i64(ids + head_bytes + DATA)
    inputs, written = program[INPUTS], program[WRITTEN]
    plan, at = program[PLAN:TABLES], TABLES + inputs * EXPECT_SIZE
    fields = program[at : at + written * FIELD_SIZE].reshape((written, FIELD_SIZE))
    scratch = np.empty(inputs + 2 + 2 * count, np.int64)
    sources, numbers = scratch[:inputs], scratch[inputs : inputs + 2]
    places = scratch[inputs + 2 :].reshape((2, count))
    if not point(program, items, count, sources):
        return MISFIT
    control = sources[inputs - CONTROL :]
    numbers[0] = sources[program[REWARD_INPUT]]
    numbers[1] = sources[program[PRIORITY_INPUT]] if program[PRIORITY_INPUT] >= 0 else 0
    fault = find_fault(plan, program, count, control, numbers, places[0])
    if fault != STORED:
        return fault
    lanes, lost, first = control[ENV_IDS], control[LOST], control[IS_FIRST_INPUT]
    rows, stride, any_first, committed, records = plan[ROWS], plan[STRIDE], False, plan[COMMITTED], plan[RECORDS]
    for i in range(count):
        lane = load_i64(lanes + i * 8)
        head = load_acquire(committed + lane * 8)
        opens, gone = load_u8(first + i) != 0, lost != 0 and load_u8(lost + i) != 0
        if (opens or gone) and is_open(plan, lane):  # the episode before was left without an end
            close_open(plan, lane)
        row = np.int64(-1)
        if gone:
            places[0, i] = places[1, i] = -1
        else:
            row = head if opens else head - 1
            slot, any_first = places[0, i] + opens, any_first or opens
            places[0, i] = slot if slot < rows else 0
            reserve(plan, lane, row + 2)
        store_i64(out + i * 8, row)
    fence()
    for begin in range(0, count, BLOCK):  # what a block touches stays in the first cache
        end = min(count, begin + BLOCK)
        open_rows(plan, control, out, places, begin, end)
        for f in range(written):
            if fields[f, ROLE] != ROLE_OBSERVATION or any_first:
                copy_field(plan, fields[f], sources[fields[f, OTHER]], control, out, places, begin, end)
    for i in range(count):
        row = load_i64(out + i * 8)
        if row >= 0:
            lane = load_i64(lanes + i * 8)
            commit_lane(plan, lane, np.int64(load_u8(first + i) != 0), 1, row + 2)
            store_i64(out + i * 8, (lane << LANE_SHIFT) | row)
            # With many lanes nothing else brings the next rows near in time.
            upcoming = records + (places[1, i] + 1) * stride
            for line in range(0, stride, 64):
                prefetch(upcoming + line)
            prefetch(upcoming + stride - 1)
    return STORED


@kernel("int64(int64[::1], int64[:, ::1], int64, int64, int64)")
def write_episode(plan: np.ndarray, fields: np.ndarray, lane: int, steps: int, ends: int) -> int:
    """Store one whole episode in a lane that has none open.

    Args:
        plan: The storage.
        fields: Field table; OTHER is the address of the episode's values: n steps, and n + 1 for ROLE_OBSERVATION.
        lane: Which.
        steps: n >= 1.
        ends: TERMINATED and TRUNCATED of the last step; 0: the episode was cut.

    Returns:
        The absolute row of its first step.
    """
    rows, head = plan[ROWS], load_acquire(plan[COMMITTED] + lane * 8)
    ordinal = load_acquire(plan[EPISODES] + lane * 8)
    reserve(plan, lane, head + steps + 1)
    fence()
    slot, index = slot_of(plan, head), np.int64(0)
    store_u32(plan[DIRECTORY] + (lane * plan[ENTRIES] + ordinal % plan[ENTRIES]) * 4, np.uint32(slot))
    for t in range(steps + 1):
        here = lane * rows + slot
        record = plan[RECORDS] + here * plan[STRIDE]
        for f in range(fields.shape[0]):
            nbytes, role, place = fields[f, NBYTES], fields[f, ROLE], here
            if t == steps and role != ROLE_OBSERVATION:
                continue
            if role == ROLE_CARRY:
                if index == 0 or index % plan[CARRY_EVERY] != 0:
                    continue
                place = carry_entry(plan, lane, head + t)
            copy_row(fields[f, BASE] + place * fields[f, PITCH], fields[f, OTHER] + t * nbytes, nbytes)
        flags = FIRST if t == 0 else 0
        if t == steps - 1:
            flags |= ends
        elif t == steps:
            flags = CLOSING | (ends if ends else CUT)
        store_u32(record + ORDINAL, np.uint32(ordinal))
        store_u32(record + FLAGS, (np.uint32(index) << np.uint32(INDEX_SHIFT)) | np.uint32(flags))
        slot, index = slot + 1 if slot + 1 < rows else 0, next_index(plan, index)
    commit_lane(plan, lane, 1, steps, head + steps + 1)
    return head
