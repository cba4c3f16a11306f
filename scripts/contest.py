"""Time contestants side by side: alternating rounds, one table a piece of work, the raw rounds for whoever doubts."""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROUND_S = 0.02
MOST_CALLS = 2000
PACKAGES = (
    "rlfeed",
    "torch",
    "numpy",
    "numba",
    "gymnasium",
    "cpprb",
    "tianshou",
    "sb3-contrib",
    "stable-baselines3",
    "torchrl",
    "tensordict",
    "mujoco",
    "envpool",
)


@dataclass(frozen=True)
class Case:
    """Say what to time.

    Args:
        call: The work.
        before: What happens before every call, outside the timed part.
        per: How many pieces of work one call does.
        peer: Whether another library does it, with which rlfeed compares itself.
        clock: Seconds: by default of the processor, for this thread alone, because other jobs have their turns.
        settle: What happens before every round, outside the timed part: what others left under way comes to rest.
        most: Calls in a round at most.
    """

    call: Callable[[], object]
    before: Callable[[], object] | None = None
    per: int = 1
    peer: bool = False
    clock: Callable[[], float] = time.thread_time
    settle: Callable[[], object] | None = None
    most: int = MOST_CALLS

    def time_us(self, calls: int) -> float:
        """Call it and tell how long it took.

        Args:
            calls: How often.

        Returns:
            Microseconds for each piece of work.
        """
        call, before, clock, spent = self.call, self.before, self.clock, 0.0
        if before is None:
            begin = clock()
            for _ in range(calls):
                call()
            spent = clock() - begin
        else:
            for _ in range(calls):
                before()
                begin = clock()
                call()
                spent += clock() - begin
        return spent / calls / self.per * 1e6


def family_time() -> float:
    """Add up what this process and all that it started, and they, have taken of the processor.

    Returns:
        Seconds, of those that live.
    """
    total_s, family = 0.0, [os.getpid()]
    for pid in family:
        with suppress(OSError):  # it has just ended
            total_s += time.clock_gettime(~pid << 3 | 2)  # the processor clock of another process, as POSIX numbers it
            for listed in Path(f"/proc/{pid}/task").glob("*/children"):
                family += [int(child) for child in listed.read_text().split()]
    return total_s


def ratio(times: list[float], others: list[float]) -> float:
    """Compare two cases round by round, so that a machine whose speed drifts tells the same.

    Args:
        times: Microseconds by round.
        others: Microseconds by round.

    Returns:
        Median of times / others.
    """
    return statistics.median(mine / other for mine, other in zip(times, others, strict=True))


@dataclass
class Contest:
    """Run cases and keep what they took.

    Args:
        rounds: Rounds of each case.
        tables: Receives the raw rounds of every table.
    """

    rounds: int = 15
    tables: list[dict[str, Any]] = field(default_factory=list)

    def measure(
        self,
        title: str,
        cases: dict[str, Case],
        notes: dict[str, str] | None = None,
        *,
        round_s: float = ROUND_S,
        cpu: Callable[[], float] | None = None,
        rate: bool = False,
    ) -> dict[str, list[float]]:
        """Time cases in alternating rounds and print a table, in Markdown.

        Args:
            title: The work.
            cases: By name; the first is what the others are compared with.
            notes: What to say about a case, or about who takes no part.
            round_s: Seconds of one case in a round.
            cpu: Seconds of the processor, to tell them as well: `time.process_time` has this process with all its
                threads and without its children, `family_time` has those too.
            rate: Also tell how many pieces of work that is in a second.

        Returns:
            Microseconds by case and round.
        """
        calls = {name: self._calls(case, round_s) for name, case in cases.items()}
        times: dict[str, list[float]] = {name: [] for name in cases}
        spent: dict[str, list[float]] = {name: [] for name in cases if cpu is not None}
        gc.collect()
        gc.disable()  # a collection in one case is not that case's work
        try:
            for turn in range(self.rounds):
                for name in reversed(cases) if turn % 2 else cases:  # nobody always comes after the same
                    case = cases[name]
                    if case.settle is not None:
                        case.settle()
                    begin_s = cpu() if cpu is not None else 0.0
                    times[name].append(case.time_us(calls[name]))
                    if cpu is not None:
                        spent[name].append((cpu() - begin_s) / calls[name] / case.per * 1e6)
        finally:
            gc.enable()
        notes = notes or {}
        peers = [name for name, case in cases.items() if case.peer]
        best = min(peers, key=lambda name: ratio(times[name], times[next(iter(times))]), default=None)
        self.tables.append({"title": title, "us": times, "cpu_us": spent, "best_peer": best, "notes": notes})
        self._print(title, times, spent, best, notes, rate)
        return times

    def _calls(self, case: Case, round_s: float) -> int:
        if case.most == 1:  # one is long enough, and to warm up as well
            case.time_us(1)
            return 1
        took_us = [case.time_us(1) * case.per for _ in range(4)]
        return max(1, min(case.most, int(round_s * 1e6 / max(took_us[-1], 1.0))))

    def _print(
        self,
        title: str,
        times: dict[str, list[float]],
        spent: dict[str, list[float]],
        best: str | None,
        notes: dict[str, str],
        rate: bool,
    ) -> None:
        first, more = next(iter(times)), " a second | " * rate + "   cpu us | " * bool(spent)
        print(f"\n{title}\n")
        print(f"| {'':42} | median us |      min | {more}of first | best peer is | |")
        print(f"|---|---:|---:|{'---:|' * more.count('|')}---:|---:|---|")
        for name, values in times.items():
            extra = f"{1e6 / statistics.median(values):9,.0f} | " if rate else ""
            extra += f"{statistics.median(spent[name]):9.1f} | " if spent else ""
            figures = f"{statistics.median(values):9.1f} | {min(values):8.1f} | {extra}"
            figures += f"{ratio(values, times[first]):8.2f}"
            compared = f"{ratio(times[best], values):.2f}" if best else ""
            print(f"| {name:42} | {figures} | {compared:>12} | {notes.get(name, '')} |")
        absent = [f"{name} ({note})" for name, note in notes.items() if name not in times]
        print(f"\nWithout {'; '.join(absent)}." if absent else "", flush=True)

    def tell(self, title: str, facts: dict[str, dict[str, str]]) -> None:
        """Print what was found once, in Markdown, and keep it.

        Args:
            title: What it is about.
            facts: By row; a row's figures by column, the same columns in each.
        """
        self.tables.append({"title": title, "facts": facts})
        columns = list(next(iter(facts.values())))
        print(f"\n{title}\n\n| {'':50} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
        for name, row in facts.items():
            print(f"| {name:50} | {' | '.join(row[column] for column in columns)} |")
        print(flush=True)

    def save(self, path: Path) -> None:
        """Write the raw rounds.

        Args:
            path: A JSON file.
        """
        versions = {}
        for name in PACKAGES:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = "not installed"
        machine = {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
        record = {"machine": machine, "python": platform.python_version(), "versions": versions, "tables": self.tables}
        path.write_text(json.dumps(record, indent=1) + "\n")
