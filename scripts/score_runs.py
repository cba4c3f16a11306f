"""Run one seed of a row: train, evaluate along the way, then the last policy, on environments of its own."""

import importlib.util
import json
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import command_line
import torch
from command_line import CHECKOUT, preset_of
from score_rows import Row

from agents.config import to_dict
from agents.training import Silence, build_parts, new_buffer, new_loop, new_source
from rlfeed.errors import UsageError
from rlfeed.train.evaluate import Evaluation, evaluate
from rlfeed.types import Mode

FINAL_EVALUATIONS = 3
FINAL_SEED = 1_000_000  # the last policy plays episodes that no evaluation on the way has played
PACKAGES = {"Box2D": "Box2D", "minatar": "minatar", "mujoco": "mujoco", "stable_baselines3": "stable-baselines3"}
USUAL = ("torch", "numpy", "gymnasium")  # of rlfeed the commit says more
Look = Callable[[int], Evaluation]


class Run(Protocol):
    """Train one seed and show its policy; ours, or a peer's."""

    settings: dict[str, Any]

    @property
    def updates(self) -> int:
        """Count the optimiser steps."""
        ...

    def train(self, look: Look) -> None:
        """Train to the end.

        Args:
            look: To be called with the env steps whenever an evaluation is due, at the end as well.
        """
        ...

    def play(self, episodes: int, seed: int, mode: Mode) -> Evaluation:
        """Let the policy of now play.

        Args:
            episodes: How many.
            seed: Decides them.
            mode: How it acts.

        Returns:
            What they gave.
        """
        ...

    def training_return(self) -> float | None:
        """Tell the mean return of the last 100 episodes of training; None where the library does not say."""
        ...

    def close(self) -> None:
        """Close the environments."""
        ...


class Ours:
    """Train a preset of rlfeed as ``scripts/train.py`` does, without a run directory.

    Args:
        row: What is trained.
        seed: The run's.
    """

    def __init__(self, row: Row, seed: int) -> None:
        default = preset_of(row.preset)
        arguments = row.arguments(seed)
        config = command_line.parse(type(default), arguments, default=default, prog=row.name, description=row.task)
        self.settings = json.loads(json.dumps(to_dict(config)))  # as a file gives it back
        self._parts = build_parts(config)
        buffer = new_buffer(config, self._parts)
        self._source = new_source(config, self._parts, buffer)
        rest = {"logger": Silence(), "evaluate": lambda policy: self._look(self._loop.env_steps)}
        self._loop = new_loop(config, self._parts, self._source, buffer, **rest)

    @property
    def updates(self) -> int:
        """Count the optimiser steps.

        Returns:
            Updates.
        """
        return self._loop.updates

    def train(self, look: Look) -> None:
        """Train to the end; see `Run`."""
        self._look = look
        self._loop.run()

    def play(self, episodes: int, seed: int, mode: Mode) -> Evaluation:
        """Let the policy of now play; see `Run`."""
        agent = self._parts.agent
        settings: Any = {"episodes": episodes, "seed": seed, "mode": mode, "actions": agent.actions}
        return evaluate(self._parts.evaluation_envs, agent.policy, **settings)

    def training_return(self) -> float:
        """Tell the mean return of the last 100 episodes of training; see `Run`."""
        return self._source.statistics.mean_return

    def close(self) -> None:
        """Close the environments; see `Run`."""
        self._source.close()
        self._parts.close()


