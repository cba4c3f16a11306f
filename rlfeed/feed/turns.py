"""Iterators over one dataset, numbered across processes."""

import mmap

import numpy as np
from torch.utils.data import get_worker_info

from rlfeed.memory import Memory

_OPEN = 64  # turns that may be waiting for workers at a time


class Turns:
    """Number the iterators over a dataset, in whatever processes they live: each turn has draws of its own.

    Without it, a loop that begins a new iterator every epoch would be given the same draws every epoch. The workers of
    one turn agree on its number in a page of shared memory; the seed that torch gives them tells them who belongs
    together, and a turn that has all its workers is joined by nobody else.
    """

    def __init__(self) -> None:
        self._memory = Memory("shared", mmap.PAGESIZE)
        self.restart(0, 0)

    def _page(self) -> np.ndarray:
        return self._memory.bytes[: (3 + 3 * _OPEN) * 8].view(np.int64)

    def begin(self) -> tuple[int, int]:
        """Join a turn with the other workers of the `DataLoader`, or begin one.

        Returns:
            Its number, and its first draw.
        """
        worker = get_worker_info()
        identity, workers = (worker.seed - worker.id, worker.num_workers) if worker else (0, 1)
        with self._memory.locked():
            page = self._page()
            turns = page[3:].reshape(-1, 3)  # identity, turn, workers still to come
            mine = next((line for line in turns if line[0] == identity and line[2] > 0), None)
            if mine is None:
                mine = turns[page[0] % _OPEN]
                mine[:] = identity, page[0], workers
                page[0] += 1
            mine[2] -= 1
            turn = int(mine[1])
            return turn, int(page[2]) if turn == page[1] else 0

    def restart(self, turn: int, draw: int) -> None:
        """Begin the next turn elsewhere.

        Args:
            turn: Its number.
            draw: Its first draw.
        """
        with self._memory.locked():
            self._page()[:] = 0
            self._page()[:3] = turn, turn, draw  # the next turn; the turn that begins at a draw, and that draw

    def upcoming(self) -> tuple[int, int]:
        """Give where the next turn begins.

        Returns:
            Its number, and its first draw.
        """
        turn, first, draw = (int(word) for word in self._page()[:3])
        return turn, draw if turn == first else 0
