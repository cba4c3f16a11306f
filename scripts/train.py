"""Train an agent: ``python scripts/train.py PRESET [flags]``, or ``--resume RUN_DIR``."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import command_line
import torch
from command_line import (
    DEFAULT_PRESET,
    PRESETS,
    absolute_file,
    find_run,
    guarded,
    load_config,
    preset_of,
    split_preset,
    summary,
)

from agents.config import BlockTrainConfig, ReplayTrainConfig, TrainConfig, differences, to_dict
from agents.training import Parts, build_parts, new_buffer, new_loop, new_source
from rlfeed.envs import Envs
from rlfeed.envs.foreign import PETTINGZOO
from rlfeed.envs.wrappers import absolute_wrapper
from rlfeed.errors import ConfigError, RunDirectoryError
from rlfeed.log import ConsoleLogger, FanOut, TensorBoardLogger
from rlfeed.replay import ReplayBuffer
from rlfeed.train.checkpoint import Checkpoint
from rlfeed.train.interrupts import Interrupts
from rlfeed.train.run import RunDirectory, default_path, read_marker

# What may change when a run goes on: none of it is part of what has been learned.
RESUMABLE = (
    "total_steps",
    "eval_every",
    "eval_episodes",
    "checkpoint_every",
    "log_every",
    "actors_ahead",
    "publish_every",
    "num_workers",
    "device",
    "env.mode",
    "env.layout",
    "env.on_fault",
    "env.max_restarts",
    "env.step_timeout_s",
)


@dataclass(frozen=True, kw_only=True)
class _Request:
    """Hold what to do with a run's settings.

    Args:
        resume: Go on with the run in this directory (any path inside it) from its last checkpoint. Environments
            restart at their next episode. Of the settings only total_steps, device, num_workers and the evaluation,
            checkpoint and log intervals may be given anew.
        dry_run: Print the resolved settings, the memory the replay will need and the device, and exit.
    """

    resume: str | None = None
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True)
class ReplayCommandLine(_Request, ReplayTrainConfig):
    """Hold a run's settings and what to do with them."""


@dataclass(frozen=True, kw_only=True)
class BlockCommandLine(_Request, BlockTrainConfig):
    """Hold a run's settings and what to do with them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says.

    Args:
        argv: The command line without the script's name; None for the process's own.

    Returns:
        The exit code: 0, 1 (failure), 2 (bad input), 130 or 143 (saved on a signal).
    """
    return guarded(_main, argv)


def _main(argv: list[str]) -> int:
    preset, args = split_preset(argv)
    scan = argparse.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    scan.add_argument("--resume")
    resume = scan.parse_known_args(args)[0].resume
    if resume is None:
        preset = preset or DEFAULT_PRESET
        config, dry_run = _parse(preset, args, preset_of(preset))
        return _start(preset, config, argv, dry_run)
    run = find_run(resume)
    saved_preset, saved = load_config(run)
    if preset not in (None, saved_preset):
        raise ConfigError(f"preset: is {preset!r}, but {run} is a run of {saved_preset!r}; expected that one, or none.")
    saved = replace(saved, run_dir=str(run))  # where it is now: it may have been moved
    config, dry_run = _parse(saved_preset, args, saved)
    _check_changes(run, saved, config)
    return _resume(run, saved_preset, config, dry_run)


def _parse(preset: str, args: list[str], default: TrainConfig) -> tuple[TrainConfig, bool]:
    kind = ReplayCommandLine if isinstance(default, ReplayTrainConfig) else BlockCommandLine
    values: dict[str, Any] = {f.name: getattr(default, f.name) for f in fields(default)}
    others = f" Presets: {', '.join(PRESETS)}; the first argument, {DEFAULT_PRESET} where there is none."
    chosen = command_line.parse(
        kind,
        args,
        default=kind(**values),
        prog=f"train.py {preset}",
        description=f"Train {preset} on a Gymnasium environment.{others}",
    )
    return type(default)(**{name: getattr(chosen, name) for name in values}), chosen.dry_run


def _check_changes(run: Path, saved: TrainConfig, config: TrainConfig) -> None:
    changes = differences(saved, config)
    for name, old, new in changes:
        if name in RESUMABLE:
            print(f"changed: {name} from {old} to {new}")
    refused = [f"{name} is {new!r} but was {old!r}" for name, old, new in changes if name not in RESUMABLE]
    if refused:
        raise ConfigError(
            f"--resume {run}: {'; '.join(refused)}; expected the run's own settings, which are part of what it has "
            f"learned. Only {', '.join(RESUMABLE)} may change. Start a new run for the others."
        )