@dataclass
class Stopwatch:
    """Count seconds, of the clock and of the processor.

    Args:
        wall_s: Of the clock.
        cpu_s: Of the processor, in this process.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __enter__(self) -> None:
        """Go on."""
        self._began = time.perf_counter(), time.process_time()

    def __exit__(self, *reason: object) -> None:
        """Stand still."""
        wall_s, cpu_s = self._began
        self.wall_s += time.perf_counter() - wall_s
        self.cpu_s += time.process_time() - cpu_s


def run_seed(row: Row, seed: int, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Train and score one seed.

    Args:
        row: What is trained.
        seed: The run's.
        tell: Receives a line at every evaluation.

    Returns:
        Everything there is to know about it, as JSON can say it. A run that crashed has the row's floor as its score
        and says why.

    Raises:
        UsageError: If the row cannot be run as it stands; that is no result.
    """
    torch.set_num_threads(1)  # as scripts/train.py has it
    every, looking, curve = Stopwatch(), Stopwatch(), []
    record = {"row": row.name, "seed": seed, "score": row.floor, "crash": None, **describe(row)}
    with every:
        try:
            run = make_run(row, seed)
            record["settings"] = run.settings

            def look(env_steps: int) -> Evaluation:
                with looking:
                    evaluation = run.play(row.episodes, seed, "greedy")
                curve.append({"env_steps": env_steps, "returns": _rounded(evaluation)})
                tell(f"{row.name}, seed {seed}, {env_steps:,} env steps: {evaluation.mean:.2f}")
                return evaluation

            try:
                run.train(look)
                with looking:
                    record |= _final(row, run, seed)
            finally:
                run.close()
        except UsageError:
            raise
        except Exception as error:  # whatever it is, it counts as the floor, and is told
            record["crash"] = f"{type(error).__name__}: {error}"
    tell(f"{row.name}, seed {seed}: {record['crash'] or format(record['score'], '.2f')}")
    seconds = {"train_s": every.wall_s - looking.wall_s, "train_cpu_s": every.cpu_s - looking.cpu_s}
    return {**record, **{name: round(value, 1) for name, value in seconds.items()}, "curve": curve}


def make_run(row: Row, seed: int) -> Run:
    """Make what trains a row.

    Args:
        row: The row.
        seed: The run's.

    Returns:
        Ours or a peer's.
    """
    if not row.is_peer:
        return Ours(row, seed)
    from score_peers import Peer  # where stable-baselines3 is installed

    return Peer(row, seed)


def _final(row: Row, run: Run, seed: int) -> dict[str, Any]:
    """Score the last policy."""
    modes: tuple[Mode, ...] = ("greedy", "explore") if row.explore else ("greedy",)
    seeds = [FINAL_SEED + FINAL_EVALUATIONS * seed + k for k in range(FINAL_EVALUATIONS)]
    played = {mode: [run.play(row.episodes, own, mode) for own in seeds] for mode in modes}
    means = {mode: sum(e.mean for e in evaluations) / len(evaluations) for mode, evaluations in played.items()}
    return {
        "score": means["greedy"],
        "score_exploring": means.get("explore"),
        "training_return": run.training_return(),
        "updates": run.updates,
        "final": {mode: [_rounded(e) for e in evaluations] for mode, evaluations in played.items()},
    }


def _rounded(evaluation: Evaluation) -> list[float]:
    return [round(float(value), 4) for value in evaluation.returns]


def missing(row: Row) -> list[str]:
    """Name what a row needs and is not here.

    Args:
        row: The row.

    Returns:
        What to say of each; empty where the row can be run.
    """
    found = {need: importlib.util.find_spec(need) is not None for need in row.needs if need != "cuda"}
    absent = [f"{PACKAGES[need]} is not installed (`make peers`)" for need, there in found.items() if not there]
    return absent + ["there is no GPU"] * ("cuda" in row.needs and not torch.cuda.is_available())


def describe(row: Row) -> dict[str, Any]:
    """Describe what a row is run with.

    Args:
        row: The row.

    Returns:
        Commit, date, machine and versions, as JSON can say them.
    """
    names = (*USUAL, *(PACKAGES[need] for need in row.needs if need != "cuda"))
    versions = {name: metadata.version(name) for name in names}
    machine = f"{torch.get_num_threads()} thread of {_processor()}"
    if "cuda" in row.needs:
        machine = torch.cuda.get_device_name()
    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine,
        "versions": {"python": platform.python_version(), **versions},
    }


def commit() -> str:
    """Name the state of the code.

    Returns:
        The commit, with a plus where what runs has been changed since; "unknown" outside a repository.
    """
    try:
        head = _git("rev-parse", "--short=9", "HEAD")
        changed = _git("status", "--porcelain", "--", "rlfeed", "agents", "scripts")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head + "+" * bool(changed)


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(CHECKOUT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()
