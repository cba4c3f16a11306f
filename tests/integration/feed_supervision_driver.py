"""Run by test_feed_supervision.py in a process of its own, which forks a learner for every way to end.

Whatever a learner leaves behind becomes a child of this process, so that nothing that outlives it can hide.
"""

import ctypes
import faulthandler
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from gymnasium.spaces import Box, Discrete

from rlfeed.feed import DeviceFeed, make_loader
from rlfeed.replay import ReplayBuffer, Transition
from rlfeed.types import Step

HANG_S = 60
PR_SET_CHILD_SUBREAPER = 36
LEARNER = "FEED_EXIT_LEARNER"  # in the environment: who must not sleep in the transform


def filled_buffer(rows=40):
    buffer = ReplayBuffer(Box(-np.inf, np.inf, (1,), np.float32), Discrete(9), capacity=200, num_envs=2)
    for i in range(rows):
        observation, over, never = np.full((2, 1), i, np.float32), np.full(2, i % 7 == 6), np.zeros(2, bool)
        actions, rewards = np.full(2, i % 9), np.full(2, i, np.float32)
        buffer.add(Step(observation, actions, rewards, observation + 1, over, never, is_first=np.full(2, i % 7 == 0)))
    return buffer


def in_worker():
    return os.environ[LEARNER] != str(os.getpid())


def quick(batch):
    return batch


def sleeps(batch):
    if in_worker():
        time.sleep(HANG_S)
    return batch


def holds_the_gil(batch):
    if in_worker():
        ctypes.PyDLL(None).usleep(HANG_S * 1_000_000)
    return batch


TRANSFORMS = {"sleeps": sleeps, "gil": holds_the_gil, "quick": quick}


def learn(case, report):
    """Be the learner of one case: iterate, say so, and end as it says."""
    os.environ[LEARNER] = str(os.getpid())
    transform = TRANSFORMS.get(case.get("transform"))
    loader = make_loader(filled_buffer(), Transition(), batch_size=4, num_workers=case["workers"], transform=transform)
    loader.multiprocessing_context = case["method"]
    if case.get("busy") == "starting":
        os.write(report, b"+")
    batches = iter(DeviceFeed(loader, "cpu") if case.get("feed") else loader)
    if case.get("transform") in ("sleeps", "gil"):
        os.write(report, b"+")
        next(batches)
    for number, _ in enumerate(batches):
        if number == 5:
            if case.get("busy") != "starting":
                os.write(report, b"+")
            if case["end"] == "open":
                break
            if case["end"] == "closed":
                loader.close()
                return
            if case["end"] == "exception":
                raise KeyError("speed")
            if case["end"] == "exit":
                sys.exit(3)
            if case.get("busy") == "computing":
                time.sleep(HANG_S)


def are_gone_within(seconds):
    """Wait until this process has no children left, of its own or orphaned; say how long that took."""
    begin = time.monotonic()
    while time.monotonic() < begin + seconds:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
        except ChildProcessError:
            return time.monotonic() - begin
    return None


def end_all():
    """Leave nothing behind where a case fails."""
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
    are_gone_within(5)


def run(case):
    """Run one case; give the exit code, what it said, and how long anything outlived it."""
    reader, report = os.pipe()
    with tempfile.TemporaryFile() as output:
        learner = os.fork()
        if learner == 0:
            os.setpgid(0, 0)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            os.close(reader)
            learn(case, report)
            return None
        os.close(report)
        os.read(reader, 1)
        os.close(reader)
        time.sleep(case.get("after_s", 0.2))
        if case["end"].startswith("SIG"):
            kill = os.killpg if case["end"] == "SIGINT" else os.kill
            kill(learner, getattr(signal, case["end"]))
        begin = time.monotonic()
        status = os.waitpid(learner, 0)[1]
        ended_s, outlived_s = time.monotonic() - begin, are_gone_within(20)
        if outlived_s is None:
            end_all()
        output.seek(0)
        code, said = os.waitstatus_to_exitcode(status), output.read().decode()
        return {"code": code, "said": said, "ended_s": ended_s, "outlived_s": outlived_s}


def main():
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    results = []
    for case in json.load(sys.stdin):
        result = run(case)
        if result is None:
            return  # a learner, which ends as any script does
        results.append(case | result)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