def _start(preset: str, config: TrainConfig, argv: list[str], dry_run: bool) -> int:
    wrappers = tuple(map(absolute_wrapper, config.env.wrappers))
    config = replace(config, env=replace(config.env, id=_absolute(config.env.id), wrappers=wrappers))
    parts = build_parts(config)
    if dry_run:
        return _describe(preset, config, parts)
    buffer = new_buffer(config, parts)
    path = config.run_dir or default_path(config.env.id, preset.rpartition(":")[2], config.seed)
    run = RunDirectory.create(path, {"preset": preset, "config": to_dict(config)}, ["scripts/train.py", *argv])
    return _train(run, config, parts, buffer, None)


def _resume(path: Path, preset: str, config: TrainConfig, dry_run: bool) -> int:
    parts = build_parts(config)
    if dry_run:
        return _describe(preset, config, parts)
    marker = read_marker(path)
    run = RunDirectory.resume(path, {"preset": preset, "config": to_dict(config)})
    checkpoint = run.checkpoints.latest(repair=True)
    if checkpoint.env_steps >= config.total_steps and marker == "DONE":
        run.mark("DONE")
        run.close()
        raise RunDirectoryError(
            f"--resume {path}: is DONE at env step {checkpoint.env_steps} of {config.total_steps}; expected steps "
            f"left to train. Extend it with --total-steps {2 * checkpoint.env_steps}."
        )
    if isinstance(config, ReplayTrainConfig):
        spaces = {"observation_space": parts.envs.observation_space, "action_space": parts.envs.action_space}
        buffer = ReplayBuffer.load(checkpoint.path / "replay", **spaces)
    else:
        buffer = new_buffer(config, parts)
    return _train(run, config, parts, buffer, checkpoint)


def _train(
    run: RunDirectory, config: TrainConfig, parts: Parts, buffer: ReplayBuffer | None, checkpoint: Checkpoint | None
) -> int:
    torch.set_num_threads(1)  # small networks: threads cost more than they bring, and results stay the same anywhere
    at = 0 if checkpoint is None else checkpoint.env_steps
    print(f"run: {run.path}, device: {parts.device} ({parts.why})", flush=True)
    print(f"environments: {_described(config, parts.envs)}", flush=True)
    with run, Interrupts() as interrupts:
        curves = TensorBoardLogger(run.path, purge_step=None if checkpoint is None else at + 1)
        console = ConsoleLogger(config.total_steps, at)
        logger = FanOut(curves, console)
        source = new_source(config, parts, buffer)
        loop = new_loop(
            config,
            parts,
            source,
            buffer,
            checkpoints=run.checkpoints,
            logger=logger,
            advance=console.advance,
            stop=lambda: interrupts.received is not None,
        )
        try:
            if checkpoint is not None:
                how = loop.restore(checkpoint)
                print(
                    f"resumed at env step {at} of {config.total_steps} after {loop.updates} updates; "
                    f"environments: {how}{_restarted(config) if 'restarted' in how else ''}",
                    flush=True,
                )
            ended = loop.run()
        finally:
            source.close()
            logger.close()
            parts.close()
        if not ended and interrupts.received is not None:
            run.mark("STOPPED", interrupts.received.name)
    if not ended or loop.evaluation is None:
        print(f"stopped at env step {loop.env_steps} of {config.total_steps}, saved")
        print(f"go on with: python scripts/train.py --resume {run.path}")
        return interrupts.exit_code
    print(f"run: {run.path}")
    print(summary(loop.evaluation))
    print(f"curves: tensorboard --logdir {run.path}")
    return 0


def _described(config: TrainConfig, envs: Envs) -> str:
    if config.actors:
        return f"{config.env.num_envs} in each of {config.actors} actor processes"
    return f"{envs.num_envs} in {getattr(envs, 'choice', '') or f'mode {config.env.mode}'}"


def _restarted(config: TrainConfig) -> str:
    cut = ", open episodes of the replay cut" if isinstance(config, ReplayTrainConfig) else ""
    return f" at their next episode{cut}"


def _describe(preset: str, config: TrainConfig, parts: Parts) -> int:
    print(json.dumps({"preset": preset, "config": to_dict(config)}, indent=2))
    if (buffer := new_buffer(config, parts, "private")) is not None:
        print(f"replay: {buffer!r}")
    print(f"device: {parts.device} ({parts.why})")
    parts.close()
    return 0


def _absolute(env_id: str) -> str:
    """Name a file from anywhere: a run may be resumed from another directory."""
    prefix = PETTINGZOO if env_id.startswith(PETTINGZOO) else ""
    return prefix + absolute_file(env_id.removeprefix(prefix))


if __name__ == "__main__":
    sys.exit(main())
