"""What becomes of a run when an environment breaks, or when the run itself is killed: looked at once."""

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv

from rlfeed.envs.source import EnvSource
from rlfeed.envs.vector import PoolEnvs
from rlfeed.errors import RlfeedError

Figures = dict[str, str]  # by library
How = Literal["raises", "gives NaN", "hangs", "is killed"]
HOWS: tuple[How, ...] = ("raises", "gives NaN", "hangs", "is killed")
NUM_ENVS, WORKERS, BROKEN = 8, 2, 3
TIMEOUT_S, PATIENCE_S = 1.0, 10.0
LENGTH = 200  # steps of an episode


class Still(gymnasium.Env):
    """Do nothing, for two hundred steps."""

    observation_space, action_space = Box(-1, 1, (4,), np.float32), Discrete(2)

    def __init__(self) -> None:
        self._seen, self._steps = np.zeros(4, np.float32), 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin."""
        self._steps = 0
        return self._seen, {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Count."""
        self._steps += 1
        return self._seen, 0.0, False, self._steps == LENGTH, {}


class Uneven(Still):
    """Take a millisecond for one step in eight."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin."""
        self._long = (np.random.default_rng(seed).random(LENGTH) < 1 / 8).tolist()
        return super().reset(seed=seed)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Count, at leisure."""
        if self._long[self._steps]:
            time.sleep(1e-3)
        return super().step(action)


class Breaking(Still):
    """Break with action 1.

    Args:
        how: In what way.
    """

    def __init__(self, how: How) -> None:
        super().__init__()
        self._how = how

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Count, or break."""
        observation, *rest = super().step(action)
        if action == 1:
            if self._how == "raises":
                raise RuntimeError("no more")
            if self._how == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self._how == "hangs":
                time.sleep(3600)
            observation = np.full(4, np.nan, np.float32)
        return (observation, *rest)  # pyright: ignore[reportReturnType]


def look() -> dict[str, Figures]:
    """Look at everything.

    Returns:
        What was found, by question.
    """
    facts = {f"it {how}{', 1 s allowed' * (how == 'hangs')}": broken(how) for how in HOWS}
    return {**facts, "the run is killed with -9: its workers are gone after": orphans()}


def broken(how: How) -> Figures:
    """Break one environment and try to go on.

    Args:
        how: In what way.

    Returns:
        What happens.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"rlfeed": of_rlfeed(how), "gymnasium, AsyncVectorEnv": of_gymnasium(how)}


def of_rlfeed(how: How) -> str:
    """Break an environment of a pool.

    Args:
        how: In what way.

    Returns:
        How long the step took in which it broke, and what it cost.
    """
    pool = PoolEnvs(EnvSource(partial(Breaking, how)), NUM_ENVS, WORKERS, step_timeout_s=TIMEOUT_S)
    zeros = np.zeros(NUM_ENVS, np.int64)
    try:
        pool.reset(0, [0] * NUM_ENVS)
        pool.step(zeros)
        begin_s = time.perf_counter()
        outcome = pool.step((np.arange(NUM_ENVS) == BROKEN).astype(np.int64))
        took_s = time.perf_counter() - begin_s
        pool.step(zeros)
    except RlfeedError as error:
        return f"ends with {type(error).__name__}"
    finally:
        pool.close()
    lost, cut = (0 if rows is None else int(rows.sum()) for rows in (outcome.lost, outcome.cut))
    return f"goes on after {took_s:.3f} s; {lost} step lost, {cut} episodes beside it cut"


def of_gymnasium(how: How) -> str:
    """Break an environment of an `AsyncVectorEnv`, which is given a timeout.

    Args:
        how: In what way.

    Returns:
        What the step raised, and the one after it.
    """
    envs = AsyncVectorEnv([partial(Breaking, how)] * NUM_ENVS)
    zeros, found = np.zeros(NUM_ENVS, np.int64), []
    try:
        envs.reset()
        for actions in ((np.arange(NUM_ENVS) == BROKEN).astype(np.int64), zeros):
            try:
                envs.step_async(actions)
                observation = envs.step_wait(timeout=TIMEOUT_S)[0]
                found.append("goes on" if np.isfinite(observation).all() else "hands NaN on")
            except Exception as error:
                found.append(f"raises {type(error).__name__}")
    finally:
        with suppress(Exception):
            envs.close(terminate=True)
    return ", then ".join(found)


def orphans() -> Figures:
    """Kill a process that has workers, and watch them.

    Returns:
        How long they live on.
    """
    return {"rlfeed": outlive("rlfeed"), "gymnasium, AsyncVectorEnv": outlive("gymnasium")}


def outlive(library: str) -> str:
    """Start a run in another process, and kill that.

    Args:
        library: Whose workers it has.

    Returns:
        How long they live.
    """
    command = [sys.executable, __file__, library]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as run:
        workers = [int(word) for word in (run.stdout.readline() if run.stdout else "").split()]
        time.sleep(0.2)  # they are at work
        run.kill()
        run.wait()
        begin_s = time.perf_counter()
        alive = workers
        while alive and time.perf_counter() - begin_s < PATIENCE_S:
            time.sleep(0.005)
            alive = [pid for pid in workers if is_alive(pid)]
        took_s = time.perf_counter() - begin_s
    for pid in alive:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return f"{len(alive)} of {len(workers)} live after {PATIENCE_S:g} s" if alive or not workers else f"{took_s:.2f} s"


def is_alive(pid: int) -> bool:
    """Tell whether a process runs, which may be nobody's child any more.

    Args:
        pid: Its number.

    Returns:
        False where it has ended, also if nobody has asked for its end yet.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def serve(library: str) -> None:
    """Step environments in workers for ever, once their numbers have been printed.

    Args:
        library: Whose.
    """
    zeros = np.zeros(NUM_ENVS, np.int64)
    step: Callable[[Any], Any]
    if library == "rlfeed":
        pool = PoolEnvs(EnvSource(Still), NUM_ENVS, WORKERS)
        pool.reset(0, [0] * NUM_ENVS)
        workers, step = pool.processes, pool.step
    else:
        envs = AsyncVectorEnv([Still] * NUM_ENVS)
        envs.reset()
        workers, step = [process.pid for process in envs.processes], envs.step
    print(*workers, flush=True)
    while True:
        step(zeros)


if __name__ == "__main__":
    serve(sys.argv[1])
