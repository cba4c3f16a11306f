"""The three autoreset modes of Gymnasium's vector environments must give the same episodes."""

import copy
from typing import Any

from rlfeed.envs.checks.findings import Findings
from rlfeed.envs.checks.isolation import Watch, quiet
from rlfeed.envs.checks.plays import difference
from rlfeed.envs.checks.results import MASK, draw_action
from rlfeed.envs.checks.tour import FIRST_SEED
from rlfeed.envs.make import Autoreset, make_envs
from rlfeed.envs.source import EnvSource
from rlfeed.nest import map_nest, stack
from rlfeed.specs import mask_sizes

_NUM_ENVS = 2


def check_autoreset(source: EnvSource, steps: int, watch: Watch, findings: Findings) -> None:
    """Check that the same steps come out in every autoreset mode.

    Args:
        source: What makes the environment.
        steps: How many to take.
        watch: Told which call is on its way.
        findings: What to add to.
    """
    first: list[list[tuple[Any, ...]]] = []
    modes: tuple[Autoreset, ...] = ("same_step", "next_step", "disabled")
    for mode in modes:
        try:
            with quiet():
                played = _play(source, mode, steps, watch)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            first = first or played
            pairs = (pair for rows in zip(first, played, strict=True) for pair in zip(*rows, strict=False))
            problem = next((found for then, now in pairs if (found := difference(then, now))), None)
        if problem is not None:
            findings.error(
                "autoreset", f"autoreset mode {mode}", f"the steps are not those of mode {modes[0]}: {problem}",
                expected="the same episodes in every mode",
                fix="Begin an episode in reset() only, wherever it is called from, and touch nothing after its end.",
            )
            return


def _play(source: EnvSource, mode: Autoreset, count: int, watch: Watch) -> list[list[tuple[Any, ...]]]:
    """Play environments side by side; give the steps of each."""
    place = f"two environments in autoreset mode {mode}"
    with watch.call(place):
        envs = make_envs(
            source.target, _NUM_ENVS, kwargs=source.kwargs, wrappers=source.wrappers, mode="sync", autoreset=mode
        )
    actions = [copy.deepcopy(envs.action_space) for _ in range(_NUM_ENVS)]
    for env_id, space in enumerate(actions):
        space.seed(FIRST_SEED + env_id)
    steps: list[list[tuple[Any, ...]]] = [[] for _ in range(_NUM_ENVS)]
    with watch.call(place):
        ready = envs.reset(FIRST_SEED, [0] * _NUM_ENVS)
    for _ in range(count):
        acted = ready.env_ids
        masks: Any = ready.action_mask
        if masks is None and isinstance(ready.observation, dict) and mask_sizes(envs.action_space) is not None:
            masks = ready.observation.get(MASK)
        masks = [None] * len(acted) if masks is None else masks != 0
        drawn = [draw_action(actions[env_id], mask) for env_id, mask in zip(acted, masks, strict=True)]
        with watch.call(place):
            outcome = envs.step(stack(drawn))
        values = (outcome.next_observation, outcome.reward, outcome.terminated, outcome.truncated)
        for row, env_id in enumerate(acted):
            steps[env_id].append(map_nest(lambda leaf, row=row: leaf[row], values))
        ready = outcome.ready
    return steps
