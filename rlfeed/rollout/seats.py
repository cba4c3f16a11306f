"""What the learner knows of each actor: its process, what it told, and how often it died."""

import select
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any, Literal, Protocol

import numpy as np

from rlfeed.codec import decode
from rlfeed.errors import ConfigError, WorkerError
from rlfeed.messages import Inbox
from rlfeed.processes import end_group, how_it_ended, undecided, uninterrupted
from rlfeed.rollout.acting import Job, LaneWriter, work
from rlfeed.rollout.board import ACTS, STARTING, STOP
from rlfeed.rollout.statistics import EpisodeRecord, EpisodeStatistics

OnDeath = Literal["restart", "raise"]
GRACE_S = 5.0  # for an actor to finish its step
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.1, 5.0  # before an actor is started again that died twice in a row


class Lanes(Protocol):
    """Give writers of lanes, as a `ReplayBuffer` does."""

    def writer(self, env_ids: Sequence[int]) -> LaneWriter:
        """Claim lanes for a writer of their own; see `ReplayBuffer.writer`."""
        ...

    def release(self, env_ids: Sequence[int]) -> int:
        """Let lanes go whose writer has left or died; see `ReplayBuffer.release`."""
        ...


@dataclass(frozen=True)
class Rules:
    """Say how actors are started, and what becomes of those that die.

    Args:
        context: How processes are started.
        on_death: ``"restart"`` or ``"raise"``.
        max_restarts: How often in a row an actor is started again that died without an episode in between.
        timeouts_s: Seconds that an actor may be at an act.
    """

    context: Any
    on_death: OnDeath
    max_restarts: int
    timeouts_s: dict[int, float]


