"""Policies: adapt what users bring to the `Policy` protocol, and exploration that wraps one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray
from torch import nn

from rlfeed.errors import ConfigError, FieldError, PolicyError
from rlfeed.nest import Nest, Path, describe, leaves, map_nest
from rlfeed.rollout.actions import Actions
from rlfeed.rollout.rows import put, to_numpy
from rlfeed.types import Policy, PolicyContext, PolicyOutput


class FunctionPolicy:
    """Make a policy of a function from NumPy observations to actions.

    Args:
        function: Given ``[k, ...]`` per leaf, returns ``[k, ...]`` per leaf.
    """

    def __init__(self, function: Callable[[Nest], Nest]) -> None:
        self._function = function

    def initial_carry(self, num_envs: int) -> Nest:
        """Give the empty carry: a function remembers nothing.

        Args:
            num_envs: Rows.

        Returns:
            ``()``.
        """
        return ()

    def __call__(self, observation: Nest, carry: Nest, context: PolicyContext) -> PolicyOutput:
        """Decide for every row.

        Args:
            observation: ``[k, ...]`` per leaf.
            carry: Unused.
            context: Unused.

        Returns:
            The actions.
        """
        action = self._function(observation)
        return action if isinstance(action, PolicyOutput) else PolicyOutput(action)


class ModulePolicy:
    """Make a policy of a torch module.

    The module gets tensors on its own device, in inference mode and evaluation mode (its former mode is restored). It
    returns the action, or a `PolicyOutput` with ``extras`` beside it. A module that has ``initial_carry(num_envs)``
    (which gives ``()`` where it is stateless) is called as a `Policy` is, with carry and context; its carry stays on
    its device.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parts = list(module.modules())  # listed once: walking the tree costs as much as a small forward pass
        self._parameter = next(module.parameters(), None)
        self._recurrent = hasattr(module, "initial_carry")

    def initial_carry(self, num_envs: int) -> Nest:
        """Give the recurrent state with which episodes begin.

        Args:
            num_envs: Rows.

        Returns:
            Tensors ``[num_envs, ...]`` on the module's device; ``()`` when stateless.
        """
        if not self._recurrent:
            return ()
        carry = self._module.initial_carry(num_envs)  # pyright: ignore[reportCallIssue]
        device = self._device()
        return map_nest(lambda leaf: torch.as_tensor(leaf, device=device).detach(), carry)

    def __call__(self, observation: Nest, carry: Nest, context: PolicyContext) -> PolicyOutput:
        """Decide for every row.

        Args:
            observation: ``[k, ...]`` per leaf.
            carry: Tensors ``[k, ...]`` per leaf.
            context: For recurrent modules.

        Returns:
            What the module returned, in tensors.
        """
        device = self._device()
        training = [part for part in self._parts if part.training]
        for part in training:  # module.eval() costs as much as a small network, and forgets which parts trained
            object.__setattr__(part, "training", False)
        try:
            with torch.inference_mode():
                plain = type(observation) is np.ndarray  # map_nest takes as long as the rest of this line
                tensors = torch.from_numpy(observation) if plain else map_nest(torch.from_numpy, observation)
                if device.type != "cpu":
                    tensors = map_nest(lambda leaf: leaf.to(device), tensors)
                out = self._module(tensors, carry, context) if self._recurrent else self._module(tensors)
        finally:
            for part in training:
                object.__setattr__(part, "training", True)
        return out if isinstance(out, PolicyOutput) else PolicyOutput(out)

    def _device(self) -> torch.device:
        # Asked for in every call: the module may be moved between two steps.
        return torch.device("cpu") if self._parameter is None else self._parameter.device


class EpsilonGreedy:
    """Take a random action with probability epsilon, otherwise the policy's, while exploring.

    Args:
        policy: What to explore around: a `Policy`, a module or a function.
        schedule: Epsilon, 0 to 1, as a function of env steps: one for all environments, or an array ``[N]`` of theirs,
            which begins anew where there are more of them.
        action_space: Of one environment; masks are respected.
    """

    def __init__(
        self, policy: Any, schedule: Callable[[int], float | Float64[ndarray, " N"]], action_space: Any
    ) -> None:
        self._policy = adapt(policy)
        self._schedule = schedule
        self._actions = Actions(action_space)

    def initial_carry(self, num_envs: int) -> Nest:
        """Give the recurrent state with which the policy's episodes begin.

        Args:
            num_envs: Rows.

        Returns:
            ``[num_envs, ...]`` per leaf.
        """
        return self._policy.initial_carry(num_envs)

    def epsilon(self, env_steps: int) -> float | Float64[ndarray, " N"]:
        """Give the probability of a random action.

        Args:
            env_steps: Steps taken so far.

        Returns:
            Epsilon, or each environment's.

        Raises:
            ConfigError: If the schedule gives no probability.
        """
        epsilon = self._schedule(env_steps)
        least, most = (epsilon.min(), epsilon.max()) if isinstance(epsilon, ndarray) else (epsilon, epsilon)
        if not 0.0 <= least <= most <= 1.0:
            raise ConfigError(f"EpsilonGreedy: epsilon is {epsilon} at {env_steps} env steps; expected 0 to 1.")
        return epsilon

    def __call__(self, observation: Nest, carry: Nest, context: PolicyContext) -> PolicyOutput:
        """Decide for every row.

        Args:
            observation: ``[k, ...]`` per leaf.
            carry: ``[k, ...]`` per leaf.
            context: Randomness, mode and masks.

        Returns:
            The policy's output, some actions replaced.
        """
        out = self._policy(observation, carry, context)
        if context.mode != "explore":
            return out
        rows = len(context.env_ids)
        epsilon = self.epsilon(context.env_steps)
        if isinstance(epsilon, ndarray):
            epsilon = epsilon[context.env_ids % len(epsilon)]
        explore = context.generator.random(rows) < epsilon
        places = explore.nonzero()[0]
        if not len(places):
            return out
        mask = None if context.action_mask is None else context.action_mask[places]
        drawn = self._actions.draw(len(places), context.generator, mask)
        action = put(map_nest(to_numpy, out.action), places, drawn, rows)
        return PolicyOutput(action, out.carry, out.extras)


