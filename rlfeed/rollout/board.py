"""Words that a learner and its actors share: how far each actor is, what it does, and how far it may go.

Each word has one writer. None says that other memory may be read, so their order does not matter.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from rlfeed.memory import Memory

_LINE = 16  # words of a line: 128 bytes, so that two writers never share a line of a cache
# Words of the learner.
_LIMIT, _COMMAND, _RANDOM_STEPS = range(3)
# Words of an actor; the episodes that each of its environments began follow.
_ENV_STEPS, _VERSION, _DOING, _SINCE, _WAITED = range(5)
RUN, STOP = 0, -1  # commands; n > 0: hold, and say so as answer n
STARTING, STEPPING, WAITING, HELD = range(4)
ACTS = ("starting", "taking a step", "waiting for the learner", "held")


class Board:
    """Hold the words of a learner and its actors; sent to their processes by pickling.

    Args:
        num_actors: Actors.
        envs_per_actor: Environments of each.
    """

    def __init__(self, num_actors: int, envs_per_actor: int) -> None:
        self._pitch = _LINE * (1 + -(-envs_per_actor // _LINE))
        self._num_actors, self._envs_per_actor = num_actors, envs_per_actor
        self._memory = Memory("shared", 8 * (_LINE + num_actors * self._pitch))
        self._bind()

    def _bind(self) -> None:
        words = self._memory.bytes.view(np.int64)
        self._learner = words[:_LINE]
        self._actors = words[_LINE:].reshape(self._num_actors, self._pitch)
        self._env_steps = self._actors[:, _ENV_STEPS]
        self._begun = self._actors[:, _LINE : _LINE + self._envs_per_actor]

    def __getstate__(self) -> dict[str, Any]:
        names = ("_pitch", "_num_actors", "_envs_per_actor", "_memory")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()

    # ------------------------------------------------------------------------------------------------- the learner's

    @property
    def limit(self) -> int:
        """Tell how far actors may go.

        Returns:
            Env steps of all together at which they wait.
        """
        return int(self._learner[_LIMIT])

    @limit.setter
    def limit(self, env_steps: int) -> None:
        self._learner[_LIMIT] = env_steps

    @property
    def command(self) -> int:
        """Tell what actors are to do.

        Returns:
            `RUN`, `STOP`, or a number above 0: hold, and answer with it.
        """
        return int(self._learner[_COMMAND])

    @command.setter
    def command(self, command: int) -> None:
        self._learner[_COMMAND] = command

    @property
    def random_steps(self) -> int:
        """Tell how long actions are random.

        Returns:
            Env steps of all together.
        """
        return int(self._learner[_RANDOM_STEPS])

    @random_steps.setter
    def random_steps(self, env_steps: int) -> None:
        self._learner[_RANDOM_STEPS] = env_steps

    # -------------------------------------------------------------------------------------------------- the actors'

    @property
    def env_steps(self) -> int:
        """Count the steps of all actors.

        Returns:
            Env steps.
        """
        return int(self._env_steps.sum())

    def env_steps_of(self, actor: int) -> int:
        """Count the steps of one actor, of all its processes.

        Args:
            actor: Which.

        Returns:
            Env steps.
        """
        return int(self._env_steps[actor])

    def version_of(self, actor: int) -> int:
        """Tell the version of the weights that an actor acts with.

        Args:
            actor: Which.

        Returns:
            The version.
        """
        return int(self._actors[actor, _VERSION])

    def waited_s_of(self, actor: int) -> float:
        """Tell how long an actor has waited for the learner.

        Args:
            actor: Which.

        Returns:
            Seconds.
        """
        return float(self._actors[actor, _WAITED]) / 1e9

    def begun_of(self, actor: int) -> Int64[ndarray, " envs"]:
        """Count the episodes that each environment of an actor has begun.

        Args:
            actor: Which.

        Returns:
            A view of the words.
        """
        return self._begun[actor]

    def act_of(self, actor: int) -> tuple[int, float]:
        """Tell what an actor does.

        Args:
            actor: Which.

        Returns:
            Its act, and for how many seconds.
        """
        words = self._actors[actor]
        return int(words[_DOING]), (time.monotonic_ns() - int(words[_SINCE])) / 1e9

    def act(self, actor: int, act: int) -> None:
        """Say what an actor does from now on.

        Args:
            actor: Which.
            act: `STARTING`, `STEPPING`, `WAITING` or `HELD`.
        """
        words, now = self._actors[actor], time.monotonic_ns()
        if words[_DOING] == WAITING:
            words[_WAITED] += now - words[_SINCE]
        words[_DOING], words[_SINCE] = act, now

    def count(self, actor: int, env_steps: int, version: int) -> None:
        """Count steps that have been stored.

        Args:
            actor: Who took them.
            env_steps: How many.
            version: Of the weights that chose them.
        """
        words = self._actors[actor]
        words[_ENV_STEPS] += env_steps
        words[_VERSION] = version

    def restore(self, env_steps: Sequence[int], begun: Int64[ndarray, "actors envs"]) -> None:
        """Set what has been counted before any actor starts.

        Args:
            env_steps: Of each actor.
            begun: Episodes that its environments have begun.
        """
        self._env_steps[:], self._begun[:] = env_steps, begun
