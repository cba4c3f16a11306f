"""Play an environment, keep what it returned bit for bit, and play it again with the same actions."""

import copy
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np

from rlfeed.envs.checks.findings import Findings
from rlfeed.envs.checks.isolation import Watch, quiet
from rlfeed.envs.importing import own_traceback
from rlfeed.nest import describe

FLAGS = ("reward", "terminated", "truncated")
_NUMBERS = np.ndarray | np.generic | float | int


@dataclass
class Trace:
    """Hold one episode, or the beginning of one.

    Args:
        seed: What ``reset`` was called with.
        actions: One for each step.
        returned: Copies of what came back: ``(observation,)`` of the reset, then ``(observation, reward, terminated,
            truncated)`` of every step.
        failure: What ended it when a call raised.
    """

    seed: int | None
    actions: list[Any] = field(default_factory=list)
    returned: list[tuple[Any, ...]] = field(default_factory=list)
    failure: str | None = None

    @property
    def ended(self) -> bool:
        """Tell whether it is a whole episode.

        Returns:
            True where its last step set a flag.
        """
        return len(self.returned) > 1 and any(map(is_set, self.returned[-1][2:]))


class Player:
    """Call one environment: a call that raises is a finding, one that hangs ends the process.

    Args:
        env: The environment.
        findings: What to add to; None: whoever calls sees from the `Trace` that a call raised.
        watch: Told which call is on its way.
    """

    def __init__(self, env: gymnasium.Env, findings: Findings | None, watch: Watch) -> None:
        self.env = env
        self.episode, self.step_in_episode = -1, 0
        self.failure: str | None = None
        self._findings, self._watch = findings, watch
        self._seeded = takes(env.unwrapped.reset, "seed")

    @property
    def place(self) -> str:
        """Say where the play is.

        Returns:
            Such as ``episode 2, step 17``.
        """
        return f"episode {self.episode}, " + (f"step {self.step_in_episode}" if self.step_in_episode else "its reset")

    def reset(self, seed: int | None) -> Any:
        """Begin an episode.

        Args:
            seed: Passed on; None: reset as it is called without a seed.

        Returns:
            What ``reset`` returned, None where it raised.
        """
        self.episode, self.step_in_episode, self.failure = self.episode + 1, 0, None
        if seed is None or not self._seeded:
            return self._call("reset()", self.env.reset)
        return self._call(f"reset(seed={seed})", lambda: self.env.reset(seed=seed))

    def step(self, action: Any) -> Any:
        """Take one step.

        Args:
            action: Given to the environment as it is.

        Returns:
            What ``step`` returned, None where it raised.
        """
        self.step_in_episode += 1
        return self._call("step()", lambda: self.env.step(action), action)

    def close(self) -> None:
        """Close the environment, twice, as a context manager inside a `finally` does."""
        for name in ("close()", "the second close()"):
            self.failure = None
            self._call(name, self.env.close, place="at the end")
            if self.failure is not None:
                return

    def _call(self, name: str, call: Callable[[], Any], action: Any = None, place: str = "") -> Any:
        place = place or self.place
        try:
            with self._watch.call(f"{place}, in {name}"), quiet() as printed:
                result = call()
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # Ctrl-C itself does not come here
            self.failure = f"{type(error).__name__}: {error}"
            if self._findings is not None:
                given = "" if action is None else f" for the action {_short(action)} (a {type(action).__name__})"
                self._findings.error(
                    ("raised", name.partition("(")[0], type(error)),
                    place,
                    f"{name} raised {type(error).__name__}{given}: {error}",
                    expected="no error for any action of action_space",
                    fix=f"Mend it; its own traceback:\n{own_traceback(error)}",
                )
            return None
        if self._findings is not None and (text := printed.getvalue().strip()):
            self._findings.note(
                "prints",
                place,
                f"{name} printed {text.splitlines()[0][:60]!r}",
                expected="silence: a run makes millions of steps",
                fix="Take the print away, or use logging.",
            )
        return result