def adapt(policy: Any) -> Policy:
    """Make a `Policy` of what a user brings.

    Args:
        policy: A `Policy`, an ``nn.Module``, or a function ``observation -> action``.

    Returns:
        The policy; modules are handed tensors, everything else NumPy arrays.

    Raises:
        ConfigError: If it cannot be called.
    """
    if isinstance(policy, nn.Module):
        return ModulePolicy(policy)
    if isinstance(policy, type) or not callable(policy):
        raise ConfigError(
            f"policy: is {policy!r}; expected a Policy, an nn.Module or a function observation -> action."
        )
    return policy if isinstance(policy, Policy) else FunctionPolicy(policy)


def check_carry(policy: Policy, num_envs: int) -> Nest:
    """Check the carry with which episodes begin.

    Args:
        policy: The policy.
        num_envs: N.

    Returns:
        The carry of one row, ``[1, ...]`` per leaf.

    Raises:
        PolicyError: If `Policy.initial_carry` gives no rows of arrays, or another structure for other numbers of rows.
    """
    one, every = policy.initial_carry(1), policy.initial_carry(num_envs)
    try:
        fine = all(fits for _, fits in leaves(map_nest(lambda a, b: a.shape[1:] == b.shape[1:], one, every)))
        fine = fine and all(len(x) == 1 for _, x in leaves(one)) and all(len(x) == num_envs for _, x in leaves(every))
    except (FieldError, AttributeError, TypeError):
        fine = False
    if not fine:
        raise PolicyError(
            f"policy: initial_carry gave {_outline(one)} for 1 row and {_outline(every)} for {num_envs}; expected "
            "arrays or tensors of that many rows, otherwise alike. Return zeros of (num_envs, ...)."
        )
    return one


def check_output(out: Any, carry: Nest, rows: int) -> PolicyOutput:
    """Check the parts of a policy's output that have no space: carry and extras.

    Args:
        out: What the policy returned.
        carry: What it was given.
        rows: k.

    Returns:
        The output, its extras as arrays of their own.

    Raises:
        PolicyError: If it is no `PolicyOutput`, the carry's structure, a shape or dtype in it, or an array's rows
            differ, or extras have no names.
    """
    if not isinstance(out, PolicyOutput):
        raise PolicyError(
            f"policy: returned a {type(out).__name__}; expected a PolicyOutput. Return PolicyOutput(action, carry)."
        )
    if not (_empty(carry) and _empty(out.carry)):
        try:
            same = map_nest(lambda new, old: new.shape == old.shape and new.dtype == old.dtype, out.carry, carry)
        except (FieldError, AttributeError):
            same = False
        if not all(fits for _, fits in leaves(same)):
            raise PolicyError(
                f"policy: returned a carry of {_outline(out.carry)} where it was given {_outline(carry)}; expected the "
                "same structure, shapes and dtypes. Return the carry after the observation."
            )
    if not isinstance(out.extras, dict):
        raise PolicyError(
            f"policy: extras are {type(out.extras).__name__}; expected a dict of arrays by name. Name them."
        )
    return PolicyOutput(out.action, out.carry, _own(out.extras, rows, ())) if out.extras else out


def _own(extras: Nest, rows: int, path: Path) -> Nest:
    if isinstance(extras, dict):
        return {key: _own(part, rows, (*path, key)) for key, part in extras.items()}
    if isinstance(extras, tuple):
        return tuple(_own(part, rows, (*path, index)) for index, part in enumerate(extras))
    leaf = np.array(to_numpy(extras))
    if leaf.shape[:1] != (rows,):
        raise PolicyError(
            f"policy: {describe('extras', path)} has shape {leaf.shape}; expected a leading axis of {rows}, one row "
            "per environment."
        )
    return leaf


def _empty(nest: Nest) -> bool:
    return type(nest) is tuple and not nest


def _outline(carry: Nest) -> str:
    parts = [
        f"{describe('carry', path)} {tuple(getattr(leaf, 'shape', ()))} {getattr(leaf, 'dtype', type(leaf).__name__)}"
        for path, leaf in leaves(carry)
    ]
    return ", ".join(parts) or "()"
