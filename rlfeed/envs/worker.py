"""A process of the worker pool: it steps its environments when it is told to, and says what went wrong."""

import multiprocessing
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from rlfeed.envs.group import EnvGroup, Faults, check_distinct
from rlfeed.envs.resume import capture, resume_group
from rlfeed.envs.slab import FLIGHT, IDLE, MOVED, STEPPED, Slab
from rlfeed.envs.source import EnvSource
from rlfeed.errors import ConfigError, RlfeedError
from rlfeed.nest import leaves, map_nest
from rlfeed.processes import Lifeline, ignore_interrupts, lead_group

START, STEP, BEGIN, CLOSE, CAPTURE, RESUME = b"r", b"s", b"b", b"x", b"c", b"o"  # commands
FINE, FAULTY = b".", b"!"  # answers; after the second come the faults
Report = list[tuple[int, str, str]]  # row, class of the error, its message


@dataclass(frozen=True)
class Job:
    """What a worker is told at its start.

    Args:
        worker: Its number.
        rows: The first row that is its, and the first that is not.
        first_env_id: The number of the environment in row 0.
        num_envs: How many there are in all.
        source: Makes one environment.
        name: What they are called.
        spaces: Observation and action space, as the parent's are.
        slab: What is shared.
        line: Ends it with the parent.
    """

    worker: int
    rows: tuple[int, int]
    first_env_id: int
    num_envs: int
    source: EnvSource
    name: str
    spaces: tuple[Any, Any]
    slab: Slab
    line: Lifeline


def work(job: Job, commands: Connection, answers: Connection) -> None:
    """Make the environments of a job and do what the parent says, until it closes the pipe.

    Args:
        job: The job.
        commands: One byte each.
        answers: One byte each, and reports.
    """
    ignore_interrupts()  # where the environment hears it all the same, the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    lead_group()
    multiprocessing.current_process().daemon = False  # an environment may start processes; they end with this one
    job.line.tie()
    torch.set_num_threads(1)  # several processes with a thread per core each are 1.3 to 20 times slower
    try:
        worker = _Worker(job, commands, answers)
        os.write(answers.fileno(), FINE)
        worker.serve()
    except (BrokenPipeError, ConnectionResetError, EOFError):
        pass  # the parent is gone, or has let go
    except RlfeedError as error:  # an environment cannot be made: now, or anew
        os.write(answers.fileno(), FAULTY)
        answers.send([(-1, type(error).__name__, str(error))])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # nothing of the parent's that was inherited shall run at exit


