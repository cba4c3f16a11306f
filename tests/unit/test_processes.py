"""Processes that are tied to the one that starts them end with it, whatever they do."""

import os
import subprocess
import sys
import time

import pytest
from support.endings import is_running

from rlfeed.processes import how_it_ended, is_alive

# Three children that keep the GIL for a minute each; the parent prints their numbers and kills itself.
SCRIPT = """
import ctypes, multiprocessing, os, signal, sys, time
from rlfeed.processes import Lifeline

def child(line, pipe):
    line.tie()
    pipe.send(os.getpid())
    ctypes.PyDLL(None).sleep(60)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    line = Lifeline()
    for _ in range(3):
        mine, theirs = context.Pipe(duplex=False)
        context.Process(target=child, args=(line, theirs)).start()
        print(mine.recv(), flush=True)
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_lifeline_of_a_killed_process_ends_all_that_are_tied_even_without_the_gil(method, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run([sys.executable, script, method], capture_output=True, text=True, timeout=120, check=False)
    children = [int(line) for line in run.stdout.split()]
    deadline = time.monotonic() + 20
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.05)

    assert len(children) == 3, run.stderr
    assert [child for child in children if is_running(child)] == []


def test_is_alive_tells_this_process_from_none():
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()

    assert is_alive(os.getpid())
    assert not is_alive(ended.pid)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-9, "was killed by SIGKILL"),
        (-200, "was killed by signal 200"),
        (3, "ended with exit code 3"),
        (None, "hung up"),
    ],
)
def test_how_it_ended_names_the_signal_or_the_code(code, said):
    assert how_it_ended(code) == said
