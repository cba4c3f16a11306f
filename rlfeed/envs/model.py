"""A model of an environment, in the place of one: `ModelEnvs`."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray
from torch import Tensor, nn

from rlfeed.envs.autoreset import Outcome, Ready
from rlfeed.envs.boundary import REWARD_LIMIT, ObservationCheck, reward_of
from rlfeed.envs.faults import Fault, FaultPolicy, OnFault
from rlfeed.envs.group import Faults, rows_of
from rlfeed.envs.resume import EXACT
from rlfeed.envs.serial import MAX_RESTARTS
from rlfeed.errors import ConfigError, EnvContractError, RlfeedError
from rlfeed.nest import Nest, describe, leaves, map_nest

STREAM = 4  # the first observations' generator, apart from every other stream of the same seed


class ModelEnvs:
    """Step a model of an environment as if it were N environments: one `Rollout` serves both.

    The functions get batches of all N rows: tensors on the model's device, in inference and evaluation mode, where one
    of them is an ``nn.Module`` or a method of one; otherwise NumPy arrays. They get copies and may write into them. A
    model that draws holds a generator of its own.

    A prediction that is not finite, or far outside the observation space, is what an environment that breaks is: an
    error that names row and step, or a step that is lost and a new episode.

    Args:
        model: ``model(observation, action) -> next observation``, ``[N, ...]`` per leaf; with ``initial_carry``
            ``model(observation, action, carry) -> (next observation, carry)``.
        observation_space: Of one row.
        action_space: Of one row.
        initial: ``initial(generator) -> first observation`` of one row, such as a stored one. The generator depends
            on (seed, row, episode) alone, so that episodes begin alike for any number of rows; it is for that call.
        reward_fn: ``reward_fn(observation, action, next observation) -> [N]``.
        termination_fn: ``termination_fn(next observation) -> [N] bool``; None = never.
        horizon: After how many steps an episode is truncated; None = never.
        num_envs: N, how many rows.
        initial_carry: ``initial_carry(first observations [k, ...]) -> [k, ...]`` per leaf: what the model keeps for
            itself where k episodes begin. None where it keeps nothing.
        on_fault: What to do where a prediction cannot be used: ``"raise"``, or ``"restart"``: the step is lost, a new
            episode begins.
        max_restarts: How often in a row one row is begun anew.
        name: What to call it in errors.

    Raises:
        ConfigError: If an argument is wrong.
        SpaceError: If the observation space cannot be stored.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        observation_space: Any,
        action_space: Any,
        initial: Callable[[np.random.Generator], Nest],
        reward_fn: Callable[[Nest, Nest, Nest], Any],
        termination_fn: Callable[[Nest], Any] | None,
        horizon: int | None = None,
        num_envs: int = 1,
        initial_carry: Callable[[Nest], Nest] | None = None,
        on_fault: OnFault = "raise",
        max_restarts: int = MAX_RESTARTS,
        name: str | None = None,
    ) -> None:
        for key, count in (("num_envs", num_envs), ("horizon", horizon)):
            if key == "num_envs" or count is not None:
                _check_count(key, count)
        self.name = name or getattr(model, "__name__", type(model).__name__)
        self.num_envs = num_envs
        self.observation_space, self.action_space = observation_space, action_space
        self._model, self._initial, self._reward_fn = model, initial, reward_fn
        self._termination_fn, self._horizon, self._initial_carry = termination_fn, horizon, initial_carry
        modules = [_module(function) for function in (model, reward_fn, termination_fn, initial_carry)]
        self._modules = [module for module in modules if module is not None]
        self._parts = [part for module in self._modules for part in module.modules()]  # walking the tree is slow
        self._parameter = next((parameter for module in self._modules for parameter in module.parameters()), None)
        self._check = ObservationCheck(observation_space)
        self._policy = FaultPolicy(self.name, on_fault, max_restarts)
        self._ids: Int64[ndarray, " N"] = np.arange(num_envs, dtype=np.int64)
        self._ids.flags.writeable = False
        self._start(0)
        self._episodes = np.zeros(num_envs, np.int64)
        self._lengths = np.zeros(num_envs, np.int64)
        self._observation: Nest = None
        self._carry: Nest = ()

    @property
    def faults(self) -> Sequence[Fault]:
        """List the predictions that could not be used: the last hundred.

        Returns:
            The faults, oldest first.
        """
        return tuple(self._policy.faults)

    @property
    def episodes(self) -> Int64[ndarray, " N"]:
        """Number the open episodes.

        Returns:
            ``[N]``.
        """
        return self._episodes.copy()

    def reset(self, seed: int, first_episodes: Sequence[int]) -> Ready:
        """Begin an episode in every row.

        Args:
            seed: The run's seed.
            first_episodes: The episodes' numbers, one per row.

        Returns:
            The first observations, of all rows.
        """
        self._start(seed)
        self._episodes, self._lengths = np.array(first_episodes, np.int64), np.zeros(self.num_envs, np.int64)
        self._observation = self._firsts(self._ids)
        if self._initial_carry is not None:
            with self._evaluating():
                self._carry = self._initial_carry(self._given(self._observation))
        return Ready(self._ids, self._observation)

    def step(self, action: Nest) -> Outcome:
        """Take one step in every row, and begin new episodes where one ended.

        Args:
            action: ``[N, ...]`` per leaf.

        Returns:
            What became of it, and what to act on next.
        """
        self._lengths += 1
        with self._evaluating():
            predicted = self._predict(action)
            successor, faults = self._checked(map_nest(_own, predicted))
            self._meet(faults)
            given = self._given(self._observation), self._given(action), predicted
            reward, unpaid = self._rewards(self._reward_fn(*given), faults)
            self._meet(unpaid)
            terminated = self._terminated(predicted)
        truncated = np.zeros(self.num_envs, bool) if self._horizon is None else self._lengths >= self._horizon
        lost = np.isin(self._ids, [*faults, *unpaid]) if faults or unpaid else None
        if lost is not None:
            # Nobody knows what followed: what was acted on stands for it.
            _put(successor, lost, map_nest(lambda leaf: leaf[lost], self._observation))
            reward[lost], terminated[lost], truncated[lost] = 0.0, False, False
        ended = terminated | truncated
        begin = ended if lost is None else ended | lost
        self._observation = successor
        if begin.any():
            self._policy.ended(np.flatnonzero(ended).tolist())
            self._begin(begin)
        return Outcome(successor, reward, terminated, truncated, Ready(self._ids, self._observation), lost)

    def save_episodes(self) -> dict[str, Any]:
        """Give what brings the open episodes back, exact where the model is the same; see `Resumable`.

        Returns:
            The state, without the model.
        """
        return {
            "states": [True] * self.num_envs,
            "seed": self._seed,
            "episodes": self._episodes.copy(),
            "lengths": self._lengths.copy(),
            "observation": map_nest(np.copy, self._observation),
            "carry": map_nest(_own, self._carry),
        }

    def resume_episodes(self, state: Mapping[str, Any]) -> tuple[Ready, Int64[ndarray, " N"]]:
        """Bring open episodes back; see `Resumable`.

        Args:
            state: What `save_episodes` gave.

        Returns:
            What to act on next, and that every row has come back exact.
        """
        self._start(int(state["seed"]))
        self._episodes, self._lengths = np.array(state["episodes"]), np.array(state["lengths"])
        self._observation = map_nest(np.array, state["observation"])
        self._carry = self._given(state["carry"])
        return Ready(self._ids, self._observation), np.full(self.num_envs, EXACT)

    def close(self) -> None:
        """Do nothing: a model holds no processes."""

    def _start(self, seed: int) -> None:
        self._seed = seed
        self._bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(STREAM,)))
        self._generator = np.random.Generator(self._bits)

    def _predict(self, action: Nest) -> Nest:
        observation = self._given(self._observation)
        if self._initial_carry is None:
            predicted = self._model(observation, self._given(action))
        else:
            predicted, self._carry = self._model(observation, self._given(action), self._carry)
        for path, leaf in leaves(predicted):
            shape = tuple(getattr(leaf, "shape", ()))
            if not isinstance(leaf, ndarray | Tensor) or shape[:1] != (self.num_envs,):
                raise EnvContractError(
                    f"{self.name}: the model's {describe('observation', path)} is a {type(leaf).__name__} of shape "
                    f"{shape}; expected an array or a tensor with a leading axis of {self.num_envs}, one row for each."
                )
        return predicted

    def _meet(self, faults: Faults) -> None:
        for row, error in faults.items():
            self._policy.meet(row, int(self._episodes[row]), error)

    def _checked(self, successor: Nest) -> tuple[Nest, Faults]:
        """Check the predictions: those of all rows at once, and one by one where one is wrong."""
        with contextlib.suppress(EnvContractError):
            return self._check.batch(successor, self._where), {}
        faults: dict[int, RlfeedError] = {}
        target = self._check.empty(self.num_envs)
        for row in range(self.num_envs):
            # Another shape or dtype is in every row and in every step: nothing to go on with.
            self._check.write(map_nest(lambda leaf, row=row: leaf[row], successor), target, row, self._where)
            try:
                self._check.check(rows_of(target, row), lambda _, row=row: self._where(row))
            except RlfeedError as error:
                faults[row] = error
        return target, faults

    def _rewards(self, values: Any, besides: Faults) -> tuple[Float64[ndarray, " N"], Faults]:
        reward = np.array(_own(values), np.float64)
        if reward.shape != (self.num_envs,):
            raise EnvContractError(
                f"{self.name}: reward_fn returned shape {reward.shape}; expected ({self.num_envs},), one for each row. "
                "Write .squeeze(-1) after a layer with one output."
            )
        faults: dict[int, RlfeedError] = {}
        for row in np.flatnonzero(~(np.abs(reward) <= REWARD_LIMIT)).tolist():
            if row not in besides:
                try:
                    reward_of(float(reward[row]), row, self._where)
                except RlfeedError as error:
                    faults[row] = error
        return reward, faults

    def _terminated(self, predicted: Nest) -> Bool[ndarray, " N"]:
        if self._termination_fn is None:
            return np.zeros(self.num_envs, bool)
        terminated = _own(self._termination_fn(predicted))
        if terminated.shape != (self.num_envs,) or terminated.dtype != bool:
            raise EnvContractError(
                f"{self.name}: termination_fn returned {terminated.dtype} of shape {terminated.shape}; expected bool "
                f"of shape ({self.num_envs},), one for each row."
            )
        return terminated

    def _begin(self, where: Bool[ndarray, " N"]) -> None:
        rows = np.flatnonzero(where)
        self._episodes[rows] += 1
        self._lengths[rows] = 0
        firsts = self._firsts(rows)
        self._observation = map_nest(np.copy, self._observation)
        _put(self._observation, where, firsts)
        if self._initial_carry is not None:
            with self._evaluating():
                self._carry = map_nest(
                    lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf.copy(), self._carry
                )
                _put(self._carry, where, self._initial_carry(self._given(firsts)))

    def _firsts(self, rows: Int64[ndarray, " k"]) -> Nest:
        firsts, episodes = self._check.empty(len(rows)), self._episodes[rows].tolist()

        def where(index: int) -> str:
            return self._where(int(rows[index]))

        # One generator set to (row, episode), not one made for each: that costs eight times as much.
        state: Any = self._bits.state
        counter = state["state"]["counter"]
        counter[:] = 0
        state.update(buffer_pos=4, has_uint32=0)
        for index, row in enumerate(rows.tolist()):
            counter[2], counter[3] = row, episodes[index]
            self._bits.state = state
            self._check.write(self._initial(self._generator), firsts, index, where)
        self._check.check(firsts, where)
        return firsts

    def _given(self, nest: Nest) -> Nest:
        """Give the functions values of their own, as they want them."""
        copies = map_nest(np.copy, nest)
        if not self._modules:
            return copies
        tensors = map_nest(torch.from_numpy, copies)
        # Asked for in every step: the module may be moved between two.
        device = None if self._parameter is None else self._parameter.device
        if device is None or device.type == "cpu":
            return tensors
        return map_nest(lambda leaf: leaf.to(device), tensors)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = [part for part in self._parts if part.training]
        for part in training:  # module.eval() is slow, and forgets which parts trained
            object.__setattr__(part, "training", False)
        try:
            with torch.inference_mode():
                yield
        finally:
            for part in training:
                object.__setattr__(part, "training", True)

    def _where(self, row: int) -> str:
        return (
            f"{self.name}: env {row} of {self.num_envs}, step {self._lengths[row]} of its episode {self._episodes[row]}"
        )


def _check_count(name: str, count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"ModelEnvs: {name} is {count!r}; expected an integer of at least 1.")


def _module(function: Any) -> nn.Module | None:
    """Find the module that a function is, or is a method of."""
    owner = getattr(function, "__self__", function)
    return owner if isinstance(owner, nn.Module) else None


def _own(leaf: Any) -> ndarray:
    return leaf.numpy(force=True).copy() if isinstance(leaf, Tensor) else np.array(leaf)


def _put(nest: Nest, where: Bool[ndarray, " N"], rows: Nest) -> None:
    def put(target: Any, values: Any) -> None:
        target[torch.from_numpy(where) if isinstance(target, Tensor) else where] = values

    map_nest(put, nest, rows, where="ModelEnvs: what initial_carry gave")
