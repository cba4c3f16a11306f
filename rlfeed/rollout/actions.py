"""Actions: check what policies return against the action space, and draw random ones."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray

from rlfeed.errors import EnvContractError, PolicyError, SpaceError, UnsupportedError
from rlfeed.nest import Nest, Path, describe, map_nest
from rlfeed.rollout.rows import to_numpy
from rlfeed.specs import from_space, zeros


@dataclass(frozen=True, slots=True)
class _Leaf:
    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    low: ndarray | int
    high: ndarray | int
    space: Any


class Actions:
    """Know one environment's action space: check batches of actions and draw random ones.

    Args:
        space: Discrete, MultiDiscrete, MultiBinary, Box, or Dict and Tuple of these.

    Raises:
        SpaceError: If a part of the space is another.
    """

    def __init__(self, space: Any) -> None:
        self.space = space
        self._spec = from_space(space, "action_space")
        self._tree = _leaf_tree(space, ())

    def zeros(self, rows: int) -> Nest:
        """Give what stands for the action before the first one.

        Args:
            rows: How many.

        Returns:
            ``[rows, ...]`` zeros per leaf.
        """
        return zeros(self._spec, rows)

    def fit(self, action: Nest, env_ids: Int64[ndarray, " k"]) -> Nest:
        """Check what a policy returned.

        Args:
            action: ``[k, ...]`` per leaf, arrays or tensors.
            env_ids: The environments of the rows.

        Returns:
            Fresh arrays of the space's dtypes.

        Raises:
            PolicyError: If structure, rows, shape or dtype differ, or a value is outside the space.
        """
        return _fit(self._tree, action, env_ids, ())

    def draw(
        self, rows: int, generator: np.random.Generator, mask: Bool[ndarray, "k A"] | None = None
    ) -> Nest:
        """Draw random actions, uniformly where the space has bounds.

        Args:
            rows: k.
            generator: The only source of randomness.
            mask: ``[k, A]``, True = allowed; for Discrete spaces.

        Returns:
            ``[k, ...]`` per leaf.

        Raises:
            UnsupportedError: If there is a mask and the space is not Discrete.
            EnvContractError: If a mask has another number of actions or a row that allows none.
        """
        if mask is None:
            return map_nest(lambda leaf: _draw(leaf, rows, generator), self._tree)
        leaf = self._tree
        if not isinstance(leaf, _Leaf) or type(leaf.space).__name__ != "Discrete":
            raise UnsupportedError(
                f"action_mask: the action space is {self.space}; masks are for Discrete. Leave the mask out."
            )
        allowed = np.asarray(mask, bool)
        if allowed.shape != (rows, int(leaf.space.n)) or not allowed.any(axis=1).all():
            raise EnvContractError(
                f"action_mask: has shape {allowed.shape}; expected {(rows, int(leaf.space.n))} with at least one "
                "allowed action in each row. Mend the environment's mask."
            )
        best = np.where(allowed, generator.random(allowed.shape), -1.0).argmax(axis=1)
        return (best + leaf.low).astype(leaf.dtype)


def _leaf_tree(space: Any, path: Path) -> Nest:
    kind = type(space).__name__
    if kind == "Dict":
        return {key: _leaf_tree(part, (*path, key)) for key, part in space.spaces.items()}
    if kind == "Tuple":
        return tuple(_leaf_tree(part, (*path, index)) for index, part in enumerate(space.spaces))
    if kind == "Discrete":
        low, high = int(space.start), int(space.start + space.n - 1)
    elif kind == "MultiDiscrete":
        low, high = space.start, space.start + space.nvec - 1
    elif kind == "MultiBinary":
        low, high = 0, 1
    elif kind == "Box":
        low, high = space.low, space.high
    else:
        raise SpaceError(
            f"{describe('action_space', path)}: is {space!r}; expected Discrete, MultiDiscrete, MultiBinary, Box, or "
            "Dict and Tuple of these. Encode it in a wrapper."
        )
    return _Leaf(path, tuple(space.shape or ()), np.dtype(space.dtype), low, high, space)


def _fit(tree: Nest, action: Any, env_ids: ndarray, path: Path) -> Nest:
    if isinstance(tree, dict):
        if not isinstance(action, dict) or action.keys() != tree.keys():
            got = sorted(map(str, action)) if isinstance(action, dict) else type(action).__name__
            raise PolicyError(f"{describe('action', path)}: is {got}; expected a dict with the keys {sorted(tree)}.")
        return {key: _fit(part, action[key], env_ids, (*path, key)) for key, part in tree.items()}
    if isinstance(tree, tuple):
        if not isinstance(action, tuple) or len(action) != len(tree):
            raise PolicyError(
                f"{describe('action', path)}: is {type(action).__name__}; expected a tuple of {len(tree)} parts."
            )
        return tuple(_fit(part, action[i], env_ids, (*path, i)) for i, part in enumerate(tree))
    return _fit_leaf(tree, to_numpy(action), env_ids)


def _fit_leaf(leaf: _Leaf, given: ndarray, env_ids: ndarray) -> ndarray:
    if given.shape != (len(env_ids), *leaf.shape):
        raise PolicyError(
            f"{describe('action', leaf.path)}: has shape {given.shape}; expected {(len(env_ids), *leaf.shape)}, one "
            f"row for each of {len(env_ids)} environments. Observations come batched; return one action per row."
        )
    integral = leaf.dtype.kind in "iu"
    if given.dtype.kind not in ("biu" if integral else "fiu"):
        raise PolicyError(
            f"{describe('action', leaf.path)}: has dtype {given.dtype}; expected {leaf.dtype} for {leaf.space}. "
            + ("Return the action itself, such as values.argmax(-1)." if integral else "Return real numbers.")
        )
    # Integers are compared as they were given (a cast would wrap around), floats as they will be executed and stored.
    action = given.astype(leaf.dtype)
    compared = given if integral else action
    if isinstance(leaf.low, int) and isinstance(leaf.high, int) and not leaf.shape:
        values = given.tolist()  # for a handful of rows faster than NumPy's reductions
        if leaf.low <= min(values) and max(values) <= leaf.high:
            return action
    fine = (compared >= leaf.low) & (compared <= leaf.high)
    if not fine.all():
        row, *index = (int(n) for n in np.argwhere(~fine)[0])
        raise PolicyError(
            f"env {env_ids[row]}: {describe('action', (*leaf.path, *index))} is {given[(row, *index)]}, outside "
            f"{leaf.space}. "
            + ("Return one of its actions." if integral else "Clip it, as in np.clip(action, low, high).")
        )
    if not integral and not np.isfinite(action).all():
        raise PolicyError(f"{describe('action', leaf.path)}: is {given}; expected finite numbers.")
    return action


def _draw(leaf: _Leaf, rows: int, generator: np.random.Generator) -> ndarray:
    size = (rows, *leaf.shape)
    if leaf.dtype.kind in "iu":
        return generator.integers(leaf.low, leaf.high, size, leaf.dtype, endpoint=True)
    low, high = np.asarray(leaf.low, np.float64), np.asarray(leaf.high, np.float64)
    below, above = np.isfinite(low), np.isfinite(high)
    # As Gymnasium draws: normal without bounds, exponential with one bound, uniform with two.
    span = np.where(below & above, high - np.where(below, low, 0.0), 0.0)
    tail = generator.exponential(size=size)
    drawn = np.where(
        below & above,
        np.where(below, low, 0.0) + span * generator.random(size),
        np.where(below, low + tail, np.where(above, high - tail, generator.normal(size=size))),
    )
    return np.clip(drawn.astype(leaf.dtype), leaf.low, leaf.high)