class _Worker:
    """Environments and their rows in the slab; it is also the book of its group."""

    def __init__(self, job: Job, commands: Connection, answers: Connection) -> None:
        first, end = job.rows
        envs = [job.source() for _ in range(first, end)]
        check_distinct(job.name, envs)
        if (envs[0].observation_space, envs[0].action_space) != job.spaces:
            raise ConfigError(
                f"{job.name}: in worker {job.worker} its spaces are {envs[0].observation_space} and "
                f"{envs[0].action_space}, in the parent {job.spaces[0]} and {job.spaces[1]}; expected the same. "
                "Build all environments alike."
            )
        self._group = EnvGroup(
            envs,
            job.name,
            first=job.first_env_id + first,
            num_envs=job.first_env_id + job.num_envs,
            makers=[job.source] * len(envs),
            book=self,
        )
        slab = job.slab

        def mine(column: ndarray) -> ndarray:
            return column[first:end]

        def fast(column: ndarray) -> Any:
            return column.data  # takes a number in a third of the time that an array does

        self._observation, self._final, self._action = (
            map_nest(mine, nest) for nest in (slab.observation, slab.final, slab.action)
        )
        self._mask = mine(slab.mask) if slab.mask.shape[1] else None
        self._episodes, self._success = mine(slab.episodes), mine(slab.success)
        self._stage, self._reward = fast(mine(slab.stage)), fast(mine(slab.reward))
        self._terminated, self._truncated = fast(mine(slab.terminated)), fast(mine(slab.truncated))
        self._call = fast(slab.calls[job.worker])
        self._poll = select.poll()
        self._poll.register(commands, select.POLLIN)
        self._commands, self._answers = commands, answers

    def serve(self) -> None:
        """Do what the parent says."""
        acts = {STEP: self._step, START: self._start, BEGIN: self._begin, CAPTURE: self._capture, RESUME: self._resume}
        sink = self._answers.fileno()
        while (command := self._hear()) not in (CLOSE, b""):
            report = acts[command]()
            self._call[1] = IDLE
            if report:
                os.write(sink, FAULTY)
                self._answers.send(report)
            else:
                os.write(sink, FINE)
        self._group.close()

    def _hear(self) -> bytes:
        """Wait for a command: awake for a moment, where it costs too much to be woken, then asleep."""
        wakeful_ns = self._call[4]
        if wakeful_ns:
            until_ns, is_there, give_way = time.monotonic_ns() + wakeful_ns, self._poll.poll, os.sched_yield
            while not is_there(0) and time.monotonic_ns() < until_ns:
                give_way()  # whoever else can use this processor goes first: the parent above all
        return os.read(self._commands.fileno(), 1)

    def calls(self, row: int, phase: int) -> None:
        """Note that an environment is called; see `Book`."""
        call = self._call
        call[0], call[2], call[1] = row, time.monotonic_ns(), phase

    def stepped(self, row: int, reward: float, terminated: bool, truncated: bool) -> None:
        """Note what a step gave; see `Book`."""
        self._reward[row], self._terminated[row], self._truncated[row] = reward, terminated, truncated
        self._stage[row] = STEPPED

    def _start(self) -> Report:
        seed: int = self._commands.recv()
        faults = self._group.start(seed, self._episodes.tolist(), self._observation, self._mask)
        self._call[3] = self._group.masked
        return _report(faults)

    def _step(self) -> Report:
        group = self._group
        faults = group.step(self._action, self._observation, self._mask)
        for row in faults:
            self._stage[row] = FLIGHT
        if rows := group.ended:
            self._success[rows] = [group.success.get(row, np.nan) for row in rows]
            self._move(rows)
            for row in rows:
                group.episodes[row] += 1
            faults = {**faults, **group.begin(rows, self._observation, self._mask)}
        return _report(faults)

    def _move(self, rows: Sequence[int]) -> None:
        """Put final observations where the next episodes' first ones will not be, and say so before those come."""
        for (_, final), (_, last) in zip(leaves(self._final), leaves(self._observation), strict=True):
            final[rows] = last[rows]
        for row in rows:
            self._stage[row] = MOVED

    def _begin(self) -> Report:
        """Make environments anew that broke, and begin the episodes that the parent has numbered."""
        group = self._group
        rows = [row for row, episode in enumerate(self._episodes.tolist()) if episode != group.episodes[row]]
        unmade: dict[int, RlfeedError] = {}
        for row in rows:
            group.episodes[row] = int(self._episodes[row])
            self.calls(row, 2)
            unmade |= group.renew([row])
        made = [row for row in rows if row not in unmade]
        faults = group.begin(made, self._observation, self._mask)
        self._call[3] = group.masked
        return _report({**unmade, **faults})

    def _capture(self) -> list[Any]:
        """Give the states that environments offer, in place of a report."""
        return capture(self._group.envs)

    def _resume(self) -> Report:
        """Bring open episodes back; how each has come back stands where its stage does."""
        (seed, pasts), group, episodes = self._commands.recv(), self._group, self._episodes
        faults, ways = resume_group(group, seed, episodes.tolist(), pasts, self._observation, self._mask)
        self._call[3] = group.masked
        episodes[:] = group.episodes
        for row, way in enumerate(ways):
            self._stage[row] = way
        return _report(faults)


def _report(faults: Faults) -> Report:
    return [(row, type(error).__name__, str(error)) for row, error in faults.items()]

