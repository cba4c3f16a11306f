"""Check how an environment is made and called: constructor, signatures, metadata, closing, other processes."""

import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import gymnasium

from rlfeed.envs.checks.findings import Findings
from rlfeed.envs.checks.isolation import Watch, quiet
from rlfeed.envs.checks.plays import Player, Trace, replay, takes
from rlfeed.envs.source import EnvSource
from rlfeed.errors import ConfigError, EnvMakeError
from rlfeed.processes import how_it_ended, undecided, uninterrupted

_SLOW_S = 5.0
_WORKER_STEPS = 200


def make_twice(
    make: Callable[[], gymnasium.Env], watch: Watch, findings: Findings
) -> tuple[gymnasium.Env, gymnasium.Env] | None:
    """Make an environment, and another one that must be another object.

    Args:
        make: Makes one.
        watch: Told which call is on its way.
        findings: What to add to.

    Returns:
        Both; None where they could not be made.
    """
    start_s = time.monotonic()
    try:
        with watch.call("the constructor"), quiet():
            one = make()
        took_s = time.monotonic() - start_s
        with watch.call("the constructor, called again"), quiet():
            two = make()
    except EnvMakeError as error:
        problem, _, frames = str(error).partition("Traceback")
        findings.error(
            "constructor", "the constructor", problem.partition(": ")[2].partition(";")[0],
            expected="an environment, as often as it is called",
            fix=f"Mend the constructor or its arguments; its own traceback:\nTraceback{frames}",
        )
        return None
    if took_s > _SLOW_S:
        findings.note(
            "slow constructor", "the constructor", f"took {took_s:.0f} s",
            expected=f"less than {_SLOW_S:.0f} s: a worker that failed is made again",
            fix="Load what is large once, in the module, or from a file that is mapped.",
        )
    if one.unwrapped is two.unwrapped:
        findings.error(
            "same object", "the constructor", "called twice it gave the same object",
            expected="a new environment in every call",
            fix="Build it inside the function: lambda: MyEnv(), not lambda: env.",
        )
        return None
    return one, two


def check_interface(env: gymnasium.Env, findings: Findings) -> None:
    """Check the signature of ``reset``, and what is left of the old API.

    Args:
        env: The environment.
        findings: What to add to.
    """
    inner = env.unwrapped
    for name in ("seed", "options"):
        if not takes(inner.reset, name):
            findings.error(
                ("reset takes", name), "reset()", f"takes no {name}",
                expected="reset(self, *, seed=None, options=None)", fix="Add it, also where it is not used.",
            )
    if callable(getattr(inner, "get_state", None)) and not callable(getattr(inner, "set_state", None)):
        findings.error(
            "state pair", "", "has get_state() and no set_state()", expected="both, or none",
            fix="Add set_state(state), or rename the other one: runs go on from the stored actions then.",
        )
    if callable(getattr(inner, "seed", None)):
        findings.note(
            "old seed", "", "has a method seed() of the old gym API, which nobody calls",
            expected="reset(seed=...)", fix="Seed in reset(): super().reset(seed=seed).",
        )
    metadata = getattr(env, "metadata", None) or {}
    modes, mode = metadata.get("render_modes") or [], getattr(inner, "render_mode", None)
    if mode is not None and mode not in modes:
        findings.note(
            "render mode", "", f"render_mode is {mode!r}, which metadata does not list: {modes}",
            expected='metadata = {"render_modes": [...], "render_fps": 30} in the class', fix="List it there.",
        )
    elif "rgb_array" in modes and "render_fps" not in metadata:
        findings.note(
            "render fps", "", "metadata has no render_fps", expected="frames per second of a video",
            fix='Add "render_fps": 30 to metadata.',
        )


def has_own_seed(env: gymnasium.Env, seed: int | None) -> bool:
    """Tell whether an environment draws from a ``np_random`` whose seed is another one than ``reset`` was given.

    Args:
        env: The environment, after ``reset(seed=seed)``.
        seed: The seed.

    Returns:
        True where ``reset`` has not handed it to Gymnasium.
    """
    inner = env.unwrapped
    return getattr(inner, "_np_random", None) is not None and getattr(inner, "_np_random_seed", None) != seed


def check_in_worker(
    source: EnvSource, context: Any, traces: Sequence[Trace], limit_s: float, findings: Findings
) -> None:
    """Play the same episodes in a process that was started afresh.

    Args:
        source: What makes the environment.
        context: Of `multiprocessing`: how to start a process.
        traces: What was played here.
        limit_s: How long the other process may take.
        findings: What to add to.
    """
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(source, _beginning(traces), limit_s, sender))
    try:
        with uninterrupted(), undecided():
            process.start()
        sender.close()
        different = receiver.recv() if receiver.poll(limit_s) else ("its start", f"said nothing for {limit_s:g} s")
    except ConfigError as error:
        findings.error(
            "pickle", "", str(error).partition(": ")[2].partition("; expected")[0],
            expected="a class, function or arguments that can be pickled",
            fix="Pass what it can be made from there, such as a path, and make it in the constructor.",
        )
        return
    except EOFError:
        process.join()
        different = "its start", how_it_ended(process.exitcode)
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
        receiver.close()
    if different is not None:
        place, problem = different
        findings.error(
            "worker", f"in a worker process, {place}", problem,
            expected="the same bits as in this process",
            fix="Look for what differs there: the order of sets, the process id, the folder, or modules that other "
            "code had imported or changed.",
        )


def _work(source: EnvSource, traces: list[Trace], limit_s: float, sender: Connection) -> None:
    watch = Watch(limit_s)
    try:
        different = replay(Player(source(), None, watch), traces, limit_s=limit_s)
    except Exception as error:
        different = "its start", f"{type(error).__name__}: {error}"
    watch.stop()
    watch.close()
    sender.send(different)


def _beginning(traces: Sequence[Trace]) -> list[Trace]:
    kept, steps = [], 0
    for trace in traces:
        if steps >= _WORKER_STEPS:
            break
        room = _WORKER_STEPS - steps
        kept.append(Trace(trace.seed, trace.actions[:room], trace.returned[: room + 1]))
        steps += len(trace.actions)
    return kept
