"""Assemble steps into batches: whole episodes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlfeed.errors import ConfigError
from rlfeed.nest import Nest, map_nest, stack
from rlfeed.rollout.rows import to_numpy, to_tensor
from rlfeed.types import Batch, Step


def positive(where: str, value: Any) -> int:
    """Check that an argument is a positive integer.

    Args:
        where: What the argument is, for the error.
        value: What was given.

    Returns:
        The value.

    Raises:
        ConfigError: If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ConfigError(f"{where} is {value!r}; expected an integer of at least 1.")
    return int(value)


def quotas(n: int, num_envs: int, per_env: bool) -> list[int]:
    """Share out episodes over environments.

    Args:
        n: How many.
        num_envs: N.
        per_env: Whether ``n`` counts for each environment; otherwise the first ones get more.

    Returns:
        Episodes for each environment.
    """
    if per_env:
        return [n] * num_envs
    return [n // num_envs + (env_id < n % num_envs) for env_id in range(num_envs)]


def episode_batch(rows: Sequence[tuple[Step, int]]) -> Batch:
    """Assemble one whole episode.

    Args:
        rows: Its steps in order, each with the episode's row in it.

    Returns:
        A batch of one row: ``observation`` ``[1, T+1, ...]``, everything else ``[1, T, ...]``, no padding.
    """
    last, last_row = rows[-1]

    def series(field: str) -> Nest:
        return _tensors(stack([_row(getattr(step, field), row) for step, row in rows]))

    observations = [_row(step.observation, row) for step, row in rows]
    observations.append(_row(last.next_observation, last_row))
    action = series("action")
    everywhere = torch.ones(1, len(rows), dtype=torch.bool)
    first, first_row = rows[0]
    return Batch(
        observation=_tensors(stack(observations)),
        action=action,
        reward=series("reward"),
        terminated=series("terminated"),
        truncated=series("truncated"),
        is_first=series("is_first"),
        mask=everywhere,
        loss_mask=everywhere.clone(),
        lengths=torch.tensor([len(rows)]),
        carry=map_nest(lambda leaf: to_tensor(leaf)[first_row : first_row + 1], first.carry),
        prev_action=map_nest(lambda leaf: torch.zeros_like(leaf[:, 0]), action),
        prev_reward=torch.zeros(1),
        extras=_tensors(stack([_row(columns_of(step), row) for step, row in rows])),
    )


def columns_of(step: Step) -> dict[str, Nest]:
    """Give the columns beside a step's own fields.

    Args:
        step: The step.

    Returns:
        Its extras, and ``env_action`` where the environments got another action than the policy's.
    """
    return step.extras if step.env_action is None else {**step.extras, "env_action": step.env_action}


def _row(nest: Nest, row: int) -> Nest:
    return map_nest(lambda leaf: to_numpy(leaf)[row], nest)


def _tensors(nest: Nest) -> Nest:
    return map_nest(lambda leaf: torch.from_numpy(leaf)[None], nest)
