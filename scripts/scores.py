"""Train and score what docs/benchmarks/agents.md shows; go on with what is missing.

    python scripts/scores.py                                    every row, in order, one seed after the other
    python scripts/scores.py --rows cartpole-dqn --seeds 0 1    some of it
    python scripts/scores.py --jobs 2                           two processes side by side
    python scripts/scores.py --list                             what there is and what is missing
    python scripts/scores.py --tables                           only rewrite the documents from the results

A finished seed is written at once, so this may be stopped at any time. One that was begun begins anew.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import CHECKOUT, guarded
from score_rows import ROWS, Row
from score_runs import describe, missing, run_seed
from score_tables import keep, read, write_documents

from rlfeed.errors import ConfigError, suggest

OUT = CHECKOUT / "docs" / "benchmarks"
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGKILL)
LOOK_S = 0.2  # between looks at what runs beside


def main(argv: Sequence[str] | None = None, rows: Sequence[Row] = ROWS) -> int:
    """Score as the command line says.

    Args:
        argv: The command line without the script's name; None for the process's own.
        rows: What there is to run.

    Returns:
        The exit code: 0, 1 (a run's process ended without a result), 2 (bad input) or 130 (interrupted).
    """
    return guarded(lambda args: _main(args, rows), argv)


def _main(args: list[str], rows: Sequence[Row]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help="default: all; see --list")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="default: those of the row")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side; 0 runs in this one")
    parser.add_argument("--list", action="store_true", help="only say what there is and what is missing")
    parser.add_argument("--tables", action="store_true", help="only rewrite the documents")
    parser.add_argument("--out", type=Path, default=OUT, help="directory of the documents")
    flags = parser.parse_args(args)
    chosen = _chosen(flags.rows, rows)
    if flags.jobs < 0 or any(seed < 0 for seed in flags.seeds):
        raise ConfigError(f"--jobs, --seeds: are {flags.jobs} and {flags.seeds}; expected numbers of at least 0.")
    if flags.list:
        _list(chosen, flags.out)
        return 0
    ended = True
    if not flags.tables:
        wanted = [(row, seed) for row in chosen for seed in _seeds(row, flags) if _is_served(row, seed)]
        ended = _run_here(wanted, flags.out) if flags.jobs == 0 else _run_beside(wanted, flags.jobs, flags.out)
    write_documents(flags.out, rows)
    return 0 if ended else 1


def _chosen(names: list[str], rows: Sequence[Row]) -> list[Row]:
    known = [row.name for row in rows]
    if unknown := [name for name in names if name not in known]:
        hints = "".join(suggest(name, known) for name in unknown)
        raise ConfigError(f"--rows: {', '.join(unknown)} are not there; expected some of those of --list.{hints}")
    return [row for row in rows if not names or row.name in names]


def _seeds(row: Row, flags: Any) -> list[int]:
    """List the seeds of a row that are wanted and not there."""
    there = set() if flags.again else {record["seed"] for record in read(flags.out, row.name)}
    return [seed for seed in flags.seeds or range(row.seeds) if seed not in there]


def _is_served(row: Row, seed: int) -> bool:
    """Tell whether a row can be run here; say once why not."""
    absent = missing(row)
    if absent and seed == 0:
        print(f"{row.name}: not run, {'; '.join(absent)}")
    return not absent


def _run_here(wanted: list[tuple[Row, int]], out: Path) -> bool:
    """Run one after the other in this process."""
    for row, seed in wanted:
        keep(out, run_seed(row, seed, lambda line: print(line, flush=True)))
    return True


def _run_beside(wanted: list[tuple[Row, int]], jobs: int, out: Path) -> bool:
    """Run each seed in a process of its own: one that takes its process with it is a result, too."""
    running: dict[subprocess.Popen[bytes], tuple[Row, int]] = {}
    ended, waiting = True, list(wanted)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # none is left running
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                row, seed = waiting.pop(0)
                options = ["--rows", row.name, "--seeds", f"{seed}", "--again", "--jobs", "0", "--out", f"{out}"]
                running[subprocess.Popen([sys.executable, __file__, *options], env=environment)] = row, seed
            for process in [process for process in running if process.poll() is not None]:
                row, seed = running.pop(process)
                if -process.returncode in CRASHES:
                    keep(out, _killed(row, seed, -process.returncode))
                ended &= process.returncode == 0
            time.sleep(LOOK_S)
    finally:
        for process in running:
            process.terminate()
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return ended


def _killed(row: Row, seed: int, number: int) -> dict[str, Any]:
    crash = {
        "score": row.floor,
        "crash": f"killed by {signal.Signals(number).name}",
        "train_s": 0.0,
        "train_cpu_s": 0.0,
    }
    return {"row": row.name, "seed": seed, **crash, "curve": [], **describe(row)}


def _list(rows: Sequence[Row], out: Path) -> None:
    for row in rows:
        records = read(out, row.name)
        scores = ", ".join(f"{record['score']:.1f}" for record in records) or "none"
        absent = "".join(f"; {reason}" for reason in missing(row))
        print(f"{row.name:36} {row.total_steps:>9,} env steps, {len(records)} of {row.seeds} seeds: {scores}{absent}")


if __name__ == "__main__":
    sys.exit(main())
