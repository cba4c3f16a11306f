"""What environments return is checked here, once, where it enters rlfeed.

Nothing is cast with a loss, but for one that half of all environments in the world have: float64 observations under a
space of float32. They are rounded, and a warning says so, once. Integers are cast where every value survives. Real
numbers must be finite and inside their Box; one outside by less than the Box's own width, as simulators with bounds of
their own are now and then, passes with a warning, once.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray

from rlfeed.errors import EnvContractError
from rlfeed.nest import Nest, Path, describe, map_nest
from rlfeed.specs import from_space, mask_sizes

Where = Callable[[int], str]
REWARD_LIMIT = float(np.finfo(np.float32).max)
SUCCESS_KEYS = ("is_success", "success")  # what infos tell it by


@dataclass(frozen=True, slots=True)
class _Leaf:
    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    low: Any  # an array, or one number for all; None: every value of the dtype is inside
    high: Any
    said: set[Any] = field(default_factory=set)  # what was warned about: wider floats, values just outside


class ObservationCheck:
    """Check observations against their space, and put those of several environments side by side.

    Args:
        space: The space of one environment's observations.

    Raises:
        SpaceError: If a part of the space cannot be stored as an array of one shape.
    """

    def __init__(self, space: Any) -> None:
        self._spec = from_space(space, "observation_space")
        self._tree = _leaf_tree(space, ())
        leaf = self._tree
        # dtype and shape where an observation is one array, else what equals none
        self.plain = (leaf.dtype, leaf.shape) if isinstance(leaf, _Leaf) else (None, None)

    def empty(self, rows: int) -> Nest:
        """Make room for observations.

        Args:
            rows: k.

        Returns:
            ``[k, ...]`` per leaf, in the dtypes of the space, not initialised.
        """
        leaf = self._tree
        if isinstance(leaf, _Leaf):
            return np.empty((rows, *leaf.shape), leaf.dtype)
        return map_nest(lambda part: np.empty((rows, *part.shape), part.dtype), self._spec)

    def write(self, observation: Any, target: Nest, row: int, where: Where) -> None:
        """Copy one observation into a row; its values are for `check`.

        Args:
            observation: What an environment returned.
            target: ``[k, ...]`` per leaf.
            row: Which.
            where: Says where a row comes from, for errors.

        Raises:
            EnvContractError: If keys, shape or dtype differ from the space.
        """
        _write(self._tree, observation, target, row, where, ())

    def check(self, observations: Nest, where: Where) -> None:
        """Check the values of observations that lie side by side in the shapes and dtypes of the space.

        Args:
            observations: ``[k, ...]`` per leaf.
            where: Says where a row comes from, for errors.

        Raises:
            EnvContractError: If a value is not finite, or outside the space.
        """
        _check(self._tree, observations, where)

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
    return np.array([reward_of(value, row, where) for row, value in enumerate(values)], np.float64)


def reward_of(value: Any, row: int, where: Where) -> float:
    """Check a reward.

    Args:
        value: What an environment returned.
        row: Of which row.
        where: Says where a row comes from, for errors.

    Returns:
        The reward.

    Raises:
        EnvContractError: If it is no finite scalar that float32 can hold; an array with one entry is taken for one.
    """
    if type(value) is ndarray and value.size == 1 and value.ndim:
        # Many environments return shape (1,), the shape of an action. Always the same text: it is shown once.
        warnings.warn(
            f"reward is an array of shape {value.shape}: its one entry is taken. Return a float.",
            RuntimeWarning,
            stacklevel=2,
        )
        value = value.reshape(())
    if type(value) is float:
        fine = -REWARD_LIMIT <= value <= REWARD_LIMIT
    else:
        fine = np.shape(value) == () and _is_real(value) and abs(float(value)) <= REWARD_LIMIT
    if not fine:
        shape = f" of shape {np.shape(value)}" if np.shape(value) else ""
        raise EnvContractError(f"{where(row)}: reward is {value!r}{shape}; expected a finite scalar. Return a float.")
    return float(value)


def flag_of(name: str, value: Any, row: int, where: Where) -> bool:
    """Check a flag.

    Args:
        name: terminated or truncated.
        value: What an environment returned.
        row: Of which row.
        where: Says where a row comes from, for errors.

    Returns:
        The flag.

    Raises:
        EnvContractError: If it is no bool.
    """
    if value is not True and value is not False and not _is_bool(value):
        raise EnvContractError(f"{where(row)}: {name} is {value!r}; expected True or False. Return bool(...).")
    return bool(value)


def mask_length(action_space: Any) -> int:
    """Count the entries of an action mask.

    Args:
        action_space: Of one environment.

    Returns:
        How many; 0 where the space has no masks.
    """
    sizes = mask_sizes(action_space)
    return 0 if sizes is None else int(sizes.sum())


def mask_of(mask: Any, action_space: Any, row: int, where: Where) -> Bool[ndarray, " A"]:
    """Check an action mask that came in an info.

    Args:
        mask: What the info holds; None where it holds none. A tuple of one mask per component, as Gymnasium's
            MultiDiscrete samples with, is taken as their concatenation.
        action_space: Of one environment.
        row: Of which row.
        where: Says where a row comes from, for errors.

    Returns:
        ``[A]``, True = allowed; see `mask_sizes`.

    Raises:
        EnvContractError: If actions of that space cannot be masked, or the mask is missing, of another shape, or leaves
            a component of the action no value.
    """
    sizes = mask_sizes(action_space)
    if sizes is None:
        raise EnvContractError(
            f'{where(row)}: info has an "action_mask" but the action space is {action_space}; expected Discrete, '
            "MultiDiscrete or MultiBinary. Leave the mask out."
        )
    starts, entries = np.cumsum(sizes) - sizes, int(sizes.sum())
    given = np.concatenate([np.ravel(part) for part in mask]) if isinstance(mask, tuple) else np.asarray(mask)
    fits = mask is not None and given.shape == (entries,) and given.dtype.kind in "biu"
    if not fits or not np.logical_or.reduceat(given != 0, starts).all():
        each = "" if len(sizes) == 1 else " for each component"
        raise EnvContractError(
            f'{where(row)}: info["action_mask"] is {mask}; expected {entries} booleans, at least one True{each}, '
            "in the info of every reset and step. Give one for each action."
        )
    return given.astype(bool)


def stack_masks(masks: Sequence[Any], action_space: Any, where: Where) -> Bool[ndarray, "k A"]:
    """Check the action masks that came in infos, and put them side by side.

    Args:
        masks: One per row; None where the environment gave none.
        action_space: Of one environment.
        where: Says where a row comes from, for errors.

    Returns:
        ``[k, A]``, True = allowed; see `mask_sizes`.

    Raises:
        EnvContractError: If one is wrong; see `mask_of`.
    """
    return np.stack([mask_of(mask, action_space, row, where) for row, mask in enumerate(masks)])


def success_of(info: Mapping[str, Any]) -> float | None:
    """Read whether an episode succeeded.

    Args:
        info: Of its last step.

    Returns:
        ``info["is_success"]`` or ``info["success"]`` as a number; None where it tells nothing.
    """
    told: Any = next((info[key] for key in SUCCESS_KEYS if info.get(key) is not None), None)
    return float(told) if _is_real(told) and np.shape(told) == () else None


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
    return _Leaf(path, tuple(space.shape or ()), np.dtype(space.dtype), *_bounds(space))


def _bounds(space: Any) -> tuple[Any, Any]:
    """Give the least and the largest value that is inside, None where all of the dtype are."""
    from gymnasium import spaces

    # Integers index tables: one outside would be read as another entry, far from its cause.
    if isinstance(space, spaces.Discrete):
        return np.asarray(space.start), np.asarray(space.start + space.n - 1)
    if isinstance(space, spaces.MultiDiscrete):
        return np.asarray(space.start), np.asarray(space.start + space.nvec - 1)
    if isinstance(space, spaces.MultiBinary):
        return np.asarray(0), np.asarray(1)
    dtype = np.dtype(space.dtype)
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype) if dtype.kind in "iu" else None
    if limits is None:
        return None, None
    # The largest finite number in place of infinity: NaN and infinity fail the same two comparisons.
    low, high = np.maximum(space.low, limits.min), np.minimum(space.high, limits.max)
    if dtype.kind != "f" and np.all(low == limits.min) and np.all(high == limits.max):
        return None, None
    return tuple(bound.flat[0] if np.all(bound == bound.flat[0]) else bound for bound in (low, high))


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
    out = np.empty((len(rows), *leaf.shape), leaf.dtype)
    for row, value in enumerate(rows):
        _write_leaf(leaf, value, out, row, where)
    _check_values(leaf, out, where)
    return out


def _write(tree: Nest, value: Any, target: Nest, row: int, where: Where, path: Path) -> None:
    if isinstance(tree, _Leaf):
        _write_leaf(tree, value, target, row, where)
    elif isinstance(tree, dict):
        if not isinstance(value, dict) or value.keys() != tree.keys():
            raise _keys_error(tree, value, where(row), path)
        for key, part in tree.items():
            _write(part, value[key], target[key], row, where, (*path, key))
    else:
        if not isinstance(value, tuple) or len(value) != len(tree):
            raise _keys_error(tree, value, where(row), path)
        for index, part in enumerate(tree):
            _write(part, value[index], target[index], row, where, (*path, index))


def _write_leaf(leaf: _Leaf, value: Any, target: ndarray, row: int, where: Where) -> None:
    if type(value) is not ndarray or value.dtype != leaf.dtype or value.shape != leaf.shape:
        value = _fit(leaf, value, where(row))
    target[row] = value


def _check(tree: Nest, values: Nest, where: Where) -> None:
    if isinstance(tree, _Leaf):
        _check_values(tree, values, where)
    else:
        for part, below in zip(*((n.values() if isinstance(n, dict) else n) for n in (tree, values)), strict=True):
            _check(part, below, where)


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
    if leaf.low is None:
        return
    fine = (values >= leaf.low) & (values <= leaf.high)
    if np.count_nonzero(fine) == fine.size:  # a third of the price of fine.all()
        return
    if leaf.dtype.kind == "f":
        _check_outside(leaf, values, where)
        return
    row, *index = (int(n) for n in np.argwhere(~fine)[0])
    raise EnvContractError(
        f"{where(row)}: {describe('observation', (*leaf.path, *index))} is {values[(row, *index)]}, outside its space; "
        f"expected {np.asarray(leaf.low).tolist()} to {np.asarray(leaf.high).tolist()}. "
        "Find where reset() or step() makes it."
    )


def _check_outside(leaf: _Leaf, values: ndarray, where: Where) -> None:
    """Tell what is broken from what is just outside: by less than the width of its Box."""
    shape = values.shape[1:]
    low, high = (np.broadcast_to(bound, shape).astype(np.float64) for bound in (leaf.low, leaf.high))
    given = values.astype(np.float64)
    with np.errstate(over="ignore"):
        wild = ~((given >= low - (high - low)) & (given <= high + (high - low)) & np.isfinite(given))
    row, *index = (int(n) for n in np.argwhere(wild if wild.any() else (given < low) | (given > high))[0])
    value, bounds = values[(row, *index)], (low[tuple(index)], high[tuple(index)])
    text = f"{where(row)}: {describe('observation', (*leaf.path, *index))} is {value}, "
    if not np.isfinite(value):
        raise EnvContractError(text + "not finite; expected finite numbers. Find where reset() or step() makes it.")
    text += f"outside its space; expected {bounds[0]:g} to {bounds[1]:g}. "
    if wild.any():
        raise EnvContractError(text + "Find where reset() or step() makes it, or widen observation_space.")
    if "outside" not in leaf.said:
        leaf.said.add("outside")
        warnings.warn(text + "It is passed on. Widen observation_space.", RuntimeWarning, stacklevel=2)


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
        if array.dtype not in leaf.said:
            leaf.said.add(array.dtype)
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
