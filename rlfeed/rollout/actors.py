"""Actors: processes that step environments of their own, with a copy of the policy, into a replay that all share.

    learner ── weights ──► actor 0 ── lanes 0 .. k-1 ────►  replay
               (pulled)    actor 1 ── lanes k .. 2k-1 ──►

What crosses is memory: steps, weights, a board of words. The pipe of each actor carries what is rare: finished
episodes, its state where it was asked to hold, and what went wrong. No actor waits for the learner unless `limit`
says so, and the learner waits for none. See docs/adr/0013-actors.md.
"""

import math
import multiprocessing.util
import select
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np

from rlfeed.errors import CheckpointError, ConfigError, WorkerError
from rlfeed.processes import Lifeline, choose_context, context_of
from rlfeed.rollout.acting import Job, MakeEnvs, MakePolicy, PullEvery
from rlfeed.rollout.actions import Handling
from rlfeed.rollout.board import RUN, STARTING, STEPPING, STOP, Board
from rlfeed.rollout.seats import GRACE_S, Lanes, OnDeath, Rules, Seat
from rlfeed.rollout.statistics import EpisodeRecord, EpisodeStatistics
from rlfeed.rollout.weights import Weights

_LOOK_S = 0.001  # between looks at the board while waiting
_CHECK_S = 0.5  # between looks at what tells nobody that it changed
_NO_LIMIT = int(np.iinfo(np.int64).max)


@dataclass(frozen=True, slots=True)
class ActorStats:
    """Count what one actor did.

    Args:
        env_steps: Steps that it stored, in all of its processes.
        version: Of the weights that it acts with.
        waited_s: Seconds in which it waited for the learner.
        restarts: Times that it was started again.
    """

    env_steps: int
    version: int
    waited_s: float
    restarts: int


