"""Draws made ahead by the learner and gathered by anyone: the draw table.

The learner is the clock: each time it takes a batch it makes the draws of the batch ``lookahead`` later. What is drawn
depends on the tick alone; which process gathers it, how fast, and whether one dies on the way, changes nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from rlfeed.errors import CapacityError, CheckpointError, NotEnoughDataError
from rlfeed.memory import Memory, available_bytes, readable_bytes
from rlfeed.replay.draws import Draws

Fill = Callable[[Draws], None]
KEPT = 32  # entries beside those drawn ahead: the one being made, and those that a `DeviceFeed` has taken ahead


class Past(Protocol):
    """Remember what draws were made on, and make them again."""

    def snapshot(self) -> np.ndarray | None:
        """Copy what draws depend on besides the rows; see `UnitSampler.snapshot`."""
        ...

    def redraw(self, snapshot: np.ndarray, key: int, number: int, count: int) -> Draws:
        """Make draws again; see `UnitSampler.redraw`."""
        ...


class DrawTable:
    """Keep the draws of the batches that are under way.

    Args:
        fill: Makes draws in place; see `UnitSampler.fill`.
        key: The stream of draws.
        batch_size: B.
        lookahead: Batches drawn ahead of delivery, >= 0.
        shared: Whether other processes gather.
        past: What can make draws again, so that a state needs no ids but a few words for each lane.

    Raises:
        CapacityError: If they do not fit in memory, with the numbers.
    """

    def __init__(
        self, fill: Fill, key: int, batch_size: int, lookahead: int, *, shared: bool, past: Past | None = None
    ) -> None:
        self._fill, self.key, self.batch_size, self.lookahead = fill, key, batch_size, lookahead
        self._past, self._snapshots = past, dict[int, np.ndarray]()
        self.drawn = 0  # batches: the number of the next one to draw
        self.begun = 0  # batches: the number of the next one to have made
        self.delivered = 0  # batches handed out
        self.taken_ahead = 0  # and how many of those a `DeviceFeed` still holds
        nbytes, free = (lookahead + KEPT) * 3 * batch_size * 8, available_bytes()
        if nbytes > 0.9 * free:
            raise CapacityError(
                f"make_loader: the draws of {lookahead + KEPT} batches of {batch_size} samples need "
                f"{readable_bytes(nbytes)}, but {readable_bytes(free)} are free in memory; expected at most 90 % of "
                "that. Lower batch_size or lookahead."
            )
        self._memory = Memory("shared" if shared else "private", nbytes)
        self._bind()

    def _bind(self) -> None:
        words = self._memory.bytes[: (self.lookahead + KEPT) * 3 * self.batch_size * 8]
        self._entries = words.view(np.int64).reshape(self.lookahead + KEPT, 3, self.batch_size)
        self._parts = [(ids, limits, weights.view(np.float64)) for ids, limits, weights in self._entries]

    def __getstate__(self) -> dict[str, Any]:
        left_out = {"_entries", "_parts", "_fill", "_past", "_snapshots"}  # only the learner ticks
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()

    def tick(self) -> int:
        """Draw the next batch.

        Returns:
            Its number.

        Raises:
            NotEnoughDataError: If no stored step can start a sample. The number stays the next one.
        """
        number = self.drawn
        snapshot = None if self._past is None else self._past.snapshot()
        self._fill(self.entry(number))
        self._snapshots.pop(number - self.lookahead - KEPT, None)
        if snapshot is not None:
            self._snapshots[number] = snapshot
        self.drawn += 1
        return number

    def entry(self, batch: int) -> Draws:
        """Give a batch's draws, in any process.

        Args:
            batch: Its number, among the last ``lookahead + KEPT``.

        Returns:
            The draws, in the table's memory.
        """
        return Draws(self.key, batch * self.batch_size, *self._parts[batch % (self.lookahead + KEPT)])

    def state_dict(self) -> dict[str, Any]:
        """Give what has been drawn and has not reached the consumer.

        Returns:
            The next batch to deliver, and the draws from there on.
        """
        begin = self.delivered - self.taken_ahead
        made: dict[str, Any] = {"key": self.key, "batch_size": self.batch_size, "batch": begin}
        if (snapshots := self._redrawable(begin)) is not None:
            return made | {"snapshot": snapshots[0], "grown": _narrow(np.diff(snapshots, axis=0))}
        entries = [self._entries[batch % (self.lookahead + KEPT)] for batch in range(begin, self.drawn)]
        return made | {"entries": np.stack(entries) if entries else np.empty((0, 3, self.batch_size), np.int64)}

    def _redrawable(self, begin: int) -> np.ndarray | None:
        """Give what the draws under way were made on, where they come out the same again."""
        numbers = range(begin, self.drawn)
        if self._past is None or not numbers or any(number not in self._snapshots for number in numbers):
            return None
        snapshots = np.stack([self._snapshots[number] for number in numbers])
        try:
            same = all(
                np.array_equal(self._redrawn(snapshot, number)[:2], self._entries[number % (self.lookahead + KEPT)][:2])
                for snapshot, number in zip(snapshots, numbers, strict=True)
            )
        except NotEnoughDataError:  # what they were made on has been overwritten
            return None
        return snapshots if same else None

    def _redrawn(self, snapshot: np.ndarray, number: int) -> np.ndarray:
        if self._past is None:
            raise CheckpointError("loader: the state has no ids; expected those of draws by priority.")
        made = self._past.redraw(snapshot, self.key, number * self.batch_size, self.batch_size)
        return np.stack([made.ids, made.limits, made.weights.view(np.int64)])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take draws back.

        Args:
            state: What `state_dict` gave.

        Raises:
            CheckpointError: If it is of other draws: another seed, rank or batch size, or drawn further ahead.
        """
        begin = int(state["batch"])
        snapshots = _widen(state["snapshot"], state["grown"]) if "snapshot" in state else []
        ahead = len(snapshots) or len(state["entries"])
        wrong = [name for name in ("key", "batch_size") if state[name] != getattr(self, name)]
        wrong += ["lookahead"] if ahead > self.lookahead + KEPT else []
        if wrong:
            raise CheckpointError(
                f"loader: the state has another {' and '.join(wrong)} than this loader; expected the same seed, rank, "
                "batch_size and lookahead. Make the loader as the saved one was."
            )
        entries = [self._redrawn(snapshot, begin + i) for i, snapshot in enumerate(snapshots)]
        for batch, entry in enumerate(entries or state["entries"], begin):
            self._entries[batch % (self.lookahead + KEPT)] = entry
        self._snapshots = dict(enumerate(snapshots, begin))
        self.drawn, self.delivered, self.taken_ahead = begin + ahead, begin, 0


def _narrow(grown: np.ndarray) -> np.ndarray:
    """Store small numbers in few bytes."""
    return grown.astype(np.min_scalar_type(grown.max(initial=0)) if grown.min(initial=0) >= 0 else np.int64)


def _widen(snapshot: np.ndarray, grown: np.ndarray) -> np.ndarray:
    return np.cumsum(np.concatenate([snapshot[None], grown.astype(np.int64)]), axis=0)
