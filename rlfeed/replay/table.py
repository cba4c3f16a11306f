"""Draws made ahead by the learner and gathered by anyone: the draw table.

The learner is the clock: each time it takes a batch it makes the draws of the batch ``lookahead`` later. What is drawn
depends on the tick alone; which process gathers it, how fast, and whether one dies on the way, changes nothing.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rlfeed.errors import CheckpointError
from rlfeed.replay.draws import Draws
from rlfeed.replay.memory import Memory

Draw = Callable[[int, int, int], Draws]
KEPT = 32  # entries beside those drawn ahead: the one being made, and those that a `DeviceFeed` has taken ahead


class DrawTable:
    """Keep the draws of the batches that are under way.

    Args:
        draw: Makes draws by key, first number and count; see `UnitSampler.draw`.
        key: The stream of draws.
        batch_size: B.
        lookahead: Batches drawn ahead of delivery, >= 0.
        shared: Whether other processes gather.
    """

    def __init__(self, draw: Draw, key: int, batch_size: int, lookahead: int, *, shared: bool) -> None:
        self._draw, self.key, self.batch_size, self.lookahead = draw, key, batch_size, lookahead
        self.drawn = 0  # batches: the number of the next one to draw
        self.delivered = 0  # batches handed out
        self.taken_ahead = 0  # and how many of those a `DeviceFeed` still holds
        self._memory = Memory("shared" if shared else "private", (lookahead + KEPT) * 3 * batch_size * 8)
        self._bind()

    def _bind(self) -> None:
        words = self._memory.bytes[: (self.lookahead + KEPT) * 3 * self.batch_size * 8]
        self._entries = words.view(np.int64).reshape(self.lookahead + KEPT, 3, self.batch_size)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_entries"}

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
        made = self._draw(self.key, number * self.batch_size, self.batch_size)
        entry = self.entry(number)
        entry.ids[:], entry.limits[:], entry.weights[:] = made.ids, made.limits, made.weights
        self.drawn += 1
        return number

    def entry(self, batch: int) -> Draws:
        """Give a batch's draws, in any process.

        Args:
            batch: Its number, among the last ``lookahead + KEPT``.

        Returns:
            The draws, in the table's memory.
        """
        ids, limits, weights = self._entries[batch % (self.lookahead + KEPT)]
        return Draws(self.key, batch * self.batch_size, ids, limits, weights.view(np.float64))

    def state_dict(self) -> dict[str, Any]:
        """Give what has been drawn and has not reached the consumer.

        Returns:
            The next batch to deliver, and the draws from there on.
        """
        delivered = self.delivered - self.taken_ahead
        entries = [self._entries[batch % (self.lookahead + KEPT)] for batch in range(delivered, self.drawn)]
        shape = (0, 3, self.batch_size)
        made = {"key": self.key, "batch_size": self.batch_size, "batch": delivered}
        return made | {"entries": np.stack(entries) if entries else np.empty(shape, np.int64)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take draws back.

        Args:
            state: What `state_dict` gave.

        Raises:
            CheckpointError: If it is of other draws: another seed, rank or batch size, or drawn further ahead.
        """
        begin, entries = int(state["batch"]), state["entries"]
        wrong = [name for name in ("key", "batch_size") if state[name] != getattr(self, name)]
        wrong += ["lookahead"] if len(entries) > self.lookahead + KEPT else []
        if wrong:
            raise CheckpointError(
                f"loader: the state has another {' and '.join(wrong)} than this loader; expected the same seed, rank, "
                "batch_size and lookahead. Make the loader as the saved one was."
            )
        for batch, entry in enumerate(entries, begin):
            self._entries[batch % (self.lookahead + KEPT)] = entry
        self.drawn, self.delivered, self.taken_ahead = begin + len(entries), begin, 0