class Actors:
    """Start actors, watch over them, and collect what they tell.

    Actor i has the environments, and the lanes, ``i * envs_per_actor`` and up; every episode has the seed that it would
    have in one process. Each stored step has the version of its weights in ``extras["policy_version"]``. Which weights
    an actor has when is up to the clock, so that no two runs are the same bit by bit.

    Args:
        make_envs: Given the number of its first environment, makes an actor's environments in its process. Pass that
            number on: ``make_envs(..., first_env_id=number)``.
        make_policy: Given an actor's number and how many there are, makes what acts, and the module whose weights it
            pulls, on the CPU: an epsilon for each actor, for example.
        buffer: Where steps go; has a lane for every environment and declares ``"policy_version"``, int64, in extras.
        weights: What the learner publishes.
        num_actors: Processes, at least 1.
        envs_per_actor: Environments of each, at least 1.
        seed: Of episodes and exploration, at least 0.
        pull_every: Steps of its environments after which an actor looks for new weights; ``"episode"`` when one of
            its episodes has ended. With one environment for each actor no episode is then played by two policies.
        random_steps: Env steps of all actors together that are taken at random.
        limit: Env steps of all actors together at which they wait, until it is assigned anew; None is no limit.
        actions: What becomes of the policy's actions; see `Rollout`.
        start_method: How processes are started; None is a fork server, or what the program has chosen.
        start_timeout_s: Seconds in which an actor must have made its environments and policy.
        step_timeout_s: Seconds in which an actor must have taken a step of all its environments.
        max_restarts: How often in a row an actor is started again that died without an episode in between.
        on_death: ``"restart"``, or ``"raise"`` at the first death.

    Raises:
        ConfigError: If an argument is wrong; all findings at once.
    """

    def __init__(
        self,
        make_envs: MakeEnvs,
        make_policy: MakePolicy,
        buffer: Lanes,
        weights: Weights,
        *,
        num_actors: int,
        envs_per_actor: int = 1,
        seed: int = 0,
        pull_every: PullEvery = 32,
        random_steps: int = 0,
        limit: int | None = None,
        actions: Handling = "strict",
        start_method: str | None = None,
        start_timeout_s: float = 120.0,
        step_timeout_s: float = 60.0,
        max_restarts: int = 5,
        on_death: OnDeath = "restart",
    ) -> None:
        least = {"num_actors": (num_actors, 1), "envs_per_actor": (envs_per_actor, 1), "seed": (seed, 0)}
        least |= {"random_steps": (random_steps, 0), "max_restarts": (max_restarts, 0)}
        if pull_every != "episode":
            least["pull_every"] = (pull_every, 1)
        wrong = [
            f"{name} is {value!r}; expected an int of at least {low}"
            for name, (value, low) in least.items()
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low
        ]
        for name, value in {"start_timeout_s": start_timeout_s, "step_timeout_s": step_timeout_s}.items():
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                wrong.append(f"{name} is {value!r}; expected seconds above 0")
        if on_death not in get_args(OnDeath):
            wrong.append(f"on_death is {on_death!r}; expected one of {get_args(OnDeath)}")
        if wrong:
            raise ConfigError(f"Actors: {'; '.join(wrong)}.")
        self.num_actors, self.envs_per_actor, self.seed = num_actors, envs_per_actor, seed
        self.statistics = EpisodeStatistics(num_actors * envs_per_actor)
        self._board, self._poll = Board(num_actors, envs_per_actor), select.poll()
        self.random_steps, self.weights = random_steps, weights
        self.limit = limit
        context = choose_context(context_of(start_method))
        rules = Rules(context, on_death, max_restarts, {STARTING: start_timeout_s, STEPPING: step_timeout_s})
        lifeline = Lifeline()
        self._seats = [
            Seat(
                Job(
                    actor, num_actors, envs_per_actor, make_envs, make_policy, weights, self._board, lifeline, seed,
                    pull_every, actions,
                ),
                range(actor * envs_per_actor, (actor + 1) * envs_per_actor),
                buffer,
                rules,
                self._poll,
                self.statistics,
            )
            for actor in range(num_actors)
        ]  # fmt: skip
        self._check_s, self._check_at = min(_CHECK_S, start_timeout_s, step_timeout_s), 0.0
        self._holds, self._started, self._failed, self._closed = 0, False, False, False
        self._news: list[EpisodeRecord] = []
        # Not of weakref: multiprocessing waits for its children at exit before those are run.
        self._end = multiprocessing.util.Finalize(self, _end, (self._seats, lifeline), exitpriority=10)

    # ------------------------------------------------------------------------------------------------------- counting

    @property
    def env_steps(self) -> int:
        """Count the steps that are stored, of all actors.

        Returns:
            Env steps.
        """
        return self._board.env_steps

    @property
    def limit(self) -> int | None:
        """Tell how far the actors may go; they pass it by at most one step of each environment.

        Returns:
            Env steps of all together at which they wait; None is no limit.
        """
        return None if self._board.limit == _NO_LIMIT else self._board.limit

    @limit.setter
    def limit(self, env_steps: int | None) -> None:
        self._board.limit = _NO_LIMIT if env_steps is None else env_steps

    @property
    def random_steps(self) -> int:
        """Tell how long actions are random.

        Returns:
            Env steps of all actors together.
        """
        return self._board.random_steps

    @random_steps.setter
    def random_steps(self, env_steps: int) -> None:
        self._board.random_steps = env_steps

    def stats(self) -> list[ActorStats]:
        """Count what every actor did.

        Returns:
            One entry for each actor.
        """
        board = self._board
        return [
            ActorStats(board.env_steps_of(i), board.version_of(i), board.waited_s_of(i), max(seat.starts - 1, 0))
            for i, seat in enumerate(self._seats)
        ]

    @property
    def processes(self) -> list[int | None]:
        """Name the processes.

        Returns:
            The number of each actor's process; None where it is none now.
        """
        return [None if seat.process is None else seat.process.pid for seat in self._seats]

    # ------------------------------------------------------------------------------------------------------- watching

    def start(self) -> None:
        """Start the actors; `poll` and `wait` do so the first time.

        Raises:
            ConfigError: If they were closed, or a function cannot be sent to a process.
            LaneError: If a lane is not there, or somebody has it.
        """
        if self._closed:
            raise ConfigError("Actors: were closed; expected ones at work. Make new ones.")
        if not self._started:
            self._started = True
            for seat in self._seats:
                seat.start()

    def poll(self, wait_s: float = 0.0) -> None:
        """See to the actors: read what they tell, bury the dead and start them again.

        Args:
            wait_s: Seconds to wait for news.

        Raises:
            WorkerError: If an actor died or hangs and is not started again; the message has its own traceback.
        """
        self.start()
        ready = {handle for handle, _ in self._poll.poll(wait_s * 1e3)}
        for seat in self._seats:
            if not ready.isdisjoint(seat.handles):
                self._news += seat.read()
        now = time.monotonic()
        if now < self._check_at and all(seat.process is not None for seat in self._seats):
            return
        self._check_at = now + self._check_s
        try:
            for seat in self._seats:
                self._news += seat.look(now)
        except WorkerError:
            self._failed = True
            raise

    def wait(self, beyond: int, timeout_s: float = 0.1) -> None:
        """Wait until the actors have taken more steps.

        Args:
            beyond: Env steps that there are already.
            timeout_s: Seconds; then it returns all the same.

        Raises:
            WorkerError: As `poll`.
        """
        deadline = time.monotonic() + timeout_s
        self.poll()
        while self.env_steps <= beyond and time.monotonic() < deadline:
            self.poll(_LOOK_S)

    def finished(self) -> tuple[EpisodeRecord, ...]:
        """Give the episodes that ended since this was asked last, as `poll`, `wait` and `held` were told of them.

        Returns:
            The episodes, in the order in which each actor ended them.
        """
        finished, self._news = tuple(self._news), []
        return finished

    @contextmanager
    def held(self, timeout_s: float = 60.0) -> Iterator[None]:
        """Hold all actors between two steps for a block of code: what is stored and counted stays as it is.

        Args:
            timeout_s: Seconds in which they must all have come to rest.

        Raises:
            WorkerError: If they have not, or one died meanwhile and is not started again.
        """
        self._holds += 1
        self._board.command = self._holds
        deadline = time.monotonic() + timeout_s
        try:
            while self._started and (late := [seat for seat in self._seats if not self._is_held(seat)]):
                self.poll(_LOOK_S)
                if time.monotonic() > deadline:
                    raise WorkerError(
                        f"Actors.held: waited {timeout_s:g} s for {len(late)} of {self.num_actors} actors; actor "
                        f"{late[0].job.actor} has been {late[0].doing}; expected it to come to rest after a step."
                    )
            yield
        finally:
            self._board.command = RUN

    def _is_held(self, seat: Seat) -> bool:
        return seat.held is not None and seat.held[0] == self._holds

    def state_dict(self) -> dict[str, Any]:
        """Give what later actors need to go on; call it while they are `held`.

        Returns:
            The state: every environment goes on with its next episode.
        """
        board = self._board
        return {
            "environments": "restarted",
            "seed": self.seed,
            "actors": [seat.job.state if seat.held is None else seat.held[1] for seat in self._seats],
            "env_steps": [board.env_steps_of(i) for i in range(self.num_actors)],
            "begun": np.stack([board.begun_of(i) for i in range(self.num_actors)]),
            "statistics": self.statistics.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, before the actors have started.

        Args:
            state: What `state_dict` gave.

        Raises:
            CheckpointError: If it is of another seed, or of other numbers of actors or environments.
            ConfigError: If the actors have started.
        """
        shape = (self.num_actors, self.envs_per_actor)
        if self._started:
            raise ConfigError("Actors.load_state_dict: the actors have started; expected it to be called before.")
        if state["seed"] != self.seed or state["begun"].shape != shape:
            raise CheckpointError(
                f"Actors: the state is of seed {state['seed']} and {state['begun'].shape} (actors, environments of "
                f"each); these have seed {self.seed} and {shape}. Make them with the recorded ones."
            )
        self._board.restore(state["env_steps"], state["begun"])
        self.statistics.load_state_dict(state["statistics"])
        for seat, saved in zip(self._seats, state["actors"], strict=True):
            seat.job = replace(seat.job, state=saved)

    def close(self) -> None:
        """Let the actors finish their step, cut what is open, and end them; steps and statistics stay."""
        if self._closed:
            return
        self._closed = True
        self._board.command = STOP
        deadline = time.monotonic() + GRACE_S
        for seat in self._seats:
            self._news += seat.leave(deadline, quiet=self._failed)
        self._end()

    def __enter__(self) -> "Actors":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _end(seats: list[Seat], lifeline: Lifeline) -> None:
    """End all processes, whatever they do."""
    for seat in seats:
        seat.end()
    lifeline.close()
