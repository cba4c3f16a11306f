"""Play again: the same seed and actions must give the same bits, in whatever surroundings."""

import copy
from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.wrappers import TimeLimit

from rlfeed.codec import decode, encode
from rlfeed.envs.checks.findings import Findings
from rlfeed.envs.checks.plays import Player, Trace, difference, is_set, observation_of, replay, step_values
from rlfeed.envs.checks.tour import FIRST_SEED
from rlfeed.errors import FieldError
from rlfeed.nest import leaves

_OTHER_SEED = FIRST_SEED + 100
_SEVERAL = 12


def check_twin(player: Player, traces: Sequence[Trace], own_seed: bool, findings: Findings) -> bool:
    """Check that another environment of the same making plays the same episodes.

    Args:
        player: Of a fresh environment, without findings of its own.
        traces: What the first one played.
        own_seed: Whether its ``np_random`` has another seed than its reset was given.
        findings: What to add to.

    Returns:
        Whether it does.
    """
    different = replay(player, traces)
    if different is None:
        return True
    place, problem = different
    if own_seed:
        findings.error(
            "not seeded", place, f"self.np_random is used and was not seeded: a second environment gave {problem}",
            expected="super().reset(seed=seed) as the first line of reset()", fix="Call it there.",
        )
        return False
    findings.error(
        "repeat", place, f"the same seed and actions gave something else in a second environment: {problem}",
        expected="reset(seed=...) decides everything: the same bits every time",
        fix="Draw from self.np_random only, call super().reset(seed=seed) first, seed nothing from the clock, and "
        "keep nothing in the class or module that episodes change.",
    )
    return False


def check_fresh(player: Player, trace: Trace, findings: Findings) -> bool:
    """Check that an episode does not depend on those before it.

    Args:
        player: Of a fresh environment, without findings of its own.
        trace: The last episode that was played.
        findings: What to add to.

    Returns:
        Whether it does not.
    """
    different = replay(player, [trace])
    if different is None:
        return True
    place, problem = different
    place = place.replace("episode 0", f"the episode of seed {trace.seed}")
    findings.note(
        "history", place, f"played in a fresh environment the episode is another one: {problem}",
        expected="an episode that its seed decides, whatever was played before: then a run that was stopped goes on in "
        "mid-episode, and the number of workers does not matter",
        fix="Set every attribute anew in reset(); a curriculum is fine, and its runs go on at the next episode.",
    )
    return False


def check_own_memory(player: Player, traces: Sequence[Trace], findings: Findings) -> None:
    """Check that who writes into a returned observation does not change the environment.

    Args:
        player: Of a fresh environment, without findings of its own.
        traces: What was played.
        findings: What to add to.
    """
    different = replay(player, traces, between=_scribble)
    if different is None:
        return
    place, problem = different
    findings.note(  # a note: an environment of Gymnasium's own does it, and rlfeed copies
        "shared memory", place, f"writing into a returned observation changed what came next: {problem}",
        expected="an observation that is not the environment's own memory: a policy may work in place",
        fix="Return a copy, such as self._state.copy() or np.array(self._state, np.float32).",
    )


def _scribble(observation: Any) -> None:
    for _, leaf in leaves(observation):
        if isinstance(leaf, np.ndarray) and leaf.flags.writeable and leaf.dtype.kind in "biuf":
            leaf[...] = np.zeros_like(leaf) if leaf.any() else np.ones_like(leaf)


def check_seeds(one: Player, two: Player, actions: Sequence[Any], findings: Findings) -> None:
    """Check that another seed gives another episode, and that a reset without a seed goes on with the generator.

    Args:
        one: Of a fresh environment, without findings of its own.
        two: Of another one.
        actions: What to do in every episode, until it ends.
        findings: What to add to.
    """
    seeded = False
    first = None
    for seed in range(_OTHER_SEED, _OTHER_SEED + _SEVERAL):
        episode, _ = (_episode(player, seed, actions) for player in (one, two))
        first = first or episode
        if seeded := _differ(first, episode):
            break
    else:
        findings.note(
            "seed ignored", f"{_SEVERAL} seeds", "every seed gives the same episode",
            expected="different seeds, different episodes, unless nothing is random here",
            fix="Right where nothing is random; else draw from self.np_random.",
        )
    first, goes_on = None, False
    for count in range(_SEVERAL):
        episode, twin = (_episode(player, None, actions) for player in (one, two))
        if one.failure is not None and not one.step_in_episode:
            findings.error(
                "no seed", "reset() without a seed", f"raised {one.failure}",
                expected="seed=None, which is its default, goes on with the generator",
                fix="Pass the seed on as it is, super().reset(seed=seed), and draw from self.np_random.",
            )
            return
        if _differ(episode, twin):
            findings.error(
                "fresh entropy", "reset() without a seed", "is not decided by the seed of the reset before it",
                expected="a generator that goes on, as super().reset(seed=None) lets it",
                fix="Make a generator only where seed is not None: super().reset(seed=seed) does.",
            )
            return
        first = first or episode
        goes_on = goes_on or _differ(first, episode)
        if goes_on and count >= 2:
            return
    if seeded and not goes_on:
        findings.error(
            "same episode", "reset() without a seed", f"began the same episode {_SEVERAL} times",
            expected="a generator that goes on: a new episode each time",
            fix="Pass the seed on as it is, super().reset(seed=seed), and seed nothing with a constant.",
        )


