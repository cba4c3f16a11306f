"""Keep the results of scores, a line for each seed, and write the documents that show them."""

import csv
import fcntl
import io
import json
import os
import shlex
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from contest import ratio
from score_rows import Row

from rlfeed.durable import make_directory, write_bytes
from rlfeed.train.aggregate import improvement, interquartile_mean, iqm

DOCUMENT = "agents.md"
RAW = "scores"  # the folder of results beside the document
SPEED = "speed.json"  # in it: the rounds of scripts/benchmark.py
INTRODUCTION = """# Scores of the agents

Written by `scripts/scores.py` from the files in [scores/](scores): a line of JSON for each seed, with its settings,
versions and every return; `seeds.csv` and `curves.csv` say the same in brief.

```bash
make scores                                       # what is missing, row by row; stopped, it goes on with the next seed
make scores ARGS="--rows cartpole-dqn --seeds 0"  # some of it; --again runs what is there already
make scores ARGS="--list"                         # what there is and what is missing
make scores ARGS="--tables"                       # only this document, from the files
```

**How a run is scored.** With the preset's defaults and the flags of its row it trains on seeds 0, 1, ...; none is
left out. On the way it is evaluated ten times on environments of its own, which gives its curve. Its score is the
mean of three evaluations of the last policy, never the best one, on episodes that no evaluation before has played:
rewards as the environment gives them, statistics of observations frozen, actions greedy. A run that crashed counts as
the row's floor. A row's score is the interquartile mean of its seeds, with the interval of 95 % of 10,000 stratified
bootstrap resamples ([aggregate.py](../../rlfeed/train/aggregate.py)); with 3 seeds that mean is the plain one.

**Time** is that of training alone, the median of the seeds: of the processor, and in brackets by the clock, on a
machine that did other work beside it.
"""


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Let no other process write results in a block of code; it waits its turn.

    Args:
        directory: Of the documents.
    """
    make_directory(directory / RAW)
    folder = os.open(directory / RAW, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def read(directory: Path, row: str) -> list[dict[str, Any]]:
    """Read the results of a row.

    Args:
        directory: Of the documents.
        row: Its name.

    Returns:
        One for each seed that is finished, in their order.
    """
    path = directory / RAW / f"{row}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted(map(json.loads, lines), key=lambda record: record["seed"])


def keep(directory: Path, record: dict[str, Any]) -> None:
    """Write the result of a seed, durably, in place of an older one.

    Args:
        directory: Of the documents.
        record: What `score_runs.run_seed` gave.
    """
    with alone(directory):
        records = [old for old in read(directory, record["row"]) if old["seed"] != record["seed"]]
        lines = [json.dumps(one, allow_nan=False) for one in sorted([*records, record], key=lambda one: one["seed"])]
        write_bytes(directory / RAW / f"{record['row']}.jsonl", "".join(f"{line}\n" for line in lines).encode())


def write_documents(directory: Path, rows: Sequence[Row]) -> None:
    """Write what shows the results.

    Args:
        directory: Of the documents.
        rows: In their order.
    """
    with alone(directory):
        for name, text in documents(directory, rows).items():
            write_bytes(directory / name, text.encode())


def documents(directory: Path, rows: Sequence[Row]) -> dict[str, str]:
    """Render what shows the results.

    Args:
        directory: Of the documents.
        rows: In their order.

    Returns:
        Text by file.
    """
    results = {row.name: [record for record in read(directory, row.name) if record["seed"] < row.seeds] for row in rows}
    every = [record for records in results.values() for record in records]
    parts = [INTRODUCTION, _scores(rows, results), _peers(rows, results), _curves(rows, results)]
    parts += [_speed(directory / RAW / SPEED), _commands(rows, every)]
    heads = ("row", "seed", "score", "score_exploring", "training_return", "updates", "train_s", "train_cpu_s")
    heads += ("commit", "date", "machine", "crash")
    points = [
        (record["row"], record["seed"], point["env_steps"], _mean(point), statistics.pstdev(point["returns"]))
        for record in every
        for point in record["curve"]
    ]
    return {
        DOCUMENT: "\n".join(part for part in parts if part),
        f"{RAW}/seeds.csv": _csv(heads, ([record.get(head) for head in heads] for record in every)),
        f"{RAW}/curves.csv": _csv(("row", "seed", "env_steps", "mean_return", "std_return"), points),
    }


def _scores(rows: Sequence[Row], results: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["## Scores", "", "| task | preset | env steps | goal | IQM [95 %] | seeds | time, updates | commit |"]
    lines.append("|---|---|---:|---:|---:|---|---|---|")
    for row in rows:
        goal = "" if row.goal is None else f"{'≤' if row.at_most else '≥'} {row.goal:g}"
        cells = [row.task, f"`{row.preset}`", f"{row.total_steps:,}", goal, *_result(row, results[row.name])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _result(row: Row, records: list[dict[str, Any]]) -> list[str]:
    if not records:
        return ["not run", "", "", ""]
    scores = [record["score"] for record in records]
    found = iqm(scores)
    score = f"{_short(found.value)} [{_short(found.low)}, {_short(found.high)}]"
    if row.goal is not None:
        score = f"**{score}**" if row.is_reached(found.value) else f"{score}, not reached"
    seeds = ", ".join(_short(record["score"]) + " (crashed)" * bool(record["crash"]) for record in records)
    if len(records) < row.seeds:
        seeds += f"; {len(records)} of {row.seeds} run"
    exploring = [record["score_exploring"] for record in records if record.get("score_exploring") is not None]
    if exploring:
        seeds += f"; exploring {_short(iqm(exploring).value)}"
    cpu_s, train_s = (statistics.median(record[key] for record in records) for key in ("train_cpu_s", "train_s"))
    updates = {record.get("updates", 0) for record in records if not record["crash"]}
    spent = f"{cpu_s / 60:.1f} ({train_s / 60:.1f}) min, {max(updates, default=0):,}"
    return [score, seeds, spent, ", ".join(dict.fromkeys(record["commit"] for record in records))]


def _peers(rows: Sequence[Row], results: dict[str, list[dict[str, Any]]]) -> str:
    """Compare with stable-baselines3, where both have played the same task for as many steps."""
    lines = []
    for peer in (row for row in rows if row.is_peer and results[row.name]):
        for row in rows:
            alike = (row.env_id, row.flags, row.total_steps) == (peer.env_id, peer.flags, peer.total_steps)
            if row.is_peer or not alike or not results[row.name]:
                continue
            chance = improvement(*([record["score"] for record in results[name]] for name in (row.name, peer.name)))
            interval = f"{chance.value:.2f} [{chance.low:.2f}, {chance.high:.2f}]"
            lines.append(f"| {row.task} | `{row.preset}` | `{peer.preset}` | {row.total_steps:,} | {interval} |")
    if not lines:
        return ""
    head = ["## Beside stable-baselines3", "", "How probable it is that a run of ours beats one of theirs.", ""]
    head += ["| task | ours | theirs | env steps | probability [95 %] |", "|---|---|---|---:|---:|"]
    return "\n".join([*head, *lines, ""])


def _curves(rows: Sequence[Row], results: dict[str, list[dict[str, Any]]]) -> str:
    """Show the curves of what was not reached."""
    parts = []
    for row in rows:
        records = [record for record in results[row.name] if record["curve"]]
        missed = results[row.name] and not row.is_reached(iqm([r["score"] for r in results[row.name]]).value)
        if not missed or not records:
            continue
        parts += [f"### {row.task}, `{row.preset}`", ""]
        seeds = [f"seed {record['seed']}" for record in records]
        parts.append(f"| env steps | IQM | {' | '.join(seeds)} |")
        parts.append(f"|---:|---:|{'---:|' * len(records)}")
        for point in range(max(len(record["curve"]) for record in records)):
            there = [record["curve"][point] for record in records if point < len(record["curve"])]
            means = [_mean(entry) for entry in there]
            middle = float(interquartile_mean(np.array(means)))
            shown = [_short(mean) for mean in [middle, *means]]
            parts.append(f"| {there[0]['env_steps']:,} | {' | '.join(shown)} |")
        parts.append("")
    return "\n".join(["## Curves of what was not reached", "", *parts]) if parts else ""


def _speed(path: Path) -> str:
    """Show how long training takes beside stable-baselines3."""
    head = ["## Wall clock beside stable-baselines3", ""]
    head += ["Whole training runs with the same settings and the same number of updates, in alternating rounds:", ""]
    head += ["```bash", 'make benchmark ARGS="agents --rounds 3 --json docs/benchmarks/scores/speed.json"', "```", ""]
    if not path.exists():
        return "\n".join([*head, "Not run.", ""])
    record = json.loads(path.read_text())
    head += ["| trained | rlfeed, us an env step | theirs | times as fast, by the clock | of the processor |"]
    lines = [*head, "|---|---:|---:|---:|---:|"]
    for table in record["tables"]:
        ours, theirs = (
            {kind: table[kind].get(name) for kind in ("us", "cpu_us")} for name in ("rlfeed", "stable-baselines3")
        )
        work = table["title"].partition(";")[0].removeprefix("train ")
        if not ours["us"] or not theirs["us"]:
            lines.append(f"| {work} | not run | | | |")
            continue
        medians = [f"{statistics.median(side['us']):,.0f}" for side in (ours, theirs)]
        faster = [f"{ratio(theirs[kind], ours[kind]):.2f}" for kind in ("us", "cpu_us")]
        lines.append(f"| {work} | {' | '.join(medians + faster)} |")
    rounds = len(next(iter(record["tables"][0]["us"].values())))
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version[0].isdigit())
    return "\n".join([*lines, "", f"Medians of {rounds} rounds; {versions}.", ""])


def _commands(rows: Sequence[Row], every: list[dict[str, Any]]) -> str:
    lines = ["## Commands", "", "```bash"]
    for row in rows:
        if row.is_peer:
            lines.append(f"python scripts/scores.py --rows {row.name} --seeds SEED")
            continue
        command = shlex.join(["python", "scripts/train.py", row.preset, *row.arguments(0)[:-1]])
        lines.append(f"{command} SEED  # {row.name}")
    lines += ["```", ""]
    machines = dict.fromkeys(f"{one['machine']}; {', '.join(map(' '.join, one['versions'].items()))}" for one in every)
    if machines:
        lines += ["## Machines", "", *(f"- {machine}" for machine in machines), ""]
    return "\n".join(lines)


def _csv(heads: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows([round(cell, 4) if isinstance(cell, float) else cell for cell in line] for line in lines)
    return text.getvalue()


def _mean(point: dict[str, Any]) -> float:
    return statistics.fmean(point["returns"])


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
