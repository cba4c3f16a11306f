"""Run by test_checkpoint_kill.py in a process of its own, which forks one child for every place to die at."""

import itertools
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np

from rlfeed.durable import build_directory, save_state
from rlfeed.errors import CheckpointError
from rlfeed.train.checkpoint import Checkpoints

KILLED = 77
MUTATIONS = {"os.mkdir", "os.remove", "os.rename", "os.rmdir"}
countdown = None


def tick():
    global countdown
    if countdown is None:
        return
    if countdown == 0:
        os._exit(KILLED)
    countdown -= 1


def audit(event, arguments):
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if event in MUTATIONS or writes:
        tick()


def fsync(descriptor):
    tick()  # and no more: what a process wrote outlives it, only a power cut needs the disk


def save(checkpoints, env_steps):
    def replay(path):
        with build_directory(path, {"rows": env_steps}) as building:
            save_state(building / "columns.state", {"rows": np.full(1000, env_steps)})

    checkpoints.save(env_steps, {"learner": {"weights": np.full(10, env_steps)}}, {"replay": replay})


def child(directory, point, report):
    global countdown
    countdown = point
    checkpoints = Checkpoints(directory)
    for env_steps in (200, 300):
        save(checkpoints, env_steps)
        os.write(report, bytes([env_steps // 100]))
    os._exit(0)


def check(directory, reported):
    """Look at what is left as a resumed run would, and go on."""
    checkpoints = Checkpoints(directory)
    found = checkpoints.latest()
    weights = found.load("learner")["weights"]
    if found.env_steps < reported or not (weights == found.env_steps).all():
        raise CheckpointError(f"{reported} was reported, {found.env_steps} is there")
    save(checkpoints, found.env_steps + 1000)
    left = sorted(p.name for p in directory.iterdir() if p.name.startswith("."))
    if left or checkpoints.latest().env_steps != found.env_steps + 1000:
        raise CheckpointError(f"could not go on: {left}")
    return found.env_steps


def main(root):
    warnings.simplefilter("error")
    os.fsync = fsync
    sys.addaudithook(audit)
    seed = root / "seed"
    for env_steps in (50, 100):
        save(Checkpoints(seed), env_steps)
    failures, pairs = [], set()
    for point in itertools.count():
        directory = root / str(point)
        shutil.copytree(seed, directory)
        reader, report = os.pipe()
        process = os.fork()
        if process == 0:
            child(directory, point, report)
        os.close(report)
        _, status = os.waitpid(process, 0)
        reported = max((byte * 100 for byte in os.read(reader, 16)), default=100)
        os.close(reader)
        try:
            pairs.add((reported, check(directory, reported)))
        except (CheckpointError, Warning) as error:
            failures.append(f"point {point}: {type(error).__name__}: {error}")
        shutil.rmtree(directory)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            break
        if code != KILLED:
            failures.append(f"point {point}: the child ended with {code}")
            break
    json.dump({"points": point, "failures": failures, "reported_and_loaded": sorted(pairs)}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
