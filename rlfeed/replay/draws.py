"""Numbered draws: which starts, as they were when they were drawn, and what draws them."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import numpy as np

from rlfeed.replay import kernels as k
from rlfeed.replay.priorities import Priorities, Tree
from rlfeed.replay.samplers import Mixture, Prioritized, Recent, Sampler, shares, subkey
from rlfeed.replay.storage import Storage
from rlfeed.replay.units import Unit, rule_of


class Draws:
    """Hold draws ``number .. number + B - 1`` of one stream.

    Args:
        key: The stream; see `rlfeed.replay.samplers.stream_key`.
        number: The first draw.
        ids: ``[B]`` int64, what was drawn.
        limits: ``[B]`` int64, the head of each one's lane at the draw: what the sample may see.
        weights: ``[B]`` float64, importance weights before they are scaled to the batch.
    """

    __slots__ = ("ids", "key", "limits", "number", "weights")

    def __init__(self, key: int, number: int, ids: np.ndarray, limits: np.ndarray, weights: np.ndarray) -> None:
        self.key, self.number, self.ids, self.limits, self.weights = key, number, ids, limits, weights

    @classmethod
    def blank(cls, key: int, number: int, count: int) -> "Draws":
        """Make room for draws.

        Args:
            key: The stream.
            number: The first draw.
            count: B.

        Returns:
            Draws that a `Drawer` fills.
        """
        return cls(key, number, np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.float64))

    def __len__(self) -> int:
        """Count the draws.

        Returns:
            B.
        """
        return len(self.ids)

    def one(self, row: int) -> "Draws":
        """View one of the draws.

        Args:
            row: 0 .. B-1.

        Returns:
            That draw, in the same memory.
        """
        at = slice(row, row + 1)
        return Draws(self.key, self.number + row, self.ids[at], self.limits[at], self.weights[at])


class Drawer(ABC):
    """Fill draws with starts of a unit: a pure function of their numbers and of what is stored now."""

    weights: Literal["ones", "batch", "buffer"] = "ones"  # whose greatest importance weight becomes 1
    tree: Tree | None = None  # of priorities, where some are kept

    @abstractmethod
    def draw(self, draws: Draws, attempt: int = 0, *, tick: bool = True) -> bool:
        """Make the draws.

        Args:
            draws: Their key and number; receives the rest.
            attempt: Above 0 only to repeat a draw that turned out torn, in steps of 2^16.
            tick: Whether this process may fold new rows into the tree of priorities.

        Returns:
            False where no stored step can start a sample.
        """


class UniformDrawer(Drawer):
    """Draw every valid start with the same probability.

    Args:
        storage: What to draw from.
        rule: Whose starts.
    """

    def __init__(self, storage: Storage, rule: np.ndarray) -> None:
        self._plan, self._rule, self._whole = storage.plan, rule, bool(rule[k.WHOLE])

    def draw(self, draws: Draws, attempt: int = 0, *, tick: bool = True) -> bool:
        """Make the draws; see `Drawer.draw`."""
        key, number, ids, limits = draws.key, draws.number, draws.ids, draws.limits
        if self._whole:
            return k.draw_episodes(self._plan, key, number, attempt, ids, limits) != k.NO_START
        return k.draw_steps(self._plan, self._rule, key, number, attempt, ids, limits) != k.NO_START


class RecentDrawer(Drawer):
    """Draw newer starts more often.

    Args:
        storage: What to draw from.
        rule: Whose starts.
        half_life: Inserted steps after which a start is drawn half as often.
    """

    def __init__(self, storage: Storage, rule: np.ndarray, half_life: float) -> None:
        self._storage, self._rule = storage, rule
        self._slope = -math.log(2.0) * storage.lanes / half_life

    def draw(self, draws: Draws, attempt: int = 0, *, tick: bool = True) -> bool:
        """Make the draws; see `Drawer.draw`."""
        plan, key, number = self._storage.plan, draws.key, draws.number
        drawn = k.draw_recent(plan, self._rule, self._slope, key, number, attempt, draws.ids, draws.limits)
        return drawn != k.NO_START

    def chances(self, draws: Draws) -> np.ndarray:
        """Give the probability of drawing each start, with every row taken for one.

        Args:
            draws: Made by any drawer.

        Returns:
            ``[B]`` float64.
        """
        rows = np.maximum(np.minimum(self._storage.heads()[0], self._storage.rows) - 1, 0)
        total = -np.expm1(self._slope * rows).sum()
        ages = draws.limits - 2 - (draws.ids & k.ROW_MASK)
        return np.exp(self._slope * ages) * -np.expm1(self._slope) / total


class PrioritizedDrawer(Drawer):
    """Draw starts in proportion to their mass, priority^alpha.

    Args:
        storage: What to draw from.
        tree: Their masses.
        scale: Whose greatest importance weight becomes 1.
    """

    def __init__(self, storage: Storage, tree: Tree, scale: Literal["batch", "buffer"]) -> None:
        self._plan, self._beta, self._rule = storage.plan, beta_of(storage), tree.rule
        self.tree = self._tree = tree
        self.weights = scale

    def draw(self, draws: Draws, attempt: int = 0, *, tick: bool = True) -> bool:
        """Make the draws; see `Drawer.draw`."""
        tree, masses = self._tree, draws.weights
        if tick:
            tree.fold()
        drawn = k.draw_masses(
            self._plan, self._rule, tree.nodes, tree.words, tree.levels,
            draws.key, draws.number, attempt, draws.ids, draws.limits, masses,
        )  # fmt: skip
        if drawn == k.NO_START:
            return False
        # The greatest weight that any start would have is the one of the least mass.
        least = min(tree.least(), masses.min()) if self.weights == "buffer" else 1.0
        k.weigh(masses, least, self._beta[0])
        return True


class MixtureDrawer(Drawer):
    """Draw each number with one of several drawers, in exact proportion.

    Args:
        storage: What to draw from.
        parts: The drawers.
        fractions: Their shares.
    """

    def __init__(self, storage: Storage, parts: list[Drawer], fractions: list[float]) -> None:
        self._parts, self._fractions, self._beta = parts, fractions, beta_of(storage)
        trees = [part.tree for part in parts if isinstance(part, PrioritizedDrawer)]
        self.tree = trees[0] if trees else None
        self.weights = "ones" if self.tree is None else "batch"

    def draw(self, draws: Draws, attempt: int = 0, *, tick: bool = True) -> bool:
        """Make the draws; see `Drawer.draw`."""
        part_of, before = shares(draws.number, len(draws), self._fractions)
        for index, part in enumerate(self._parts):
            mine = part_of == index
            made = Draws.blank(subkey(draws.key, index), before[index], int(mine.sum()))
            if len(made) and not part.draw(made, attempt, tick=tick):
                return False
            draws.ids[mine], draws.limits[mine] = made.ids, made.limits
        draws.weights[:] = 1.0 if self.tree is None else self._chances(draws, self.tree) ** -self._beta[0]
        return True

    def _chances(self, draws: Draws, tree: Tree) -> np.ndarray:
        chances = np.zeros(len(draws))
        for part, fraction in zip(self._parts, self._fractions, strict=True):
            if isinstance(part, PrioritizedDrawer):
                chances += fraction * np.maximum(tree.masses(draws.ids), 0.0) / max(tree.total(), 1e-300)
            elif isinstance(part, RecentDrawer):
                chances += fraction * part.chances(draws)
            else:
                chances += fraction / max(int(tree.words[0]), 1)
        return np.maximum(chances, 1e-300)


def beta_of(storage: Storage) -> np.ndarray:
    """View the exponent of the importance weights, which can be annealed.

    Args:
        storage: Whose.

    Returns:
        ``[1]`` float64 on shared memory.
    """
    return storage.words(160, 161).view(np.float64)


def prioritized_in(sampler: Sampler) -> Prioritized | None:
    """Find the part of a sampler that needs priorities.

    Args:
        sampler: Any.

    Returns:
        That part, or None.
    """
    parts = sampler.samplers if isinstance(sampler, Mixture) else [sampler]
    return next((part for part in parts if isinstance(part, Prioritized)), None)


def drawer_for(storage: Storage, sampler: Sampler, unit: Unit, priorities: Priorities | None) -> Drawer:
    """Bind a sampler to a storage and a unit.

    Args:
        storage: What to draw from.
        sampler: Which starts.
        unit: Whose starts.
        priorities: Of the buffer, where its sampler needs them.

    Returns:
        What draws them.
    """
    rule = rule_of(unit, storage)
    if isinstance(sampler, Mixture):
        parts = [drawer_for(storage, part, unit, priorities) for part in sampler.samplers]
        return MixtureDrawer(storage, parts, list(sampler.samplers.values()))
    if isinstance(sampler, Prioritized) and priorities is not None:
        return PrioritizedDrawer(storage, priorities.tree_of(rule), sampler.scale)
    if isinstance(sampler, Recent):
        return RecentDrawer(storage, rule, sampler.half_life)
    return UniformDrawer(storage, rule)
