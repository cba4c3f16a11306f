"""Running means and variances that are exact however the rows came: singly, in batches, or from several processes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from rlfeed.errors import CheckpointError


class RunningMoments:
    """Keep count, mean and squared deviations of the rows seen so far, in float64.

    Any split of the rows, merged in any order, gives what all rows at once give, up to rounding in float64.

    Args:
        shape: Of one row.
        deltas: Whether to keep beside what has been seen since `take_delta` was last called.

    Source: Chan, Golub and LeVeque 1979 (Updating formulae and a pairwise algorithm for computing sample variances).
    """

    def __init__(self, shape: tuple[int, ...] = (), *, deltas: bool = False) -> None:
        self.count = 0
        self.mean: Float64[ndarray, ...] = np.zeros(shape)
        self.m2: Float64[ndarray, ...] = np.zeros(shape)
        self._delta = RunningMoments(shape) if deltas else None

    @property
    def variance(self) -> Float64[ndarray, "..."]:
        """Give the variance of the rows, over the rows themselves (not an estimate beyond them).

        Returns:
            An array of a row's shape; zeros before the first row.
        """
        return self.m2 / max(self.count, 1)

    def update(self, rows: ndarray) -> None:
        """Count rows.

        Args:
            rows: ``[k, ...]``, any k, finite.
        """
        count = len(rows)
        if not count:
            return
        # The reductions themselves: their methods cost several times more for the few rows of a step.
        rows = rows.astype(np.float64)
        mean = np.add.reduce(rows, axis=0) / count
        rows -= mean
        m2 = np.add.reduce(rows * rows, axis=0)
        self._add(count, mean, m2)
        if self._delta is not None:
            self._delta._add(count, mean, m2)

    def merge(self, other: "RunningMoments") -> None:
        """Count the rows that another one has seen, such as another process's delta.

        Args:
            other: Of the same shape; stays as it is.
        """
        self._add(other.count, other.mean, other.m2)

    def take_delta(self) -> "RunningMoments":
        """Give what `update` has counted since the last call; rows that came by `merge` are not among it.

        Returns:
            Moments of those rows alone; empty ones where there were none or deltas are not kept.
        """
        delta = self._delta
        if delta is None:
            return RunningMoments(self.mean.shape)
        self._delta = RunningMoments(self.mean.shape)
        return delta

    def scale(self, rows: ndarray, *, center: bool, clip: float, epsilon: float) -> ndarray:
        """Bring rows to unit variance.

        Args:
            rows: ``[k, ...]`` floats.
            center: Whether to subtract the mean too.
            clip: Results lie in -clip .. clip.
            epsilon: Added to the variance.

        Returns:
            ``[k, ...]``, fresh, in the dtype of ``rows``; unscaled where nothing has varied yet.
        """
        deviation = np.sqrt(np.where(self.m2 > 0, self.variance + epsilon, 1.0))
        scaled = (rows - self.mean if center else rows) / deviation
        return np.minimum(np.maximum(scaled, -clip), clip).astype(rows.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Give the moments.

        Returns:
            The state; it shares no memory with the object.
        """
        return {"count": self.count, "mean": self.mean.copy(), "m2": self.m2.copy()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take moments back; a delta that was not taken is dropped.

        Args:
            state: What `state_dict` gave.

        Raises:
            CheckpointError: If they are of rows of another shape.
        """
        mean, m2 = (np.array(state[name], np.float64) for name in ("mean", "m2"))
        if mean.shape != self.mean.shape:
            raise CheckpointError(
                f"RunningMoments: the state is of rows of shape {mean.shape}; expected {self.mean.shape}. Make the "
                "environments with the recorded settings."
            )
        self.count, self.mean, self.m2 = int(state["count"]), mean, m2
        self.take_delta()

    def _add(self, count: int, mean: ndarray, m2: ndarray) -> None:
        total = self.count + count
        if not total:
            return
        apart = mean - self.mean
        self.m2 = self.m2 + m2 + apart * apart * (self.count * count / total)
        self.mean = self.mean + apart * (count / total)
        self.count = total
