"""Which seed an episode begins with: a function of run seed, environment and episode number, and of nothing else."""

from typing import Any

import gymnasium
import numpy as np

from rlfeed.envs.boundary import ObservationCheck
from rlfeed.envs.source import own_traceback
from rlfeed.errors import EnvFailedError
from rlfeed.nest import map_nest
from rlfeed.specs import check_spaces

EPISODES_OPTION = "rlfeed.episodes"


def episode_seed(seed: int, env_id: int, episode: int) -> int:
    """Derive the seed that an episode's ``reset`` is called with.

    Args:
        seed: The run's seed, at least 0.
        env_id: The environment's number, from 0.
        episode: The episode's number in that environment, from 0.

    Returns:
        31 bits: every library's generator takes them, also those that add a little to their seed.
    """
    return int(np.random.SeedSequence((seed, env_id, episode)).generate_state(1)[0] >> 1)


def failed(where: str, call: str, error: BaseException) -> EnvFailedError:
    """Say that an environment raised.

    Args:
        where: Which environment and step.
        call: What was called.
        error: What it raised.

    Returns:
        The error to raise from it.
    """
    try:
        text = f": {error}"
    except Exception:  # its traceback says so
        text = ""
    return EnvFailedError(
        f"{where}: {call} raised {type(error).__name__}{text}. Mend the environment; this is its own "
        f"traceback:\n{own_traceback(error)}"
    )


class NumberedEpisodes(gymnasium.Wrapper):
    """Begin every episode with its own seed, also where a vector environment resets by itself.

    A reset with the option ``rlfeed.episodes`` = (run seed, first episode number of each environment) sets the count;
    every later reset begins the next episode. Observations are checked here too, so that a vector environment, which
    casts in silence, never sees a wrong one, and handed on as copies, so that it may keep them.

    Args:
        env: The environment.
        env_id: Its number, from 0.
        num_envs: How many there are beside it.
    """

    def __init__(self, env: gymnasium.Env, env_id: int, num_envs: int) -> None:
        super().__init__(env)
        self._env_id, self._num_envs = env_id, num_envs
        check_spaces(env.observation_space, env.action_space)
        self._check = ObservationCheck(env.observation_space)
        self._seed = 0
        self._episode = -1
        self._length = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin the next episode, with its own seed.

        Args:
            seed: Ignored: the episode's number decides.
            options: Passed on, without ``rlfeed.episodes``.

        Returns:
            The first observation and the info.
        """
        options = dict(options or {})
        run_seed, first_episodes = options.pop(EPISODES_OPTION, (self._seed, None))
        self._seed = run_seed
        self._episode = self._episode + 1 if first_episodes is None else int(first_episodes[self._env_id])
        self._length = 0
        seed = episode_seed(run_seed, self._env_id, self._episode)
        try:
            observation, info = self.env.reset(seed=seed, options=options or None)
        except Exception as error:
            raise failed(self._where(0), f"reset(seed={seed})", error) from error
        return self._checked(observation), info

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Take one step.

        Args:
            action: The action.

        Returns:
            Observation, reward, terminated, truncated and info.
        """
        self._length += 1
        try:
            observation, reward, terminated, truncated, info = self.env.step(action)
        except Exception as error:
            raise failed(self._where(0), f"step({action!r})", error) from error
        return self._checked(observation), reward, terminated, truncated, info

    def _checked(self, observation: Any) -> Any:
        return map_nest(lambda leaf: leaf[0], self._check.stack([observation], self._where))

    def _where(self, row: int) -> str:
        return f"env {self._env_id} of {self._num_envs}, step {self._length} of its episode {self._episode}"
