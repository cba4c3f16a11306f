"""How a feed begins, ends, goes on and stays fresh: looked at once, beside PyTorch's DataLoader."""

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contestants import Rlfeed
from feed_contestants import Endless
from torch import Tensor
from torch.utils.data import DataLoader
from workloads import make_stream

from rlfeed.codec import encode
from rlfeed.errors import FeedTimeoutError
from rlfeed.feed import make_loader
from rlfeed.replay import ReplayBuffer, Transition
from rlfeed.types import Batch

Figures = dict[str, str]  # by library
MARK = 777.0  # a reward that only a step written late has
LOOKS = 40


def look() -> dict[str, Figures]:
    """Look at everything.

    Returns:
        What was found, by question.
    """
    multiprocessing.set_start_method(None, force=True)  # importing TorchRL sets one for the whole process
    return {
        "written after the workers started, seen after": fresh(),
        "copies of the payload after storage": copies(),
        "close with 4 blocked workers": close_blocked(4),
        "2 workers started anew, until each has brought a batch": restart(),
        "2 workers killed, until each new one has brought a batch": killed(),
        **resume(),
    }


def fresh() -> Figures:
    """Write after the workers started, and count the batches until one has it.

    Returns:
        Batches that were handed over before it.
    """
    steps = make_stream(12_000).steps(1)
    buffer = Rlfeed(lanes=1).empty(1, 20_000)
    for step in steps[:10_000]:
        buffer.add(step)
    loader = make_loader(buffer, Transition(), batch_size=256, num_workers=1)
    batches = iter(loader)
    seen = [first_marked(batches, 10)]
    for step in steps[10_000:]:
        step.reward[:] = MARK
        buffer.add(step)
    seen.append(first_marked(batches, LOOKS))
    loader.close()

    reward = np.zeros(10_000, np.float32)

    def make(generator: np.random.Generator) -> dict[str, Tensor]:
        return {"reward": torch.from_numpy(reward[generator.integers(0, len(reward), 256)])}

    stock = iter(DataLoader(Endless(make), batch_size=None, num_workers=1, multiprocessing_context="fork"))
    next(stock)
    reward[:] = MARK
    shown = {None: "never"} | {count: f"{count} batches" for count in range(LOOKS)}
    return {"DataLoader": shown[first_marked(stock, LOOKS)], "rlfeed": shown[seen[1]] if seen[0] is None else "wrong"}


def first_marked(batches: Iterator[Any], looks: int) -> int | None:
    """Find the first batch with a reward that was written late.

    Args:
        batches: What to look at.
        looks: How many at most.

    Returns:
        The number of batches before it; None if there is none.
    """
    for count in range(looks):
        batch = next(batches)
        reward = batch.reward if isinstance(batch, Batch) else batch["reward"]
        if (reward == MARK).any():
            return count
    return None


def copies() -> Figures:
    """See whether the memory that a worker gathered into is the memory that the consumer reads.

    Returns:
        How often the payload is copied after it was stored.
    """
    buffer = small_buffer()
    loader = make_loader(buffer, Transition(), batch_size=256, num_workers=1)
    lies_in = mapping_of(next(iter(loader)).reward)
    loader.close()
    found = f"1: gathered into {lies_in}, read there" if "memfd" in lies_in else f"2: copied to {lies_in}"
    return {"DataLoader": "2: collated, moved to shared memory; 3 if pinned", "rlfeed": found}


def mapping_of(tensor: Tensor) -> str:
    """Tell what memory a tensor lies in.

    Args:
        tensor: On the CPU.

    Returns:
        The name that the system gives that memory.
    """
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, rest = line.partition(" ")
        begin, end = (int(text, 16) for text in span.split("-"))
        if begin <= address < end:
            return rest.split(maxsplit=4)[4] if len(rest.split()) > 4 else "memory of this process"
    return "nothing"


def block(batch: Any) -> Any:
    """Stand in for a transform, or a source, that does not come back from a worker.

    Args:
        batch: Any.

    Returns:
        The same; in a worker in an hour.
    """
    if multiprocessing.parent_process() is not None:
        time.sleep(3600)
    return batch


