"""Hindsight relabelling: transitions of goal environments, as if a goal that was reached later had been wanted."""

from typing import Any

import numpy as np
import torch

from rlfeed.errors import FieldError, SpaceError
from rlfeed.nest import Nest, describe
from rlfeed.replay import kernels as k
from rlfeed.replay.draws import Draws
from rlfeed.replay.samplers import Hindsight
from rlfeed.replay.storage import Storage
from rlfeed.replay.units import Transition, rule_of
from rlfeed.specs import ArraySpec
from rlfeed.types import Batch, Layout

PARTS = ("observation", "achieved_goal", "desired_goal")
STRATEGIES = {"future": k.FUTURE, "final": k.FINAL, "episode": k.EPISODE}
GOALS_KEY = 0x60A1_5EED_60A1_5EED  # a stream of draws of its own beside that of the starts


class Relabelling:
    """Collect the new goals of one batch, and what their rewards depend on.

    Args:
        relabeller: Which goals.
        draws: What was drawn.
        layout: Where the batch's fields lie.
        address: Of its block.
    """

    def __init__(self, relabeller: "Relabeller", draws: Draws, layout: Layout, address: int) -> None:
        self._by, self._draws = relabeller, draws
        n_step, spec = relabeller.unit.n_step, relabeller.column.spec
        self._counts = np.zeros(len(draws), np.int64)
        self._reached, self._wanted = np.empty((2, len(draws), n_step, *spec.shape), spec.dtype)
        offsets = {slot.name: slot.offset for slot in layout.slots if slot.path == ("desired_goal",)}
        order = self._order = np.zeros(k.ORDER_SIZE, np.int64)
        order[k.KEY], order[k.NUMBER] = draws.key ^ GOALS_KEY, draws.number
        order[k.STRATEGY], order[k.N_STEP] = STRATEGIES[relabeller.hindsight.strategy], n_step
        order[k.DESIRED] = address + offsets["observation"]
        order[k.NEXT_DESIRED] = address + offsets["next_observation"]
        order[k.REACHED], order[k.WANTED] = self._reached.ctypes.data, self._wanted.ctypes.data

    def gather(self, todo: np.ndarray) -> int:
        """Replace the desired goals of some rows.

        Args:
            todo: Which rows of the batch; receives, in its front, those that were overwritten meanwhile.

        Returns:
            How many were overwritten.
        """
        by, draws = self._by, self._draws
        fraction = float(by.hindsight.fraction)
        return k.relabel_goals(
            by.plan, by.rule, by.field, self._order, fraction, draws.ids, draws.limits, todo, self._counts
        )

    def reward(self, batch: Batch) -> None:
        """Give the relabelled rows of a batch the rewards of their new goals; its ends and discounts stay.

        Args:
            batch: The gathered batch.

        Raises:
            FieldError: If the reward function gives anything but one finite number per step.
        """
        n_step, gamma = self._by.unit.n_step, self._by.unit.gamma
        inside = np.arange(n_step) < self._counts[:, None]
        rows, steps = np.nonzero(inside)
        if len(rows) == 0:
            return
        rewards = self._by.hindsight.reward_fn(self._reached[inside], self._wanted[inside])
        sums = np.zeros(len(batch))
        np.add.at(sums, rows, _checked(rewards, len(rows)) * gamma**steps)
        relabelled = torch.from_numpy(self._counts > 0)
        batch.reward[relabelled] = torch.from_numpy(sums).float()[relabelled]


def _checked(rewards: Any, count: int) -> np.ndarray:
    array = np.asarray(rewards)
    if array.shape != (count,) or array.dtype.kind not in "biuf":
        raise FieldError(
            f"Hindsight: reward_fn gave shape {array.shape} and dtype {array.dtype} for {count} steps; expected "
            f"({count},), one number per step. Let it reward arrays [M, ...] of goals row by row."
        )
    if not np.isfinite(array).all():
        raise FieldError(
            f"Hindsight: reward_fn gave {array[~np.isfinite(array)][0]}, first for step "
            f"{int(np.argmin(np.isfinite(array)))} of {count}; expected finite numbers. Mend it."
        )
    return array.astype(np.float64)


class Relabeller:
    """Relabel the transitions of a storage.

    Args:
        storage: What is sampled.
        unit: Transitions.
        hindsight: Which goals they get.

    Raises:
        SpaceError: If the observations have no goals.
    """

    def __init__(self, storage: Storage, unit: Transition, hindsight: Hindsight) -> None:
        _check_space(storage.fields["observation"], storage.frames)
        self.unit, self.hindsight, self.plan, self.rule = unit, hindsight, storage.plan, rule_of(unit, storage)
        self.column = storage.column("observation", ("achieved_goal",))
        self.field = storage.table([(self.column, k.ROLE_STEP)])[0]

    def start(self, draws: Draws, layout: Layout, address: int) -> Relabelling:
        """Begin with a batch.

        Args:
            draws: What was drawn.
            layout: Where the batch's fields lie.
            address: Of its block.

        Returns:
            Its relabelling.
        """
        return Relabelling(self, draws, layout, address)


def _check_space(observation: Nest, frames: dict[tuple[str | int, ...], int]) -> None:
    known = list(observation) if isinstance(observation, dict) else []
    if missing := [part for part in PARTS if part not in known]:
        raise SpaceError(
            f"Hindsight: the observation has no {missing}; expected a Dict with {list(PARTS)}, as goal environments "
            f"have it. It has {known or 'one part without a name'}: wrap the environment, or sample without relabel."
        )
    achieved, desired = observation["achieved_goal"], observation["desired_goal"]
    if not isinstance(achieved, ArraySpec) or achieved != desired:
        raise SpaceError(
            f"Hindsight: achieved_goal is {achieved} and desired_goal is {desired}; expected two arrays of one shape "
            "and dtype. Give both the same Box."
        )
    if stacked := [describe("observation", (part,)) for part in PARTS[1:] if frames[(part,)] > 1]:
        raise SpaceError(
            f"Hindsight: frame_stack stacks {stacked}; expected single goals. Name the entries that are to be stacked: "
            "frame_stack={'observation': ...}."
        )
