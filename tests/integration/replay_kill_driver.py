"""Run by test_replay_kill.py in a process of its own, which forks one child for every place to die at."""

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from gymnasium.spaces import Box, Discrete

from rlfeed.durable import clean_temporaries
from rlfeed.replay import ReplayBuffer, Transition
from rlfeed.types import Step

KILLED, SAVES, STEPS, LANES = 77, 3, 40, 2
MUTATIONS = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link"}
countdown = None


def tick():
    global countdown
    if countdown == 0:
        os._exit(KILLED)
    if countdown is not None:
        countdown -= 1


def audit(event, arguments):
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if event in MUTATIONS or writes:
        tick()


def go_on(buffer):
    """Add steps whose fields all follow from the number of the step."""
    start = buffer.stats().inserted // LANES
    for i in range(start, start + STEPS):
        now = np.full((LANES, 300), i, np.float32) + np.array([[0], [0.5]], np.float32)
        first, last, no = (np.full(LANES, flag) for flag in (i % 10 == 0, i % 10 == 9, False))
        step = Step(now, np.full(LANES, i % 7), np.full(LANES, i, np.float32), now + 1, last, no, is_first=first)
        buffer.add(step)


def problem_of(buffer, saves):
    """Say what is wrong with a buffer that was saved so often, or nothing."""
    if buffer.stats().inserted != saves * STEPS * LANES:
        return f"{buffer.stats().inserted} steps were inserted; expected {saves * STEPS * LANES}"
    batch = buffer.sample(100, Transition())
    now = batch.observation[:, :1]
    rows = (batch.observation == now).all() and (batch.next_observation == now + 1).all()
    fields = (batch.reward == now[:, 0].floor()).all() and (batch.action == batch.reward.long() % 7).all()
    return "" if rows and fields else "its rows are not those that were stored"


def child(buffer, directory, point, report):
    global countdown
    countdown = point
    for number in range(2, 2 + SAVES):
        go_on(buffer)
        os.write(report, b"(")
        buffer.save(directory / str(number))
        os.write(report, b")")
    os._exit(0)


def look(directory, reported):
    """Look at what a killed process left as a resumed run would, and go on; give the problems."""
    clean_temporaries(directory)
    found = sorted(int(path.name) for path in directory.iterdir())
    if found not in ([*range(1, reported + 1)], [*range(1, reported + 2)]):
        return [f"{reported} were reported, {found} are there"]
    problems = []
    for number in found:
        buffer = ReplayBuffer.load(directory / str(number))
        if problem := problem_of(buffer, number):
            problems.append(f"{number}: {problem}")
    go_on(buffer)
    buffer.save(directory / "next")
    if problem := problem_of(ReplayBuffer.load(directory / "next"), found[-1] + 1):
        problems.append(f"next: {problem}")
    return problems


def run(seed, buffer, directory, point=None, delay_s=None):
    """Let a child save and die; give its exit code, how long it lived, how far it came, and the problems."""
    shutil.copytree(seed, directory)
    reader, report = os.pipe()
    begin, process = time.monotonic(), os.fork()
    if process == 0:
        child(buffer, directory, point, report)
    os.close(report)
    if delay_s is not None:
        time.sleep(delay_s)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    lived_s = time.monotonic() - begin
    marks = os.read(reader, 64).decode()
    os.close(reader)
    problems = look(directory, 1 + marks.count(")"))
    shutil.rmtree(directory)
    return os.waitstatus_to_exitcode(status), lived_s, marks, problems


def main(root):
    warnings.simplefilter("error")
    sys.addaudithook(audit)
    fsync = os.fsync
    os.fsync = lambda descriptor: (tick(), fsync(descriptor))
    # Wraps while it is saved, so that files of dead rows are left behind; private: every child has a copy of its own.
    buffer = ReplayBuffer(Box(-1, 1e9, (300,)), Discrete(7), capacity=LANES * 100, num_envs=LANES, storage="private")
    go_on(buffer)
    (root / "seed").mkdir()
    buffer.save(root / "seed" / "1")
    failures, code, point, in_a_save, lived_s = [], KILLED, -1, 0, 0.0
    while code == KILLED:
        point += 1
        code, lived_s, _, problems = run(root / "seed", buffer, root / "work", point=point)
        failures += [f"operation {point}: {problem}" for problem in problems]
    generator = random.Random(0)
    for kill in range(300):
        if in_a_save == 50:
            break
        delay_s = generator.random() * lived_s  # the last child was not killed
        _, _, marks, problems = run(root / "seed", buffer, root / "work", delay_s=delay_s)
        in_a_save += marks.endswith("(")
        failures += [f"kill {kill} after {marks}: {problem}" for problem in problems]
    json.dump({"operations": point, "in_a_save": in_a_save, "failures": failures}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
