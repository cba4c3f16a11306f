"""Check an environment: ``python scripts/check_env.py ENV [flags]``, ENV such as path/to/file.py:MyEnv."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import command_line
import tyro
from command_line import guarded

from rlfeed.envs.check import Report, examine
from rlfeed.envs.layouts import suggest_layout
from rlfeed.envs.source import EnvSource
from rlfeed.envs.wrappers import as_wrapper

RESUME = {
    "exact": "exact: get_state() and set_state() bring an open episode back",
    "re-enacted": "re-enacted: an open episode is begun with its seed again and its actions are repeated",
    "restarted": "restarted: an open episode is lost, the next one begins",
}


@dataclass(frozen=True, kw_only=True)
class EnvFlags:
    """Say how the environment is made.

    Args:
        kwargs: Arguments of its constructor; one at a time as --env.kwargs.NAME VALUE.
        wrappers: Wrappers, applied in order, as NAME or NAME:key=value,key=value; see train.py.
    """

    kwargs: dict[str, Any] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """Say what to check.

    Args:
        target: The environment: a Gymnasium id, path/to/file.py:ClassName, or package.module:ClassName.
        env: How it is made.
        episodes: Whole episodes to play; each is played several times.
        max_steps: When to leave an episode that goes on, in steps.
        call_timeout_s: How long the constructor, reset() and step() may take, in seconds.
        workers: Play in a worker process as well.
        num_envs: How many environments the suggested layout is for.
    """

    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV")]
    env: EnvFlags = field(default_factory=EnvFlags)
    episodes: int = 3
    max_steps: int = 1000
    call_timeout_s: float = 60.0
    workers: bool = True
    num_envs: int = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Check as the command line says.

    Args:
        argv: The command line without the script's name; None for the process's own.

    Returns:
        The exit code: 0 (clean, perhaps with notes), 1 (something is wrong) or 2 (bad input, or no such environment).
    """
    return guarded(_main, argv)


def _main(argv: list[str]) -> int:
    chosen = command_line.parse(CommandLine, argv, prog="check_env.py", description="Check an environment.")
    source = EnvSource(chosen.target, chosen.env.kwargs, tuple(map(as_wrapper, chosen.env.wrappers)))
    report = examine(
        source, episodes=chosen.episodes, max_steps=chosen.max_steps, call_timeout_s=chosen.call_timeout_s,
        workers=chosen.workers,
    )
    for finding in report.findings:
        print(f"{finding}\n")
    errors = sum(finding.severity == "error" for finding in report.findings)
    print(f"{source.name}: {_count(errors, 'error')}, {_count(len(report.findings) - errors, 'note')}")
    _print_figures(report, chosen.num_envs)
    return 1 if errors else 0


def _print_figures(report: Report, num_envs: int) -> None:
    print(f"played: {_count(report.episodes, 'episode')}, {_count(report.steps, 'step')}, each several times")
    print(f"resume: {RESUME[report.resume]}")
    if report.step_s is not None:
        print(f"speed: {1 / report.step_s:,.0f} steps/s in one process")
        print(f"layout: {suggest_layout(report.step_s, num_envs).why}")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(main())
