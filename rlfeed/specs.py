"""Array specs: what a Gymnasium space looks like in memory, and back.

Gymnasium is touched only inside `from_space`, so the data path works where its environments are not installed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlfeed.errors import ConfigError, SpaceError, suggest
from rlfeed.nest import Nest, Path, describe, leaves, map_nest

FrameStack = int | Mapping[str, int]


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
        SpaceError: If a part cannot be stored as an array of one shape; the message names every such part.
    """
    wrong: list[str] = []
    spec = _from_space(space, where, (), wrong)
    _raise(wrong)
    return spec


def check_spaces(observation_space: Any, action_space: Any) -> None:
    """Refuse an environment whose spaces have a part that cannot be stored, with all such parts at once.

    Args:
        observation_space: Of one environment.
        action_space: Of one environment.

    Raises:
        SpaceError: If a part has no array of one shape; the message names each.
    """
    wrong: list[str] = []
    _from_space(observation_space, "observation_space", (), wrong)
    _from_space(action_space, "action_space", (), wrong)
    _raise(wrong)


def _raise(wrong: list[str]) -> None:
    if wrong:
        raise SpaceError(" ".join(wrong))


def _from_space(space: Any, where: str, path: tuple[str | int, ...], wrong: list[str]) -> Nest:
    """Turn a space into specs; what cannot be stored is a line of ``wrong``."""
    if isinstance(space, ArraySpec):
        return space
    kind = type(space).__name__
    if isinstance(space, Mapping) or kind == "Dict":
        parts = space if isinstance(space, Mapping) else space.spaces
        if not parts:
            wrong.append(f"{describe(where, path)}: is an empty Dict; expected at least one entry.")
        strange = [key for key in parts if not isinstance(key, str)]
        wrong += [f"{describe(where, path)}: has the key {key!r}; expected keys that are strings." for key in strange]
        return {key: _from_space(part, where, (*path, str(key)), wrong) for key, part in parts.items()}
    if isinstance(space, tuple) or kind == "Tuple":
        parts = space if isinstance(space, tuple) else space.spaces
        return tuple(_from_space(part, where, (*path, index), wrong) for index, part in enumerate(parts))
    from gymnasium import spaces

    if isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return ArraySpec(tuple(int(n) for n in space.shape or ()), np.dtype(space.dtype))
    wrong.append(
        f"{describe(where, path)}: is {space!r}; expected Box, Discrete, MultiDiscrete, MultiBinary, or Dict and "
        f"Tuple of these. {kind} has no array of one shape: encode it in a wrapper."
    )
    return ()


def mask_sizes(action_space: Any) -> np.ndarray | None:
    """Say how an action mask is made up: one entry for each value of each component, one component after the other.

    Args:
        action_space: Of one environment.

    Returns:
        ``[components]`` int64, the values of each: ``[n]`` for Discrete(n), the numbers of ``nvec`` for MultiDiscrete,
        a 2 for each entry of MultiBinary (0 and 1); a mask has their sum of entries. None for other spaces.
    """
    kind = type(action_space).__name__
    if kind == "Discrete":
        return np.array([action_space.n], np.int64)
    if kind == "MultiDiscrete":
        return np.asarray(action_space.nvec, np.int64).ravel()
    if kind == "MultiBinary":
        return np.full(math.prod(action_space.shape), 2, np.int64)
    return None


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


def frames_of(observation: Nest, frame_stack: FrameStack, where: str) -> dict[Path, int]:
    """Say how many frames of every leaf of an observation are stacked.

    Args:
        observation: The observation's specs, of single frames.
        frame_stack: Frames, >= 1, of every leaf; or of the named entries of a Dict observation, 1 for the others.
        where: Who asks, for an error.

    Returns:
        Frames by the leaf's path.

    Raises:
        ConfigError: If a number is no int >= 1, or an entry is not there; all findings at once.
    """
    if not isinstance(frame_stack, Mapping):
        count = _counted({"frame_stack": frame_stack}, [], where)[0]
        return dict.fromkeys((path for path, _ in leaves(observation)), count)
    known = list(observation) if isinstance(observation, dict) else []
    strange = [
        f"frame_stack names {key!r}; expected entries of the observation: {known}{suggest(str(key), known)}"
        for key in frame_stack
        if key not in known
    ]
    counts = _counted({f"frame_stack[{key!r}]": frames for key, frames in frame_stack.items()}, strange, where)
    named: dict[Any, int] = dict(zip(frame_stack, counts, strict=True))
    return {path: named.get(path[0], 1) if path else 1 for path, _ in leaves(observation)}


def _counted(counts: dict[str, Any], wrong: list[str], where: str) -> list[int]:
    findings = [*wrong, *(f"{k} is {n!r}; expected an int >= 1" for k, n in counts.items() if not _is_count(n))]
    if findings:
        raise ConfigError(f"{where}: " + "; ".join(findings) + ".")
    return [int(n) for n in counts.values()]


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1
