"""How worker processes are started and ended, and that Ctrl-C does not reach them while they are."""

import fcntl
import multiprocessing
import multiprocessing.reduction as reduction
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from rlfeed.errors import ConfigError

_USUAL = ("gymnasium", "gymnasium.spaces", "rlfeed.rollout.acting")
_PRELOADED = ("__main__", "rlfeed.feed.workers", "rlfeed.feed.preloaded")
_LOOK_S = 0.5  # between looks at a process that nobody tells of


def choose_context(context: Any) -> Any:
    """Choose how worker processes are started.

    Args:
        context: A context of `multiprocessing`, or None: what the user has set for this process, else forkserver (a
            fork of a process that has threads can hang), else spawn. A script that is read from standard input has no
            file that another process could import: there it is fork.

    Returns:
        The context.

    Raises:
        ConfigError: If this process is one that is being started and imports the script of the one that starts it.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a fork would not refuse, and all run twice
        raise ConfigError(
            "rlfeed: the script is imported by a process that it starts, and would run once more there; expected "
            "`if __name__ == '__main__':` around what it does. Put it there."
        )
    if context is None:
        methods, method = multiprocessing.get_all_start_methods(), multiprocessing.get_start_method(allow_none=True)
        wanted = ("forkserver", "spawn") if _has_file() else ("fork", "spawn")
        context = multiprocessing.get_context(method or next(name for name in wanted if name in methods))
    if context.get_start_method() == "forkserver":
        # Imported once, in the process that forks them: a worker is there after 0.05 s instead of 3 s.
        known = getattr(forkserver._forkserver, "_preload_modules", ["__main__"])  # what the user wants there
        usual = [name for name in _USUAL if name in sys.modules]  # by the script, which each worker imports again
        context.set_forkserver_preload(list(dict.fromkeys([*known, *usual, *_PRELOADED])))
    return context


def _has_file() -> bool:
    """Tell whether another process can import what this one runs, or need not: a command line has nothing to import."""
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None)
    return path is None or getattr(main, "__spec__", None) is not None or Path(path).exists()


def processors() -> int:
    """Count the processors that this process may use.

    Returns:
        At least 1.
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def context_of(context: Any) -> Any:
    """Take how worker processes are to be started, in any of the forms that torch's `DataLoader` takes.

    Args:
        context: A start method, a context of `multiprocessing`, or None.

    Returns:
        The context, or None.

    Raises:
        ConfigError: If there is no such start method here.
    """
    methods = multiprocessing.get_all_start_methods()
    if context is None or hasattr(context, "get_start_method"):
        return context
    if context not in methods:
        raise ConfigError(f"multiprocessing_context: is {context!r}; expected one of {methods}, or None.")
    return multiprocessing.get_context(context)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Keep Ctrl-C from processes that are started in a block of code; this process sees it right after the block.

    It is sent to the whole group, and one that is still importing would say so at length.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def undecided() -> Iterator[None]:
    """Start processes in a block of code, and leave it open how others are started where nobody has chosen yet.

    To start one by a fork server is to choose the platform's default, perhaps fork, for all that ask later.
    """
    chosen = multiprocessing.get_start_method(allow_none=True)
    try:
        yield
    finally:
        if chosen is None:
            multiprocessing.set_start_method(None, force=True)


def ignore_interrupts() -> None:
    """Ignore Ctrl-C in this process, and what came of it while it was started."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    allow_interrupts()


def allow_interrupts() -> None:
    """Undo in a process what `uninterrupted` did to it when it was started."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def lead_group() -> None:
    """Have a group of this process and of those it will start: no Ctrl-C or Ctrl-Z, and `end_group` ends them all."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def end_group(leader: int) -> None:
    """End what a process has left behind that leads a group, and that process.

    Args:
        leader: Its number.
    """
    if hasattr(os, "killpg"):
        with suppress(OSError):  # nobody is left
            os.killpg(leader, signal.SIGKILL)


class Lifeline:
    """End processes with this one, however it ends, and whatever they do then: also without the GIL.

    A pipe that nobody writes into and whose writing end only this process has. Where the kernel can, it kills a
    process that is `tied` when that end closes; elsewhere a thread looks whether this process is there.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._reading, self._writing = os.pipe()

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self._owner, "reading": reduction.DupFd(self._reading)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._owner, self._reading, self._writing = state["owner"], state["reading"].detach(), -1

    def tie(self) -> None:
        """Tie this process, which the owner has started, to the owner; and its group, where it leads one."""
        if self._writing >= 0:  # it was forked, and would keep itself alive
            os.close(self._writing)
            self._writing = -1
        if hasattr(fcntl, "F_SETSIG"):
            # Whom a signal is sent to belongs to the open file, which all that got it from the owner share: open anew.
            end = os.open(f"/proc/self/fd/{self._reading}", os.O_RDONLY | os.O_NONBLOCK)
            fcntl.fcntl(end, fcntl.F_SETOWN, -os.getpid() if os.getpgrp() == os.getpid() else os.getpid())
            fcntl.fcntl(end, fcntl.F_SETSIG, signal.SIGKILL)
            fcntl.fcntl(end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_ASYNC)
        threading.Thread(target=self._outlive, name="rlfeed-lifeline", daemon=True).start()

    def _outlive(self) -> None:
        # The end may have closed before anybody listened; and another child of the owner may hold a copy of it.
        while is_alive(self._owner):
            time.sleep(_LOOK_S)
        if os.getpgrp() == os.getpid():
            end_group(os.getpid())
        os._exit(0)

    def close(self) -> None:
        """End the processes that are still tied."""
        for end in (self._reading, self._writing):
            if end >= 0:
                os.close(end)
        self._reading = self._writing = -1


def is_alive(process: int) -> bool:
    """Tell whether a process is there.

    Args:
        process: Its number.

    Returns:
        True where it is, or is a zombie.
    """
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True


def how_it_ended(code: int | None) -> str:
    """Say how a process ended.

    Args:
        code: Its exit code, negative for a signal; None where it has hung up and goes on.

    Returns:
        Such as ``was killed by SIGKILL``.
    """
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
        return f"was killed by {name}"
    return f"ended with exit code {code}" if code is not None else "hung up"


def has_guard() -> bool:
    """Tell whether the script that runs here can be imported by processes it starts without running once more.

    Returns:
        False where it has a file, and nowhere in it stands ``__name__``.
    """
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    if path is None:
        return True
    try:
        return "__name__" in Path(path).read_text(errors="replace")
    except OSError:
        return False
