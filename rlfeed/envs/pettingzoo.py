"""PettingZoo's parallel environments behind the one contract: every agent is a row."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy import ndarray

from rlfeed.envs.autoreset import Outcome, Ready
from rlfeed.envs.boundary import ObservationCheck, check_rewards, flag_of, stack_masks, success_of
from rlfeed.envs.group import split_rows
from rlfeed.envs.seeds import episode_seed, failed
from rlfeed.errors import ConfigError, EnvContractError
from rlfeed.nest import Nest

_PARTS = ("observations", "rewards", "terminated", "truncated", "infos")


class ParallelEnvs:
    """Speak the contract for environments of PettingZoo's parallel interface, whose agents act at the same time.

    Row ``copy * A + agent`` is an agent of a copy of the environment, A of them in the order of ``possible_agents``.
    An agent whose episode ended takes no step until those of all agents of its copy have: then the copy begins its
    next episode, with its own seed. One that comes later in an episode is ready from then on.

    Args:
        envs: At least one environment, all alike, of agents with the same spaces.
        name: What to call them in errors; by default the name that their metadata tell.
        first_env_id: The number of the first row; episodes have their seeds by the number of the copy.

    Raises:
        ConfigError: If there is none, if one is given twice, or if the agents' spaces differ.
        SpaceError: If the observation space cannot be stored.
    """

    def __init__(self, envs: Sequence[Any], name: str | None = None, *, first_env_id: int = 0) -> None:
        if not envs:
            raise ConfigError("ParallelEnvs: got no environment; expected at least one.")
        first = envs[0]
        self.name = name or (getattr(first, "metadata", None) or {}).get("name") or type(first.unwrapped).__name__
        self.agents: tuple[Any, ...] = tuple(first.possible_agents)
        _check_alike(self.name, envs, self.agents)
        self.num_envs = len(envs) * len(self.agents)
        self.observation_space = first.observation_space(self.agents[0])
        self.action_space = first.action_space(self.agents[0])
        self._envs, self._first = list(envs), first_env_id // len(self.agents)
        pairs = [(copy, agent) for copy in range(len(envs)) for agent in self.agents]
        self._rows = {pair: row for row, pair in enumerate(pairs)}
        self._check = ObservationCheck(self.observation_space)
        self._seed = 0
        self._episodes = [0] * len(envs)
        self._steps = [0] * len(envs)
        self._ids = np.zeros(0, np.int64)  # the rows that are ready
        self._masked = False

    def reset(self, seed: int, first_episodes: Sequence[int]) -> Ready:
        """Begin an episode in every copy.

        Args:
            seed: The run's seed.
            first_episodes: The episodes' numbers, one per row; the highest of a copy's rows is the copy's.

        Returns:
            The first observations, of all agents that are there.
        """
        width = len(self.agents)
        self._seed = seed
        self._episodes = [max(map(int, first_episodes[c * width : (c + 1) * width])) for c in range(len(self._envs))]
        begun = self._begin(range(len(self._envs)))
        self._masked = any("action_mask" in info for _, info in begun.values())
        return self._ready(begun)

    def step(self, action: Nest) -> Outcome:
        """Take one step in every copy, and begin new episodes where those of all agents ended.

        Args:
            action: ``[k, ...]`` per leaf, of the agents that were ready.

        Returns:
            What became of it, and what to act on next.
        """
        acted = [int(row) for row in self._ids]
        actions = dict(zip(acted, split_rows(action), strict=True))
        results: dict[int, tuple[Any, ...]] = {}
        newcomers: dict[int, tuple[Any, Any]] = {}
        for copy in range(len(self._envs)):
            self._step(copy, actions, results, newcomers)
        observations, rewards, terminated, truncated, infos = zip(*(results[row] for row in acted), strict=True)

        def where(i: int) -> str:
            return self._where(acted[i])

        reward = check_rewards(rewards, where)
        terminations = np.array([flag_of("terminated", value, i, where) for i, value in enumerate(terminated)])
        truncations = np.array([flag_of("truncated", value, i, where) for i, value in enumerate(truncated)])
        successor = self._check.stack(observations, where)
        ended = terminations | truncations
        success = None
        if ended.any():
            told = [success_of(info) if over else None for info, over in zip(infos, ended, strict=True)]
            success = np.array([np.nan if value is None else value for value in told])
            success = None if np.isnan(success).all() else success
        going = {row: (observations[i], infos[i]) for i, row in enumerate(acted) if not ended[i]}
        if not newcomers and len(going) == len(acted):
            ready = Ready(self._ids, successor, self._masks(going))
        else:
            alive = {row // len(self.agents) for row in (*going, *newcomers)}
            over = [copy for copy in range(len(self._envs)) if copy not in alive]
            for copy in over:
                self._episodes[copy] += 1
            ready = self._ready({**going, **newcomers, **self._begin(over)})
        return Outcome(successor, reward, terminations, truncations, ready, success=success)

    def close(self) -> None:
        """Close every copy."""
        for env in self._envs:
            env.close()

    def _begin(self, copies: Sequence[int]) -> dict[int, tuple[Any, Any]]:
        """Begin an episode in some copies: the first observation and info of each of their rows."""
        begun = {}
        for copy in copies:
            self._steps[copy] = 0
            seed = episode_seed(self._seed, self._first + copy, self._episodes[copy])
            try:
                result = self._envs[copy].reset(seed=seed)
            except Exception as error:
                raise failed(self._place(copy), f"reset(seed={seed})", error) from error
            if not isinstance(result, tuple) or len(result) != 2 or not all(isinstance(p, dict) for p in result):
                raise EnvContractError(
                    f"{self._place(copy)}: reset() returned {_outline(result)}; expected a pair of dicts, the agents' "
                    "observations and infos. Return both."
                )
            observations, infos = result
            agents = list(self._envs[copy].agents)
            if not agents or any(agent not in observations for agent in agents):
                raise EnvContractError(
                    f"{self._place(copy)}: reset() gave observations of {list(observations)}, and agents are {agents}; "
                    "expected at least one agent, and an observation for each. Return them."
                )
            for agent in agents:
                begun[self._row(copy, agent)] = (observations[agent], infos.get(agent) or {})
        return begun

    def _step(
        self,
        copy: int,
        actions: Mapping[int, Any],
        results: dict[int, tuple[Any, ...]],
        newcomers: dict[int, tuple[Any, Any]],
    ) -> None:
        """Step one copy: what came of its rows' actions, and the first observations of agents that came to it."""
        env, rows = self._envs[copy], [(agent, self._row(copy, agent)) for agent in self.agents]
        given = {agent: actions[row] for agent, row in rows if row in actions}
        self._steps[copy] += 1
        try:
            parts = env.step(given)
        except Exception as error:
            raise failed(self._place(copy), f"step({given!r})", error) from error
        if not isinstance(parts, tuple) or len(parts) != 5 or not all(isinstance(part, dict) for part in parts):
            raise EnvContractError(
                f"{self._place(copy)}: step() returned {_outline(parts)}; expected five dicts by agent: "
                f"{', '.join(_PARTS)}. Return all five."
            )
        for agent, row in rows:
            if agent in given:
                for name, part in zip(_PARTS[:4], parts[:4], strict=True):
                    if agent not in part:
                        raise EnvContractError(
                            f"{self._where(row)}: step() gave no {name} for it; expected them for every agent that "
                            "acted, also for one that left in this step."
                        )
                results[row] = (*(part[agent] for part in parts[:4]), parts[4].get(agent) or {})
            elif agent in env.agents and agent in parts[0] and not (parts[2].get(agent) or parts[3].get(agent)):
                newcomers[row] = (parts[0][agent], parts[4].get(agent) or {})
        if gone := [a for a in given if a not in env.agents and not (parts[2][a] or parts[3][a])]:
            raise EnvContractError(
                f"{self._where(self._row(copy, gone[0]))}: it is no longer in `agents`, but neither terminated nor "
                "truncated; expected one of them to be True in the step in which it leaves. Say how its episode ended."
            )

    def _ready(self, rows: Mapping[int, tuple[Any, Any]]) -> Ready:
        ids = sorted(rows)
        self._ids = np.array(ids, np.int64)
        observation = self._check.stack([rows[row][0] for row in ids], lambda i: self._where(ids[i]))
        return Ready(self._ids, observation, self._masks(rows))

    def _masks(self, rows: Mapping[int, tuple[Any, Any]]) -> ndarray | None:
        if not self._masked:
            return None
        ids = sorted(rows)
        masks = [rows[row][1].get("action_mask") for row in ids]
        return stack_masks(masks, self.action_space, lambda i: self._where(ids[i]))

    def _row(self, copy: int, agent: Any) -> int:
        try:
            return self._rows[copy, agent]
        except KeyError:
            raise EnvContractError(
                f"{self._place(copy)}: there is an agent {agent!r}; expected one of possible_agents "
                f"{list(self.agents)}. List all that may come."
            ) from None

    def _place(self, copy: int) -> str:
        return (
            f"{self.name}: copy {copy} of {len(self._envs)}, step {self._steps[copy]} of its episode "
            f"{self._episodes[copy]}"
        )

    def _where(self, row: int) -> str:
        return f"{self._place(row // len(self.agents))}, agent {self.agents[row % len(self.agents)]!r} (env {row})"


