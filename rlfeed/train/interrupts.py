"""Stopping by a signal: save first, or at once."""

import signal
import threading
from types import FrameType
from typing import Any, Self


class Interrupts:
    """Turn the first SIGINT or SIGTERM into a flag that the training loop polls; the second one leaves at once.

    A third one meets the operating system's default. Outside the main thread, where Python has no signals, it does
    nothing.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """Give the exit code of a process that stopped for the signal.

        Returns:
            130 for SIGINT, 143 for SIGTERM, 0 where none came.
        """
        return 0 if self.received is None else 128 + self.received

    def __enter__(self) -> Self:
        """Take the signals over.

        Returns:
            The flag.
        """
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            return
        for other in self._SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        raise SystemExit(128 + number)
