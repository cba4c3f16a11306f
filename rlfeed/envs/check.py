"""Checking an environment: every finding at once, with the fix."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import gymnasium

from rlfeed.envs.checks.findings import Finding, Findings
from rlfeed.envs.checks.interface import check_in_worker, check_interface, has_own_seed, make_twice
from rlfeed.envs.checks.isolation import Watch, quiet, run_isolated
from rlfeed.envs.checks.modes import check_autoreset
from rlfeed.envs.checks.plays import Player, Trace
from rlfeed.envs.checks.repeats import (
    check_fresh,
    check_neighbours,
    check_own_memory,
    check_seeds,
    check_state,
    check_twin,
)
from rlfeed.envs.checks.spaces import check_spaces
from rlfeed.envs.checks.tour import check_ends, take_tour
from rlfeed.envs.source import EnvSource
from rlfeed.errors import ConfigError
from rlfeed.processes import choose_context, has_guard

Resume = Literal["exact", "re-enacted", "restarted"]
_TIMED_S = 0.2


@dataclass
class Report:
    """Hold what came out of a check.

    Args:
        findings: What is wrong or good to know, errors first.
        episodes: How many were played, each several times.
        steps: Of these episodes together.
        resume: How a run that was stopped in mid-episode goes on: ``"exact"`` by ``set_state``, ``"re-enacted"`` from
            the seed and the stored actions, or ``"restarted"`` with the next episode.
        step_s: What a step takes, resets included; None where it was not measured.
    """

    findings: list[Finding] = field(default_factory=list)
    episodes: int = 0
    steps: int = 0
    resume: Resume = "restarted"
    step_s: float | None = None


def check_env(
    env_or_factory: gymnasium.Env | Callable[[], gymnasium.Env] | str,
    *,
    episodes: int = 3,
    max_steps: int = 1000,
    call_timeout_s: float = 60.0,
    workers: bool = True,
) -> list[Finding]:
    """Play whole episodes and list everything that breaks Gymnasium's contract.

    The environment is played in a copy of this process: one that hangs or crashes is a finding, too, and one that was
    given as an object is not touched. Call it before CUDA is used in this process, which no copy could use then.

    Args:
        env_or_factory: What makes the environment: a class, a function, or a name as `make_envs` takes it; or the
            environment itself, of which fewer things can be checked.
        episodes: Whole episodes to play, at least 1.
        max_steps: When to leave an episode that goes on.
        call_timeout_s: How long the constructor, ``reset`` or ``step`` may take.
        workers: Whether to play in a worker process as well, which takes some seconds to start.

    Returns:
        The findings, errors first; empty where there are none.

    Raises:
        EnvNotFoundError: If there is no environment of that name.
        ConfigError: If an argument is wrong, or what was found is no `gymnasium.Env`.
    """
    return examine(
        env_or_factory, episodes=episodes, max_steps=max_steps, call_timeout_s=call_timeout_s, workers=workers,
        timed=False,
    ).findings


def examine(
    env_or_factory: gymnasium.Env | Callable[[], gymnasium.Env] | str,
    *,
    episodes: int = 3,
    max_steps: int = 1000,
    call_timeout_s: float = 60.0,
    workers: bool = True,
    timed: bool = True,
) -> Report:
    """Do what `check_env` does, and say how fast the environment is and how its runs are resumed.

    Args:
        env_or_factory: See `check_env`.
        episodes: See `check_env`.
        max_steps: See `check_env`.
        call_timeout_s: See `check_env`.
        workers: See `check_env`.
        timed: Whether to measure what a step takes.

    Returns:
        Everything that was found out.
    """
    for name, value in (("episodes", episodes), ("max_steps", max_steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"check_env: {name} is {value!r}; expected an integer of at least 1.")
    if not call_timeout_s > 0:
        raise ConfigError(f"check_env: call_timeout_s is {call_timeout_s!r}; expected seconds, more than 0.")
    context = choose_context(None)
    subject = _Subject.of(env_or_factory)

    def work(watch: Watch, tell: Callable[[Finding], None]) -> tuple[Report, list[Trace]]:
        examination = _Examination(subject, watch, Findings(subject.name, tell))
        return examination.run(episodes, max_steps, timed=timed)

    early, result, death = run_isolated(work, call_timeout_s)
    if death is not None:
        died = Findings(subject.name)
        died.error(
            "death", death.place, f"{death.cause}{f': {death.frames}' if death.frames else ''}",
            expected=f"every call returns or raises within {call_timeout_s:g} s",
            fix="Mend it, then check again: what comes after it was not checked.",
        )
        return Report([*died.all(), *early])
    report, traces = result
    if workers and subject.source is not None and report.episodes:
        findings = Findings(subject.name)
        if has_guard():
            check_in_worker(subject.source, context, traces, call_timeout_s, findings)
        else:
            findings.note(
                "no guard", "in a worker process", "not played there: the script would run once more in it",
                expected="`if __name__ == '__main__':` around what a script does", fix="Put it there.",
            )
        report.findings = [*findings.all(), *report.findings]
    return report


@dataclass(frozen=True)
class _Subject:
    """Be what is checked: what makes the environment, and whether a worker process can make it too."""

    name: str
    make: Callable[[], gymnasium.Env]
    source: EnvSource | None

    @classmethod
    def of(cls, given: Any) -> "_Subject":
        if not isinstance(given, gymnasium.Env):
            source = given if isinstance(given, EnvSource) else EnvSource(given)
            return cls(source.name, source, source)
        spec = given.spec
        if spec is not None:
            source = EnvSource(lambda: gymnasium.make(spec, disable_env_checker=True))
            return cls(spec.id, source, source)
        return cls(type(given.unwrapped).__name__, lambda: _copy_of(given), None)


def _copy_of(env: gymnasium.Env) -> gymnasium.Env:
    try:
        return copy.deepcopy(env)
    except Exception as error:
        raise ConfigError(
            f"check_env: {type(env.unwrapped).__name__} cannot be copied ({type(error).__name__}: {error}); expected "
            "an environment that can, since it is played several times. Pass its class, or a function that makes it."
        ) from error


@dataclass
class _Examination:
    """Run the checks of one process, one after the other."""

    subject: _Subject
    watch: Watch
    findings: Findings
    report: Report = field(default_factory=Report)
    traces: list[Trace] = field(default_factory=list)

    def run(self, episodes: int, max_steps: int, *, timed: bool) -> tuple[Report, list[Trace]]:
        made = make_twice(self.subject.make, self.watch, self.findings)
        if made is not None:
            self._play(*made, episodes, max_steps, timed)
        self.report.findings = self.findings.all()
        # What is wrong here would be there: only an environment that is right is compared with itself in a worker.
        return self.report, [] if self._has_errors() else self.traces

    def _play(self, one: gymnasium.Env, two: gymnasium.Env, episodes: int, max_steps: int, timed: bool) -> None:
        findings, report = self.findings, self.report
        check_interface(one, findings)
        if not check_spaces(one, findings):
            return
        player = Player(one, findings, self.watch)
        tour = take_tour(player, findings, episodes, max_steps)
        check_ends(one, tour, max_steps, findings)
        self.traces = [trace for trace in tour.traces if trace.returned]
        report.episodes, report.steps = len(self.traces), tour.steps
        if self.traces:
            report.resume = self._repeat(one, two, [] if tour.masked else self.traces[0].actions, tour.few)
        if timed and tour.steps and not findings.has("raised", "action written", "reset takes"):
            report.step_s = self._time(two)
        player.close()

    def _repeat(self, one: gymnasium.Env, two: gymnasium.Env, actions: Sequence[Any], few: int) -> Resume:
        """Play again in every way; what follows from a cause that was found already is not told."""
        findings, traces = self.findings, self.traces
        if findings.has("world", "reset takes"):
            return "restarted"
        own_seed = has_own_seed(one, traces[-1].seed)
        if not check_twin(self._silent(two), traces, own_seed, findings):
            return "restarted"
        check_own_memory(self._fresh(), traces, findings)
        check_seeds(self._silent(one), self._silent(two), actions[:few], findings)
        repeats = check_fresh(self._fresh(), traces[-1], findings)
        if repeats:
            check_neighbours(self._fresh(), self._fresh(), traces, few, findings)
        if self.subject.source is not None and not self._has_errors():
            check_autoreset(self.subject.source, few, self.watch, findings)
        if check_state(self._fresh(), self._fresh(), traces, findings):
            return "exact"
        return "re-enacted" if repeats else "restarted"

    def _time(self, env: gymnasium.Env) -> float:
        """Measure what a step takes, resets included, in seconds."""
        steps, start_s = 0, time.perf_counter()
        with self.watch.call("the steps that are timed"), quiet():
            while True:
                for trace in self.traces:
                    env.reset(seed=trace.seed)
                    for action in trace.actions:
                        env.step(action)
                        steps += 1
                        if (took_s := time.perf_counter() - start_s) > _TIMED_S:
                            return took_s / steps

    def _has_errors(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings.all())

    def _silent(self, env: gymnasium.Env) -> Player:
        return Player(env, None, self.watch)

    def _fresh(self) -> Player:
        with self.watch.call("the constructor"), quiet():
            return self._silent(self.subject.make())
