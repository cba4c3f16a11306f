"""The processes of a worker pool as their parent sees them: started, told, waited for, buried."""

import os
import select
import time
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import rlfeed.errors
from rlfeed.envs.slab import IDLE, Slab
from rlfeed.envs.worker import CLOSE, FAULTY, Job, Report, work
from rlfeed.errors import ConfigError, WorkerError
from rlfeed.processes import Lifeline, end_group, how_it_ended, undecided, uninterrupted

_GRACE_S = 2.0  # for environments to close, and for a process that has hung up to end
_LOOK_S = 0.5  # between looks at workers that are late


class Crew:
    """Run one process for each worker and speak with it: a byte to it, a byte back.

    Args:
        name: What the environments are called.
        jobs: One per worker.
        line: Ends the workers with this process.
        slab: What is shared.
        context: How processes are started.
        call_timeout_s: Seconds that one call of an environment may take.
        start_timeout_s: Seconds that a process may take to make its environments.
    """

    def __init__(
        self,
        name: str,
        jobs: Sequence[Job],
        line: Lifeline,
        slab: Slab,
        context: Any,
        call_timeout_s: float,
        start_timeout_s: float,
    ) -> None:
        self._name, self._jobs, self._slab, self._context = name, jobs, slab, context
        self._sizes = [end - first for first, end in (job.rows for job in jobs)]
        self._call_timeout_s, self._start_timeout_s = call_timeout_s, start_timeout_s
        self.processes: list[Any] = [None] * len(jobs)
        self._pipes: list[Any] = [None] * len(jobs)
        self._poll = select.poll()
        self._owner: dict[int, int] = {}
        self._sent_s = [0.0] * len(jobs)
        self._in_doubt: set[int] = set()  # workers that somebody is just telling something, or hearing
        self._looked_s = 0.0  # when somebody last looked who is late
        self.flying: set[int] = set()  # workers that have been told something and have not answered
        self.reports: dict[int, Report] = {}  # what they said went wrong, until it has been dealt with
        self.dead: dict[int, str] = {}  # how they ended, until that has been told
        self.gone: set[int] = set()  # workers without a process
        self.end = weakref.finalize(self, _end, os.getpid(), self.processes, self._pipes, line)

    def start(self, workers: Sequence[int]) -> None:
        """Start workers and wait until they have made their environments.

        Args:
            workers: Which.

        Raises:
            ConfigError: If what makes the environments cannot be sent to another process.
            EnvMakeError: If an environment cannot be made.
            WorkerError: If one ends before, or takes too long.
        """
        for worker in workers:
            self._launch(worker)
        self.flying.update(workers)
        deadline_s = time.monotonic() + self._start_timeout_s
        while waiting := self.flying.intersection(workers):
            if time.monotonic() > deadline_s:
                for worker in waiting:
                    self._bury(worker, "")
                    del self.dead[worker]
                raise WorkerError(
                    f"{self._name}: workers {sorted(waiting)} did not make their environments within "
                    f"{self._start_timeout_s:g} s; expected them by then. See what the constructor waits for."
                )
            for worker in self._listen(waiting):
                for _, kind, message in self.reports.pop(worker, ()):
                    self._bury(worker, "")
                    del self.dead[worker]
                    raise getattr(rlfeed.errors, kind)(message)
                if worker in self.dead:
                    raise WorkerError(
                        f"{self._name}: worker {worker} {self.dead.pop(worker)} before its environments were made. A "
                        "script that starts processes needs `if __name__ == '__main__':` around what it does; its own "
                        "output says more."
                    )

    def tell(self, worker: int, command: bytes, more: Any = None) -> None:
        """Tell a worker to do something.

        Args:
            worker: Which.
            command: What.
            more: What it must know for that.
        """
        self._in_doubt.add(worker)
        self._sent_s[worker] = time.monotonic()
        self.flying.add(worker)
        with suppress(OSError):  # it is dead: whoever waits for its answer will see
            os.write(self._pipes[worker][0].fileno(), command)
            if more is not None:
                self._pipes[worker][0].send(more)
        self._in_doubt.discard(worker)

    def clear_up(self) -> None:
        """End workers of whom nobody knows what they were told or have answered: Ctrl-C came in between."""
        for worker in sorted(self._in_doubt - self.gone):
            self._bury(worker, "")
            del self.dead[worker]
        self._in_doubt.clear()

    def wait(self, enough: int, only: Iterable[int] | None = None) -> list[int]:
        """Wait until workers have answered, have died, or had to be ended.

        Args:
            enough: How many environments they must have in all; or until nobody is left to wait for.
            only: Wait for these workers; None: for whoever has been told something.

        Returns:
            The workers, ascending.
        """
        came: list[int] = []
        waiting = self.flying if only is None else self.flying.intersection(only)
        while waiting and sum(self._sizes[worker] for worker in came) < enough:
            heard = self._listen(waiting)
            if not heard or time.monotonic() - self._looked_s > _LOOK_S:  # those that are ready must not hide one
                heard += self._late(waiting.difference(heard))
            came += heard
            waiting = waiting.difference(heard)
        return sorted(came)

    def _launch(self, worker: int) -> None:
        theirs_in, mine_out = self._context.Pipe(duplex=False)
        mine_in, theirs_out = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=work, args=(self._jobs[worker], theirs_in, theirs_out), name=f"rlfeed-envs-{worker}", daemon=True
        )
        try:
            with uninterrupted(), undecided():
                process.start()
        except Exception as error:
            mine_out.close()
            mine_in.close()
            raise ConfigError(
                f"{self._name}: worker {worker} could not be started: {type(error).__name__}: {error}; expected an "
                "environment that can be made in another process. Name it by id, file or module, or pass a class or "
                "function from the top level of a module."
            ) from error
        finally:
            theirs_in.close()
            theirs_out.close()
        self.processes[worker], self._pipes[worker] = process, (mine_out, mine_in)
        self._poll.register(mine_in, select.POLLIN)
        self._owner[mine_in.fileno()] = worker
        self.gone.discard(worker)

    def _listen(self, waiting: set[int]) -> list[int]:
        """Hear which of some workers have answered or died."""
        poll = self._poll
        if len(waiting) < len(self._owner):  # the others' answers are for later, and would not let it sleep
            poll = select.poll()
            for handle, worker in self._owner.items():
                if worker in waiting:
                    poll.register(handle, select.POLLIN)
        heard = [self._owner[handle] for handle, _ in poll.poll(1e3 * min(_LOOK_S, self._call_timeout_s))]
        for worker in heard:
            self._hear(worker)
        return heard

    def _hear(self, worker: int) -> None:
        self._in_doubt.add(worker)
        self.flying.discard(worker)
        pipe = self._pipes[worker][1]
        try:
            answer = os.read(pipe.fileno(), 1)
            if answer == FAULTY:
                self.reports[worker] = pipe.recv()
        except (EOFError, OSError):
            answer = b""
        if not answer:
            self._bury(worker, None)
        self._in_doubt.discard(worker)

    def _late(self, waiting: set[int]) -> list[int]:
        """End workers whose environment takes too long over one call."""
        now_s, late = time.monotonic(), []
        self._looked_s = now_s
        for worker in sorted(waiting):
            if not self.processes[worker].is_alive():  # and what it started keeps its pipe open
                self._bury(worker, None)
                late.append(worker)
                continue
            doing, since_ns = (int(n) for n in self._slab.calls[worker, 1:3])
            since_s = max(self._sent_s[worker], since_ns * 1e-9 if doing != IDLE else 0.0)
            if now_s - since_s > self._call_timeout_s:
                self._bury(worker, f"did not return within {self._call_timeout_s:g} s, and its process was ended")
                late.append(worker)
        return late

    def _bury(self, worker: int, how: str | None) -> None:
        """Let a process go that has hung up; or end it, and say how."""
        process = self.processes[worker]
        self.flying.discard(worker)
        if how is None:
            process.join(_GRACE_S)
        if process.is_alive():
            process.kill()
        end_group(process.pid)
        process.join(_GRACE_S)
        self.dead[worker] = how or how_it_ended(process.exitcode)
        self.gone.add(worker)
        out, back = self._pipes[worker]
        self._poll.unregister(back)
        del self._owner[back.fileno()]
        out.close()
        back.close()


def _end(owner: int, processes: list[Any], pipes: list[Any], line: Lifeline) -> None:
    if owner != os.getpid():  # a forked child: they are not its workers
        return
    for pipe in pipes:
        if pipe is not None and not pipe[0].closed:
            with suppress(OSError):
                os.write(pipe[0].fileno(), CLOSE)
    deadline_s = time.monotonic() + _GRACE_S
    for process in processes:
        if process is not None:
            process.join(max(0.0, deadline_s - time.monotonic()))
    for process in processes:
        if process is not None:
            end_group(process.pid)
            if process.is_alive():  # it had no group yet
                process.kill()
            process.join(_GRACE_S)
    for pipe in pipes:
        for end in pipe or ():
            end.close()
    line.close()
