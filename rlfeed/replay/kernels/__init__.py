"""Every compiled loop of the data path, and nowhere else.

Kernels take addresses and small int64 tables instead of arrays of many types: one table costs 0.2 us a call where
sixteen arrays cost 0.95, and a signature that never changes never recompiles in the middle of training. They release
the GIL. Each has a slow and obvious twin in the tests.

    words    memory by address, and the order of loads and stores
    rows     where a row and its episode lie
    starts   which rows may start a sample
    draw     which samples
    gather   rows to transitions
    windows  rows to padded windows of steps
    write    steps to rows
"""

from rlfeed.replay.kernels.draw import draw_episodes, draw_steps
from rlfeed.replay.kernels.gather import gather_transitions
from rlfeed.replay.kernels.rows import (
    BASE,
    COMMITTED,
    DIRECTORY,
    ENTRIES,
    EPISODES,
    FIELD_SIZE,
    HEAD_BYTES,
    LANE_SHIFT,
    LANES,
    NBYTES,
    NO_START,
    OTHER,
    OWNERS,
    PITCH,
    PLAN_SIZE,
    RECORDS,
    RESERVED,
    REWARD,
    ROLE,
    ROLE_CARRY,
    ROLE_OBSERVATION,
    ROLE_PREVIOUS,
    ROLE_STEP,
    ROLE_SUCCESSOR,
    ROW_MASK,
    ROWS,
    STEPS,
    STRIDE,
    TRIES,
    count_steps,
)
from rlfeed.replay.kernels.starts import BACK, NEED, PLAIN, RULE_SIZE, STRICT, WHOLE
from rlfeed.replay.kernels.windows import gather_windows, resolve_windows
from rlfeed.replay.kernels.write import cut_lane, write_step

__all__ = [
    "BACK",
    "BASE",
    "COMMITTED",
    "DIRECTORY",
    "ENTRIES",
    "EPISODES",
    "FIELD_SIZE",
    "HEAD_BYTES",
    "LANES",
    "LANE_SHIFT",
    "NBYTES",
    "NEED",
    "NO_START",
    "OTHER",
    "OWNERS",
    "PITCH",
    "PLAIN",
    "PLAN_SIZE",
    "RECORDS",
    "RESERVED",
    "REWARD",
    "ROLE",
    "ROLE_CARRY",
    "ROLE_OBSERVATION",
    "ROLE_PREVIOUS",
    "ROLE_STEP",
    "ROLE_SUCCESSOR",
    "ROWS",
    "ROW_MASK",
    "RULE_SIZE",
    "STEPS",
    "STRICT",
    "STRIDE",
    "TRIES",
    "WHOLE",
    "count_steps",
    "cut_lane",
    "draw_episodes",
    "draw_steps",
    "gather_transitions",
    "gather_windows",
    "resolve_windows",
    "write_step",
]
