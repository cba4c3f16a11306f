"""What a training loop needs of an algorithm: to act, to learn, and to be saved."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium import spaces
from jaxtyping import Float
from torch import Tensor, nn

from rlfeed.errors import CheckpointError, UnsupportedError
from rlfeed.replay import Transition, Uniform
from rlfeed.replay.samplers import Sampler
from rlfeed.replay.units import Unit
from rlfeed.rollout.actions import Handling
from rlfeed.types import Batch, Policy

_KIND = "kind"  # of the agent, beside its parts


@dataclass(frozen=True, slots=True)
class Learned:
    """Tell what came of learning from a batch.

    Args:
        scalars: Curves by tag, one number each, left on the device: reading them here would wait for it every time.
        priorities: New priorities of the batch's samples, ``[B]``, or ``[B, T]`` of the steps of sequences; they need
            a `Prioritized` sampler.
        updates: Optimiser steps taken.
    """

    scalars: Mapping[str, Tensor]
    priorities: Float[Tensor, "B ..."] | None = None
    updates: int = 1


class Agent(ABC):
    """Act and learn; the base of `ReplayAgent` and `BlockAgent`.

    ``policy`` explores in mode ``"explore"`` and does its best in mode ``"greedy"``. ``actions`` says what becomes of
    its actions in a Box, as `Rollout` has it: with ``"rescale"`` the policy acts in -1 .. 1 whatever the bounds are.
    """

    policy: Policy
    actions: Handling = "strict"

    @abstractmethod
    def learn(self, batch: Batch, *, env_steps: int) -> Learned:
        """Learn from a batch.

        Args:
            batch: On the agent's device.
            env_steps: Steps taken so far, the clock of schedules.

        Returns:
            Curves, and new priorities where there are some.
        """

    @abstractmethod
    def parts(self) -> Mapping[str, Any]:
        """Name everything that learning changes.

        Returns:
            Modules, optimisers, generators and what else has ``state_dict`` and ``load_state_dict``, by name.
        """

    def scalars(self, env_steps: int) -> Mapping[str, float]:
        """Say where the schedules stand.

        Args:
            env_steps: Steps taken so far.

        Returns:
            Curves by tag; none where this is not overridden.
        """
        return {}

    def actor(self, number: int, count: int) -> tuple[Any, nn.Module]:
        """Give what an actor process acts with.

        Args:
            number: The actor's, from 0.
            count: How many there are: each may explore in its own way.

        Returns:
            A policy, and the module whose weights it acts with.

        Raises:
            UnsupportedError: Where this is not overridden.
        """
        raise UnsupportedError(
            f"{type(self).__name__}: has no method actor(number, count); expected one that gives an actor's policy "
            "and its module. Write it, or use actors=0."
        )

    def state_dict(self) -> dict[str, Any]:
        """Give the state of every part; see `Stateful`."""
        return {_KIND: type(self).__name__, **{name: _state_of(part) for name, part in self.parts().items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state back.

        Args:
            state: What `state_dict` gave.

        Raises:
            CheckpointError: If it is of another agent, or of networks of other shapes; nothing is changed then but
                parts that came before the one that does not fit.
        """
        parts, kind = self.parts(), state.get(_KIND)
        found = set(state) - {_KIND}
        if kind != type(self).__name__ or found != set(parts):
            raise CheckpointError(
                f"agent state: is of {kind} with {', '.join(sorted(found))}; expected {type(self).__name__} with "
                f"{', '.join(sorted(parts))}. Load it with the preset and the settings it was saved with."
            )
        for name, part in parts.items():
            try:
                _load(part, state[name])
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"agent state: {name!r} does not fit this {type(self).__name__}; expected the same spaces and "
                    f"settings as when it was saved. {error}"
                ) from error


class ReplayAgent(Agent):
    """Learn from samples of a replay: one batch of them is one update.

    ``unit`` is what a sample becomes: `Transition`, `Sequence` or `Episode`; ``sampler`` draws them; ``columns`` are
    the spaces of what the replay stores beside each step, by name, of the policy's extras and its ``"carry"``.
    """

    unit: Unit = Transition()
    sampler: Sampler = Uniform()
    columns: Mapping[str, spaces.Space] = {}

    def beta(self, env_steps: int) -> float | None:
        """Give the exponent of importance weights, where it changes in the course of a run.

        Args:
            env_steps: Steps taken so far.

        Returns:
            0 to 1; None leaves it as the sampler has it.
        """
        return None


class BlockAgent(Agent):
    """Learn from blocks: ``[N, T]`` steps that the policy has just taken, as `Rollout.blocks` gives them.

    `learn` goes over a block as often as it likes. With actors the policy that took the steps is a few updates older;
    a block then consists of windows of what they stored, whose ``mask`` is False at closing rows (see `InOrder`), and
    ``columns`` are the spaces of what is stored beside each step, by name.
    """

    columns: Mapping[str, spaces.Space] = {}


class Counter:
    """Count something that a checkpoint keeps, such as updates.

    Args:
        value: To begin with.
    """

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        """Give the count; see `Stateful`."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a count back; see `Stateful`."""
        self.value = int(state["value"])


def _state_of(part: Any) -> Any:
    if isinstance(part, torch.Generator):
        return part.get_state()
    if isinstance(part, torch.optim.Optimizer):  # its settings are the configuration's
        return _copied(part.state_dict()["state"])
    return _copied(part.state_dict())


def _load(part: Any, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, torch.optim.Optimizer):
        part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})
    else:
        part.load_state_dict(state)


def _copied(state: Any) -> Any:
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, tuple | list):
        return type(state)(_copied(value) for value in state)
    return state.detach().clone() if isinstance(state, Tensor) else state
