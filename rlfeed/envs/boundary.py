"""What environments return is checked here, once, where it enters rlfeed.

Nothing is cast with a loss, but for one that half of all environments in the world have: float64 observations under a
space of float32. They are rounded, and a warning says so, once. Integers are cast where every value survives.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray

from rlfeed.errors import EnvContractError
from rlfeed.nest import Nest, Path, describe
from rlfeed.specs import from_space, mask_sizes

Where = Callable[[int], str]
REWARD_LIMIT = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class _Leaf:
    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    low: ndarray | None
    high: ndarray | None
    may_be_infinite: bool
    rounded: set[np.dtype] = field(default_factory=set)  # wider floats that were warned about


class ObservationCheck:
    """Check observations against their space, and put those of several environments side by side.

    Args:
        space: The space of one environment's observations.

    Raises:
        SpaceError: If a part of the space cannot be stored as an array of one shape.
    """

    def __init__(self, space: Any) -> None:
        from_space(space, "observation_space")
        self._tree = _leaf_tree(space, ())

    def stack(self, observations: Sequence[Any], where: Where) -> Nest:
        """Put observations of single environments side by side, in fresh arrays.

        Args:
            observations: One observation per row.
            where: Says where a row comes from, for errors.

        Returns:
            ``[k, ...]`` per leaf, in the dtypes of the space.

        Raises:
            EnvContractError: If keys, shape or dtype differ from the space, or a value is not finite.
        """
        return _stack(self._tree, observations, where)

    def batch(self, observations: Nest, where: Where) -> Nest:
        """Check observations that lie side by side already.

        Args:
            observations: ``[k, ...]`` per leaf.
            where: Says where a row comes from, for errors.

        Returns:
            The same arrays.

        Raises:
            EnvContractError: If keys, shape or dtype differ from the space, or a value is not finite.
        """
        return _batch(self._tree, observations, where)


def check_rewards(values: Sequence[Any], where: Where) -> Float64[ndarray, " k"]:
    """Check the rewards of one step.

    Args:
        values: One reward per row.
        where: Says where a row comes from, for errors.

    Returns:
        ``[k]``, in float64, as the environments gave them.

    Raises:
        EnvContractError: If one is no finite scalar that float32 can hold.
    """
    for row, value in enumerate(values):
        if type(value) is float:
            fine = -REWARD_LIMIT <= value <= REWARD_LIMIT
        else:
            fine = np.shape(value) == () and _is_real(value) and abs(float(value)) <= REWARD_LIMIT
        if not fine:
            shape = f" of shape {np.shape(value)}" if np.shape(value) else ""
            raise EnvContractError(
                f"{where(row)}: reward is {value!r}{shape}; expected a finite scalar. Return a float."
            )
    return np.array(values, np.float64)


def check_flags(name: str, values: Sequence[Any], where: Where) -> Bool[ndarray, " k"]:
    """Check the terminated or truncated flags of one step.

    Args:
        name: Which of the two.
        values: One flag per row.
        where: Says where a row comes from, for errors.

    Returns:
        ``[k]`` bool.

    Raises:
        EnvContractError: If one is no bool.
    """
    for row, value in enumerate(values):
        if value is not True and value is not False and not _is_bool(value):
            raise EnvContractError(f"{where(row)}: {name} is {value!r}; expected True or False. Return bool(...).")
    return np.array(values, bool)


def stack_masks(masks: Sequence[Any], action_space: Any, where: Where) -> Bool[ndarray, "k A"]:
    """Check the action masks that came in infos, and put them side by side.

    Args:
        masks: One per row; None where the environment gave none. A tuple of one mask per component, as Gymnasium's
            MultiDiscrete samples with, is taken as their concatenation.
        action_space: Of one environment.
        where: Says where a row comes from, for errors.

    Returns:
        ``[k, A]``, True = allowed; see `mask_sizes`.

    Raises:
        EnvContractError: If actions of that space cannot be masked, or a mask is missing, of another shape, or leaves
            a component of the action no value.
    """
    sizes = mask_sizes(action_space)
    if sizes is None:
        raise EnvContractError(
            f'{where(0)}: info has an "action_mask" but the action space is {action_space}; expected Discrete, '
            "MultiDiscrete or MultiBinary. Leave the mask out."
        )
    starts, entries = np.cumsum(sizes) - sizes, int(sizes.sum())
    out = np.empty((len(masks), entries), bool)
    for row, mask in enumerate(masks):
        given = np.concatenate([np.ravel(part) for part in mask]) if isinstance(mask, tuple) else np.asarray(mask)
        fits = mask is not None and given.shape == (entries,) and given.dtype.kind in "biu"
        if not fits or not np.logical_or.reduceat(given != 0, starts).all():
            each = "" if len(sizes) == 1 else " for each component"
            raise EnvContractError(
                f'{where(row)}: info["action_mask"] is {mask}; expected {entries} booleans, at least one True{each}, '
                "in the info of every reset and step. Give one for each action."
            )
        out[row] = given
    return out


def _is_real(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number | np.bool_) or (
        isinstance(value, ndarray) and value.dtype.kind in "biuf"
    )


def _is_bool(value: Any) -> bool:
    return isinstance(value, np.bool_) or (isinstance(value, ndarray) and value.dtype == bool and value.shape == ())


def _leaf_tree(space: Any, path: Path) -> Nest:
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return {key: _leaf_tree(part, (*path, key)) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_leaf_tree(part, (*path, index)) for index, part in enumerate(space.spaces))
    low: Any = None
    high: Any = None
    # Values of these spaces index tables; one outside would be read as another entry, far from its cause.
    if isinstance(space, spaces.Discrete):
        low, high = np.asarray(space.start), np.asarray(space.start + space.n - 1)
    elif isinstance(space, spaces.MultiDiscrete):
        low, high = np.asarray(space.start), np.asarray(space.start + space.nvec - 1)
    elif isinstance(space, spaces.MultiBinary):
        low, high = np.asarray(0), np.asarray(1)
    dtype = np.dtype(space.dtype)
    return _Leaf(path, tuple(space.shape or ()), dtype, low, high, dtype.kind == "f")


def _stack(tree: Nest, rows: Sequence[Any], where: Where, path: Path = ()) -> Nest:
    if isinstance(tree, _Leaf):
        return _stack_leaf(tree, rows, where)
    if isinstance(tree, dict):
        for row, value in enumerate(rows):
            if not isinstance(value, dict) or value.keys() != tree.keys():
                raise _keys_error(tree, value, where(row), path)
        return {key: _stack(part, [r[key] for r in rows], where, (*path, key)) for key, part in tree.items()}
    for row, value in enumerate(rows):
        if not isinstance(value, tuple) or len(value) != len(tree):
            raise _keys_error(tree, value, where(row), path)
    return tuple(_stack(part, [r[i] for r in rows], where, (*path, i)) for i, part in enumerate(tree))


def _stack_leaf(leaf: _Leaf, rows: Sequence[Any], where: Where) -> ndarray:
    shape, dtype = leaf.shape, leaf.dtype
    out = np.empty((len(rows), *shape), dtype)
    for row, value in enumerate(rows):
        if type(value) is not ndarray or value.dtype != dtype or value.shape != shape:
            value = _fit(leaf, value, where(row))
        out[row] = value
    _check_values(leaf, out, where)
    return out


def _batch(tree: Nest, values: Any, where: Where, path: Path = ()) -> Nest:
    if isinstance(tree, dict):
        if not isinstance(values, dict) or values.keys() != tree.keys():
            raise _keys_error(tree, values, where(0), path)
        return {key: _batch(part, values[key], where, (*path, key)) for key, part in tree.items()}
    if isinstance(tree, tuple):
        if not isinstance(values, tuple) or len(values) != len(tree):
            raise _keys_error(tree, values, where(0), path)
        return tuple(_batch(part, values[i], where, (*path, i)) for i, part in enumerate(tree))
    if type(values) is not ndarray or values.dtype != tree.dtype or values.shape[1:] != tree.shape:
        return _stack_leaf(tree, list(values), where)
    _check_values(tree, values, where)
    return values


def _check_values(leaf: _Leaf, values: ndarray, where: Where) -> None:
    if leaf.may_be_infinite:
        fine = np.isfinite(values)
        wrong, rule = "not finite", "finite numbers"
    elif leaf.low is not None and leaf.high is not None:
        fine = (values >= leaf.low) & (values <= leaf.high)
        wrong, rule = "outside its space", f"{leaf.low.tolist()} to {leaf.high.tolist()}"
    else:
        return
    if np.count_nonzero(fine) < fine.size:  # a third of the price of fine.all()
        row, *index = (int(n) for n in np.argwhere(~fine)[0])
        value = values[(row, *index)]
        raise EnvContractError(
            f"{where(row)}: {describe('observation', (*leaf.path, *index))} is {value}, {wrong}; expected {rule}. "
            "Find where reset() or step() makes it."
        )


def _fit(leaf: _Leaf, value: Any, where: str) -> ndarray:
    name = describe("observation", leaf.path)
    try:
        array = np.asarray(value)
    except ValueError:
        raise EnvContractError(
            f"{where}: {name} is {value!r}, no array; expected {leaf.dtype} of shape {leaf.shape}."
        ) from None
    if array.shape != leaf.shape:
        raise EnvContractError(
            f"{where}: {name} has shape {array.shape} but its space says {leaf.shape}. "
            "Return that shape, or declare the other one in observation_space."
        )
    exact = np.can_cast(array.dtype, leaf.dtype, "safe")
    if not exact and array.dtype.kind in "biu" and leaf.dtype.kind in "iu":
        # Compared in Python's integers: NumPy compares uint64 with int64 as floats.
        exact = array.astype(leaf.dtype).tolist() == array.tolist()
    if not exact and array.dtype.kind == leaf.dtype.kind == "f":
        if array.dtype not in leaf.rounded:
            leaf.rounded.add(array.dtype)
            warnings.warn(
                f"{where}: {name} has dtype {array.dtype} but its space says {leaf.dtype}: it is rounded to that, in "
                f"every step. Cast it in reset() and step(), or declare dtype=np.{array.dtype} in observation_space.",
                RuntimeWarning,
                stacklevel=2,
            )
        with np.errstate(over="ignore"):  # too large becomes infinite, which is refused by name
            return array.astype(leaf.dtype)
    if not exact:
        raise EnvContractError(
            f"{where}: {name} has dtype {array.dtype} but its space says {leaf.dtype}. "
            f"Cast it in reset() and step(), or declare dtype=np.{array.dtype} in observation_space."
        )
    return array


def _keys_error(tree: Nest, value: Any, where: str, path: Path) -> EnvContractError:
    wanted = f"a dict with the keys {sorted(tree)}" if isinstance(tree, dict) else f"a tuple of {len(tree)} parts"
    if isinstance(value, dict):
        got = f"has the keys {sorted(map(str, value))}"
    elif isinstance(value, tuple):
        got = f"is a tuple of {len(value)} parts"
    else:
        got = f"is a {type(value).__name__}"
    return EnvContractError(
        f"{where}: {describe('observation', path)} {got}; expected {wanted}, as observation_space says."
    )
