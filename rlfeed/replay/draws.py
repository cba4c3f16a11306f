"""Numbered draws: which starts, as they were when they were drawn, and what draws them."""

from abc import ABC, abstractmethod

import numpy as np

from rlfeed.replay import kernels as k
from rlfeed.replay.samplers import Sampler
from rlfeed.replay.storage import Storage
from rlfeed.replay.units import Episode, Unit, rule_of


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

    @abstractmethod
    def draw(self, draws: Draws, attempt: int = 0) -> bool:
        """Make the draws.

        Args:
            draws: Their key and number; receives the rest.
            attempt: Above 0 only to repeat a draw that turned out torn, in steps of 2^16.

        Returns:
            False where no stored step can start a sample.
        """


class UniformDrawer(Drawer):
    """Draw every valid start with the same probability.

    Args:
        storage: What to draw from.
        unit: Whose starts.
    """

    def __init__(self, storage: Storage, unit: Unit) -> None:
        self._plan, self._rule, self._whole = storage.plan, rule_of(unit, storage), isinstance(unit, Episode)

    def draw(self, draws: Draws, attempt: int = 0) -> bool:
        """Make the draws; see `Drawer.draw`."""
        key, number, ids, limits = draws.key, draws.number, draws.ids, draws.limits
        if self._whole:
            return k.draw_episodes(self._plan, key, number, attempt, ids, limits) != k.NO_START
        return k.draw_steps(self._plan, self._rule, key, number, attempt, ids, limits) != k.NO_START


def drawer_for(storage: Storage, sampler: Sampler, unit: Unit) -> Drawer:
    """Bind a sampler to a storage and a unit.

    Args:
        storage: What to draw from.
        sampler: Which starts.
        unit: Whose starts.

    Returns:
        What draws them.
    """
    return UniformDrawer(storage, unit)
