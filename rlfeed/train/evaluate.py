"""Evaluation: whole episodes on environments of their own, a fixed number in each."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv
from jaxtyping import Float64, Int64
from numpy import ndarray

from rlfeed.envs import Envs, NormalizedEnvs
from rlfeed.errors import ConfigError
from rlfeed.rollout import EpisodeRecord, Rollout
from rlfeed.rollout.actions import Handling
from rlfeed.rollout.views import positive, quotas
from rlfeed.types import Mode

_ENDLESS = 100_000  # env steps without an end, after which one is told
STREAM = 2  # evaluation plays other episodes than training of the same seed


@dataclass(frozen=True, eq=False, slots=True)
class Evaluation:
    """Hold what an evaluation found.

    Args:
        returns: ``[episodes]`` float64, undiscounted, ordered by episode and then by environment.
        lengths: ``[episodes]`` int64, steps, in the same order.
        mean: Of the returns.
        std: Of the returns, over the episodes played (not an estimate beyond them).
        success: Mean of what the environments' infos told of the episodes' success; None where they told nothing.
    """

    returns: Float64[ndarray, " episodes"]
    lengths: Int64[ndarray, " episodes"]
    mean: float
    std: float
    success: float | None = field(default=None, kw_only=True)


def evaluate(
    envs: Envs | gymnasium.Env | VectorEnv,
    policy: Any,
    *,
    episodes: int = 20,
    seed: int = 0,
    mode: Mode = "greedy",
    actions: Handling = "strict",
) -> Evaluation:
    """Play whole episodes and report their returns.

    The number of episodes is fixed for each environment beforehand: taking the first that end would prefer short
    ones. The same seed plays the same episodes, which are not those that training with that seed plays. Statistics of
    `NormalizedEnvs` are used as they are, and count nothing; returns are of the rewards before normalisation. Episodes
    that are lost with their environment are replaced; a warning tells of episodes that do not come to an end.

    Args:
        envs: Environments that nobody else steps meanwhile; they stay open.
        policy: A `Policy`, an ``nn.Module`` or a function ``observation -> action``.
        episodes: How many, over all environments, at least 1.
        seed: At least 0.
        mode: How the policy acts.
        actions: What becomes of its actions; see `Rollout`.

    Returns:
        Returns and lengths of all episodes.

    Raises:
        ConfigError: If an argument is wrong.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"evaluate: seed is {seed!r}; expected an integer of at least 0.")
    own_seed = int(np.random.SeedSequence(seed, spawn_key=(STREAM,)).generate_state(1, np.uint64)[0])
    rollout = Rollout(envs, policy, seed=own_seed, mode=mode, actions=actions)
    quota = quotas(positive("evaluate: episodes", episodes), rollout.num_envs, per_env=False)
    played: list[list[EpisodeRecord]] = [[] for _ in quota]
    with _frozen(rollout.envs):
        ended_at = 0
        for _ in rollout:
            for record in rollout.statistics.finished:
                played[record.env_id].append(record)
            ended_at = _watch(rollout, ended_at)
            if all(len(records) >= enough for records, enough in zip(played, quota, strict=True)):
                break
    counted = [
        records[number]
        for number in range(max(quota))
        for records, enough in zip(played, quota, strict=True)
        if number < enough
    ]
    returns = np.array([record.total_reward for record in counted])
    lengths = np.array([record.length for record in counted], np.int64)
    told = [record.success for record in counted if record.success is not None]
    success = float(np.mean(told)) if told else None
    return Evaluation(returns, lengths, float(returns.mean()), float(returns.std()), success=success)


def _watch(rollout: Rollout, ended_at: int) -> int:
    """Give the env step at which an episode ended last; say, again and again, that none has for long."""
    if rollout.statistics.finished:
        return rollout.env_steps
    if rollout.env_steps - ended_at < _ENDLESS:
        return ended_at
    warnings.warn(
        f"evaluate: no episode of {rollout.envs.name} ended within {_ENDLESS:,} steps; expected an end. If there is "
        "none, give the environment a time limit: gymnasium.wrappers.TimeLimit(env, max_episode_steps).",
        RuntimeWarning,
        stacklevel=3,
    )
    return rollout.env_steps


@contextmanager
def _frozen(envs: Envs) -> Iterator[None]:
    if not isinstance(envs, NormalizedEnvs):
        yield
        return
    before, envs.frozen = envs.frozen, True
    try:
        yield
    finally:
        envs.frozen = before
