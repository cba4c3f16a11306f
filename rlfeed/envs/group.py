"""A group of environments that one process steps, one after the other: the only place that calls reset and step.

`SerialEnvs` has one group in this process, the worker pool one in each of its processes, so that an environment is
seeded, checked and named in the same way wherever it runs. What goes wrong with an environment is told and not
decided here: whoever has the group raises it, or begins the row anew.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import gymnasium
from jaxtyping import Bool
from numpy import ndarray

from rlfeed.envs.boundary import ObservationCheck, flag_of, mask_of, reward_of, success_of
from rlfeed.envs.seeds import episode_seed, failed
from rlfeed.errors import ConfigError, EnvContractError, EnvMakeError, RlfeedError
from rlfeed.nest import Nest
from rlfeed.specs import check_spaces

Faults = Mapping[int, RlfeedError]  # by row
Mask = Bool[ndarray, "k A"] | None
_NO_FAULTS: dict[int, RlfeedError] = {}
_NO_ENV = gymnasium.Env()  # in the place of one that could not be made
_PENDING = object()


class Book(Protocol):
    """Write down what environments do while they do it, for somebody who may have to find out."""

    def calls(self, row: int, phase: int) -> None:
        """Note that an environment is called.

        Args:
            row: Which.
            phase: 1 for a step, 2 for a reset.
        """
        ...

    def stepped(self, row: int, reward: float, terminated: bool, truncated: bool) -> None:
        """Note what a step gave; its observation is written already.

        Args:
            row: Which.
            reward: The reward.
            terminated: The flag.
            truncated: The flag.
        """
        ...


class EnvGroup:
    """Reset and step k environments, and check what they return.

    Args:
        envs: The environments, all of the same spaces.
        name: What to call them in errors.
        first: The number of the first one among all.
        num_envs: How many there are in all.
        makers: Make each environment anew; without them an environment that broke is only reset.
        book: Told of every call, in a process of the pool.
    """

    def __init__(
        self,
        envs: Sequence[gymnasium.Env],
        name: str,
        *,
        first: int = 0,
        num_envs: int | None = None,
        makers: Sequence[Callable[[], gymnasium.Env]] | None = None,
        book: Book | None = None,
    ) -> None:
        self.envs = list(envs)
        self.name, self.first, self.num_envs = name, first, num_envs or len(self.envs)
        self.check = ObservationCheck(self.envs[0].observation_space)
        self.action_space = self.envs[0].action_space
        self.masked = False  # whether infos hold action masks: the first reset that succeeds tells
        self._unmasked = True  # until then
        self.seed, self.episodes = 0, [0] * len(self.envs)
        self._makers, self._book = makers, book
        self._ints = all(map(_takes_ints, self.envs))
        # In this process Ctrl-C and exits are the user's; a process of the pool hears neither but from an environment.
        self._mistakes = Exception if book is None else BaseException
        self._clock = 0
        self._began = [0] * len(self.envs)  # what the clock showed when the row's episode began
        self.reward: list[float] = []
        self.terminated: list[bool] = []
        self.truncated: list[bool] = []
        self.ended: list[int] = []  # rows whose episode ended with the last step
        self.success: dict[int, float] = {}  # theirs, where infos tell
        self._infos: list[Any] = [{}] * len(self.envs)

    def start(self, seed: int, episodes: Sequence[int], target: Nest, mask: Mask = None) -> Faults:
        """Begin an episode in every environment.

        Args:
            seed: The run's seed.
            episodes: The episodes' numbers, one per environment.
            target: Where the first observations go, ``[k, ...]`` per leaf.
            mask: Where their action masks go, ``[k, A]``, if infos hold some.

        Returns:
            What went wrong, by row.
        """
        self.seed, self.episodes = seed, [int(n) for n in episodes]
        self.masked, self._unmasked = False, True
        return self.begin(range(len(self.envs)), target, mask)

    def step(self, action: Nest, target: Nest, mask: Mask = None) -> Faults:
        """Take one step in every environment; ``reward``, ``terminated``, ``truncated`` and ``success`` are its.

        Args:
            action: ``[k, ...]`` per leaf.
            target: Where the observations go, ``[k, ...]`` per leaf.
            mask: Where the action masks go, ``[k, A]``, of rows whose episode goes on.

        Returns:
            What went wrong, by row: a step that is none.
        """
        self._clock += 1
        book, infos, where = self._book, self._infos, self.where
        dtype, shape = self.check.plain
        rewards, terminations, truncations = [], [], []
        faults = _NO_FAULTS
        row = 0
        for env, act in zip(self.envs, self.split(action), strict=True):
            result = _PENDING
            try:
                if book is not None:
                    book.calls(row, 1)
                result = env.step(act)
                observation, reward, terminated, truncated, infos[row] = result
                # What most environments return is written without a call: the loop costs as much as a light step.
                if type(observation) is ndarray and observation.dtype == dtype and observation.shape == shape:
                    target[row] = observation
                else:
                    self.check.write(observation, target, row, where)
                if type(reward) is not float or not -1e38 <= reward <= 1e38:
                    reward = reward_of(reward, row, where)
                if terminated is not False:
                    terminated = flag_of("terminated", terminated, row, where)
                if truncated is not False:
                    truncated = flag_of("truncated", truncated, row, where)
                if book is not None:
                    book.stepped(row, reward, terminated, truncated)
            except self._mistakes as error:
                faults = {**faults, row: self._fault(row, act, result, error)}
                reward, terminated, truncated = 0.0, False, False
            rewards.append(reward)
            terminations.append(terminated)
            truncations.append(truncated)
            row += 1
        self.reward, self.terminated, self.truncated = rewards, terminations, truncations
        faults = self._check_values(target, range(row), faults)
        self.ended, self.success = [], {}
        if True in terminations or True in truncations:
            both = enumerate(zip(terminations, truncations, strict=True))
            self.ended = [i for i, flags in both if (flags[0] or flags[1]) and i not in faults]
            told = {i: success_of(infos[i]) for i in self.ended if isinstance(infos[i], dict)}
            self.success = {i: value for i, value in told.items() if value is not None}
        if self.masked:
            faults = self._check_masks([i for i in range(row) if i not in self.ended], mask, faults)
        return faults

    def split(self, action: Nest) -> list[Any]:
        """Give each environment its action.

        Args:
            action: ``[k, ...]`` per leaf, of any k.

        Returns:
            k actions that share no memory with the batch.
        """
        return action.tolist() if self._ints else split_rows(action)

    def repeat(self, row: int, action: Any, target: Nest) -> tuple[float, bool]:
        """Take a step in one environment that was taken before, in another process.

        Args:
            row: Which.
            action: The action.
            target: Where the observation goes, ``[k, ...]`` per leaf.

        Returns:
            The reward, and whether the episode is over.
        """
        if self._book is not None:
            self._book.calls(row, 1)
        self._began[row] -= 1
        observation, reward, terminated, truncated, self._infos[row] = self.envs[row].step(action)
        self.check.write(observation, target, row, self.where)
        return reward_of(reward, row, self.where), bool(terminated or truncated)

    def begin(self, rows: Sequence[int], target: Nest, mask: Mask = None) -> Faults:
        """Begin the episodes whose numbers are in ``episodes``.

        Args:
            rows: In which environments.
            target: Where the first observations go, ``[k, ...]`` per leaf.
            mask: Where their action masks go, ``[k, A]``, if infos hold some.

        Returns:
            What went wrong, by row.
        """
        faults: dict[int, RlfeedError] = {}
        for row in rows:
            self._began[row] = self._clock
            seed = episode_seed(self.seed, self.first + row, self.episodes[row])
            call, returned = f"reset(seed={seed})", "what reset() returned"
            try:
                if self._book is not None:
                    self._book.calls(row, 2)
                result = self.envs[row].reset(seed=seed)
                call = returned
                if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], dict):
                    raise EnvContractError(
                        f"{self.where(row)}: reset() returned {_outline(result)}; expected the pair (observation, "
                        "info), info a dict. Return both."
                    )
                self.check.write(result[0], target, row, self.where)
                self._infos[row] = result[1]
            except self._mistakes as error:
                if isinstance(error, RlfeedError) and call == returned:
                    faults[row] = error
                else:
                    faults[row] = failed(self.where(row), call, error)
        if self._unmasked and len(faults) < len(rows):
            self.masked = any("action_mask" in self._infos[row] for row in rows if row not in faults)
            self._unmasked = False
        return self._check_masks(rows, mask, self._check_values(target, rows, faults))

    def renew(self, rows: Iterable[int]) -> Faults:
        """Make environments anew that broke: whatever state they are in, their next episodes begin without it.

        Args:
            rows: Which.

        Returns:
            What went wrong, by row: those cannot be made again.
        """
        faults: dict[int, RlfeedError] = {}
        makers = self._makers
        if makers is None:
            return faults
        for row in rows:
            broken, self.envs[row] = self.envs[row], _NO_ENV
            with suppress(self._mistakes):  # it is broken: that it cannot be closed either is no news
                broken.close()
            del broken  # there may not be room for two
            try:
                self.envs[row] = makers[row]()
            except self._mistakes as error:
                faults[row] = EnvMakeError(f"{self.where(row)}: its environment cannot be made anew. {error}")
        return faults

    def close(self) -> None:
        """Close every environment; one that cannot be is warned of."""
        for row, env in enumerate(self.envs):
            close_env(env, f"{self.name}: env {self.first + row} of {self.num_envs}", self._mistakes)

    def where(self, row: int) -> str:
        """Name a row for errors.

        Args:
            row: Which.

        Returns:
            Such as ``CartPole-v1: env 3 of 8, step 17 of its episode 2``.
        """
        return (
            f"{self.name}: env {self.first + row} of {self.num_envs}, step {self._clock - self._began[row]} of its "
            f"episode {self.episodes[row]}"
        )

    def _place(self, row: int) -> str:
        return f"{self.where(row)} (seed {episode_seed(self.seed, self.first + row, self.episodes[row])})"

    def _check_masks(self, rows: Sequence[int], target: Mask, faults: Faults) -> Faults:
        if not self.masked:
            return faults
        found = dict(faults)
        for row in rows:
            if row in faults:
                continue
            info = self._infos[row]
            given = info.get("action_mask") if isinstance(info, dict) else None
            try:
                mask = mask_of(given, self.action_space, row, self.where)
            except Exception as error:
                ours = isinstance(error, RlfeedError)
                found[row] = error if ours else failed(self.where(row), 'info["action_mask"]', error)
                continue
            if target is not None:
                target[row] = mask
        return found

    def _check_values(self, target: Nest, rows: Sequence[int], faults: Faults) -> Faults:
        """Check values: those of all rows at once, and one by one where one is wrong."""
        whole = len(rows) == len(self.envs)
        if whole and not faults:
            try:
                self.check.check(target, self.where)
            except RlfeedError:
                pass
            else:
                return faults
        found = dict(faults)
        for row in rows:
            if row not in faults:
                try:
                    self.check.check(rows_of(target, row), lambda _, row=row: self.where(row))
                except RlfeedError as error:
                    found[row] = error
        return found

    def _fault(self, row: int, action: Any, result: Any, error: BaseException) -> RlfeedError:
        """Say what went wrong in a step: in the environment, in the form of its result, or with a part of it."""
        if result is _PENDING:
            return failed(self._place(row), f"step({action!r})", error)
        if isinstance(error, RlfeedError):
            return error
        if isinstance(result, tuple) and len(result) == 5:
            return failed(self._place(row), "what step() returned", error)
        return EnvContractError(
            f"{self.where(row)}: step() returned {_outline(result)}; expected the five values (observation, "
            "reward, terminated, truncated, info). Return all five; an old `done` is terminated or truncated."
        )


def close_env(env: gymnasium.Env, name: str, mistakes: type[BaseException] = Exception) -> None:
    """Close an environment; where it raises, what it did before still counts, so that is a warning.

    Args:
        env: The environment.
        name: What to call it.
        mistakes: What it may raise.
    """
    try:
        env.close()
    except mistakes as error:
        warnings.warn(str(failed(name, "close()", error)), RuntimeWarning, stacklevel=3)


def rows_of(nest: Nest, row: int) -> Nest:
    """Give one row of a nest, with its leading axis.

    Args:
        nest: ``[k, ...]`` per leaf.
        row: Which.

    Returns:
        Views ``[1, ...]`` per leaf.
    """
    if isinstance(nest, dict):
        return {key: rows_of(part, row) for key, part in nest.items()}
    if isinstance(nest, tuple):
        return tuple(rows_of(part, row) for part in nest)
    return nest[row : row + 1]


def check_distinct(name: str, envs: Sequence[gymnasium.Env]) -> None:
    """Check that environments are different objects of the same spaces, which can be stored.

    Args:
        name: What to call them in errors.
        envs: The environments.

    Raises:
        ConfigError: If one is there twice, or if their spaces differ.
        SpaceError: If parts of the spaces cannot be stored; the message names all of them.
    """
    check_spaces(envs[0].observation_space, envs[0].action_space)
    seen: dict[int, int] = {}
    for index, env in enumerate(envs):
        twin = seen.setdefault(id(env.unwrapped), index)
        if twin != index:
            raise ConfigError(
                f"{name}: environments {twin} and {index} are the same object; expected one object for each row. "
                "Build a new environment in every call of the factory."
            )
        for kind in ("observation_space", "action_space"):
            if getattr(env, kind) != getattr(envs[0], kind):
                raise ConfigError(
                    f"{name}: {kind} of environment {index} is {getattr(env, kind)}, that of environment 0 is "
                    f"{getattr(envs[0], kind)}; expected the same. Build all environments alike."
                )


def split_rows(action: Nest) -> list[Any]:
    """Split batched actions into one per environment.

    Args:
        action: ``[k, ...]`` per leaf.

    Returns:
        k actions that share no memory with the batch: an environment may write into its own.
    """
    if isinstance(action, dict):
        parts = [split_rows(part) for part in action.values()]
        return [dict(zip(action, row, strict=True)) for row in zip(*parts, strict=True)]
    if isinstance(action, tuple):
        return list(zip(*(split_rows(part) for part in action), strict=True))
    # The elements of a vector are scalars of their own already.
    return list(action) if action.ndim == 1 else list(action.copy())


def _takes_ints(env: gymnasium.Env) -> bool:
    """Tell Gymnasium's own environments with Discrete actions: a Python int is all they need.

    Each of their steps asks whether the action is in the space, which takes a fifth of CartPole's step for an int64 of
    NumPy and next to nothing for an int. Others get NumPy's, as they would from Gymnasium's vector environments.
    """
    layers = [env]
    while isinstance(layers[-1], gymnasium.Wrapper):
        layers.append(layers[-1].env)
    own = all(type(layer).__module__.startswith("gymnasium.") for layer in layers)
    return own and type(env.action_space) is gymnasium.spaces.Discrete


def _outline(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} values"
    return f"a {type(value).__name__}"
