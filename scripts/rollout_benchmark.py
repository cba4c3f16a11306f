"""What a step costs from the policy to the environment and into memory, beside other libraries' loops."""

import multiprocessing
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from contest import Case, Contest, family_time
from contestants import NotServedError
from rollout_contestants import Bare, Load, Rlfeed, RolloutContestant, Run, spaces_of
from rollout_life import Still, Uneven, look
from rollout_peers import CleanRL, EnvPool, Gymnasium, StableBaselines3, StableBaselines3PPO, Tianshou, TorchRL

from rlfeed.envs.autoreset import Envs
from rlfeed.envs.group import EnvGroup
from rlfeed.envs.source import EnvSource
from rlfeed.envs.vector import PoolEnvs
from rlfeed.envs.worker import BEGIN

ROUND_S = 0.3
WORKERS = 2
LIGHT, HEAVY = "CartPole-v1", "HalfCheetah-v5"


class RolloutBenchmark:
    """Let everybody step environments.

    Args:
        contest: Times it.
        rows: Steps that a replay buffer holds; a thousandth of it is also the most environments there are.
    """

    def __init__(self, contest: Contest, rows: int) -> None:
        self._contest, self._rows = contest, min(rows, 200_000)
        self._most = max(WORKERS, rows // 1000)

    def blocks(self) -> None:
        """Collect blocks for an on-policy learner, in one process."""
        for num_envs in self._counts(1, 8, 32):
            load, title = Load(LIGHT, num_envs, 128), "blocks of 128 steps, actor and critic"
            kinds = [Bare, Rlfeed, CleanRL, StableBaselines3]
            self._compete(title, load, kinds, lambda c, of=load: c.blocks(of), cpu=True)

    def store(self) -> None:
        """Collect steps into a replay buffer, in one process."""
        lengths = {1: 1024, 8: 256, 64: 64}
        for num_envs in self._counts(*lengths):
            load = Load(LIGHT, num_envs, lengths.get(num_envs, 256))
            kinds = [Rlfeed, StableBaselines3, StableBaselines3PPO, Tianshou, TorchRL]
            self._compete("steps into a replay buffer, actor", load, kinds, lambda c, of=load: c.store(of, self._rows))

    def step(self) -> None:
        """Step environments alone, on two processors."""
        (num_envs,) = self._counts(32)
        for env_id, length in ((LIGHT, 256), ("LunarLander-v3", 64), (HEAVY, 64)):
            load = Load(env_id, num_envs, length)
            kinds = [partial(Rlfeed, WORKERS), Rlfeed, Bare, partial(EnvPool, WORKERS)]
            kinds += [partial(Gymnasium, workers=True), partial(Gymnasium, workers=False)]
            self._compete("environments alone", load, kinds, lambda c, of=load: c.step(of))

    def heavy(self) -> None:
        """Collect blocks from environments that are worth processes of their own."""
        (num_envs,) = self._counts(32)
        load = Load(HEAVY, num_envs, 64)
        kinds = [partial(Rlfeed, WORKERS), Rlfeed, Bare, StableBaselines3, partial(StableBaselines3, workers=True)]
        self._compete("blocks of 64 steps, actor and critic", load, kinds, lambda c: c.blocks(load))

    def parts(self) -> None:
        """Take a step of a pool apart, and do not wait for all."""
        (num_envs,) = self._counts(32)
        pool, half, own = self._pool(Still, num_envs), num_envs // WORKERS, EnvSource(Still)
        group = EnvGroup([own() for _ in range(half)], "Still")
        actions, target = np.zeros(num_envs, np.int64), group.check.empty(half)
        group.start(0, [0] * half, target)

        def signal() -> None:
            for worker in range(WORKERS):
                pool._crew.tell(worker, BEGIN)  # where nothing is to begin
            pool._crew.wait(num_envs)

        parts = {
            f"a step of {num_envs} environments in {WORKERS} workers": lambda: pool.step(actions),
            "told to the workers and heard from them": signal,
            "copied, what to act on next": lambda: pool._show(pool._all),
            f"a worker's {half} environments, checked": lambda: group.step(actions[:half], target),
            f"a worker's {half} environments alone": lambda: [env.step(0) for env in group.envs],
        }
        cases = {name: Case(call, clock=time.perf_counter) for name, call in parts.items()}
        try:
            self._contest.measure("a pool's step by part, environments that do nothing; wall clock", cases)
        finally:
            pool.close()
        self._first_ready(Still, num_envs, WORKERS, (num_envs, half))
        self._first_ready(Uneven, *((8, 8, (8, 4, 1)) if num_envs > 8 else (2, 2, (2, 1))))

    def life(self) -> None:
        """Break environments in every way, and look once at what becomes of the run."""
        self._contest.tell("a rollout's life, looked at once: an environment of 8 in 2 workers breaks", look())

    def _first_ready(self, target: Any, num_envs: int, workers: int, enough: Iterable[int]) -> None:
        """Measure what it costs or gains to wait for some of the environments."""
        pools = {f"waits for {n} of {num_envs}": self._pool(target, num_envs, workers, n) for n in enough}
        cases = {
            name: Case(playing(pool, 4 * num_envs), per=4 * num_envs, clock=time.perf_counter)
            for name, pool in pools.items()
        }
        title = f"first-ready batches, {num_envs} x {target.__name__}, {workers} workers; wall clock, an env step"
        try:
            self._contest.measure(title, cases, rate=True)
        finally:
            for pool in pools.values():
                pool.close()

    def _pool(self, target: Any, num_envs: int, workers: int = WORKERS, min_ready: int | None = None) -> PoolEnvs:
        pool = PoolEnvs(EnvSource(target), num_envs, workers, min_ready=min_ready)
        pool.reset(0, [0] * num_envs)
        return pool

    def _counts(self, *wanted: int) -> list[int]:
        return sorted({min(count, self._most) for count in wanted})

    def _compete(
        self, title: str, load: Load, kinds: list[Any], work: Callable[[Any], Run], *, cpu: bool = False
    ) -> None:
        """Let contestants do the same work in alternating rounds."""
        title = f"{title}, {load.num_envs} x {load.env_id}; {'processor' if cpu else 'wall clock'}, an env step"
        clock, cases, notes, present = time.process_time if cpu else time.perf_counter, {}, {}, []
        try:
            spaces_of(load.env_id)
        except NotServedError as reason:
            self._contest.tell(title, {load.env_id: {"": str(reason)}})
            return
        try:
            for kind in kinds:
                name = getattr(kind, "func", kind).name
                try:
                    contestant: RolloutContestant = kind()
                    name = contestant.name
                    present.append(contestant)
                    cases[name] = Case(work(contestant), per=load.steps, peer=contestant.peer, clock=clock)
                except ImportError:
                    notes[name] = "not installed"
                except NotServedError as reason:
                    notes[name] = str(reason)
                multiprocessing.set_start_method(None, force=True)  # importing TorchRL sets one for the whole process
            spent = None if cpu else family_time
            self._contest.measure(title, cases, notes, round_s=ROUND_S, cpu=spent, rate=True)
        finally:
            for contestant in present:
                contestant.close()


def playing(envs: Envs, rows: int) -> Run:
    """Step environments, whichever are ready.

    Args:
        envs: The environments, begun.
        rows: Env steps in a run; what is too many counts in the next.

    Returns:
        Takes them.
    """
    ready, left = envs.num_envs, 0

    def run() -> None:
        nonlocal ready, left
        left += rows
        while left > 0:
            outcome = envs.step(np.zeros(ready, np.int64))
            ready = len(outcome.ready.env_ids)
            left -= len(outcome.reward)

    return run