class Seat:
    """Hold one actor: start its process, read what it tells, and see to it when it dies.

    Args:
        job: What it does; its writer is claimed when it starts.
        lanes: Where it writes.
        buffer: Whose lanes those are.
        rules: How it is started, and again.
        poll: Where its handles are watched.
        statistics: Of all actors.
    """

    def __init__(
        self, job: Job, lanes: range, buffer: Lanes, rules: Rules, poll: select.poll, statistics: EpisodeStatistics
    ) -> None:
        self.job, self.lanes, self._buffer, self._rules, self._poll = job, lanes, buffer, rules, poll
        self._statistics = statistics
        self.process: Any = None
        self.starts = 0
        self.held: tuple[int, dict[str, Any]] | None = None  # its answer to a command to hold, and its state then
        self._pipe: Connection | None = None
        self._inbox: Inbox | None = None
        self._deaths, self._start_at = 0, 0.0  # in a row; and when it is started again
        self._failure: str | None = None  # what it told
        self._in_vain = False  # whether to start it again would be

    def start(self) -> None:
        """Start the process.

        Raises:
            ConfigError: If what it needs cannot be sent to it.
            LaneError: If one of its lanes is not there, or somebody has it.
        """
        job, context = self.job, self._rules.context
        job = replace(job, writer=self._buffer.writer(self.lanes), start=self.starts)
        job.board.act(job.actor, STARTING)
        mine, theirs = context.Pipe(duplex=False)
        # Not a daemon: those may not start processes, and its environments may be processes.
        process = context.Process(target=work, args=(job, theirs), name=f"rlfeed-actor-{job.actor}", daemon=False)
        try:
            with uninterrupted(), undecided():
                process.start()
        except Exception as error:
            mine.close()
            self._buffer.release(self.lanes)
            raise ConfigError(
                f"Actors: actor {job.actor} could not be started: {error}; expected make_envs, make_policy and a "
                "buffer that can be sent to a process. Define functions at the top level of a module, and use "
                "storage='shared' or 'memmap'."
            ) from error
        finally:
            theirs.close()
        self.process, self._pipe, self._inbox, self._failure = process, mine, Inbox(mine), None
        self.starts += 1
        for handle in self.handles:
            self._poll.register(handle, select.POLLIN)

    @property
    def handles(self) -> tuple[int, ...]:
        """Name what to watch: it is ready when there is news.

        Returns:
            Its pipe's and its process's handle; none where there is no process.
        """
        return () if self._pipe is None else (self._pipe.fileno(), self.process.sentinel)

    def read(self) -> list[EpisodeRecord]:
        """Take what the actor sent; where its process has ended that is the last of it.

        Returns:
            Episodes that ended.
        """
        records: list[EpisodeRecord] = []
        if self._inbox is None:
            return records
        messages = None
        try:
            while messages := self._inbox.read():
                for message in messages:
                    records += self._receive(message)
        except (EOFError, OSError):
            self._part()
        else:
            if messages is None and not self.process.is_alive():  # a child of its own keeps the pipe open
                self._part()
        return records

    def _receive(self, message: bytes) -> list[EpisodeRecord]:
        kind, *content = decode(np.frombuffer(message, np.uint8), "message of an actor")
        if kind == "episodes":
            records, lost, cut = content
            if records:
                self._deaths = 0
            finished, statistics = [EpisodeRecord(*record) for record in records], self._statistics
            statistics.window.extend(finished)
            statistics.episodes += len(finished)
            statistics.lost, statistics.cut = statistics.lost + lost, statistics.cut + cut
            return finished
        if kind == "held":
            self.held = (content[0], content[1])
        else:
            self._in_vain, self._failure = content[0], content[1]
        return []

    def look(self, now: float) -> list[EpisodeRecord]:
        """Start an actor whose pause is over, and end one that hangs.

        Args:
            now: Seconds of the monotonic clock.

        Returns:
            Episodes that ended, of which a process that is no more had told.

        Raises:
            WorkerError: If it died or hangs, and is not started again.
        """
        records: list[EpisodeRecord] = []
        if self.process is not None:
            act, since_s = self.job.board.act_of(self.job.actor)
            most_s = self._rules.timeouts_s.get(act, np.inf)
            if since_s > most_s:
                name = "start_timeout_s" if act == STARTING else "step_timeout_s"
                self._failure = (
                    f"has been {self.doing}; {name} is {most_s:g}. See what the environments or the policy wait for, "
                    f"or raise {name}."
                )
                self.process.kill()
                self._part()
            elif not self.process.is_alive():
                records = self.read()
        if self.process is None:
            if self._failure is not None:
                self._bury(now)
            if now >= self._start_at:
                self.start()
        return records

    @property
    def doing(self) -> str:
        """Tell what the actor does, in words.

        Returns:
            Such as ``taking a step for 0.1 s``.
        """
        act, since_s = self.job.board.act_of(self.job.actor)
        return f"{ACTS[act]} for {since_s:.1f} s"

    def _part(self) -> None:
        """Let a process go that has ended, or has hung up; what it has not committed is dropped, what is open cut."""
        for handle in self.handles:
            self._poll.unregister(handle)
        if self._pipe is not None:
            self._pipe.close()
        process, self.process, self._pipe, self._inbox = self.process, None, None, None
        process.join(1.0)
        if process.is_alive():
            process.kill()
        end_group(process.pid)
        process.join()
        if self._failure is None and (process.exitcode != 0 or self.job.board.command != STOP):
            self._failure = f"{how_it_ended(process.exitcode)} while it was {self.doing}"
        self._buffer.release(self.lanes)

    def _bury(self, now: float) -> None:
        """Decide what becomes of an actor that died."""
        actor, rules = self.job.actor, self._rules
        self._deaths += 1
        said = f"actor {actor} (envs {self.lanes[0]} .. {self.lanes[-1]}) {self._failure}"
        self._failure, self.held = None, None
        never_began = self.starts == 1 and self.job.board.act_of(actor)[0] == STARTING
        if rules.on_death == "raise" or never_began or self._in_vain or self._deaths > rules.max_restarts:
            again = f" It died {self._deaths} times without an episode in between." if self._deaths > 1 else ""
            raise WorkerError(f"{said}\nIts open episodes were cut, its steps are kept.{again}")
        if self._deaths > 1:
            self._start_at = now + min(_FIRST_PAUSE_S * 2 ** (self._deaths - 2), _MOST_PAUSE_S)
        warnings.warn(
            f"{said}\nIts open episodes were cut; it is started again ({self._deaths} of {rules.max_restarts} times).",
            RuntimeWarning,
            stacklevel=4,
        )

    def end(self) -> None:
        """End the process, whatever it does, and let its lanes go."""
        if self.process is not None:
            self.process.kill()
            self._part()

    def leave(self, deadline: float, *, quiet: bool) -> list[EpisodeRecord]:
        """Wait for a process that was told to stop.

        Args:
            deadline: Until when, on the monotonic clock.
            quiet: Whether to say nothing of how it ended: an error has been raised already.

        Returns:
            Episodes that ended meanwhile.
        """
        records = self.read()
        while self.process is not None and time.monotonic() < deadline:
            time.sleep(0.001)
            records += self.read()
        if self._failure is not None and not quiet:
            warnings.warn(f"actor {self.job.actor}, told to stop, {self._failure}", RuntimeWarning, stacklevel=3)
        with suppress(OSError):
            self.end()
        return records
