"""Actions: check what policies return against the action space, make of it what environments get, draw random ones."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray

from rlfeed.errors import ConfigError, EnvContractError, PolicyError, SpaceError, UnsupportedError, suggest
from rlfeed.nest import Nest, Path, describe, leaves, map_nest
from rlfeed.rollout.rows import to_numpy
from rlfeed.specs import from_space, mask_sizes, zeros

Handling = Literal["strict", "clip", "rescale"]
HANDLINGS = ("strict", "clip", "rescale")
MASK = "action_mask"


@dataclass(frozen=True, slots=True)
class _Leaf:
    """Hold one part of the space; ``low`` and ``high`` bound what the policy does, the space what is executed."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    low: ndarray | int
    high: ndarray | int
    space: Any
    handling: Handling = "strict"


class Actions:
    """Know one environment's action space: check batches of actions and draw random ones.

    Args:
        space: Discrete, MultiDiscrete, MultiBinary, Box, or Dict and Tuple of these.
        handling: ``"strict"``: policies act inside the space. ``"clip"``: in Boxes of floats they may act outside, and
            the environment gets the nearest action inside. ``"rescale"``: there they act in -1 .. 1, which is mapped
            onto low .. high, and clipped. Parts of other kinds are always strict.

    Raises:
        ConfigError: If there is no such handling.
        SpaceError: If a part of the space is another, or has no bounds to rescale to; the message names every one.
    """

    def __init__(self, space: Any, handling: Handling = "strict") -> None:
        if handling not in HANDLINGS:
            raise ConfigError(
                f"actions: is {handling!r}; expected one of {HANDLINGS}.{suggest(str(handling), HANDLINGS)}"
            )
        self.space, self.handling = space, handling
        self._spec = from_space(space, "action_space")
        self._tree = _leaf_tree(space, (), handling)
        self._sizes = mask_sizes(space)
        if handling == "rescale":
            _check_bounded(self._tree)

    def zeros(self, rows: int) -> Nest:
        """Give what stands for the action before the first one.

        Args:
            rows: How many.

        Returns:
            ``[rows, ...]`` zeros per leaf.
        """
        return zeros(self._spec, rows)

    def mask(self, given: Bool[ndarray, "k A"] | None, observation: Nest) -> Bool[ndarray, "k A"] | None:
        """Find the mask of the actions that are allowed now: from the infos, else the observation's ``action_mask``.

        Args:
            given: What came in the infos.
            observation: What is acted on, ``[k, ...]`` per leaf.

        Returns:
            ``[k, A]``, True = allowed; None where there is none.

        Raises:
            EnvContractError: If the observation's has another shape, or allows nothing.
        """
        if given is not None or not isinstance(observation, dict):
            return given
        shown = observation.get(MASK)
        if not isinstance(shown, ndarray):
            return None
        shown = shown.astype(bool)
        if self._sizes is not None:
            self._check_mask(shown, len(shown), 'observation["action_mask"]')
        return shown

    def fit(
        self, action: Nest, env_ids: Int64[ndarray, " k"], mask: Bool[ndarray, "k A"] | None = None
    ) -> Nest:
        """Check what a policy returned.

        Args:
            action: ``[k, ...]`` per leaf, arrays or tensors.
            env_ids: The environments of the rows.
            mask: ``[k, A]``, True = allowed.

        Returns:
            Fresh arrays of the space's dtypes.

        Raises:
            PolicyError: If structure, rows, shape or dtype differ, or an action is outside the space or masked.
        """
        fitted = _fit(self._tree, action, env_ids, ())
        if mask is not None and self._sizes is not None:
            self._check_allowed(fitted, env_ids, mask)
        return fitted

    def executed(self, action: Nest) -> Nest | None:
        """Make of the policy's actions what the environments get.

        Args:
            action: ``[k, ...]`` per leaf, as `fit` gave it.

        Returns:
            ``[k, ...]`` per leaf; None with ``"strict"`` handling, where it is the same.
        """
        return None if self.handling == "strict" else map_nest(_execute, self._tree, action)

    def draw(
        self, rows: int, generator: np.random.Generator, mask: Bool[ndarray, "k A"] | None = None
    ) -> Nest:
        """Draw random actions, uniformly where the space has bounds.

        Args:
            rows: k.
            generator: The only source of randomness.
            mask: ``[k, A]``, True = allowed; for Discrete, MultiDiscrete and MultiBinary spaces.

        Returns:
            ``[k, ...]`` per leaf.

        Raises:
            UnsupportedError: If there is a mask and the space is another.
            EnvContractError: If a mask has another number of actions or a row that allows none.
        """
        if mask is None:
            return map_nest(lambda leaf: _draw(leaf, rows, generator), self._tree)
        if self._sizes is None:
            raise UnsupportedError(
                f"action_mask: the action space is {self.space}; masks are for Discrete, MultiDiscrete and "
                "MultiBinary. Leave the mask out."
            )
        allowed = np.asarray(mask, bool)
        self._check_mask(allowed, rows, MASK)
        scores = np.where(allowed, generator.random(allowed.shape), -1.0)
        drawn = [part.argmax(axis=1) for part in np.split(scores, np.cumsum(self._sizes)[:-1], axis=1)]
        leaf = self._tree
        return (np.stack(drawn, axis=1).reshape(rows, *leaf.shape) + leaf.low).astype(leaf.dtype)

    def _check_mask(self, mask: Bool[ndarray, "k A"], rows: int, name: str) -> None:
        sizes: Any = self._sizes
        shape = (rows, int(sizes.sum()))
        if mask.shape != shape or not np.logical_or.reduceat(mask, np.cumsum(sizes) - sizes, axis=1).all():
            each = "" if len(sizes) == 1 else " for each component of the action"
            raise EnvContractError(
                f"{name}: has shape {mask.shape}; expected {shape} with at least one allowed action{each} in each row. "
                "Mend the environment's mask."
            )

    def _check_allowed(self, action: ndarray, env_ids: ndarray, mask: Bool[ndarray, "k A"]) -> None:
        sizes: Any = self._sizes
        chosen = (action - self._tree.low).reshape(len(action), -1) + (np.cumsum(sizes) - sizes)
        allowed = np.take_along_axis(mask, chosen, axis=1)
        if allowed.all():
            return
        row, component = (int(n) for n in np.argwhere(~allowed)[0])
        place = np.unravel_index(component, self._tree.shape) if self._tree.shape else ()
        name = describe("action", tuple(int(n) for n in place))
        first = int(np.broadcast_to(self._tree.low, self._tree.shape)[place])
        begin = int(sizes[:component].sum())
        fine = (np.flatnonzero(mask[row, begin : begin + sizes[component]]) + first).tolist()
        raise PolicyError(
            f"env {env_ids[row]}: {name} is {action[(row, *place)]}, which its action mask forbids; expected one of "
            f"{fine}. Choose among context.action_mask, such as values with -inf where it is False."
        )


