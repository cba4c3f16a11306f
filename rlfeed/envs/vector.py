"""Environments in worker processes, several in each, over memory that all share.

A worker steps its environments one after the other and tells with one byte that all are through; observations, rewards
and actions never leave the shared memory. The parent watches: an environment that raises, hangs, or takes its process
with it costs the step in flight, and the run goes on.
"""

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64
from numpy import ndarray

import rlfeed.errors
from rlfeed.envs.autoreset import Outcome, Ready
from rlfeed.envs.boundary import ObservationCheck, mask_length
from rlfeed.envs.crew import Crew
from rlfeed.envs.faults import MAX_RESTARTS, Fault, FaultPolicy, OnFault
from rlfeed.envs.group import close_env, rows_of
from rlfeed.envs.resume import FAILED, REENACTED, Diary, offers_state, pasts_of
from rlfeed.envs.seeds import episode_seed
from rlfeed.envs.slab import FLIGHT, IDLE, MOVED, RESET, STEP, Slab
from rlfeed.envs.source import EnvSource
from rlfeed.envs.worker import BEGIN, CAPTURE, RESUME, START, Job
from rlfeed.envs.worker import STEP as STEP_NOW
from rlfeed.errors import ConfigError, EnvFailedError, RlfeedError, WorkerError
from rlfeed.nest import Nest, leaves, map_nest
from rlfeed.processes import Lifeline, choose_context, context_of, processors
from rlfeed.specs import check_spaces, from_space

# On a virtual machine whose idle processors are given away it takes many times a light environment's step to be woken:
# there workers stay awake for a moment after each step, and give way while they do.
_QUICK_S, _TRIES, _WAKEFUL_NS = 5e-5, 20, 1_000_000