def close_blocked(workers: int) -> Figures:
    """Close loaders whose workers are all busy with something that does not end.

    Args:
        workers: How many.

    Returns:
        Seconds.
    """
    limits: dict[str, Any] = {"num_workers": workers, "lookahead": workers, "timeout_s": 5}
    loader = make_loader(small_buffer(), Transition(), batch_size=256, transform=block, **limits)
    with suppress(FeedTimeoutError):
        next(iter(loader))
    begin = time.perf_counter()
    loader.close()
    own = time.perf_counter() - begin

    stock = iter(DataLoader(Endless(block), batch_size=None, num_workers=workers, multiprocessing_context="fork"))
    time.sleep(1)
    begin = time.perf_counter()
    del stock
    gc.collect()
    return {"DataLoader": f"{time.perf_counter() - begin:.2f} s", "rlfeed": f"{own:.2f} s"}


def zeros(generator: np.random.Generator) -> Tensor:
    """Make a small batch.

    Args:
        generator: Not used.

    Returns:
        ``[256]``.
    """
    return torch.zeros(256)


def restart() -> Figures:
    """Start workers again, where they had been started before.

    Returns:
        Seconds until each has brought a batch.
    """
    loader = make_loader(small_buffer(), Transition(), batch_size=256, num_workers=2)
    own = started_again(loader, loader.close)
    figures = []
    for method in ("forkserver", "fork"):
        stock = DataLoader(Endless(zeros), batch_size=None, num_workers=2, multiprocessing_context=method)
        figures.append(f"{started_again(stock, gc.collect):.3f} s ({method})")
    return {"DataLoader": ", ".join(figures), "rlfeed": f"{own:.3f} s"}


def killed() -> Figures:
    """Kill workers under a loader that starts others in their place.

    Returns:
        Seconds until each of those has brought a batch.
    """
    buffer = small_buffer()
    with make_loader(buffer, Transition(), batch_size=256, num_workers=2, on_worker_death="restart") as loader:
        batches = iter(loader)
        for _ in range(8):
            next(batches)
        begin = time.perf_counter()
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, signal.SIGKILL)
        for _ in range(8):  # more than had been made
            next(batches)
        took, restarts = time.perf_counter() - begin, loader.stats().restarts
    return {"DataLoader": "raises RuntimeError", "rlfeed": f"{took:.3f} s" if restarts == 2 else "wrong"}


def started_again(loader: Iterable[Any], close: Callable[[], object]) -> float:
    """Iterate twice and time the beginning of the second time.

    Args:
        loader: Of two workers.
        close: Ends the workers, not timed.

    Returns:
        Seconds.
    """
    batches = iter(loader)
    for _ in range(8):
        next(batches)
    del batches
    close()
    begin = time.perf_counter()
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    took = time.perf_counter() - begin
    del batches
    close()
    return took


def resume() -> dict[str, Figures]:
    """Take the state of a loader of two workers and go on with others, on another loader.

    Returns:
        The size of the state, and the time by number of workers.
    """
    buffer = small_buffer()
    loader = make_loader(buffer, Transition(), batch_size=256, num_workers=2)
    batches = iter(loader)
    for _ in range(100):
        next(batches)
    begin = time.perf_counter()
    state = loader.state_dict()
    saved_ms = (time.perf_counter() - begin) * 1e3
    expected = [next(batches).clone() for _ in range(8)]
    loader.close()
    size = sum(memoryview(part).nbytes for part in encode(state))
    facts = {"resume: state_dict": f"{saved_ms:.2f} ms, {size:,} bytes"}
    for workers in (0, 1, 3):
        with make_loader(buffer, Transition(), batch_size=256, num_workers=workers) as other:
            begin = time.perf_counter()
            other.load_state_dict(state)
            loaded_ms = (time.perf_counter() - begin) * 1e3
            batches = iter(other)
            resumed = [next(batches).clone()]
            first_ms = (time.perf_counter() - begin) * 1e3
            resumed += [next(batches).clone() for _ in range(7)]
        same = all(torch.equal(a.reward, b.reward) for a, b in zip(resumed, expected, strict=True))
        shown = f"{loaded_ms:.2f} ms, with the first batch {first_ms:.1f} ms" if same else "wrong batches"
        facts[f"resume: load_state_dict of 2 workers with {workers}"] = shown
    return {name: {"DataLoader": "has no state", "rlfeed": figure} for name, figure in facts.items()}


def small_buffer() -> ReplayBuffer:
    """Fill a small buffer.

    Returns:
        Of transitions.
    """
    return Rlfeed(lanes=1).hold(make_stream(10_000), 10_000)