def _leaf_tree(space: Any, path: Path, handling: Handling) -> Nest:
    kind = type(space).__name__
    if kind == "Dict":
        return {key: _leaf_tree(part, (*path, key), handling) for key, part in space.spaces.items()}
    if kind == "Tuple":
        return tuple(_leaf_tree(part, (*path, index), handling) for index, part in enumerate(space.spaces))
    shape, dtype = tuple(space.shape or ()), np.dtype(space.dtype)
    if kind == "Discrete":
        low, high = int(space.start), int(space.start + space.n - 1)
    elif kind == "MultiDiscrete":
        low, high = space.start, space.start + space.nvec - 1
    elif kind == "MultiBinary":
        low, high = 0, 1
    elif dtype.kind != "f" or handling == "strict":
        low, high = space.low, space.high
    else:
        low, high = (space.low, space.high) if handling == "clip" else (-np.ones(shape, dtype), np.ones(shape, dtype))
        return _Leaf(path, shape, dtype, low, high, space, handling)
    return _Leaf(path, shape, dtype, low, high, space)


def _check_bounded(tree: Nest) -> None:
    wrong = [
        f"{describe('action_space', leaf.path)}: is {leaf.space}, without bounds in part; expected finite bounds to "
        "rescale to. Bound it in a wrapper, or clip."
        for _, leaf in leaves(tree)
        if leaf.handling == "rescale" and not (np.isfinite(leaf.space.low) & np.isfinite(leaf.space.high)).all()
    ]
    if wrong:
        raise SpaceError(" ".join(wrong))


def _execute(leaf: _Leaf, action: ndarray) -> ndarray:
    if leaf.handling == "strict":
        return action
    low, high = leaf.space.low, leaf.space.high
    if leaf.handling == "rescale":
        # A mean of both ends, in float64: exact at -1 and 1, and no span that could overflow.
        share = (np.clip(action, leaf.low, leaf.high).astype(np.float64) + 1) / 2
        action = (low * (1 - share) + high * share).astype(leaf.dtype)
    return np.clip(action, low, high)


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
    # Integers are compared as they were given (a cast would wrap around), floats as they will be stored.
    if integral:
        action, compared = given.astype(leaf.dtype), given
    else:
        with np.errstate(over="ignore"):  # too large becomes infinite, which is refused
            action = compared = given.astype(leaf.dtype)
    if isinstance(leaf.low, int) and isinstance(leaf.high, int) and not leaf.shape:
        values = given.tolist()  # for a handful of rows faster than NumPy's reductions
        if leaf.low <= min(values) and max(values) <= leaf.high:
            return action
    if leaf.handling == "strict":
        fine = (compared >= leaf.low) & (compared <= leaf.high)
        if not fine.all():
            row, *index = (int(n) for n in np.argwhere(~fine)[0])
            raise PolicyError(
                f"env {env_ids[row]}: {describe('action', (*leaf.path, *index))} is {given[(row, *index)]}, outside "
                f"{leaf.space}. "
                + ("Return one of its actions." if integral else "Clip it, or make the Rollout with actions='clip'.")
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
    low, high = np.where(below, low, 0.0), np.where(above, high, 0.0)
    tail, share = generator.exponential(size=size), generator.random(size)
    drawn = np.where(
        below & above,
        low * (1 - share) + high * share,  # no span, which could overflow
        np.where(below, low + tail, np.where(above, high - tail, generator.normal(size=size))),
    )
    return np.clip(drawn.astype(leaf.dtype), leaf.low, leaf.high)
