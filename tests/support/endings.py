"""How a process that started others ended, what it said, and what lives on after it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HANG_S = 60.0
TESTS = Path(__file__).parents[1]


def ends_of(driver, cases):
    """Have a driver, in a process of its own that may fork, end a learner in every way of the cases."""
    paths = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, driver, json.dumps(cases)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def end_of(learn):
    """Fork a learner, let it end, and say how it did, what it said, and what of its processes lived on for how long.

    ``learn`` tells of them: it writes ``[processes, names in /dev/shm]`` as JSON to descriptor 1.
    """
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as told:
        learner = os.fork()
        if learner == 0:
            os.setsid()
            os.dup2(told.fileno(), 1)
            os.dup2(said.fileno(), 2)
            with contextlib.suppress(KeyboardInterrupt):
                learn()
            sys.exit(0)  # by the interpreter's own way out
        status = os.waitstatus_to_exitcode(os.waitpid(learner, 0)[1])
        began_s = time.monotonic()
        told.seek(0)
        said.seek(0)
        processes, names = json.load(told)
        while any(map(is_running, processes)) and time.monotonic() < began_s + HANG_S:
            time.sleep(0.01)
        lived_s = round(time.monotonic() - began_s, 2)
        alive = list(filter(is_running, processes))
        for process in alive:
            os.kill(process, signal.SIGKILL)
        end = {"status": status, "said": said.read(), "processes": len(processes), "alive": len(alive), "names": names}
        return end | {"lived_s": lived_s}


def is_running(process):
    """Tell whether a process is there and no zombie: in a container nobody may be there to bury it."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
