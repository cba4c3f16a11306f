"""How many processes to step environments in: decided by a short measurement, and said."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import gymnasium

from rlfeed.envs.group import close_env
from rlfeed.envs.seeds import episode_seed
from rlfeed.envs.source import EnvSource
from rlfeed.errors import ConfigError
from rlfeed.processes import has_guard, processors

_SECONDS, _LEAST_STEPS = 0.1, 20  # of the measurement
_ROW_S = 3e-6  # to check and copy one row, beside the environment's own step
_SIGNAL_S, _COLLECT_S, _COPY_S = 15e-6, 30e-6, 0.5e-6  # a worker told and heard; a batch taken; a row of it
# Processes take time to start, memory and a processor each, and a policy waits for them: they are worth it from about
# 35 us a step with 32 environments, and not with 8 (HalfCheetah on two processors).
_WORTH, _WORTH_S = 1.5, 1e-3  # times as fast; seconds that a step of all environments takes in one process

Layout = str | int | Sequence[int]


@dataclass(frozen=True, slots=True)
class Choice:
    """Say where environments are stepped, and why.

    Args:
        workers: Processes; 0 means in this one.
        why: The reason, with the numbers.
    """

    workers: int
    why: str


def measure_step(env: gymnasium.Env, light_s: float = 0.0) -> float:
    """Measure how long an environment takes for a step, its share of resets included, with random actions.

    Args:
        env: The environment; it is used up.
        light_s: Below this a rough figure will do.

    Returns:
        Seconds.
    """
    env.action_space.seed(0)
    env.reset(seed=episode_seed(0, 0, 0))  # the first one may load what later ones have
    env.step(env.action_space.sample())
    resets_s, steps_s, began_s = [_timed(lambda: env.reset(seed=episode_seed(0, 0, 1)))], [], time.perf_counter()
    while True:
        action = env.action_space.sample()
        before_s = time.perf_counter()
        _, _, terminated, truncated, _ = env.step(action)
        now_s = time.perf_counter()
        steps_s.append(now_s - before_s)
        if terminated or truncated:
            resets_s.append(_timed(lambda: env.reset(seed=episode_seed(0, 0, len(steps_s)))))
        # Medians: on a busy machine some steps take as long as others had the processor.
        step_s = median(steps_s) + median(resets_s) * (len(resets_s) - 1) / len(steps_s)
        spent_s = now_s - began_s
        if (len(steps_s) >= _LEAST_STEPS and (step_s <= light_s or spent_s > _SECONDS)) or spent_s > 50 * _SECONDS:
            return step_s


def _timed(call: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s


def suggest_layout(step_s: float, num_envs: int, cores: int | None = None) -> Choice:
    """Choose in how many processes environments are stepped fastest.

    Args:
        step_s: Seconds that one step of one environment takes.
        num_envs: N.
        cores: Processors; None counts those of this process.

    Returns:
        The choice.
    """
    cores = cores or processors()
    alone_s = num_envs * (step_s + _ROW_S)

    def pooled_s(workers: int) -> float:
        fullest = -(-num_envs // workers)
        return fullest * (step_s + _ROW_S) + workers * _SIGNAL_S + _COLLECT_S + num_envs * _COPY_S

    text = f"a step takes {1e6 * step_s:.0f} us ({num_envs} environments, {cores} processors), "
    counts = range(2, min(cores, num_envs) + 1)
    workers = min(counts, key=pooled_s, default=0)
    if not workers:
        return Choice(0, f"this process: {text}and there is nothing to share out")
    gain = alone_s / pooled_s(workers)
    if gain < _WORTH or alone_s < _WORTH_S:
        return Choice(0, f"this process: {text}{workers} worker processes would be {gain:.1f} times as fast")
    return Choice(workers, f"{workers} worker processes: {text}about {gain:.1f} times as fast as one")


def choose_layout(make: EnvSource, num_envs: int, layout: Layout, *, mode: str) -> Choice:
    """Decide in how many processes environments are stepped.

    Args:
        make: Makes one environment.
        num_envs: N.
        layout: ``"auto"``; a number of workers; or (workers, environments in each), also as ``"2x4"``.
        mode: ``"serial"``; ``"auto"``, which measures; or ``"pool"``, which has a worker for each processor.

    Returns:
        The choice.

    Raises:
        ConfigError: If the layout does not fit.
    """
    if mode == "serial":
        return Choice(0, "this process, as asked for")
    if layout != "auto":
        workers = _workers_of(layout, num_envs)
        return Choice(workers, f"{workers} worker processes, as asked for")
    cores = processors()
    if multiprocessing.current_process().daemon:
        return Choice(0, "this process: one that is a worker itself may not start others")
    if mode == "pool":  # nobody steps an environment in this process that a pool was asked for
        workers = min(num_envs, cores)
        return Choice(workers, f"{workers} worker processes: there are {cores} processors")
    if min(num_envs, cores) < 2:
        return Choice(0, f"this process: there is one {'environment' if num_envs < 2 else 'processor'}")
    if not isinstance(make.target, str | type):  # one environment more might be one too many
        return Choice(0, "this process: a function that makes environments may count its calls, so none is measured")
    env = make()
    try:
        step_s = measure_step(env, _WORTH_S / 3 / num_envs)
    except Exception as error:  # whoever plays it will name it
        return Choice(0, f"this process: its measurement raised {type(error).__name__}: {error}")
    finally:
        close_env(env, make.name)
    choice = suggest_layout(step_s, num_envs, cores)
    if choice.workers and not has_guard():
        need = "the script has no `if __name__ == '__main__':`, which processes need"
        return Choice(0, f"this process: {need} (else {choice.why})")
    return choice


def _workers_of(layout: Any, num_envs: int) -> int:
    wanted = layout
    if isinstance(layout, str) and layout.count("x") == 1 and all(part.isdecimal() for part in layout.split("x")):
        wanted = tuple(int(part) for part in layout.split("x"))
    if isinstance(wanted, str) and wanted.isdecimal():
        wanted = int(wanted)
    if isinstance(wanted, int) and not isinstance(wanted, bool) and 1 <= wanted <= num_envs:
        return wanted
    if isinstance(wanted, Sequence) and not isinstance(wanted, str) and len(wanted) == 2:
        workers, each = wanted
        if isinstance(workers, int) and isinstance(each, int) and workers >= 1 and workers * each == num_envs:
            return workers
    raise ConfigError(
        f"make_envs: layout is {layout!r} for {num_envs} environments; expected 'auto', a number of worker processes "
        f"from 1 to {num_envs}, or (workers, environments in each) whose product is {num_envs}."
    )
