"""How worker processes are started, and that Ctrl-C does not reach them while they are."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from rlfeed.errors import ConfigError

_USUAL = ("gymnasium", "gymnasium.spaces")
_PRELOADED = ("__main__", "rlfeed.feed.workers", "rlfeed.feed.preloaded")


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
            "make_loader: the script is imported by a process that it starts, and would run once more there; expected "
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
