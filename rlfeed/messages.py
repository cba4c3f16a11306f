"""Messages through a pipe for processes that wait for nobody: the other side may be busy, stopped or killed."""

import os
import struct
from contextlib import suppress
from multiprocessing.connection import Connection

_MOST = 1 << 18  # bytes at a time: what a socket holds


class Inbox:
    """Read what `Connection.send_bytes` or an `Outbox` sends, without waiting.

    Args:
        pipe: The end to read from; what is sent through it no longer waits either.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._bytes = pipe, bytearray()
        os.set_blocking(pipe.fileno(), False)

    def read(self) -> list[bytes] | None:
        """Read what is there.

        Returns:
            The messages that are whole now; None where nothing had come.

        Raises:
            EOFError: If the other end is closed and all has been read.
            OSError: If the pipe is broken.
        """
        try:
            came = os.read(self._pipe.fileno(), _MOST)
        except BlockingIOError:
            return None
        if not came:
            raise EOFError
        self._bytes += came
        messages = []
        while (span := self._first()) is not None:
            begin, end = span
            messages.append(bytes(memoryview(self._bytes)[begin:end]))
            del self._bytes[:end]
        return messages

    def _first(self) -> tuple[int, int] | None:
        """Give where the first message begins and ends: its length is before it, that of a long one in more bytes."""
        begin, known = 4, len(self._bytes)
        if known < begin:
            return None
        (length,) = struct.unpack_from("!i", self._bytes)
        if length == -1:
            begin = 12
            if known < begin:
                return None
            (length,) = struct.unpack_from("!Q", self._bytes, 4)
        return (begin, begin + length) if known >= begin + length else None


class Outbox:
    """Send messages without waiting: what the pipe does not take now is kept for the next time.

    Args:
        pipe: The end to write to; what is read from it no longer waits either.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._bytes = pipe, bytearray()
        os.set_blocking(pipe.fileno(), False)

    def send(self, message: bytes) -> None:
        """Send a message after those before it, as much as the pipe takes.

        Args:
            message: What an `Inbox` will read.
        """
        self._bytes += struct.pack("!iQ", -1, len(message))
        self._bytes += message
        self.flush()

    def flush(self) -> bool:
        """Send on.

        Returns:
            True where everything has been sent.

        Raises:
            OSError: If nobody has the other end any more.
        """
        with suppress(BlockingIOError):
            while self._bytes:
                del self._bytes[: os.write(self._pipe.fileno(), self._bytes[:_MOST])]
        return not self._bytes
