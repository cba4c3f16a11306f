"""The first play: whole episodes, everything checked that comes out of every call."""

import copy
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from rlfeed.envs.checks.findings import Findings
from rlfeed.envs.checks.plays import Player, Trace, is_set, observation_of, step_values
from rlfeed.envs.checks.results import MaskCheck, check_reset_result, check_step_result, draw_action
from rlfeed.envs.checks.spaces import KINDS, check_observation
from rlfeed.envs.checks.world import World
from rlfeed.nest import Path, describe, leaves

FIRST_SEED = 2_000_000_004  # of the size that the seeds of runs have
_PATIENCE_S = 60.0
_SOME_S = 3.0


@dataclass(frozen=True)
class Tour:
    """Hold what the first play was.

    Args:
        traces: Its episodes.
        steps: Of all of them.
        step_s: What a step took, with all checks.
        masked: Whether the environment tells which actions are allowed.
    """

    traces: list[Trace]
    steps: int
    step_s: float
    masked: bool

    @property
    def few(self) -> int:
        """Say how many steps are few: a slow environment is not to be played for minutes more.

        Returns:
            5 to 50.
        """
        return int(min(50, max(5, _SOME_S / self.step_s)))


def take_tour(player: Player, findings: Findings, episodes: int, max_steps: int) -> Tour:
    """Play whole episodes with random actions, and check every value.

    Args:
        player: Of the environment.
        findings: What to add to.
        episodes: How many.
        max_steps: When to leave an episode that goes on.

    Returns:
        What was played.
    """
    env = player.env
    spaces_before = {kind: copy.deepcopy(getattr(env, kind)) for kind in KINDS}
    actions = copy.deepcopy(env.action_space)  # its generator is the environment's, which may use it
    actions.seed(FIRST_SEED)
    masks, world = MaskCheck(env.action_space, findings), World(findings)
    start_s = time.monotonic()
    stop_s = start_s + _PATIENCE_S
    traces: list[Trace] = []
    masked = False
    for episode in range(episodes):
        trace = Trace(FIRST_SEED + episode)
        traces.append(trace)
        for observation, info in _episode(player, trace, findings, max_steps, stop_s):
            if len(trace.returned) == 1:
                world.compare("reset()", player.place)
            mask = masks.read(observation, info, player.place)
            masked |= mask is not None
            action = draw_action(actions, mask)
            trace.actions.append(_at_edge(actions, action) if episode % 2 else action)
        world.compare("step()" if trace.returned else "reset()", player.place)
        for kind, before in spaces_before.items():
            if getattr(env, kind) != before:
                findings.error(
                    ("changed", kind), player.place, f"{kind} has become {getattr(env, kind)}; it was {before}",
                    expected="the same space as long as the environment lives",
                    fix="Leave the spaces alone after the constructor.",
                )
    steps = sum(len(trace.returned) - 1 for trace in traces if trace.returned)
    return Tour(traces, steps, (time.monotonic() - start_s) / max(steps, 1), masked)


def _at_edge(space: Any, action: Any) -> Any:
    """Push an action to the nearest corner of its Box, where an index or a root is most likely to fail."""
    if isinstance(space, spaces.Dict):
        return {key: _at_edge(part, action[key]) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_at_edge(part, action[index]) for index, part in enumerate(space.spaces))
    if isinstance(space, spaces.Box) and space.is_bounded("both"):
        return np.where(action >= space.low / 2 + space.high / 2, space.high, space.low).astype(space.dtype)
    return action


