"""Check what ``reset`` and ``step`` return beside the observation: reward, flags, info and masks."""

from typing import Any

import numpy as np

from rlfeed.envs.boundary import REWARD_LIMIT, SUCCESS_KEYS
from rlfeed.envs.checks.findings import Findings
from rlfeed.specs import mask_sizes

MASK = "action_mask"


def check_reset_result(result: Any, place: str, findings: Findings) -> dict[str, Any]:
    """Check what ``reset`` returned.

    Args:
        result: It.
        place: Where in the play.
        findings: What to add to.

    Returns:
        The info; empty where there is none.
    """
    if isinstance(result, tuple) and len(result) == 2:
        return _check_info(result[1], "reset()", place, findings)
    got = f"{len(result)} values" if isinstance(result, tuple) else f"a {type(result).__name__}"
    findings.error(
        "reset values", place, f"reset() returned {got}",
        expected="the pair (observation, info), info a dict", fix="Return observation, {}.",
    )
    return {}


def check_step_result(result: Any, place: str, findings: Findings) -> tuple[bool, dict[str, Any]]:
    """Check what ``step`` returned, but for the observation.

    Args:
        result: It.
        place: Where in the play.
        findings: What to add to.

    Returns:
        Whether there is anything to go on with, and the info; empty where there is none.
    """
    if not isinstance(result, tuple) or len(result) != 5:
        got = f"{len(result)} values" if isinstance(result, tuple | list) else f"a {type(result).__name__}"
        findings.error(
            "step values", place, f"step() returned {got}",
            expected="five values in a tuple: observation, reward, terminated, truncated, info",
            fix="Return all five; an old `done` is terminated (the task is over) or truncated (time is up).",
        )
        if not isinstance(result, tuple | list) or len(result) not in (4, 5):
            return False, {}
    values = (*result[:3], False, result[3]) if len(result) == 4 else result
    _check_reward(values[1], place, findings)
    for name, flag in (("terminated", values[2]), ("truncated", values[3])):
        _check_flag(name, flag, place, findings)
    return True, _check_info(values[4], "step()", place, findings)


def _check_reward(reward: Any, place: str, findings: Findings) -> None:
    where = f"{place}, reward"
    array = np.asarray(reward) if isinstance(reward, bool | int | float | np.ndarray | np.generic) else None
    if array is None or array.dtype.kind not in "biuf":
        findings.error(
            "reward type", where, f"reward is {reward!r}, a {type(reward).__name__}",
            expected="a number", fix="Return float(reward).",
        )
    elif array.shape != ():
        findings.error(
            "reward shape", where, f"reward must be a scalar, got shape {array.shape}",
            expected="one number, shape ()", fix="Return float(reward[0]), or reward.item().",
        )
    elif not np.abs(array.astype(np.float64)) <= REWARD_LIMIT:
        findings.error(
            "reward finite", where, f"reward is {reward}",
            expected="a finite number that float32 can hold", fix="Find the division or logarithm that makes it.",
        )


def _check_flag(name: str, flag: Any, place: str, findings: Findings) -> None:
    if isinstance(flag, bool | np.bool_) or (isinstance(flag, np.ndarray) and flag.shape == () and flag.dtype == bool):
        return
    findings.error(
        ("flag", name), f"{place}, {name}", f"{name} is {flag!r}, a {type(flag).__name__}",
        expected="True or False", fix="Return bool(...).",
    )


def _check_info(info: Any, call: str, place: str, findings: Findings) -> dict[str, Any]:
    if not isinstance(info, dict):
        findings.error(
            "info", f"{place}, info", f"info of {call} is {info!r}, a {type(info).__name__}",
            expected="a dict", fix="Return {} where there is nothing to tell.",
        )
        return {}
    for key in SUCCESS_KEYS:
        if key in info and not isinstance(info[key], bool | int | float | np.bool_ | np.number):
            findings.error(
                ("success", key), f'{place}, info["{key}"]', f'info["{key}"] is {info[key]!r}',
                expected="True or False, or a number from 0 to 1", fix="Return bool(...) there.",
            )
    return info


class MaskCheck:
    """Check action masks, which come in infos or as an entry of the observation.

    Args:
        action_space: The environment's.
        findings: What to add to.
    """

    def __init__(self, action_space: Any, findings: Findings) -> None:
        self._sizes, self._findings = mask_sizes(action_space), findings
        self._always: bool | None = None

    def read(self, observation: Any, info: dict[str, Any], place: str) -> np.ndarray | None:
        """Check the mask for the next action.

        Args:
            observation: What was returned.
            info: The info beside it.
            place: Where in the play.

        Returns:
            ``[A]`` bool, see `mask_sizes`; None: no usable mask.
        """
        in_info = MASK in info
        mask = info.get(MASK, observation.get(MASK) if isinstance(observation, dict) else None)
        name = f'{"info" if in_info else "observation"}["{MASK}"]'
        given, before = mask is not None, self._always
        self._always = given if before is None else before
        if before is not None and before != given:
            self._findings.error(
                "mask missing", place, f'"{MASK}" is {"given" if given else "missing"} here, other than before',
                expected="a mask from every reset and step, or from none", fix="Give one always.",
            )
        if not given or (self._sizes is None and not in_info):
            return None
        if self._sizes is None:
            self._findings.error(
                "mask space", f"{place}, {name}", f"{name} is there and the action space has no single actions",
                expected="masks for Discrete, MultiDiscrete or MultiBinary", fix="Leave the mask out.",
            )
            return None
        return self._check(mask, self._sizes, name, place)

    def _check(self, mask: Any, sizes: np.ndarray, name: str, place: str) -> np.ndarray | None:
        array, actions = np.concatenate(mask) if isinstance(mask, tuple) else np.asarray(mask), int(sizes.sum())
        if array.shape != (actions,) or array.dtype.kind not in "biu" or not np.isin(array, (0, 1)).all():
            kind, problem, fix = "mask form", f"is {mask!r}", f"Give {actions} booleans, True = allowed."
        elif not np.logical_or.reduceat(array != 0, np.cumsum(sizes) - sizes).all():
            kind, problem, fix = "mask empty", "allows no action", "Allow at least one, or end the episode before."
        else:
            return array != 0
        self._findings.error(
            kind, f"{place}, {name}", f"{name} {problem}",
            expected=f"{actions} booleans, at least one True for each component of the action", fix=fix,
        )
        return None


def draw_action(space: Any, mask: np.ndarray | None) -> Any:
    """Draw a random action that is allowed.

    Args:
        space: The action space; its generator is used.
        mask: ``[A]`` bool, see `mask_sizes`; None: all are allowed.

    Returns:
        The action.
    """
    if mask is None:
        return space.sample()
    sizes: Any = mask_sizes(space)
    scores = np.where(mask, space.np_random.random(len(mask)), -1.0)
    drawn = np.array([part.argmax() for part in np.split(scores, np.cumsum(sizes)[:-1])])
    return (drawn.reshape(space.shape) + getattr(space, "start", 0)).astype(space.dtype)[()]
