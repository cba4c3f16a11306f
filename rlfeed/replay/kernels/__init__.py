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
    writeback  what the learner rewrites
    restore  heads to a checkpoint and back
"""

from rlfeed.replay.kernels.draw import draw_episodes, draw_steps
from rlfeed.replay.kernels.gather import gather_transitions
from rlfeed.replay.kernels.restore import reserved_head, restore_heads, snapshot_heads
from rlfeed.replay.kernels.rows import (
    BASE,
    CARRY_ENTRIES,
    CARRY_EVERY,
    COMMITTED,
    DIRECTORY,
    ENTRIES,
    EPISODES,
    FIELD_SIZE,
    HEAD_BYTES,
    INSIDE,
    LANE_SHIFT,
    LANES,
    NBYTES,
    NO_START,
    OTHER,
    OVERLAY,
    OVERLAY_PITCH,
    OWNERS,
    PITCH,
    PLAN_SIZE,
    PRIORITY,
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
    SHARED,
    STALE_UPDATES,
    STEPS,
    STRIDE,
    TRIES,
    WRITTEN_BACK,
    count_steps,
)
from rlfeed.replay.kernels.starts import ALIGNED, BACK, CROSS, ENDED, GRID, NEED, PLAIN, RULE_SIZE, STRICT, WHOLE
from rlfeed.replay.kernels.windows import EXTENT, WINDOW_SIZE, gather_windows, resolve_windows
from rlfeed.replay.kernels.write import cut_lane, write_step
from rlfeed.replay.kernels.writeback import write_back

__all__ = [
    "ALIGNED",
    "BACK",
    "BASE",
    "CARRY_ENTRIES",
    "CARRY_EVERY",
    "COMMITTED",
    "CROSS",
    "DIRECTORY",
    "ENDED",
    "ENTRIES",
    "EPISODES",
    "EXTENT",
    "FIELD_SIZE",
    "GRID",
    "HEAD_BYTES",
    "INSIDE",
    "LANES",
    "LANE_SHIFT",
    "NBYTES",
    "NEED",
    "NO_START",
    "OTHER",
    "OVERLAY",
    "OVERLAY_PITCH",
    "OWNERS",
    "PITCH",
    "PLAIN",
    "PLAN_SIZE",
    "PRIORITY",
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
    "SHARED",
    "STALE_UPDATES",
    "STEPS",
    "STRICT",
    "STRIDE",
    "TRIES",
    "WHOLE",
    "WINDOW_SIZE",
    "WRITTEN_BACK",
    "count_steps",
    "cut_lane",
    "draw_episodes",
    "draw_steps",
    "gather_transitions",
    "gather_windows",
    "reserved_head",
    "resolve_windows",
    "restore_heads",
    "snapshot_heads",
    "write_back",
    "write_step",
]
