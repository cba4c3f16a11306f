"""Frame stacks: how many frames of each part of an observation a sample shows."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlfeed.errors import ConfigError, suggest
from rlfeed.nest import Nest, Path, leaves

FrameStack = int | Mapping[str, int]


def frames_of(observation: Nest, frame_stack: FrameStack) -> dict[Path, int]:
    """Say how many frames of every leaf of an observation are stacked.

    Args:
        observation: The observation's specs, of single frames.
        frame_stack: Frames, >= 1, of every leaf; or of the named entries of a Dict observation, 1 for the others.

    Returns:
        Frames by the leaf's path.

    Raises:
        ConfigError: If a number is no int >= 1, or an entry is not there; all findings at once.
    """
    if not isinstance(frame_stack, Mapping):
        return dict.fromkeys((path for path, _ in leaves(observation)), _checked({"frame_stack": frame_stack})[0])
    known = list(observation) if isinstance(observation, dict) else []
    strange = [
        f"frame_stack names {key!r}; expected entries of the observation: {known}{suggest(str(key), known)}"
        for key in frame_stack
        if key not in known
    ]
    counts = _checked({f"frame_stack[{key!r}]": frames for key, frames in frame_stack.items()}, strange)
    named: dict[Any, int] = dict(zip(frame_stack, counts, strict=True))
    return {path: named.get(path[0], 1) if path else 1 for path, _ in leaves(observation)}


def _checked(counts: dict[str, Any], wrong: list[str] | None = None) -> list[int]:
    findings = [*(wrong or []), *(f"{k} is {n!r}; expected an int >= 1" for k, n in counts.items() if not _is_count(n))]
    if findings:
        raise ConfigError("ReplayBuffer: " + "; ".join(findings) + ".")
    return [int(n) for n in counts.values()]


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1
