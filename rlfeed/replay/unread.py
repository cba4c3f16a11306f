"""Rows that were drawn and are not gathered yet: this process waits before it overwrites them.

Writers never wait for readers, and a reader that was overtaken draws again. But a learner that writes its own steps
would then give batches that depend on how fast its workers are. So before its steps reach what they may still read, it
waits for them: once in as many rows as lanes have to spare.
"""

import weakref
from collections.abc import Callable

from rlfeed.replay.storage import Storage


class Unread:
    """Make a writer wait for readers of its own process's loaders.

    Args:
        storage: What is written.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage, self._budget = storage, 0
        self.settlers: list[weakref.WeakMethod[Callable[[], None]]] = []

    def protect(self, settle: Callable[[], None]) -> None:
        """Have a bound method called before rows are overwritten that may have been drawn before its last call.

        Args:
            settle: Waits until all that was drawn has been gathered; let go with its object.
        """
        self._budget = 0
        if all(settler() != settle for settler in self.settlers):
            self.settlers.append(weakref.WeakMethod(settle))

    def before_rows(self, rows: int) -> None:
        """Wait, if need be, before writing.

        Args:
            rows: How many at most, in any lane.
        """
        self._budget -= rows
        if self._budget >= 0:
            return
        spare, fresh = self._storage.ring - self._storage.rows, self._storage.ring - int(self._storage.heads()[1].max())
        if fresh < rows:  # fresh places were never written, so nobody reads there
            self.settle()
            fresh = spare
        self._budget = fresh - rows

    def settle(self) -> None:
        """Wait until all that was drawn has been gathered."""
        for settler in list(self.settlers):
            settle = settler()
            if settle is None:
                self.settlers.remove(settler)
            else:
                settle()
