"""Check an environment's spaces, and what it returns against them."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from rlfeed.envs.checks.findings import Findings
from rlfeed.errors import SpaceError
from rlfeed.nest import Path, describe
from rlfeed.specs import from_space

KINDS = ("observation_space", "action_space")
_IMAGE_CHANNELS = (1, 3, 4)


def check_spaces(env: gymnasium.Env, findings: Findings) -> bool:
    """Check that the spaces are there, can be stored, and follow the usual conventions.

    Args:
        env: The environment.
        findings: What to add to.

    Returns:
        Whether it can be played: both are spaces of Gymnasium.
    """
    playable = True
    for kind in KINDS:
        space = getattr(env, kind, None)
        if isinstance(space, spaces.Space):
            try:
                from_space(space, kind)
            except SpaceError as error:
                where, _, problem = str(error).partition(": ")
                problem, _, rule = problem.partition("; expected ")
                rule, _, fix = rule.partition(". ")
                findings.error(("space", where), where, problem, expected=rule, fix=fix)
            _check_parts(kind, space, (), findings)
            continue
        playable = False
        old = space is not None and type(space).__module__.partition(".")[0] == "gym"
        problem = f"{kind} is missing" if space is None else f"{kind} is a {type(space).__name__}"
        findings.error(
            kind,
            "",
            f"{problem}{', a space of the old gym' if old else ''}",
            expected="a space of gymnasium.spaces",
            fix=f"Set self.{kind} in the constructor, such as gymnasium.spaces.Box(-1, 1, (3,), np.float32).",
        )
    return playable


def _check_parts(kind: str, space: Any, path: Path, findings: Findings) -> None:
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            _check_parts(kind, part, (*path, key), findings)
    elif isinstance(space, spaces.Tuple):
        for index, part in enumerate(space.spaces):
            _check_parts(kind, part, (*path, index), findings)
    elif isinstance(space, spaces.Box):
        name = describe(kind, path)
        (_check_action_box if kind == "action_space" else _check_observation_box)(name, space, findings)
    elif isinstance(space, spaces.Discrete) and kind == "action_space" and space.n == 1:
        findings.note(
            ("one action", path),
            "",
            f"{describe(kind, path)} has one action only",
            expected="a choice",
            fix="Count the actions: Discrete(n) has the actions 0 .. n-1.",
        )


def _check_action_box(name: str, space: spaces.Box, findings: Findings) -> None:
    if not space.is_bounded("both"):
        findings.note(
            ("unbounded", name),
            "",
            f"{name} has no bounds: {space}",
            expected="finite low and high: random actions and squashed policies need them",
            fix="Declare the range that makes sense, such as Box(-1, 1, ...), and scale in step().",
        )
    elif space.dtype.kind == "f" and not np.allclose(space.low, -space.high):  # pyright: ignore[reportOptionalMemberAccess]
        findings.note(
            ("asymmetric", name),
            "",
            f"{name} is not symmetric around zero: {space}",
            expected="usually [-1, 1]: policies start near the middle of it",
            fix="Scale in step(), or wrap it in gymnasium.wrappers.RescaleAction(env, -1, 1).",
        )


def _check_observation_box(name: str, space: spaces.Box, findings: Findings) -> None:
    if len(space.shape) != 3:
        return
    if space.shape[-1] not in _IMAGE_CHANNELS and space.shape[0] not in _IMAGE_CHANNELS:
        channels = f"has the shape {space.shape}"
    elif space.dtype == np.uint8 and not (np.all(space.low == 0) and np.all(space.high == 255)):
        channels = f"has bounds {space.low.min()} to {space.high.max()}"
    elif space.dtype != np.uint8:
        channels = f"has dtype {space.dtype}"
    else:
        return
    findings.note(
        ("image", name),
        "",
        f"{name} {channels}, which looks like an image and is none for image networks",
        expected="uint8 from 0 to 255, channels last or first",
        fix="Declare Box(0, 255, (height, width, channels), np.uint8): a quarter of float32's memory, too.",
    )


def check_observation(space: Any, value: Any, place: str, findings: Findings, path: Path = ()) -> None:
    """Check that an observation lies in its space, and say which part of it does not.

    Args:
        space: The space, or the part of it at ``path``.
        value: The observation, or its part.
        place: Where in the play.
        findings: What to add to.
        path: The part's place in the observation.
    """
    name = describe("observation", path)
    if isinstance(space, spaces.Dict):
        if not isinstance(value, dict) or value.keys() != space.spaces.keys():
            got = f"has the keys {sorted(map(str, value))}" if isinstance(value, dict) else f"is a {_kind(value)}"
            findings.error(
                ("keys", path), f"{place}, {name}", f"{name} {got}",
                expected=f"a dict with the keys {sorted(space.spaces)}, as observation_space says",
                fix="Return all of them and no other, in reset() and step() alike.",
            )
        for key, part in space.spaces.items() if isinstance(value, dict) else ():
            if key in value:
                check_observation(part, value[key], place, findings, (*path, key))
    elif isinstance(space, spaces.Tuple):
        if isinstance(value, tuple) and len(value) == len(space.spaces):
            for index, part in enumerate(space.spaces):
                check_observation(part, value[index], place, findings, (*path, index))
            return
        got = f"has {len(value)} parts" if isinstance(value, tuple) else f"is a {_kind(value)}"
        findings.error(
            ("keys", path), f"{place}, {name}", f"{name} {got}",
            expected=f"a tuple of {len(space.spaces)} parts, as observation_space says",
            fix="Return tuple(...) of them, in reset() and step() alike.",
        )
    elif isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        _check_array(name, space, value, place, findings)
    elif not space.contains(value):
        findings.error(
            ("outside", path), f"{place}, {name}", f"{name} is {value!r}, not in {space}",
            expected="an element of its space", fix="Return one, or declare another space.",
        )


def _check_array(name: str, space: Any, value: Any, place: str, findings: Findings) -> None:
    where, kind = f"{place}, {name}", name
    if isinstance(value, list | tuple):
        findings.note(
            ("list", kind), where, f"{name} is a {_kind(value)}",
            expected=f"a NumPy array of {space.dtype}: it is converted in every step",
            fix=f"Return np.array(..., np.{space.dtype}).",
        )
    elif not isinstance(value, np.ndarray | np.generic | int | float):
        findings.error(
            ("type", kind), where, f"{name} is a {type(value).__module__}.{_kind(value)}",
            expected="a NumPy array, or a number where the space has no shape", fix="Return np.asarray(...) of it.",
        )
        return
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(value, object)
    if array.shape != (space.shape or ()):
        findings.error(
            ("shape", kind), where, f"{name} has shape {array.shape} but its space says {space.shape or ()}",
            expected="one shape, from the reset to the last step",
            fix="Return that shape, or declare the other one in observation_space.",
        )
        return
    if not _dtype_fits(array, value, space):
        findings.error(
            ("dtype", kind), where, f"{name} has dtype {_dtype_name(array, value)} but its space says {space.dtype}",
            expected=f"{space.dtype}, as observation_space says",
            fix=f"Cast it in reset() and step(), or declare dtype=np.{array.dtype} in observation_space.",
        )
    if array.dtype.kind in "biuf":
        _check_range(name, kind, space, array, where, findings)


def _check_range(name: str, kind: str, space: Any, array: np.ndarray, where: str, findings: Findings) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        index = tuple(int(n) for n in np.argwhere(~finite)[0])
        findings.error(
            ("finite", kind), where, f"{describe(name, index)} is {array[index]}",
            expected="finite numbers: one NaN ruins all weights of a network",
            fix="Find the division or root that makes it; clip what grows without bounds.",
        )
    low, high = _bounds(space)
    outside = finite & ((array < low) | (array > high))
    if outside.any():
        index = tuple(int(n) for n in np.argwhere(outside)[0])
        bottom, top = np.broadcast_to(low, array.shape)[index], np.broadcast_to(high, array.shape)[index]
        findings.error(
            ("bounds", kind), where, f"{describe(name, index)} is {array[index]}, outside {bottom} to {top}",
            expected="values inside the bounds of its space", fix="Clip it, or declare wider bounds.",
        )


def _bounds(space: Any) -> tuple[Any, Any]:
    if isinstance(space, spaces.Box):
        return space.low, space.high
    if isinstance(space, spaces.Discrete):
        return space.start, space.start + space.n - 1
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    return 0, 1


def _dtype_fits(array: np.ndarray, value: Any, space: Any) -> bool:
    if isinstance(value, bool | np.bool_) or array.dtype.kind not in "biuf":
        return isinstance(space, spaces.MultiBinary)
    if isinstance(value, int | float | list | tuple):  # Python's numbers have no size
        return array.dtype.kind in "bi" or np.dtype(space.dtype).kind == "f"
    if not isinstance(space, spaces.Box):
        return array.dtype.kind in "biu"
    return np.can_cast(array.dtype, space.dtype, "safe")


def _dtype_name(array: np.ndarray, value: Any) -> str:
    return str(array.dtype) if array.dtype.kind != "O" else f"object (a {_kind(value)})"


def _kind(value: Any) -> str:
    return type(value).__name__