class PoolEnvs:
    """Step environments in worker processes.

    Args:
        source: Makes one environment, also in another process.
        num_envs: N.
        workers: Processes, at most N; environments are shared out evenly.
        first_env_id: The number of the first one; episodes have their seeds by it.
        min_ready: How many environments a step waits for; the others follow when they are ready. None waits for all:
            the only way that is repeatable.
        on_fault: What to do when an environment breaks: ``"restart"``, which loses the step and begins a new episode,
            or ``"raise"``.
        max_restarts: How often in a row one is begun anew.
        step_timeout_s: Seconds that one call of reset() or step() may take.
        start_timeout_s: Seconds that a process may take to make its environments.
        context: How processes are started: a start method or context of `multiprocessing`; None chooses.
        choice: Why so many workers, kept for whoever asks.

    Raises:
        ConfigError: If an argument is wrong.
        SpaceError: If the observation space cannot be stored.
        EnvMakeError: If an environment cannot be made.
        WorkerError: If a process does not start.
    """

    def __init__(
        self,
        source: EnvSource,
        num_envs: int,
        workers: int,
        *,
        first_env_id: int = 0,
        min_ready: int | None = None,
        on_fault: OnFault = "restart",
        max_restarts: int = MAX_RESTARTS,
        step_timeout_s: float = 60.0,
        start_timeout_s: float = 120.0,
        context: Any = None,
        choice: str = "",
    ) -> None:
        _check_numbers(num_envs, workers, min_ready, step_timeout_s, start_timeout_s)
        self.name, self.num_envs, self.choice = source.name, num_envs, choice
        env = source()
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self._offers_state = offers_state(env)
        close_env(env, self.name)
        check_spaces(self.observation_space, self.action_space)
        self._check = ObservationCheck(self.observation_space)
        self._policy = FaultPolicy(self.name, on_fault, max_restarts)
        self._first = first_env_id
        self._enough = num_envs if min_ready is None else min_ready
        bounds = [round(worker * num_envs / workers) for worker in range(workers + 1)]
        self._rows = list(pairwise(bounds))
        specs = from_space(self.observation_space, "observation_space"), from_space(self.action_space, "action_space")
        self._slab = Slab(*specs, mask_length(self.action_space), num_envs, workers)
        self._all = np.arange(num_envs, dtype=np.int64)
        self._all.flags.writeable = False
        self._seed, self._masked = 0, False
        self._lengths = np.zeros(num_envs, np.int64)  # steps of the open episodes
        self._acted = self._check.empty(num_envs)  # observations that were acted on: they stand for what is lost
        self._acted_mask = self._slab.mask.copy()
        self._ready, self._diary = Ready(self._all, ()), Diary(num_envs)
        context = choose_context(context_of(context))
        spaces, line = (self.observation_space, self.action_space), Lifeline()
        rest = first_env_id, num_envs, source, self.name, spaces, self._slab, line
        jobs = [Job(worker, rows, *rest) for worker, rows in enumerate(self._rows)]
        self._crew = Crew(self.name, jobs, line, self._slab, context, step_timeout_s, start_timeout_s)
        try:
            self._crew.start(range(workers))
            if self._costs_to_wake() and workers <= processors():
                self._slab.calls[:, 4] = _WAKEFUL_NS
        except BaseException:
            self._crew.end()
            raise

    def _costs_to_wake(self) -> bool:
        """Measure how long it takes to be heard by a worker that sleeps and to hear its answer."""
        took_s = []
        for _ in range(_TRIES):
            began_s = time.perf_counter()
            self._crew.tell(0, BEGIN)  # nothing: no episode is new
            self._crew.wait(self.num_envs, [0])
            took_s.append(time.perf_counter() - began_s)
        return median(took_s) > _QUICK_S

    @property
    def layout(self) -> tuple[int, int]:
        """Say how the environments are shared out.

        Returns:
            Processes, and environments in the fullest one.
        """
        return len(self._rows), max(end - first for first, end in self._rows)

    @property
    def episodes(self) -> Int64[ndarray, " N"]:
        """Number the open episodes.

        Returns:
            ``[N]``; where environments broke, numbers have been passed over.
        """
        return self._slab.episodes.copy()

    @property
    def faults(self) -> Sequence[Fault]:
        """List how environments broke: the last hundred times.

        Returns:
            The faults, oldest first.
        """
        return tuple(self._policy.faults)

    @property
    def processes(self) -> list[int]:
        """Name the worker processes.

        Returns:
            Their numbers, by worker.
        """
        return [process.pid for process in self._crew.processes]

    def reset(self, seed: int, first_episodes: Sequence[int]) -> Ready:
        """Begin an episode in every environment.

        Args:
            seed: The run's seed.
            first_episodes: The episodes' numbers, one per environment.

        Returns:
            The first observations, of all environments.
        """
        crew, slab = self._crew, self._slab
        self._stop_short(seed, first_episodes)
        self._diary.begin()
        for worker in range(len(self._rows)):
            crew.tell(worker, START, seed)
        crew.wait(self.num_envs)
        for worker in range(len(self._rows)):
            self._settle(worker)
        self._masked = bool(slab.calls[:, 3].any())
        return self._show(self._all)

    def step(self, action: Nest) -> Outcome:
        """Take one step in the environments that are ready, and begin new episodes where one ended.

        Args:
            action: ``[k, ...]`` per leaf, one row for each environment that was ready.

        Returns:
            What became of these actions, or of earlier ones, and what to act on next.
        """
        acted, slab, crew = self._ready.env_ids, self._slab, self._crew
        rows = slice(None) if len(acted) == self.num_envs else acted
        for (_, target), (_, given) in zip(leaves(slab.action), leaves(action), strict=True):
            target[rows] = given
        slab.stage[rows] = FLIGHT
        for worker, (first, _) in enumerate(self._rows):
            if worker not in crew.flying and (rows is not acted or first in acted):
                crew.tell(worker, STEP_NOW)
        self._lengths[rows] += 1  # while they work
        for (_, kept), (_, shown) in zip(leaves(self._acted), leaves(self._ready.observation), strict=True):
            kept[rows] = shown
        if self._ready.action_mask is not None:
            self._acted_mask[rows] = self._ready.action_mask
        workers = crew.wait(self._enough)
        if len(workers) == len(self._rows):
            # All have come back, which need not be those just acted on: some may have been under way before.
            whole = len(acted) == self.num_envs
            given = (self._ready.observation, action) if whole else None
            return self._collect(workers, self._all, None if whole else self._all, given)
        ids = np.concatenate([self._all[slice(*self._rows[worker])] for worker in workers])
        return self._collect(workers, ids, ids)

    def close(self) -> None:
        """End the worker processes, whatever they do."""
        self._crew.end()

    def save_episodes(self) -> dict[str, Any]:
        """Give what brings the open episodes back; see `Resumable`.

        Actions that are under way are none of it: their environments come back as they were before.

        Returns:
            The state.
        """
        crew, slab = self._crew, self._slab
        states: list[Any] = [None] * self.num_envs
        idle = [worker for worker in range(len(self._rows)) if worker not in crew.flying and worker not in crew.gone]
        asked = idle if self._offers_state else []
        for worker in asked:
            crew.tell(worker, CAPTURE)
        crew.wait(self.num_envs, asked)
        for worker in asked:
            states[slice(*self._rows[worker])] = crew.reports.pop(worker, states[slice(*self._rows[worker])])
        flying = [row for worker in crew.flying for row in range(*self._rows[worker])]

        def before(now: ndarray, acted: ndarray) -> ndarray:
            out = now.copy()
            out[flying] = acted[flying]
            return out

        return {
            "seed": self._seed,
            "episodes": self.episodes,
            "observation": map_nest(before, slab.observation, self._acted),
            "mask": before(slab.mask, self._acted_mask) if self._masked else None,
            "states": states,
            **self._diary.save(),
        }

    def resume_episodes(self, state: Mapping[str, Any]) -> tuple[Ready, Int64[ndarray, " N"]]:
        """Bring open episodes back, or begin the next ones; see `Resumable`.

        Args:
            state: What `save_episodes` gave.

        Returns:
            What to act on next, and how each environment has come back: a key of ``COMEBACKS``.
        """
        self._stop_short(state["seed"], state["episodes"])
        pasts = pasts_of(state, self._diary.load(state))
        self._slab.stage[:] = FAILED  # where a process does not live to say
        for worker, rows in enumerate(self._rows):
            self._crew.tell(worker, RESUME, (self._seed, pasts[slice(*rows)]))
        self._crew.wait(self.num_envs)
        codes = self._slab.stage.astype(np.int64)
        for worker in range(len(self._rows)):
            if worker in self._crew.dead:
                codes[slice(*self._rows[worker])] = FAILED
            self._settle(worker)
        self._masked = bool(self._slab.calls[:, 3].any())
        self._diary.forget((codes > REENACTED).nonzero()[0].tolist())
        self._lengths[:] = self._diary.lengths
        return self._show(self._all), codes

    def _stop_short(self, seed: int, episodes: Sequence[int]) -> None:
        """Leave whatever is played; say which episodes are to begin."""
        crew, slab = self._crew, self._slab
        crew.clear_up()
        crew.wait(self.num_envs)  # what is under way is of no use any more
        crew.reports.clear()
        for worker in sorted(crew.gone):
            self._replace(worker)
        self._seed = seed
        slab.episodes[:] = [int(n) for n in episodes]
        self._lengths[:] = 0

    def _collect(
        self,
        workers: list[int],
        ids: Int64[ndarray, " k"],
        env_ids: ndarray | None,
        acted: tuple[Nest, Nest] | None = None,
    ) -> Outcome:
        """Take what workers have written, see to what broke, and show what to act on next."""
        slab, crew = self._slab, self._crew
        noted = ids if acted is None else None
        observation, action = acted or (_rows(self._acted, ids), _rows(slab.action, ids))
        reward, terminated, truncated = (column[ids] for column in (slab.reward, slab.terminated, slab.truncated))
        broken = [worker for worker in workers if worker in crew.reports or worker in crew.dead]
        lost = cut = success = None
        if broken:
            lost = (slab.stage[ids] == FLIGHT) | np.isin(ids, self._unsound(broken))
            reward[lost], terminated[lost], truncated[lost] = 0.0, False, False
        ended = terminated | truncated
        if not broken and not np.count_nonzero(ended):
            ready = self._show(ids)
            self._diary.note(observation, action, reward, None, noted)
            return Outcome(ready.observation, reward, terminated, truncated, ready, env_ids=env_ids)
        successor, over = self._successors(ids, lost), ids[ended]
        told = np.where(slab.stage[over] == MOVED, slab.success[over], np.nan)  # else its worker died before it told
        if not np.isnan(told).all():
            success = np.full(len(ids), np.nan)
            success[ended] = told
        slab.episodes[over] += 1
        self._lengths[over] = 0
        self._policy.ended((over + self._first).tolist())
        if lost is not None:
            replaced = [worker for worker in broken if self._settle(worker)]
            if replaced:
                cut = np.isin(ids, [i for worker in replaced for i in range(*self._rows[worker])]) & ~lost & ~ended
        over = ended
        for broken_off in (lost, cut):
            over = over if broken_off is None else over | broken_off
        self._diary.note(observation, action, reward, over, noted)
        return Outcome(successor, reward, terminated, truncated, self._show(ids), lost, cut, env_ids, success)

    def _successors(self, ids: Int64[ndarray, " k"], lost: Bool[ndarray, " k"] | None) -> Nest:
        """Give what the environments returned for the actions, before new episodes began."""
        moved = self._slab.stage[ids] == MOVED

        def whole(now: ndarray, final: ndarray, acted: ndarray) -> ndarray:
            out = now[ids]
            out[moved] = final[ids[moved]]
            if lost is not None:  # nobody knows what followed: what was acted on stands for it
                out[lost] = acted[ids[lost]]
            return out

        return map_nest(whole, self._slab.observation, self._slab.final, self._acted)

    def _unsound(self, workers: list[int]) -> list[int]:
        """List rows whose result is there but wrong: a worker that died had no time to check it."""
        slab, wrong = self._slab, []
        for worker in workers:
            for row in range(*self._rows[worker]) if worker in self._crew.dead else ():
                written = slab.final if slab.stage[row] == MOVED else slab.observation
                try:
                    self._check.check(rows_of(written, row), str)
                except RlfeedError:
                    wrong.append(row)
        return wrong

    def _show(self, ids: Int64[ndarray, " m"]) -> Ready:
        """Give what to act on next, in arrays that nobody writes any more."""
        slab = self._slab
        if len(ids) == self.num_envs:
            mask = slab.mask.copy() if self._masked else None
            self._ready = Ready(self._all, map_nest(np.copy, slab.observation), mask)
        else:
            mask = slab.mask[ids] if self._masked else None
            self._ready = Ready(ids, map_nest(lambda column: column[ids], slab.observation), mask)
        return self._ready

    def _settle(self, worker: int) -> bool:
        """Begin anew what broke in a worker until all its episodes have begun; tell whether it was replaced."""
        crew, first, replaced = self._crew, self._rows[worker][0], False
        while worker in crew.reports or worker in crew.dead:
            if worker in crew.dead:
                replaced = True
                self._replace(worker)
                crew.tell(worker, START, self._seed)
            else:
                for row, kind, message in crew.reports.pop(worker):
                    error = getattr(rlfeed.errors, kind)(message)
                    self._policy.meet(self._first + first + row, int(self._slab.episodes[first + row]), error)
                    self._slab.episodes[first + row] += 1
                    self._lengths[first + row] = 0
                crew.tell(worker, BEGIN)
            crew.wait(self.num_envs, [worker])
        return replaced

    def _replace(self, worker: int) -> None:
        """Have another process take over the environments of one that died."""
        (first, end), slab, crew = self._rows[worker], self._slab, self._crew
        row, doing = (int(n) for n in slab.calls[worker, :2])
        guilty, how = first + row, crew.dead.pop(worker, None)
        if how is not None:  # else it has been told, and somebody has caught it
            others = [i for i in range(first, end) if self._lengths[i] and (i != guilty or doing == IDLE)]
            named = ", ".join(str(self._first + i) for i in others)
            besides = f" So are those beside it, of env {named}." if others else ""
            error = self._obituary(worker, guilty, doing, how)
            self._policy.meet(self._first + guilty, int(slab.episodes[guilty]), error, besides)
        # An episode without a step is begun again, unless it was its beginning that failed.
        slab.episodes[first:end] += self._lengths[first:end] > 0
        slab.episodes[guilty] += doing == RESET and not self._lengths[guilty]
        self._lengths[first:end] = 0
        crew.reports.pop(worker, None)
        slab.calls[worker, :4] = 0
        while worker in crew.gone:
            try:
                crew.start([worker])
            except RlfeedError as error:
                again = type(error)(f"{self.name}: worker {worker} could not be started again. {error}")
                self._policy.meet(self._first + guilty, int(slab.episodes[guilty]), again)

    def _obituary(self, worker: int, row: int, doing: int, how: str) -> RlfeedError:
        """Say how a worker died, and over what."""
        first, end = (self._first + row for row in self._rows[worker])
        process = f"worker {worker} (process {self._crew.processes[worker].pid}, environments {first} to {end - 1})"
        if doing == IDLE:
            return WorkerError(f"{self.name}: {process} {how} between two calls; expected it to live on.")
        episode, length, env_id = int(self._slab.episodes[row]), int(self._lengths[row]), self._first + row
        seed = episode_seed(self._seed, env_id, episode)
        action = map_nest(lambda column: column[row].tolist(), self._slab.action)
        call = f"step({action!r})" if doing == STEP else f"reset(seed={seed})"
        advice = " Perhaps memory ran out: see the system's log." if "SIGKILL" in how else ""
        if how.startswith("did not return"):
            advice = " If that is how long it may take, raise step_timeout_s."
        return EnvFailedError(
            f"{self.name}: env {env_id} of {self._first + self.num_envs}, step {length} of its episode {episode} "
            f"(seed {seed}): {call} in {process} {how}. Play that episode in this process to see why "
            f"(mode='serial').{advice}"
        )


def _rows(nest: Nest, ids: Int64[ndarray, " k"]) -> Nest:
    return map_nest(lambda leaf: leaf[ids], nest)


def _check_numbers(
    num_envs: int, workers: int, min_ready: int | None, step_timeout_s: float, start_timeout_s: float
) -> None:
    wrong = []
    if not 1 <= workers <= num_envs:
        wrong.append(f"layout: is {workers} workers for {num_envs} environments; expected 1 to {num_envs}.")
    if min_ready is not None and (type(min_ready) is not int or not 1 <= min_ready <= num_envs):
        wrong.append(f"min_ready: is {min_ready!r}; expected 1 to {num_envs}, or None to wait for all.")
    for name, seconds in (("step_timeout_s", step_timeout_s), ("start_timeout_s", start_timeout_s)):
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
            wrong.append(f"{name}: is {seconds!r}; expected seconds above 0.")
    if wrong:
        raise ConfigError("make_envs: " + " ".join(wrong))