def _episode(
    player: Player, trace: Trace, findings: Findings, max_steps: int, stop_s: float
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Play one episode; whoever iterates adds an action to the trace each time."""
    space = player.env.observation_space
    kept = _Kept(findings)
    result = player.reset(trace.seed)
    if player.failure is None:
        info = check_reset_result(result, player.place, findings)
        observation = observation_of(result)
        check_observation(space, observation, player.place, findings)
        kept.add(observation)
        trace.returned.append((copy.deepcopy(observation),))
        while len(trace.actions) < max_steps and (not trace.actions or time.monotonic() < stop_s):
            yield observation, info
            action = copy.deepcopy(trace.actions[-1])
            result = player.step(action)
            if player.failure is not None:
                break
            _check_action(action, trace.actions[-1], player.place, findings)
            usable, info = check_step_result(result, player.place, findings)
            if not usable:
                break
            observation, *rest = step_values(result)
            check_observation(space, observation, player.place, findings)
            kept.compare(player.place)
            kept.add(observation)
            trace.returned.append(copy.deepcopy((observation, *rest)))
            if any(map(is_set, rest[1:])):
                break
    trace.failure = player.failure
    del trace.actions[max(len(trace.returned) - 1, 0) :]


def _check_action(action: Any, before: Any, place: str, findings: Findings) -> None:
    for (path, now), (_, then) in zip(leaves(action), leaves(before), strict=False):
        if not np.array_equal(now, then):
            name = describe("action", path)
            findings.error(
                "action written", f"{place}, {name}", f"step() wrote into its action: {then} became {now}",
                expected="an action that stays as it was: the same array is stored for training",
                fix="Work on a copy: action = np.clip(action, low, high) makes one, action *= scale does not.",
            )


class _Kept:
    """Keep the last observations that an environment gave away, and see whether it still writes into them."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._arrays: deque[tuple[Path, np.ndarray, bytes]] = deque(maxlen=32)

    def add(self, observation: Any) -> None:
        for path, leaf in leaves(observation):
            if isinstance(leaf, np.ndarray):
                self._arrays.append((path, leaf, leaf.tobytes()))

    def compare(self, place: str) -> None:
        for path, array, before in self._arrays:
            if array.tobytes() != before:
                name = describe("observation", path)
                self._findings.error(
                    ("reused", path), f"{place}, {name}", f"step() wrote into the {name} that it had returned before",
                    expected="a new array from every reset() and step(): the old ones may be stored",
                    fix="Return a copy, such as self._state.copy() or np.array(self._state, np.float32).",
                )
                self._arrays.clear()
                return


def check_ends(env: gymnasium.Env, tour: Tour, max_steps: int, findings: Findings) -> None:
    """Say which kinds of ends were seen, and whether there is a time limit.

    Args:
        env: The environment.
        tour: What was played.
        max_steps: When an episode that went on was left.
        findings: What to add to.
    """
    limits = list(_time_limits(env))
    if len(limits) > 1:
        findings.note(
            "time limits", "", f"has {len(limits)} TimeLimit wrappers, of {', '.join(map(str, limits))} steps; that of "
            f"{min(limits)} fires",
            expected="one time limit", fix="Register or make it with max_episode_steps once.",
        )
    played = [trace for trace in tour.traces if trace.failure is None]
    ended = [trace.returned[-1] for trace in played if trace.ended]
    place = f"{len(played)} episodes, {tour.steps} steps"
    if any(len(trace.actions) >= max_steps and not trace.ended for trace in played) and not limits:
        findings.note(
            "endless", place, f"an episode went on for {max_steps} steps and nothing limits it",
            expected="episodes that end: returns and curves are told per episode",
            fix="Register it with max_episode_steps=..., or wrap it in gymnasium.wrappers.TimeLimit.",
        )
    if any(len(trace.actions) < max_steps and not trace.ended for trace in played):
        findings.note(
            "slow", place, f"was left after {_PATIENCE_S:.0f} s, a step takes {1000 * tour.step_s:.0f} ms",
            expected="whole episodes, to check them whole", fix="Check it with fewer --episodes as well.",
        )
    if not ended:
        return
    if all(is_set(last[2]) and is_set(last[3]) for last in ended):
        findings.note(
            "both ends", place, "every episode ended as terminated and truncated at once",
            expected="terminated where the task is over, truncated where only time is up",
            fix="Set one: bootstrapping stops at terminated only.",
        )
        return
    for index, name in ((2, "terminated"), (3, "truncated")):
        if not any(is_set(last[index]) for last in ended):
            findings.note(
                ("never", name), place, f"no episode was {name}",
                expected="both kinds of ends, to check them both", fix="Right where the task has no such end; else "
                "play more --episodes.",
            )


def _time_limits(env: Any) -> Iterator[int]:
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, gymnasium.wrappers.TimeLimit):
            yield env._max_episode_steps
        env = env.env