def check_neighbours(one: Player, two: Player, traces: Sequence[Trace], steps: int, findings: Findings) -> None:
    """Check that two environments of one process, stepped in turn, leave each other alone.

    Args:
        one: Of an environment, without findings of its own.
        two: Of another one.
        traces: What was played; the first and the last are played at once.
        steps: How many of their steps.
        findings: What to add to.
    """
    pairs = [(one, traces[0], traces[0].returned), (two, traces[-1], traces[-1].returned)]
    for index in range(min(steps, *(len(returned) for _, _, returned in pairs))):
        for player, trace, returned in pairs:
            result = player.step(copy.deepcopy(trace.actions[index - 1])) if index else player.reset(trace.seed)
            seen = (step_values(result) if index else (observation_of(result),)) if player.failure is None else ()
            problem = player.failure or difference(returned[index], seen)
            if problem:
                findings.error(
                    "neighbours", f"step {index}", f"two environments stepped in turn disturb each other: {problem}",
                    expected="environments that share nothing",
                    fix="Keep what changes in the object (self.x in __init__), not in the class or module.",
                )
                return


def check_state(one: Player, two: Player, traces: Sequence[Trace], findings: Findings) -> bool:
    """Check that ``set_state`` in one environment goes on with what ``get_state`` gave in another, as after a resume.

    Args:
        one: Of a fresh environment, without findings of its own.
        two: Of another one.
        traces: What was played.
        findings: What to add to.

    Returns:
        Whether it has both and they work.
    """
    first, second = one.env.unwrapped, two.env.unwrapped
    if not all(callable(getattr(first, name, None)) for name in ("get_state", "set_state")):
        return False
    trace = max(traces, key=lambda trace: len(trace.returned))
    half = len(trace.actions) // 2
    different = replay(one, [Trace(trace.seed, trace.actions[:half], trace.returned[: half + 1])])
    problem = None if different is None else different[1]
    two.reset(_OTHER_SEED)
    try:
        second.set_state(_saved(first.get_state()))  # pyright: ignore[reportAttributeAccessIssue]
        _set_elapsed(two.env, half)
        for action, expected in zip(trace.actions[half:], trace.returned[half + 1 :], strict=True):
            seen = step_values(two.step(copy.deepcopy(action)))
            problem = problem or two.failure or difference(expected, seen)
    except FieldError as error:
        findings.error(
            "state form", f"step {half}", str(error), expected="what a checkpoint can hold",
            fix="Give numbers, text, NumPy arrays, None, and lists, tuples and dicts of these.",
        )
        return False
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is None:
        return True
    findings.error(
        "state", f"step {half}", f"after set_state(get_state()) the same actions gave something else: {problem}",
        expected="the very same steps: a run that was stopped goes on with it",
        fix="Put all that changes into the state, the generator (self.np_random.bit_generator.state) included.",
    )
    return False


def _saved(state: Any) -> Any:
    """Make of a state what comes back from a checkpoint."""
    block = np.frombuffer(b"".join(encode(state, "get_state()")), np.uint8)
    return copy.deepcopy(decode(block))


def _set_elapsed(env: Any, steps: int) -> None:
    """Let time limits count on from some step: they have no other way to be told."""
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, TimeLimit):
            env._elapsed_steps = steps
        env = env.env


def _episode(player: Player, seed: int | None, actions: Sequence[Any]) -> list[tuple[Any, ...]]:
    returned: list[tuple[Any, ...]] = [(copy.deepcopy(observation_of(player.reset(seed))),)]
    for action in actions:
        if player.failure is not None or any(map(is_set, returned[-1][2:])):
            break
        returned.append(copy.deepcopy(step_values(player.step(copy.deepcopy(action)))))
    return returned


def _differ(first: Sequence[tuple[Any, ...]], second: Sequence[tuple[Any, ...]]) -> bool:
    return len(first) != len(second) or any(difference(a, b) for a, b in zip(first, second, strict=True))
