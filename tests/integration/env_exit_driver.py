"""Run by test_env_exits.py in a process of its own, which forks one learner for every way to end, in every phase."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
from support.endings import end_of

import rlfeed.envs.faults
from rlfeed.envs import EnvSource, PoolEnvs
from rlfeed.rollout import Rollout
from rlfeed.testing import IdentifiableEnv

LONG_S = 1000


class Slow(IdentifiableEnv):
    """Take for ever over a phase, in a worker; each environment has a process of its own beside it."""

    def __init__(self, phase, learner):
        super().__init__()
        self.phase, self.steps = phase if os.getpid() != learner else "", 0
        if not self.phase:
            return
        self.nurse = subprocess.Popen(["sleep", str(LONG_S)])
        if phase == "making":
            time.sleep(LONG_S)

    def reset(self, *, seed=None, options=None):
        if self.phase == "resetting":
            time.sleep(LONG_S)
        return super().reset(seed=seed)

    def step(self, action):
        self.steps += 1
        if self.phase == "stepping" and self.steps > 2:
            time.sleep(LONG_S)
        if self.phase == "holding the lock" and self.steps > 2:
            ctypes.PyDLL(None).sleep(LONG_S)
        if self.phase == "restarting" and self.steps > 2:
            os._exit(1)
        return super().step(action)

    def close(self):
        if self.phase == "closing":
            time.sleep(LONG_S)
        super().close()


def tell(found):
    json.dump(found, sys.stdout)
    sys.stdout.flush()


def learn(how, phase):
    """Be in a phase, and end in a way: now, or by a thread where this one waits."""
    if phase == "restarting":
        rlfeed.envs.faults._FIRST_WAIT_S = 1e3
    make = EnvSource(partial(Slow, phase, os.getpid()))

    def end():
        while len(found := family(os.getpid())) < (4 if phase != "restarting" else 1):
            time.sleep(0.01)
        time.sleep(0.1)
        maps = Path("/proc/self/maps").read_text().splitlines()
        tell([family(os.getpid()), sum("/dev/shm/" in line and "(deleted)" not in line for line in maps)])
        if how == "stopped worker, killed":
            os.kill(found[0], signal.SIGSTOP)
        if "killed" in how:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        if how == "Ctrl-C":
            os.killpg(0, signal.SIGINT)

    if phase in ("waiting", "closing"):
        rollout = Rollout(PoolEnvs(make, 2, 2, context="fork"), fives)
        next(rollout)
        end()
        if how == "closed":
            rollout.close()
        if how == "an exception":
            raise ArithmeticError("of the loop")
        if how == "sys.exit":
            sys.exit(0)
        time.sleep(LONG_S if how in ("SIGTERM", "Ctrl-C") else 0)
        return
    threading.Thread(target=end, daemon=True).start()
    rollout = Rollout(PoolEnvs(make, 2, 2, context="fork", max_restarts=9), fives)
    for _ in rollout:
        pass


def fives(observation):
    return np.full(len(observation), 3, np.int64)


def family(process):
    """Give all that descend from a process."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents.setdefault(int(parent), []).append(int(entry.parent.name))
    found, new = [], parents.get(process, [])
    while new:
        found += new
        new = [child for one in new for child in parents.get(one, [])]
    return found


if __name__ == "__main__":
    json.dump([end_of(partial(learn, *case)) for case in json.loads(sys.argv[1])], sys.stdout)
