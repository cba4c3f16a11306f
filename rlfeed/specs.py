"""Array specs: what a Gymnasium space looks like in memory, and back.

Gymnasium is touched only inside `from_space`, so the data path works where its environments are not installed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlfeed.errors import SpaceError
from rlfeed.nest import Nest, describe, map_nest


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """Describe one array of a nest, without its leading axes.

    Args:
        shape: The shape of one element.
        dtype: The NumPy dtype, kept in storage.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Count the bytes of one element.

        Returns:
            Bytes.
        """
        return math.prod(self.shape) * self.dtype.itemsize

    def zeros(self, *leading: int) -> np.ndarray:
        """Make an array of zeros.

        Args:
            *leading: Leading axes, such as (T, B).

        Returns:
            ``[*leading, *shape]``.
        """
        return np.zeros((*leading, *self.shape), self.dtype)


def from_space(space: Any, where: str = "space") -> Nest:
    """Turn a Gymnasium space into a nest of array specs.

    Args:
        space: Box, Discrete, MultiDiscrete, MultiBinary, or Dict and Tuple of these, nested; an `ArraySpec`, or dict
            or tuple of them, is taken as it is.
        where: What the space is called in an error.

    Returns:
        A nest of `ArraySpec`: dict for Dict, tuple for Tuple.

    Raises:
        SpaceError: If a part cannot be stored as an array of one shape; the message names the part.
    """
    return _from_space(space, where, ())


def _from_space(space: Any, where: str, path: tuple[str | int, ...]) -> Nest:
    if isinstance(space, ArraySpec):
        return space
    kind = type(space).__name__
    if isinstance(space, Mapping) or kind == "Dict":
        parts = space if isinstance(space, Mapping) else space.spaces
        if not parts:
            raise SpaceError(f"{describe(where, path)}: is an empty Dict; expected at least one entry.")
        for key in parts:
            if not isinstance(key, str):
                raise SpaceError(f"{describe(where, path)}: has the key {key!r}; expected keys that are strings.")
        return {key: _from_space(part, where, (*path, key)) for key, part in parts.items()}
    if isinstance(space, tuple) or kind == "Tuple":
        parts = space if isinstance(space, tuple) else space.spaces
        return tuple(_from_space(part, where, (*path, index)) for index, part in enumerate(parts))
    from gymnasium import spaces

    if isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return ArraySpec(tuple(int(n) for n in space.shape or ()), np.dtype(space.dtype))
    raise SpaceError(
        f"{describe(where, path)}: is {space!r}; expected Box, Discrete, MultiDiscrete, MultiBinary, or Dict and "
        f"Tuple of these. {kind} has no array of one shape: encode it in a wrapper."
    )


def to_space(spec: Nest) -> Any:
    """Turn a nest of array specs into an unbounded Gymnasium space.

    Args:
        spec: A nest of `ArraySpec`.

    Returns:
        Box for each array, in Dict and Tuple as the nest is. Bounds are those of the dtype: a spec does not keep them.
    """
    from gymnasium import spaces

    if isinstance(spec, dict):
        return spaces.Dict({key: to_space(part) for key, part in spec.items()})
    if isinstance(spec, tuple):
        return spaces.Tuple(to_space(part) for part in spec)
    if spec.dtype.kind == "f":
        return spaces.Box(-np.inf, np.inf, spec.shape, spec.dtype.type)
    if spec.dtype.kind == "b":
        return spaces.MultiBinary(spec.shape)
    info = np.iinfo(spec.dtype)
    return spaces.Box(info.min, info.max, spec.shape, spec.dtype.type)


def zeros(spec: Nest, *leading: int) -> Nest:
    """Make a nest of zeros.

    Args:
        spec: A nest of `ArraySpec`.
        *leading: Leading axes.

    Returns:
        Arrays of ``[*leading, *shape]``.
    """
    return map_nest(lambda part: part.zeros(*leading), spec)
