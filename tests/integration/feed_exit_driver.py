"""Run by test_feed_exits.py in a process of its own, which forks one learner for every way to end."""

import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
from support.endings import end_of

from rlfeed.errors import FeedTimeoutError
from rlfeed.feed import make_loader
from rlfeed.replay import ReplayBuffer, Transition
from rlfeed.specs import ArraySpec
from rlfeed.types import Step

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


if __name__ == "__main__":
    json.dump([end_of(partial(learn, *case)) for case in json.loads(sys.argv[1])], sys.stdout)
