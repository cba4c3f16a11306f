"""What a model returns is checked here before it is fed back to it: shapes, dtypes, values, and whose memory it is."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from numpy import ndarray
from torch import Tensor

from rlfeed.errors import FieldError
from rlfeed.nest import Nest, describe, leaves, map_nest
from rlfeed.rollout.rows import to_numpy

Outline = Any  # a nest of (shape, dtype)


def is_array(leaf: Any) -> bool:
    """Tell whether a leaf is an array, a tensor, or a NumPy scalar.

    Args:
        leaf: A leaf of a nest.

    Returns:
        True where it has a shape and a dtype.
    """
    return isinstance(leaf, ndarray | Tensor | np.generic)


def outline(nest: Nest) -> Outline:
    """Give shape and dtype of every leaf: two nests that may take each other's place have equal outlines.

    Args:
        nest: Arrays or tensors; anything else is its own outline.

    Returns:
        A nest of pairs.
    """
    if type(nest) in (Tensor, ndarray):  # first: it is asked for in every step
        return nest.shape, nest.dtype
    if isinstance(nest, dict):
        return {key: outline(part) for key, part in nest.items()}
    if isinstance(nest, tuple):
        return tuple([outline(part) for part in nest])
    return (nest.shape, nest.dtype) if is_array(nest) else nest


def check_rows(name: str, nest: Nest, rows: int | None, error: type[Exception] = FieldError) -> None:
    """Check that every leaf is an array with one entry per row.

    Args:
        name: What the nest is called.
        nest: The nest.
        rows: How many rows; None where arrays have no axis of rows.
        error: What to raise.

    Raises:
        FieldError: If a leaf is no array, or its leading axis differs.
    """
    for path, leaf in leaves(nest):
        where = f"Feedback: {describe(name, path)}"
        if not is_array(leaf):
            raise error(f"{where} is {leaf!r}; expected an array or a tensor, or a dict or tuple of them.")
        shape = tuple(leaf.shape)
        if rows is None or shape[:1] == (rows,):
            continue
        fix = ""
        if name == "carry" and rows in shape[1:]:
            fix = " nn.LSTM and nn.GRU keep [layers, n, ...]: give carry.transpose(0, 1), and turn it back in the cell."
        raise error(f"{where} has shape {shape}; expected a leading axis of {rows} rows.{fix}")


def check_outline(name: str, step: int, new: Nest, expected: Outline) -> None:
    """Check that a nest has the outline it had before.

    Args:
        name: What the nest is called.
        step: The number of the output.
        new: The nest.
        expected: Its outline before.

    Raises:
        FieldError: If structure, shape or dtype differ.
    """
    if outline(new) == expected:
        return
    where = f"Feedback: step {step}: {name}"
    fix = "Return that from cell in every step."
    if "the next x" in name:
        fix = "Return that from feed." if name.startswith("the") else "Pass feed= to make the next input of an output."
    if isinstance(expected, dict) and isinstance(new, dict) and new.keys() == expected.keys():
        for key, part in expected.items():
            check_outline(f'{name}["{key}"]', step, new[key], part)
    if isinstance(expected, tuple) and isinstance(new, tuple) and len(new) == len(expected) and not _is_leaf(expected):
        for index, part in enumerate(expected):
            check_outline(f"{name}[{index}]", step, new[index], part)
    raise FieldError(f"{where} is {_said(outline(new))}; expected {_said(expected)}, as it was before. {fix}")


def surely_finite(leaf: Any) -> bool:
    """Tell at little cost that every number of an array is finite.

    Args:
        leaf: An array or a tensor of any dtype.

    Returns:
        True where it has integers or bools, too. False where it may be otherwise: `finite_rows` tells.
    """
    if isinstance(leaf, Tensor):
        if leaf.is_floating_point():
            # One pass and no temporary: a sum is finite only where all its terms are. (It may overflow where they are.)
            return math.isfinite(leaf.sum().item())
        return not leaf.is_complex()
    return leaf.dtype.kind not in "fc" or np.count_nonzero(np.isfinite(leaf)) == leaf.size


def finite_rows(leaf: Any, rows: int) -> Bool[ndarray, " n"]:
    """Tell which rows have finite numbers only.

    Args:
        leaf: ``[n, ...]``, an array or a tensor of any dtype.
        rows: n.

    Returns:
        ``[n]`` bool.
    """
    finite = torch.isfinite(leaf.detach()) if isinstance(leaf, Tensor) else np.isfinite(leaf)
    return to_numpy(finite.reshape(rows, -1).all(1))


def marks(leaf: Tensor, rows: int) -> Tensor:
    """Mark the rows with numbers that are not finite, without waiting for the device.

    Args:
        leaf: ``[n, ...]``, of floating-point numbers.
        rows: n.

    Returns:
        ``[n]`` on the same device: 0 where all numbers are finite, otherwise NaN.
    """
    return (leaf.detach() * 0).reshape(rows, -1).sum(1)


def pick(nest: Nest, rows: Bool[ndarray, " n"]) -> Nest:
    """Take some rows.

    Args:
        nest: ``[n, ...]`` per leaf.
        rows: True where a row is taken.

    Returns:
        ``[m, ...]`` per leaf, in memory of their own.
    """
    index = np.flatnonzero(rows)
    return map_nest(lambda leaf: leaf[torch.from_numpy(index) if isinstance(leaf, Tensor) else index], nest)


def memory(nest: Nest) -> set[int]:
    """Say where the memory of the leaves begins: what is written in place begins where it did before.

    Args:
        nest: Arrays or tensors.

    Returns:
        Addresses; that of the whole array where a leaf is a view.
    """
    arrays = (leaf for _, leaf in leaves(nest) if isinstance(leaf, ndarray | Tensor))
    return {_address(leaf) for leaf in arrays if 0 not in tuple(leaf.shape)}


def _address(leaf: Any) -> int:
    if isinstance(leaf, Tensor):
        return leaf.untyped_storage().data_ptr()
    while isinstance(base := getattr(leaf, "base", None), ndarray):
        leaf = base
    return leaf.__array_interface__["data"][0]


def _is_leaf(part: Outline) -> bool:
    return len(part) == 2 and isinstance(part[1], torch.dtype | np.dtype)


def _said(part: Outline) -> str:
    if isinstance(part, dict):
        return f"a dict with the keys {sorted(map(str, part))}"
    if isinstance(part, tuple) and not _is_leaf(part):
        return f"a tuple of {len(part)} parts"
    if isinstance(part, tuple):
        return f"{part[1]} of shape {tuple(part[0])}"
    return repr(part)
