"""Measure rlfeed beside the barest code that moves the same bytes, and beside every peer that is installed.

    python scripts/benchmark.py                    everything
    python scripts/benchmark.py replay             a replay buffer's work; peers: pip install -e ".[bench]"
    python scripts/benchmark.py uniform insert     some of it
    python scripts/benchmark.py feed               batches brought to the learner's process, beside torch's own
    python scripts/benchmark.py feed-vectors       some of it
    python scripts/benchmark.py rollout            environments stepped by a policy, beside other libraries' loops
    python scripts/benchmark.py rollout-step       some of it
    python scripts/benchmark.py agents --rounds 3  whole training runs, beside stable-baselines3's
    python scripts/benchmark.py agents-dqn         some of it

All contestants work in one process, on one thread, in alternating rounds; those of the feed and of rollouts have
workers of their own. Times are medians of rounds, in microseconds of the processor (of the wall clock where a table
says so: "feed" and most of "rollout") a call, in rollouts an env step. The machine's speed drifts, so ratios are taken
round by round: 2.00 under "best peer is" means that the best peer takes twice as long.
"""

import argparse
import gc
import itertools
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch
from agents_benchmark import WORKS, AgentsBenchmark
from contest import Case, Contest, ratio
from contestants import Bare, Contestant, Draw, NotServedError, Rlfeed, transitions
from feed_benchmark import FeedBenchmark
from peers import PEERS
from rollout_benchmark import RolloutBenchmark
from workloads import (
    WrongSampleError,
    check_padded,
    check_pixels,
    check_transitions,
    make_movie,
    make_steps,
    make_stream,
)

from rlfeed.errors import UnsupportedError
from rlfeed.replay import Transition
from rlfeed.types import Batch, Step

ROWS = 1_000_000
LONGEST = 200
T = TypeVar("T")


