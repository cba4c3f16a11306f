"""What a loader learns from one batch: how large its slots must be, and whether processes pay."""

import statistics
import time
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler

from rlfeed.feed.gatherers import Source
from rlfeed.processes import processors
from rlfeed.types import Batch

_TRIES = 5
_WORTH_S = 1e-3  # of transforming, which holds the GIL: from here on a process is worth its transport


def slot_bytes_for(source: Source, most: int, batch: int) -> int:
    """Say how large the slots of a ring must be.

    Args:
        source: What makes batches.
        most: Bytes of the largest one before it is transformed.
        batch: One whose draws are known.

    Returns:
        Bytes: of the largest batch as gathered; with a transform, as much larger or smaller as it makes this one.
    """
    if source.transform is None:
        return most
    gathered = source.gather(batch)
    plain = _nbytes(gathered)
    try:
        made = source.finish(gathered, batch)
    except Exception:
        return most  # the worker will say so, with its number and its traceback
    return max(most, -(-most * _nbytes(made) // plain)) if isinstance(made, Batch) else most


def _nbytes(batch: Batch) -> int:
    sizes: list[int] = []
    batch.map(lambda tensor: (sizes.append(-(-tensor.nbytes // 64) * 64), tensor)[1])
    return sum(sizes)


def choose_workers(source: Source, batch: int, most: int, *, shared: bool) -> tuple[int, str]:
    """Choose between a thread of this process and worker processes, by making one batch a few times.

    A gather holds no GIL, so a thread does it beside the learner and needs no transport. A transform that takes its
    time holds the GIL, and the learner waits for it: that is what processes are for.

    Args:
        source: What makes batches.
        batch: One whose draws are known.
        most: Workers at most.
        shared: Whether other processes see the rows.

    Returns:
        Worker processes, 0 for a thread, and why.
    """
    gather_s = _median_s(lambda: source.gather(batch))
    transform_s = 0.0
    if source.transform is not None:
        transform_s = max(0.0, _median_s(lambda: source.finish(source.gather(batch), batch)) - gather_s)
    cpus = processors()
    took = f"auto: a batch takes {1e3 * gather_s:.2f} ms to gather and {1e3 * transform_s:.2f} ms to transform"
    if not shared:
        return 0, f"{took}; the storage is not shared with other processes, so a thread of this one gathers"
    if transform_s < _WORTH_S:
        return 0, f"{took}, which a thread of this process does without transport"
    workers = min(most, cpus - 1)
    if workers < 1:
        return 0, f"{took}, but there is one processor or no lookahead, so a thread of this process gathers"
    if not _is_sendable(source.transform):
        return 0, f"{took}, which cannot be sent to another process, so a thread of this process gathers"
    return workers, f"{took} under the GIL, so {workers} of {cpus} processors make batches in processes of their own"


def _is_sendable(transform: object) -> bool:
    try:
        ForkingPickler.dumps(transform)
    except Exception:
        return False
    return True


def _median_s(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_TRIES):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
