"""Watch over the processes of Gymnasium's `AsyncVectorEnv`, which by itself waits for ever and hides who failed."""

import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium
from gymnasium.error import ClosedEnvironmentError
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from rlfeed.envs.seeds import failed
from rlfeed.errors import EnvFailedError, EnvMakeError, RlfeedError
from rlfeed.processes import how_it_ended, undecided

_LAST_WORDS_S = 2.0  # what a worker that raised says travels by a thread of its own
_LEAVE_S = 5.0


class AsyncWatch:
    """Bound every wait for the workers of an `AsyncVectorEnv`, and name the environment that raised, died or hung.

    One failure ends them all: Gymnasium cannot replace a process. Our own pool can.

    Args:
        envs: The environments; their waits are bounded from now on, also below vector wrappers.
        name: What to call them in errors.
        step_timeout_s: How long a step or a reset may take, in seconds.
    """

    def __init__(self, envs: AsyncVectorEnv, name: str, step_timeout_s: float) -> None:
        self._envs, self._name, self._limit_s = envs, name, step_timeout_s
        # Wrappers call step() and reset(), which take no timeout: what these call on the object gets one.
        wait_step, wait_reset = envs.step_wait, envs.reset_wait
        envs.step_wait = lambda timeout=None: wait_step(step_timeout_s if timeout is None else timeout)
        envs.reset_wait = lambda timeout=None: wait_reset(step_timeout_s if timeout is None else timeout)
        envs._raise_if_errors = self._raise_if_errors

    def explain(self, call: str, error: Exception) -> Exception:
        """Say what became of a call that raised, and end the workers.

        Args:
            call: What was called.
            error: What it raised.

        Returns:
            The error to raise.
        """
        try:
            if isinstance(error, RlfeedError):
                return error
            if isinstance(error, ClosedEnvironmentError):
                return EnvFailedError(
                    f"{self._name}: {call} was called after its workers were ended; expected living ones. Make the "
                    "environments again."
                )
            if isinstance(error, multiprocessing.TimeoutError):
                return self._hung(call)
            if isinstance(error, EOFError | ConnectionError):
                return self._died(call)
            return failed(self._name, call, error)
        finally:
            self.stop(by_force=True)

    def stop(self, *, by_force: bool = False) -> None:
        """End the workers.

        Args:
            by_force: Kill them at once; otherwise those that do not close their environments within a few seconds.
        """
        if self._envs.closed:
            return
        if not by_force:
            self._ask_to_leave()
        for process in self._envs.processes:
            process.kill()
        for process in self._envs.processes:
            process.join(_LEAVE_S)
        for pipe in self._open_pipes():
            pipe.close()
        self._envs.error_queue.close()
        self._envs.closed = True

    def _ask_to_leave(self) -> None:
        for pipe in self._open_pipes():
            try:
                pipe.send(("close", None))
            except OSError:  # it is gone already
                continue
        deadline = time.monotonic() + _LEAVE_S
        for process in self._envs.processes:
            process.join(max(0.0, deadline - time.monotonic()))

    def _open_pipes(self) -> list[Any]:
        return [pipe for pipe in self._envs.parent_pipes if pipe is not None and not pipe.closed]

    def _hung(self, call: str) -> Exception:
        late = [i for i, pipe in enumerate(self._envs.parent_pipes) if not pipe.poll(0)]
        return EnvFailedError(
            f"{self._name}: {_who(late)} of {self._envs.num_envs} did not come back from {call} within "
            f"{self._limit_s:g} s; all workers were ended. Mend what hangs there, or give it more time with "
            "step_timeout_s. mode='pool' would go on without it."
        )

    def _died(self, call: str) -> Exception:
        deadline = time.monotonic() + _LAST_WORDS_S
        processes = self._envs.processes
        while not (gone := [i for i, process in enumerate(processes) if not process.is_alive()]):
            if time.monotonic() > deadline:
                break  # it closed its pipe and lives on
            time.sleep(0.01)
        how = {how_it_ended(processes[i].exitcode) for i in gone} or {"closed its pipe"}
        return EnvFailedError(
            f"{self._name}: the process of {_who(gone)} of {self._envs.num_envs} {' or '.join(sorted(how))} in {call}; "
            "all workers were ended. Look at its memory and its native code. mode='pool' would go on without it."
        )

    def _raise_if_errors(self, successes: Iterable[bool]) -> None:
        """Raise what a worker raised; Gymnasium's own loses the traceback and may wait for ever."""
        wrong = [i for i, success in enumerate(successes) if not success]
        if not wrong:
            return
        try:
            index, kind, error, told = self._envs.error_queue.get(timeout=_LAST_WORDS_S)
        except Exception:  # what pickle raises where an exception cannot travel, or nothing came
            raise EnvFailedError(
                f"{self._name}: {_who(wrong)} of {self._envs.num_envs} raised an exception that cannot be pickled. "
                "Look at what its process printed."
            ) from None
        if isinstance(error, RlfeedError):
            raise error
        raise EnvFailedError(
            f"{self._name}: env {index} of {self._envs.num_envs} raised {kind.__name__}: {error}. Mend the "
            f"environment; this is its own traceback:\n{told.rstrip()}"
        )


def start_async(makers: Sequence[Callable[[], gymnasium.Env]], mode: AutoresetMode, name: str) -> AsyncVectorEnv:
    """Start the workers of an `AsyncVectorEnv`, never by a fork of this process.

    Args:
        makers: Make the environments, one in each worker.
        mode: How they reset.
        name: What to call them in errors.

    Returns:
        The environments.

    Raises:
        EnvMakeError: If a worker ended before it had made its environment.
    """
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    try:
        with undecided():
            return AsyncVectorEnv(makers, context=method, autoreset_mode=mode)
    except (EOFError, ConnectionError):
        raise EnvMakeError(
            f"{name}: a worker ended while it made its environment, which this process could make; expected all "
            "workers to make theirs. Its own traceback is above."
        ) from None


def _who(rows: list[int]) -> str:
    return "an env" if not rows else f"env {', '.join(map(str, rows))}"
