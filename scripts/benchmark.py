"""Measure rlfeed beside the barest code that moves the same bytes, in alternating rounds of one run.

    python scripts/benchmark.py               everything
    python scripts/benchmark.py replay        sampling and inserting
    python scripts/benchmark.py feed          the plain DataLoader, by handles and by samples

Times are medians of rounds, in microseconds a call, on one thread. The machine's speed drifts: compare ratios.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from gymnasium.spaces import Box
from torch.utils.data import DataLoader

from rlfeed.feed import ReplayDataset, pad_collate
from rlfeed.replay import Episode, ReplayBuffer, Sequence, Transition
from rlfeed.types import Batch, Step

ROUNDS = 9
ROWS = 1_000_000


def measure(title: str, cases: dict[str, Callable[[], object]], calls: int) -> None:
    """Time several cases in alternating rounds and print a table.

    Args:
        title: The work.
        cases: What to call, by name; ratios are to the first.
        calls: Calls per round.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for call in cases.values():
        call()
    for _ in range(ROUNDS):
        for name, call in cases.items():
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            times[name].append((time.perf_counter() - begin) / calls * 1e6)
    base = statistics.median(next(iter(times.values())))
    print(f"\n{title}\n{'':44}{'median us':>10}{'min':>10}{'ratio':>8}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"  {name:42}{median:10.1f}{min(values):10.1f}{median / base:8.2f}")


def steps(count: int, num_envs: int, length: int) -> Iterator[Step]:
    """Make steps of 17 floats and 6 actions; the episodes are ``length`` steps long."""
    generator = np.random.default_rng(0)
    data = generator.standard_normal((64, num_envs, 17), dtype=np.float32)
    actions = generator.standard_normal((64, num_envs, 6), dtype=np.float32)
    rewards, no, yes = np.ones(num_envs, np.float32), np.zeros(num_envs, bool), np.ones(num_envs, bool)
    for i in range(count):
        first, last = (yes if i % length == 0 else no), (yes if i % length == length - 1 else no)
        yield Step(data[i % 64], actions[i % 64], rewards, data[(i + 1) % 64], last, no, is_first=first)


def filled(rows: int, num_envs: int, length: int) -> ReplayBuffer:
    """Fill a buffer to the brim."""
    space = Box(-np.inf, np.inf, (17,), np.float32)
    buffer = ReplayBuffer(space, Box(-1, 1, (6,), np.float32), capacity=rows, num_envs=num_envs)
    for step in steps(rows // num_envs, num_envs, length):
        buffer.add(step)
    return buffer


def bare_gather(batch_size: int) -> Callable[[], object]:
    """Give the barest equivalent: numbers from NumPy, one take of two packed rows each, no contract at all."""
    rows = np.zeros((ROWS, 52), np.float32)
    rows[:] = np.arange(ROWS, dtype=np.float32)[:, None]
    out = np.empty((batch_size, 52), np.float32)
    generator = np.random.default_rng(0)
    return lambda: np.take(rows, generator.integers(0, ROWS, batch_size), axis=0, out=out, mode="clip")


def replay() -> None:
    """Measure sampling and inserting."""
    buffer = filled(ROWS, 8, 1000)
    unit = Transition()
    for batch_size, calls in ((256, 400), (4096, 40)):
        batch = buffer.sample(batch_size, unit)
        sampler, block, layout = buffer.unit_sampler(unit), batch._block, batch._layout
        measure(
            f"uniform {batch_size} transitions with successors, {ROWS:,} rows of 17 floats and 6 actions",
            {
                "numpy.take of packed pairs, nothing else": bare_gather(batch_size),
                "  its draws alone": lambda s=sampler, n=batch_size: s.draw(1, 0, n),
                "  the tensors that show its block alone": lambda b=block, c=layout: Batch.carve(b, c),  # pyright: ignore
                "ReplayBuffer.sample": lambda n=batch_size: buffer.sample(n, unit),
                "ReplayBuffer.sample, n_step=3": lambda n=batch_size: buffer.sample(n, Transition(n_step=3)),
            },
            calls,
        )
    windows = filled(200_000, 8, 100)
    measure(
        "64 padded windows of up to 100 steps, 200,000 rows",
        {
            "Episode()": lambda: windows.sample(64, Episode()),
            "Sequence(80)": lambda: windows.sample(64, Sequence(80)),
        },
        40,
    )
    inserts = {}
    for num_envs in (1, 8, 256):
        target = filled(num_envs * 1000, num_envs, 100)
        source = list(steps(100, num_envs, 100))
        inserts[f"add, {num_envs} environments"] = lambda t=target, s=source: [t.add(step) for step in s]
    measure("100 inserted steps", inserts, 10)


def feed() -> None:
    """Measure the plain DataLoader line."""
    space = Box(-np.inf, np.inf, (17,), np.float32)
    buffer = filled(100_000, 1, 100)

    def loader(collate: Callable[..., object] | None, workers: int) -> Callable[[], object]:
        dataset = ReplayDataset(buffer, Transition())
        return iter(DataLoader(dataset, batch_size=256, collate_fn=collate, num_workers=workers)).__next__

    cases = {
        "pad_collate, 0 workers": loader(pad_collate, 0),
        "torch's collate, sample by sample, 0 workers": loader(None, 0),
        "pad_collate, 1 worker": loader(pad_collate, 1),
    }
    measure(f"DataLoader(ReplayDataset(...), batch_size=256), {space.shape[0]} floats", cases, 20)


def main() -> None:
    """Run the benchmarks that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["replay", "feed", []], help="default: everything")
    chosen = parser.parse_args().what or ["replay", "feed"]
    torch.set_num_threads(1)
    for name in chosen:
        {"replay": replay, "feed": feed}[name]()


if __name__ == "__main__":
    main()
