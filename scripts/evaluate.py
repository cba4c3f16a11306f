"""Evaluate the last checkpoint of a run: ``python scripts/evaluate.py RUN_DIR [flags]``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import command_line
import tyro
from command_line import find_run, guarded, load_config, summary

from agents.training import EVALUATION_ENVS, build_agent, build_envs
from rlfeed.envs import NormalizedEnvs
from rlfeed.errors import ConfigError
from rlfeed.feed.device import choose_device
from rlfeed.train.checkpoint import Checkpoints
from rlfeed.train.evaluate import evaluate


@dataclass(frozen=True, kw_only=True)
class CommandLine:
    """Say what to evaluate.

    Args:
        run_dir: The run directory, or any path inside it.
        episodes: Episodes to play, on fresh environments, each action the best one known.
        seed: Decides the episodes; default the run's own, which gives the episodes of its last evaluation.
        device: Where the policy computes: cpu, cuda, cuda:N, mps, or auto (cuda, then mps, then cpu).
    """

    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    episodes: int = 20
    seed: int | None = None
    device: str = "auto"


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says.

    Args:
        argv: The command line without the script's name; None for the process's own.

    Returns:
        The exit code: 0, 1 (failure) or 2 (bad input).
    """
    return guarded(_main, argv)


def _main(argv: list[str]) -> int:
    chosen = command_line.parse(CommandLine, argv, prog="evaluate.py", description="Evaluate a run's last checkpoint.")
    if chosen.episodes < 1:
        raise ConfigError(f"--episodes: is {chosen.episodes}; expected at least 1.")
    run = find_run(chosen.run_dir)
    _, config = load_config(run)
    device, _ = choose_device(chosen.device)
    checkpoint = Checkpoints(run / "checkpoints").latest()
    envs = build_envs(config.env, min(chosen.episodes, EVALUATION_ENVS))
    if isinstance(envs, NormalizedEnvs):
        envs.load_state_dict(checkpoint.load("rollout")["envs"])
    agent = build_agent(config, envs.observation_space, envs.action_space, device, envs.num_envs)
    agent.load_state_dict(checkpoint.load("agent"))
    seed = config.seed if chosen.seed is None else chosen.seed
    result = evaluate(envs, agent.policy, episodes=chosen.episodes, seed=seed, actions=agent.actions)
    envs.close()
    print(f"checkpoint: {checkpoint.path}")
    print(summary(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
