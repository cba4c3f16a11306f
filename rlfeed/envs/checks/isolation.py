"""Run a check in a copy of this process: what hangs, crashes or exits there does neither here.

A C-level watchdog (`faulthandler`) ends the copy when one call takes too long, even one that never lets go of the
interpreter, and says in which line it was.
"""

import faulthandler
import io
import mmap
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import torch

from rlfeed.errors import RlfeedError, UnsupportedError
from rlfeed.processes import how_it_ended, uninterrupted

_PLACE_BYTES = 1024
_FRAMES = 4


@dataclass(frozen=True, slots=True)
class Death:
    """Say how a copy of this process came to its end before its work did.

    Args:
        place: The call in which it was.
        cause: Such as ``did not return within 60 s`` or ``the process was killed by SIGSEGV``.
        frames: Where in the code, as far as it is known.
    """

    place: str
    cause: str
    frames: str


class Watch:
    """Let one process say which call it is in, and end it when a call takes too long.

    Args:
        limit_s: How long one call may take.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._place = mmap.mmap(-1, _PLACE_BYTES)
        self._dump = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as this object)
        self._armed_at_s = -1.0

    def start(self) -> None:
        """Begin to watch this process."""
        faulthandler.enable(self._dump)

    @contextmanager
    def call(self, place: str) -> Iterator[None]:
        """Name a call that must return in time.

        Args:
            place: What is called, and when.

        Yields:
            Nothing.
        """
        now_s = time.monotonic()
        if now_s - self._armed_at_s > min(0.5, self.limit_s / 4):  # arming starts a thread: not in every call
            faulthandler.dump_traceback_later(self.limit_s, exit=True, file=self._dump)
            self._armed_at_s = now_s
        text = place.encode()[: _PLACE_BYTES - 1]
        self._place[: len(text) + 1] = text + b"\0"
        yield
        self._place[0] = 0

    def stop(self) -> None:
        """Watch no longer."""
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        """Release what it holds."""
        self._place.close()
        self._dump.close()

    def death(self, exit_code: int | None) -> Death:
        """Say how the watched process ended.

        Args:
            exit_code: As `multiprocessing.Process` has it; negative for a signal.

        Returns:
            Its end.
        """
        place = bytes(self._place).partition(b"\0")[0].decode(errors="replace")
        self._dump.seek(0)
        dump = self._dump.read().decode(errors="replace")
        if "Timeout" in dump:
            cause = f"did not return within {self.limit_s:g} s"
        else:
            cause = f"the process {how_it_ended(exit_code)}"
        lines = [line.strip() for line in dump.splitlines() if line.startswith("  File")]
        own = [line for line in lines if "/rlfeed/envs/check" not in line and "multiprocessing" not in line]
        return Death(place or "between two calls", cause, "; ".join(own[:_FRAMES]))


def run_isolated(
    work: Callable[[Watch, Callable[[Any], None]], Any], limit_s: float
) -> tuple[list[Any], Any, Death | None]:
    """Do some work in a copy of this process.

    Args:
        work: Called with a `Watch`, and with what sends a message to this process.
        limit_s: How long one call of the work may take.

    Returns:
        The messages, what the work returned (None where it did not), and how the copy ended where it did so early.

    Raises:
        UnsupportedError: If this platform cannot copy a process.
        RlfeedError: What the work raised.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise UnsupportedError(f"check_env: {sys.platform} cannot fork; expected Linux or macOS. Run it there.")
    context = multiprocessing.get_context("fork")
    watch = Watch(limit_s)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_copy, args=(work, watch, sender), name="rlfeed check_env")
    with uninterrupted(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads: they are not needed in the copy
        process.start()
    sender.close()
    messages = []
    try:
        while True:
            wait([receiver, process.sentinel])  # what the environment started may hold the pipe open
            if not receiver.poll():
                raise EOFError
            kind, content = receiver.recv()
            if kind == "message":
                messages.append(content)
            elif kind == "raised":
                raise content
            elif kind == "failed":
                return messages, None, Death("between two calls", "something that it returned broke the check", content)
            else:
                return messages, content, None
    except EOFError:
        process.join()
        return messages, None, watch.death(process.exitcode)
    finally:
        process.kill()
        process.join()
        process.close()
        receiver.close()
        watch.close()


def _copy(work: Callable[[Watch, Callable[[Any], None]], Any], watch: Watch, sender: Any) -> None:
    torch.set_num_threads(1)  # the threads of the process that was copied are not here
    warnings.simplefilter("ignore")
    watch.start()
    try:
        result = ("result", work(watch, lambda content: sender.send(("message", content))))
    except RlfeedError as error:
        result = ("raised", error)
    except Exception:
        result = ("failed", traceback.format_exc())
    watch.stop()
    sender.send(result)


@contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Keep what is printed.

    Yields:
        What was printed in the block.
    """
    before, sys.stdout = sys.stdout, io.StringIO()
    try:
        yield sys.stdout
    finally:
        sys.stdout = before
