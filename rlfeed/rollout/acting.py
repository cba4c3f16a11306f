"""What an actor does in its process: step its environments, store the steps, pull weights, and say how it goes."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
import torch
from torch import nn

from rlfeed.codec import encode
from rlfeed.envs.autoreset import Envs
from rlfeed.errors import ConfigError, UsageError
from rlfeed.messages import Outbox
from rlfeed.processes import Lifeline, ignore_interrupts, lead_group
from rlfeed.rollout.actions import Handling
from rlfeed.rollout.board import HELD, RUN, STARTING, STEPPING, STOP, WAITING, Board
from rlfeed.rollout.rollout import STREAM, Rollout
from rlfeed.rollout.statistics import EpisodeRecord
from rlfeed.rollout.weights import Weights
from rlfeed.types import Step

MakeEnvs = Callable[[int], Envs]
MakePolicy = Callable[[int, int], tuple[Any, nn.Module]]
PullEvery = int | Literal["episode"]
VERSION_COLUMN = "policy_version"
_NOT_OPEN = {"environments": "restarted", "memory": None, "episodes": None}  # all begin their next episodes
_NAP_S = 0.001  # between looks at words that the learner writes
_TELL_S = 0.05  # between messages about episodes


class LaneWriter(Protocol):
    """Store steps in lanes of its own, as the writer of a `ReplayBuffer` does."""

    def add(self, step: Step) -> Any:
        """Store a step; see `ReplayBuffer.add`."""
        ...

    def close(self) -> None:
        """Cut what is open and let the lanes go."""
        ...


@dataclass(frozen=True)
class Job:
    """Say what an actor is to do; sent to its process at its start.

    Args:
        actor: Its number, from 0.
        num_actors: How many there are.
        envs_per_actor: Environments of each.
        make_envs: Makes them, given the number of the first one.
        make_policy: Makes what acts and the module whose weights it pulls, given the actor's number and their count.
        weights: Where new weights come from.
        board: The words it shares with the learner.
        lifeline: Ends it with the learner.
        seed: The run's seed.
        pull_every: Steps of its environments from one look at the weights to the next, or ``"episode"``.
        actions: What becomes of the policy's actions; see `Rollout`.
        state: Of its rollout, where the run goes on from a checkpoint.
        start: How many processes were this actor before.
        writer: Stores the steps.
    """

    actor: int
    num_actors: int
    envs_per_actor: int
    make_envs: MakeEnvs
    make_policy: MakePolicy
    weights: Weights
    board: Board
    lifeline: Lifeline
    seed: int
    pull_every: PullEvery
    actions: Handling = "strict"
    state: dict[str, Any] | None = None
    start: int = 0
    writer: LaneWriter | None = None


def work(job: Job, pipe: Connection) -> NoReturn:
    """Be an actor until the learner says stop, or is gone.

    Args:
        job: What to do.
        pipe: Where to report.
    """
    ignore_interrupts()  # Ctrl-C reaches actors too, but the learner decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    lead_group()  # what environments start ends with this process
    job.lifeline.tie()
    torch.set_num_threads(1)
    job.board.act(job.actor, STARTING)
    outbox, code = Outbox(pipe), 0
    try:
        actor = _Actor(job, outbox)
        try:
            actor.run()
        finally:
            with suppress(Exception):  # what went wrong before says more
                actor.rollout.close()
    except BaseException as error:
        code = 1
        text = "".join(traceback.format_exception(error))
        with suppress(OSError):  # nobody listens any more
            in_vain = isinstance(error, UsageError)  # another one would meet the same
            outbox.send(_message("failure", in_vain, f"raised {type(error).__name__}: {error}\n\n{text}"))
    with suppress(OSError):
        while not outbox.flush():
            time.sleep(_NAP_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # nothing of the learner's that was inherited shall run at exit


class _Actor:
    """An actor at work."""

    def __init__(self, job: Job, outbox: Outbox) -> None:
        if job.writer is None:
            raise ConfigError(f"Actors: actor {job.actor} has no writer; expected one of its lanes.")
        self._job, self._board, self._outbox, self._writer = job, job.board, outbox, job.writer
        self._first = job.actor * job.envs_per_actor
        envs = job.make_envs(self._first)
        if envs.num_envs != job.envs_per_actor:
            raise ConfigError(
                f"Actors: make_envs({self._first}) gave {envs.num_envs} environments; expected {job.envs_per_actor}, "
                "as envs_per_actor says."
            )
        policy, self._module = job.make_policy(job.actor, job.num_actors)
        self.rollout = Rollout(envs, policy, seed=job.seed, actions=job.actions)
        self._restore()
        while (version := job.weights.pull(self._module)) < 0:
            time.sleep(_NAP_S)
        self._version, self._versions = version, np.full(job.envs_per_actor, version)
        self._begun = self._board.begun_of(job.actor)
        self._pull_in = 0 if job.pull_every == "episode" else job.pull_every
        self._records: list[EpisodeRecord] = []
        self._broken = (self.rollout.statistics.lost, self.rollout.statistics.cut)
        self._tell_at, self._answered = 0.0, RUN

    def _restore(self) -> None:
        """Go on with the next episodes, and with random numbers that no other actor draws."""
        job, rollout = self._job, self.rollout
        if job.state is not None and job.start == 0:
            rollout.load_state_dict(job.state)
        else:
            key = np.random.SeedSequence(job.seed, spawn_key=(STREAM, job.actor, job.start))
            state = rollout.state_dict()
            state["generator"] = np.random.Philox(key).state
            state["next_episodes"] = self._board.begun_of(job.actor).copy()
            rollout.load_state_dict(state)

    def run(self) -> None:
        """Step until told to stop."""
        board, actor = self._board, self._job.actor
        while (command := board.command) != STOP:
            if command == RUN and (env_steps := board.env_steps) < board.limit:
                board.act(actor, STEPPING)
                self._step(env_steps)
                if self._records and time.monotonic() > self._tell_at:
                    self._tell()
                continue
            board.act(actor, HELD if command > RUN else WAITING)
            self._tell()
            if command > RUN and command != self._answered:
                self._outbox.send(_message("held", command, self.rollout.state_dict() | _NOT_OPEN))
                self._answered = command
            time.sleep(_NAP_S)
        self._writer.close()
        self._tell()

    def _step(self, env_steps: int) -> None:
        rollout = self.rollout
        self._pull()
        rollout.mode = "random" if env_steps < self._board.random_steps else "explore"
        rollout.env_steps = env_steps  # of all actors: the clock of schedules
        step = next(rollout)
        ids: Any = step.env_ids
        if len(step) == self._job.envs_per_actor:
            step.env_ids, versions = None, self._versions
        else:
            step.env_ids, versions = ids + self._first, self._versions[: len(step)]
        step.extras = {**step.extras, VERSION_COLUMN: versions}
        self._writer.add(step)
        self._board.count(self._job.actor, rollout.env_steps - env_steps, self._version)
        if step.is_first.any():
            self._begun[ids] += step.is_first
        self._records += rollout.statistics.finished

    def _pull(self) -> None:
        if self._job.pull_every == "episode":
            due = bool(self.rollout.statistics.finished)
        else:
            self._pull_in -= 1
            due = self._pull_in < 0
            if due:
                self._pull_in = self._job.pull_every - 1
        if due and self._job.weights.is_new:
            self._version = self._job.weights.pull(self._module)
            self._versions = np.full(self._job.envs_per_actor, self._version)

    def _tell(self) -> None:
        """Send what there is, without waiting for a learner that is busy."""
        statistics = self.rollout.statistics
        broken = (statistics.lost, statistics.cut)
        if not self._records and broken == self._broken:
            self._outbox.flush()
            return
        records = [astuple(replace(record, env_id=record.env_id + self._first)) for record in self._records]
        more = [now - before for now, before in zip(broken, self._broken, strict=True)]
        self._outbox.send(_message("episodes", records, *more))
        self._records, self._broken = [], broken
        self._tell_at = time.monotonic() + _TELL_S


def _message(kind: str, *content: Any) -> bytes:
    return b"".join(encode([kind, *content]))