class ReplayBenchmark:
    """Let everybody who is installed do the work of a replay buffer.

    Args:
        contest: Times it.
        rows: Steps held where rows are small; the other sizes follow from it.
    """

    def __init__(self, contest: Contest, rows: int) -> None:
        self._contest, self._rows = contest, rows
        self._contestants: list[Contestant] = [Bare(), Rlfeed()]
        self._absent: dict[str, str] = {}
        for peer in PEERS:
            try:
                self._contestants.append(peer())
            except ImportError:
                self._absent[peer.name] = "not installed"

    def _prepare(
        self, work: Callable[[Contestant], T], check: Callable[[T], object]
    ) -> tuple[dict[str, T], dict[str, str]]:
        """Let everybody prepare and give five samples; who cannot, or gives wrong ones, takes no part and says why."""
        ready, notes = {}, dict(self._absent)
        for contestant in self._contestants:
            name = contestant.name
            try:
                prepared = work(contestant)
                for _ in range(5 if name != Bare.name else 0):
                    check(prepared)
            except (NotServedError, UnsupportedError) as reason:
                notes[name] = f"{reason}".rstrip(".")
            except WrongSampleError as reason:
                notes[name] = f"gives something else: {reason}"
            else:
                ready[name] = prepared
        return ready, notes

    def _cases(self, calls: dict[str, Callable[[], object]], per: int = 1) -> dict[str, Case]:
        peers = {peer.name for peer in PEERS}
        return {name: Case(call, per=per, peer=name in peers) for name, call in calls.items()}

    def _draws(self, draws: dict[str, Draw], count: int) -> dict[str, Case]:
        return self._cases({name: lambda d=draw: d(count) for name, draw in draws.items()})

    def uniform(self) -> None:
        """Draw transitions with successors uniformly."""
        stream = make_stream(self._rows)
        draws, notes = self._prepare(lambda c: c.uniform(stream), lambda draw: check_transitions(draw(256), 256))
        buffer = Rlfeed().hold(stream, self._rows)
        sampler, numbers = buffer.unit_sampler(Transition()), itertools.count()
        for count in (256, 4096):
            batch = buffer.sample(count, Transition())
            own = {
                "rlfeed, n_step=3": lambda n=count: transitions(buffer.sample(n, Transition(n_step=3))),
                "rlfeed, its draws alone": lambda n=count: sampler.draw(1, next(numbers) * n, n),
                "rlfeed, its block shown as tensors, alone": lambda b=batch: tensors_of(b),
            }
            title = f"uniform {count} transitions with successors of {self._rows:,}: 17 floats, 6 actions"
            self._contest.measure(title, self._draws(draws, count) | self._cases(own), notes)

    def prioritized(self) -> None:
        """Draw transitions by priority and give them new ones."""
        stream, generator = make_stream(self._rows), torch.Generator().manual_seed(0)
        values = list(torch.rand(64, 256, generator=generator) * 2 + 0.01)
        draws, notes = self._prepare(
            lambda c: c.prioritized(stream, itertools.cycle(values)), lambda draw: check_transitions(draw(256), 256)
        )
        for draw in draws.values():  # spread the priorities before measuring
            for _ in range(300):
                draw(256)
        notes[Bare.name] = "the gather of uniform draws"
        title = f"prioritized 256 of {self._rows:,}, sample and update"
        self._contest.measure(title, self._draws(draws, 256), notes)

    def pixels(self) -> None:
        """Draw stacks of four frames with their successors."""
        movie, resident = make_movie(max(1, self._rows // 25_000), 500), {}

        def hold(contestant: Contestant) -> Draw:
            before = resident_bytes()
            draw = contestant.pixels(movie)
            grown = resident_bytes() - before
            large = movie.frames.nbytes > 100e6  # below, the allocator has old memory to give
            resident[contestant.name] = f"{grown / movie.steps:,.0f} bytes a step" if large else ""
            return draw

        draws, notes = self._prepare(hold, lambda draw: check_pixels(draw(32), 32))
        notes = {**{name: resident[name] for name in draws}, **notes, Bare.name: "five neighbouring frames, no stacks"}
        for count in (32, 256):
            title = f"{count} stacks of 4 x 84 x 84 with successors, of {movie.steps:,} steps"
            self._contest.measure(title, self._draws(draws, count), notes)

    def episodes(self) -> None:
        """Draw whole episodes, padded."""
        stream = make_stream(self._rows // 5)
        draws, notes = self._prepare(lambda c: c.episodes(stream), lambda draw: check_padded(draw(64), 64, LONGEST))
        notes[Bare.name] = f"all {LONGEST} rows of each, nothing cleared"
        title = f"64 whole episodes of 5 .. {LONGEST} steps, padded, of {len(stream):,} steps"
        self._contest.measure(title, self._draws(draws, 64), notes)

    def windows(self) -> None:
        """Draw parts of episodes, padded, with a write between samples."""
        stream, written = make_stream(self._rows // 5), make_steps(100, 1)
        pairs, notes = self._prepare(
            lambda c: c.windows(stream, 80, written), lambda pair: check_padded(pair[0](64), 64, 80)
        )
        peers = {peer.name for peer in PEERS}
        cases = {
            name: Case(lambda d=draw: d(64), before=write, peer=name in peers) for name, (draw, write) in pairs.items()
        }
        notes[Bare.name] = "all 80 rows of each, nothing cleared"
        title = f"64 sub-sequences of up to 80 steps, padded, of {len(stream):,} steps, a step written before each call"
        self._contest.measure(title, cases, notes)

    def insert(self) -> None:
        """Insert steps of 1, 8 and 256 environments."""
        for num_envs in (1, 8, 256):
            self._insert(num_envs, max(self._rows // 4, 1000 * num_envs))

    def _insert(self, num_envs: int, capacity: int) -> None:
        steps = make_steps(100, num_envs)
        runs, notes = self._prepare(lambda c: c.insert(num_envs, capacity, steps), lambda run: run())
        add = Rlfeed().empty(num_envs, capacity).add

        def make_and_add() -> None:
            for s in steps:
                fields = (s.observation, s.action, s.reward, s.next_observation, s.terminated, s.truncated)
                add(Step(*fields, is_first=s.is_first))

        title = f"insert a step of {num_envs} environments into {capacity:,} rows"
        cases = self._cases({**runs, "rlfeed, its Step made as well": make_and_add}, per=len(steps))
        self._contest.measure(title, cases, notes)

    def growth(self) -> None:
        """Draw from ever larger buffers."""
        sizes, cases, stream = (self._rows // 10, self._rows, self._rows * 10), {}, make_stream(self._rows)
        rlfeed, bare = Rlfeed(lanes=64), Bare()
        for size in sizes:
            buffer = rlfeed.hold(stream, size)
            cases[f"rlfeed, {size:,} rows"] = lambda b=buffer: transitions(b.sample(256, Transition()))
        for size in sizes:
            draw = bare.hold(stream, size)
            cases[f"{bare.name}, {size:,} rows"] = lambda d=draw: d(256)
        times = self._contest.measure("uniform 256 transitions, by size", self._cases(cases))
        grown = {
            name: ratio(times[f"{name}, {sizes[2]:,} rows"], times[f"{name}, {sizes[0]:,} rows"])
            for name in (rlfeed.name, bare.name)
        }
        figures = ", ".join(f"{name} takes {times:.2f} times as long" for name, times in grown.items())
        beside = grown[rlfeed.name] / grown[bare.name]
        print(f"From {sizes[0]:,} to {sizes[2]:,} rows {figures}: {beside:.2f} times beside the bare gather.")


REPLAY = ("uniform", "prioritized", "pixels", "episodes", "windows", "insert", "growth")
FEED = ("transport", "vectors", "plain", "pixels", "episodes", "padded", "life")
ROLLOUT = ("blocks", "store", "step", "heavy", "parts", "life")


def tensors_of(batch: Batch) -> list[object]:
    """Make all tensors of a batch anew, from its block.

    Args:
        batch: In one block.

    Returns:
        The tensors.
    """
    block, layout = batch._block, batch._layout
    if block is None or layout is None:
        return []
    shown = Batch.carve(block, layout)
    return [getattr(shown, slot.name) for slot in layout.slots]


def resident_bytes() -> int:
    """Tell how much memory this process has in use.

    Returns:
        Bytes; 0 where the system does not say.
    """
    gc.collect()
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def main(args: Iterable[str] | None = None) -> None:
    """Run the benchmarks that were asked for.

    Args:
        args: The command line; None is this process's.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("replay", *REPLAY, "feed", *(f"feed-{name}" for name in FEED))
    names += ("rollout", *(f"rollout-{name}" for name in ROLLOUT), "agents", *(f"agents-{name}" for name in WORKS))
    parser.add_argument("what", nargs="*", metavar="what", help=f"{', '.join(names)}; default: replay feed rollout")
    parser.add_argument("--rows", type=int, default=ROWS, help="steps held where rows are small")
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds")
    parser.add_argument("--json", type=Path, help="file for the raw rounds")
    flags = parser.parse_args(None if args is None else list(args))
    if unknown := sorted(set(flags.what) - set(names)):
        parser.error(f"{', '.join(unknown)}: no such benchmark; expected some of {', '.join(names)}")
    wanted = set(flags.what or ("replay", "feed", "rollout"))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="This DataLoader will create", module=r"torch\b")  # workers that wait
    warnings.filterwarnings("ignore", module=r"(torchrl|tensordict|tianshou|cpprb|stable_baselines3|gymnasium)\b")
    contest = Contest(flags.rounds)
    if chosen := [name for name in REPLAY if {"replay", name} & wanted]:
        benchmark = ReplayBenchmark(contest, flags.rows)
        for name in chosen:
            getattr(benchmark, name)()
    if chosen := [name for name in FEED if {"feed", f"feed-{name}"} & wanted]:
        feed = FeedBenchmark(contest, flags.rows)
        for name in chosen:
            getattr(feed, name)()
    if chosen := [name for name in ROLLOUT if {"rollout", f"rollout-{name}"} & wanted]:
        rollout = RolloutBenchmark(contest, flags.rows)
        for name in chosen:
            getattr(rollout, name)()
    if chosen := [name for name in WORKS if {"agents", f"agents-{name}"} & wanted]:
        agents = AgentsBenchmark(contest)
        for name in chosen:
            agents.measure(name)
    if flags.json is not None:
        contest.save(flags.json)


if __name__ == "__main__":
    main()