def takes(function: Callable[..., Any], name: str) -> bool:
    """Tell whether a function takes an argument by name.

    Args:
        function: The function.
        name: The argument's.

    Returns:
        True where it does.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C, it does not say
        return True
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def observation_of(result: Any) -> Any:
    """Take the observation out of what ``reset`` returned, also where it forgot the info.

    Args:
        result: What it returned.

    Returns:
        The observation.
    """
    pair = isinstance(result, tuple | list) and len(result) == 2
    return result[0] if pair and (isinstance(result, tuple) or isinstance(result[1], dict)) else result


def step_values(result: Any) -> tuple[Any, Any, Any, Any]:
    """Take what matters out of what ``step`` returned, also where it has the four values of old.

    Args:
        result: What it returned.

    Returns:
        Observation, reward, terminated, truncated.
    """
    values = list(result) if isinstance(result, tuple | list) else [result]
    if len(values) == 4:
        values[3] = False
    observation, reward, terminated, truncated, *_ = (*values, None, None, None)
    return observation, reward, terminated, truncated


def replay(
    player: Player,
    traces: Sequence[Trace],
    *,
    between: Callable[[Any], None] | None = None,
    limit_s: float = 5.0,
) -> tuple[str, str] | None:
    """Play episodes again, with the same seeds and actions, until something is different.

    Args:
        player: Of the environment to play.
        traces: The episodes.
        between: Called with every observation after it was compared.
        limit_s: When to stop; what was played by then was the same.

    Returns:
        Where and what was different; None: nothing.
    """
    stop_s = time.monotonic() + limit_s
    for trace in traces:
        result = player.reset(trace.seed)
        for index, expected in enumerate(trace.returned):
            if index:
                result = player.step(copy.deepcopy(trace.actions[index - 1]))
            if player.failure is not None:
                return player.place, f"raised {player.failure}"
            seen = step_values(result) if index else (observation_of(result),)
            if found := difference(expected, seen):
                return player.place, found
            if between is not None:
                between(seen[0])
            if time.monotonic() > stop_s:
                return None
    return None


def is_set(flag: Any) -> bool:
    """Read a flag that may be anything.

    Args:
        flag: What an environment returned for ``terminated`` or ``truncated``.

    Returns:
        Whether it means that the episode ended.
    """
    return bool(np.any(flag)) if isinstance(flag, bool | int | float | np.ndarray | np.generic) else False


def difference(expected: tuple[Any, ...], seen: tuple[Any, ...]) -> str | None:
    """Compare what came out of a reset or a step with what came before, bit for bit.

    Args:
        expected: What came before.
        seen: What came now.

    Returns:
        What is different, such as ``observation["camera"] is [1] and was [2]``; None: nothing.
    """
    for name, before, now in zip(("observation", *FLAGS), expected, seen, strict=False):
        if path := _first_difference(before, now, ()):
            where, old, new = path
            return f"{describe(name, where)} is {_short(new)} and was {_short(old)}"
    return None


def _first_difference(before: Any, now: Any, path: tuple[str | int, ...]) -> tuple[Any, Any, Any] | None:
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        pairs = ((key, before[key], now[key]) for key in before)
    elif isinstance(before, tuple | list) and isinstance(now, tuple | list) and len(before) == len(now):
        pairs = zip(range(len(before)), before, now, strict=True)
    else:
        return None if _same(before, now) else (path, before, now)
    return next((found for key, a, b in pairs if (found := _first_difference(a, b, (*path, key)))), None)


def _same(before: Any, now: Any) -> bool:
    if isinstance(before, _NUMBERS) and isinstance(now, _NUMBERS):
        a, b = np.asarray(before), np.asarray(now)
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    try:
        return type(before) is type(now) and bool(np.all(np.asarray(before) == np.asarray(now)))
    except Exception:  # whatever it is, it was told already that it is no array
        return True


def _short(value: Any) -> str:
    text = np.array2string(value, threshold=8) if isinstance(value, np.ndarray) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 80 else f"{text[:77]}..."