def is_parallel(env: Any) -> bool:
    """Tell whether something is an environment of PettingZoo's parallel interface, without importing it.

    Args:
        env: Anything.

    Returns:
        True where it has agents, and spaces for each of them, and is not of the interface where they take turns.
    """
    spaces = callable(getattr(env, "observation_space", None)) and callable(getattr(env, "action_space", None))
    return spaces and hasattr(env, "possible_agents") and not hasattr(env, "agent_iter")


def _check_alike(name: str, envs: Sequence[Any], agents: Sequence[Any]) -> None:
    if not agents:
        raise ConfigError(f"{name}: possible_agents is empty; expected every agent that may come. List them.")
    if len({id(env.unwrapped) for env in envs}) < len(envs):
        raise ConfigError(f"{name}: the same environment is there twice; expected one object for each copy.")
    for copy, env in enumerate(envs):
        if tuple(env.possible_agents) != tuple(agents):
            raise ConfigError(
                f"{name}: copy {copy} has the agents {list(env.possible_agents)}, copy 0 {list(agents)}; expected the "
                "same. Build all copies alike."
            )
        for kind in ("observation_space", "action_space"):
            wanted = getattr(envs[0], kind)(agents[0])
            differ = [agent for agent in agents if getattr(env, kind)(agent) != wanted]
            if differ:
                raise ConfigError(
                    f"{name}: {kind} of agent {differ[0]!r} is {getattr(env, kind)(differ[0])}, that of {agents[0]!r} "
                    f"is {wanted}; expected the same for all agents, and {len(differ)} differ: {differ}. Pad them in a "
                    "wrapper."
                )


def _outline(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} values ({', '.join(type(part).__name__ for part in value)})"
    return f"a {type(value).__name__}"
