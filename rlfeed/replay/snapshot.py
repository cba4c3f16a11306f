"""What a buffer holds at one time as samples that hold each stored step once: what a finite pass gives.

Draws leave out what their rules of starts leave out; a pass may leave out nothing. So it also shows the pieces that are
left of episodes whose beginning was overwritten, and the steps of those that are still open.
"""

from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from rlfeed.errors import ConfigError, NotEnoughDataError, StaleReadError, UnsupportedError
from rlfeed.nest import leaves
from rlfeed.replay import kernels as k
from rlfeed.replay.draws import Drawer, Draws
from rlfeed.replay.readers import WHOLE, Allocate, Redraw, TransitionReader, WindowReader, allocate_private
from rlfeed.replay.samplers import Uniform
from rlfeed.replay.storage import Storage
from rlfeed.replay.unit_sampler import unit_sampler_for
from rlfeed.replay.units import Episode, Sequence, Transition, Unit, carry_spacing
from rlfeed.types import Batch


class Snapshot:
    """List samples that hold each step stored now exactly once.

    Transitions: one from every step, its sum of rewards shorter where an episode ends or its newest step is.
    Sequences: windows that lie ``length`` steps apart in their episode; burn-in is shown beside, out of the loss.
    Episodes: every one of which a step is left, open ones included.

    Where the rows before a step were overwritten, it looks as if its episode began there, but ``is_first`` is False:
    the oldest frame is repeated, the previous action and reward are zeros, and the carry is where none is stored.

    Args:
        storage: What to list.
        unit: What the samples are.

    Raises:
        ConfigError: If an episode is longer than the unit allows, or the unit's stride is not its length.
        NotEnoughDataError: If no step is stored.
        UnsupportedError: If the unit's samples cannot hold each step once.
    """

    def __init__(self, storage: Storage, unit: Unit) -> None:
        self._storage, self._unit = storage, _tiling(unit)
        most = storage.lanes * storage.rows
        self._heads, self._tails = np.empty(storage.lanes, np.int64), np.empty(storage.lanes, np.int64)
        ids, limits = np.empty(most, np.int64), np.empty(most, np.int64)
        length = 1 if isinstance(unit, Transition) else unit.length if isinstance(unit, Sequence) else WHOLE
        count = k.list_windows(storage.plan, length, self._heads, self._tails, ids, limits)
        self.ids, self._limits = ids[:count].copy(), limits[:count].copy()
        self.lengths = self._limits - 1 - (self.ids & k.ROW_MASK)
        if isinstance(unit, Transition):  # a sum of rewards goes on over the steps of other samples
            self._limits = self._heads[self.ids >> k.LANE_SHIFT]
        self._bind()
        if count == 0:
            raise NotEnoughDataError("epoch: the buffer holds no step; expected at least one. Collect some first.")
        longest = int(self.lengths.max())
        if isinstance(unit, Episode) and unit.max_length is not None and longest > unit.max_length:
            raise ConfigError(
                f"epoch: max_length of {unit} is {unit.max_length}, but an episode of {longest} steps is stored; "
                "expected none longer. Raise it, or use Sequence(length=...)."
            )

    def _bind(self) -> None:
        self._sampler = unit_sampler_for(self._storage, Uniform(), self._unit)
        self._sampler.reader = (
            _StepReader(self._storage, self._unit, self._tails)
            if isinstance(self._unit, Transition)
            else _PieceReader(self._storage, self._unit, self._tails)
        )
        self._sampler.drawer = _Overwritten(self._storage, self._heads)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_sampler"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()

    def gather(self, picked: np.ndarray, allocate: Allocate = allocate_private) -> Batch:
        """Gather samples as they were when the snapshot was made, in any process.

        Args:
            picked: ``[B]`` int64, which ones: 0 .. number of samples - 1.
            allocate: Where the block comes from.

        Returns:
            The batch.

        Raises:
            StaleReadError: If a writer has overwritten one of them since.
        """
        draws = Draws(0, 0, self.ids[picked], self._limits[picked], np.ones(len(picked)))
        return self._sampler.gather(draws, allocate)

    def most_bytes(self, count: int) -> int:
        """Say how long the block of a batch can be.

        Args:
            count: B.

        Returns:
            Bytes.
        """
        longest = int(self.lengths.max()) + getattr(self._unit, "burn_in", 0)
        return self._sampler.reader.nbytes(count, longest)


