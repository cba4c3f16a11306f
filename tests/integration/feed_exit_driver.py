"""Run by test_feed_exits.py in a process of its own, which forks one learner for every way to end."""

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from rlfeed.errors import FeedTimeoutError
from rlfeed.feed import make_loader
from rlfeed.replay import ReplayBuffer, Transition
from rlfeed.specs import ArraySpec
from rlfeed.types import Step

HANG_S = 60.0
kept = []  # what the interpreter still holds when it ends


def never_again(batch):
    if multiprocessing.parent_process() is not None:
        time.sleep(1e6)
    return batch


def make(context, transform=None):
    spec, actions = ArraySpec((300,), np.dtype(np.float32)), ArraySpec((), np.dtype(np.int64))
    buffer = ReplayBuffer(spec, actions, capacity=200)
    observation, no = np.zeros((1, 300), np.float32), np.array([False])
    for i in range(100):
        first = np.array([i == 0])
        buffer.add(Step(observation, np.array([i % 3]), np.zeros(1, np.float32), observation, no, no, is_first=first))
    loader = make_loader(buffer, Transition(), batch_size=8, num_workers=2, transform=transform, timeout_s=0.5)
    loader.multiprocessing_context = context
    kept.append(loader)
    return loader


def tell():
    """Say what must not outlive this process: its workers, and how many names in /dev/shm it has."""
    workers = [child.pid for child in multiprocessing.active_children()]
    maps = Path("/proc/self/maps").read_text().splitlines()
    names = sum("/dev/shm/" in line and "(deleted)" not in line for line in maps)
    json.dump([workers, names], sys.stdout)
    sys.stdout.flush()


def learn(how, context):
    """Take some batches, and end as ``how`` says."""
    stuck = "computing" in how
    loader = make(context, never_again if stuck else None)
    batches = iter(loader)
    if stuck:
        try:
            next(batches)
        except FeedTimeoutError:
            tell()
    else:
        kept.extend(itertools.islice(batches, 2))
        tell()
    if "killed" in how:
        os.kill(os.getpid(), signal.SIGKILL)
    if "closed" in how:
        loader.close()
        return
    for _ in itertools.islice(batches, 0 if stuck else 5):
        if how == "left by break":
            break
        if how == "left by an exception":
            raise ArithmeticError("of the loop")
        if how == "left by sys.exit":
            sys.exit(0)
        if how == "left by Ctrl-C":
            os.killpg(0, signal.SIGINT)  # as a terminal does: the workers hear it, too


def end_of(how, context):
    """Fork a learner, let it end, and give its exit code, what it said, and how many workers live on."""
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as told:
        learner = os.fork()
        if learner == 0:
            os.setsid()
            os.dup2(told.fileno(), 1)
            os.dup2(said.fileno(), 2)
            with contextlib.suppress(KeyboardInterrupt):
                learn(how, context)
            sys.exit(0)  # by the interpreter's own way out
        status = os.waitstatus_to_exitcode(os.waitpid(learner, 0)[1])
        told.seek(0)
        said.seek(0)
        workers, names = json.load(told)
        deadline = time.monotonic() + HANG_S
        while any(map(is_alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.01)
        alive = sum(map(is_alive, workers))
        return {"status": status, "said": said.read(), "workers": len(workers), "alive": alive, "names": names}


def is_alive(process):
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()  # nobody may be there to bury it
    except OSError:
        return False


if __name__ == "__main__":
    json.dump([end_of(*case) for case in json.loads(sys.argv[1])], sys.stdout)