def _tiling(unit: Unit) -> Unit:
    """Refuse units whose samples cannot hold each step once, and settle the stride of those that can."""
    if isinstance(unit, Transition) and unit.relabel is not None:
        raise UnsupportedError(
            f"epoch: {unit} relabels goals, which only episodes that have ended have; expected steps as they are "
            "stored. Use relabel=None, or draw with ReplayDataset."
        )
    if not isinstance(unit, Sequence):
        return unit
    if unit.boundary != "pad":
        raise UnsupportedError(
            f"epoch: boundary is {unit.boundary!r}; expected 'pad': each stored step once needs windows that end with "
            "their episode. Use Sequence(..., boundary='pad')."
        )
    if unit.stride not in (None, unit.length):
        raise ConfigError(
            f"epoch: stride is {unit.stride} and length {unit.length}; expected windows that lie side by side. Leave "
            "stride out."
        )
    return replace(unit, stride=unit.length)


class _Overwritten(Drawer):
    """Refuse to draw anything in the place of a sample that is gone."""

    def __init__(self, storage: Storage, heads: np.ndarray) -> None:
        self._storage, self._heads = storage, heads

    def draw(self, draws: Draws, attempt: int = 0, *, tick: bool = True) -> NoReturn:
        lane, row = divmod(int(draws.ids[0]), k.ROW_MASK + 1)
        written = int(self._storage.heads()[1, lane] - self._heads[lane])
        raise StaleReadError(
            f"epoch: the sample at row {row} of lane {lane} was overwritten before it was given: {written} rows were "
            f"written since the pass began, into a lane that holds {self._storage.rows}; expected the steps that were "
            "stored then to stay until they are given. Do not add during a pass, or raise capacity."
        )


class _StepReader(TransitionReader):
    """Gather any stored step as a transition."""

    def __init__(self, storage: Storage, unit: Transition, tails: np.ndarray) -> None:
        super().__init__(storage, unit)
        self._tails, self._back = tails, int(self._rule[k.BACK])

    def _gather_stacks(self, fields: np.ndarray, address: int, draws: Draws, todo: np.ndarray) -> int:
        return k.gather_stored_stacks(
            self._plan, self._tails, fields, address, draws.ids, draws.limits, todo, self.unit.n_step, self._back
        )


class _PieceReader(WindowReader):
    """Gather windows as a snapshot has cut them."""

    def __init__(self, storage: Storage, unit: "Sequence | Episode", tails: np.ndarray) -> None:
        super().__init__(storage, unit)
        self._storage, self._tails, self._every = storage, tails, carry_spacing(storage)
        self._burn_in, self._back = getattr(unit, "burn_in", 0), int(self._rule[k.BACK])

    def _resolve(self, draws: Draws, todo: np.ndarray, windows: np.ndarray) -> int:
        rows = draws.ids & k.ROW_MASK
        _, first, begin = self._begin(draws.ids)
        windows[:, k.BEGIN], windows[:, k.EXTENT], windows[:, k.BURN_IN] = begin, draws.limits - 1 - begin, rows - begin
        windows[:, k.ORIGIN], windows[:, k.OLDEST] = first, np.maximum(first, rows - self._back)
        return 0

    def _begin(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Give each start's number in its episode, the oldest row that is left of that, and the window's first row.

        What was overwritten before it could be looked at here, the gather notices.
        """
        lanes, rows = ids >> k.LANE_SHIFT, ids & k.ROW_MASK
        index = self._storage.indices(lanes, rows).astype(np.int64)
        first = np.maximum(rows - index, self._tails[lanes])
        return index, first, np.maximum(first, rows - self._burn_in)

    def collect(self, draws: Draws, again: Redraw, allocate: Allocate) -> Batch:
        index, _, begin = self._begin(draws.ids)
        batch = super().collect(draws, again, allocate)
        missing = (index - (draws.ids & k.ROW_MASK) + begin) % self._every != 0
        if missing.any():  # the first windows of pieces, where carries are stored at some steps only
            for _, leaf in leaves(batch.carry):
                leaf[missing] = 0
        return batch
