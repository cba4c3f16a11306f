"""Who steps environments in a benchmark: the barest loop, and rlfeed with its whole contract.

The others are in `rollout_peers`. All act with the same networks: two layers of 64 units, for the actor and, where it
is asked for, for a critic of its own.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from contestants import NotServedError
from gymnasium.spaces import Box, Discrete
from numpy import ndarray
from torch import nn

from rlfeed import PolicyContext, PolicyOutput, ReplayBuffer, Rollout, make_envs
from rlfeed.nest import Nest

Run = Callable[[], object]
UNITS = 64
UNBOUNDED = Box(-np.inf, np.inf, (), np.float32)
DRAWN = 64  # actions that are drawn beforehand where nobody acts


@dataclass(frozen=True)
class Load:
    """Say what a run is.

    Args:
        env_id: The environments' id in Gymnasium.
        num_envs: How many there are.
        length: Steps that a run takes in each.
    """

    env_id: str
    num_envs: int
    length: int

    @property
    def steps(self) -> int:
        """Count the env steps.

        Returns:
            Those of a run, in all environments.
        """
        return self.num_envs * self.length


class Closable(Protocol):
    """Be closed when a benchmark is over."""

    def close(self) -> object:
        """Release processes and memory."""
        ...


class RolloutContestant:
    """Do the work of a rollout benchmark; what a library cannot do stays refused.

    Its constructor imports the library.
    """

    name, peer = "?", True

    def __init__(self) -> None:
        self._open: list[Closable] = []

    def blocks(self, load: Load) -> Run:
        """Collect what an on-policy learner takes: steps with log-probabilities and values.

        Args:
            load: What a run is.

        Returns:
            Collects them.
        """
        raise NotServedError("no blocks of steps")

    def store(self, load: Load, rows: int) -> Run:
        """Collect steps with log-probabilities into a replay buffer.

        Args:
            load: What a run is.
            rows: Steps that the buffer holds.

        Returns:
            Collects them.
        """
        raise NotServedError("no replay buffer")

    def step(self, load: Load) -> Run:
        """Step environments with actions that were drawn beforehand, and do nothing with what they return.

        Args:
            load: What a run is.

        Returns:
            Takes the steps.
        """
        raise NotServedError("no environments of its own")

    def close(self) -> None:
        """End the processes of all runs."""
        for thing in self._open:
            thing.close()
        self._open.clear()

    def _keep(self, thing: Any) -> Any:
        self._open.append(thing)
        return thing


def network(inputs: int, outputs: int) -> nn.Sequential:
    """Make the network that everybody has.

    Args:
        inputs: Numbers in an observation.
        outputs: Numbers that come out.

    Returns:
        The network.
    """
    body = nn.Linear(inputs, UNITS), nn.Tanh(), nn.Linear(UNITS, UNITS), nn.Tanh()
    return nn.Sequential(*body, nn.Linear(UNITS, outputs))


@cache
def spaces_of(env_id: str) -> tuple[Box, Discrete | Box]:
    """Look up what an environment shows and takes.

    Args:
        env_id: Its id in Gymnasium.

    Returns:
        Observation space, a vector of floats, and action space.

    Raises:
        NotServedError: If it is not installed.
    """
    try:
        env = gymnasium.make(env_id)
    except gymnasium.error.DependencyNotInstalled:
        raise NotServedError("not installed") from None
    observation, action = env.observation_space, env.action_space
    env.close()
    if not isinstance(observation, Box) or not isinstance(action, Discrete | Box):
        raise NotServedError(f"{env_id} has other spaces than a vector and a Discrete or Box")
    return observation, action


def draw_actions(load: Load, *, dtype: type | None = None) -> list[ndarray]:
    """Draw actions.

    Args:
        load: For which environments.
        dtype: Of the actions; None: the space's.

    Returns:
        A few batches.
    """
    space = spaces_of(load.env_id)[1]
    space.seed(0)
    return [np.array([space.sample() for _ in range(load.num_envs)], dtype or space.dtype) for _ in range(DRAWN)]


class Acting:
    """Act with a torch actor, and a critic if it is to; actions are drawn in NumPy, whose small calls cost less.

    Args:
        env_id: The environment.
        critic: Whether to give values as well.
    """

    def __init__(self, env_id: str, *, critic: bool) -> None:
        observation, action = spaces_of(env_id)
        self._discrete = isinstance(action, Discrete)
        inputs, outputs = observation.shape[0], int(action.n) if isinstance(action, Discrete) else action.shape[0]
        self._actor, self._critic = network(inputs, outputs), network(inputs, 1) if critic else None
        self._constant = np.float32(outputs / 2 * np.log(2 * np.pi))

    def initial_carry(self, num_envs: int) -> Nest:
        """Remember nothing; see `rlfeed.Policy`."""
        return ()

    def __call__(self, observation: Any, carry: Nest, context: PolicyContext) -> PolicyOutput:
        """Act on every row; see `rlfeed.Policy`."""
        action, extras = self.act(observation, context.generator)
        return PolicyOutput(action, (), extras)

    def act(self, observation: ndarray, generator: np.random.Generator) -> tuple[ndarray, dict[str, ndarray]]:
        """Draw actions.

        Args:
            observation: ``[N, floats]``.
            generator: The source of randomness.

        Returns:
            The actions ``[N, ...]``, and by name their log-probabilities and what the critic says, ``[N]``.
        """
        with torch.inference_mode():
            seen = torch.from_numpy(observation).float()
            if self._discrete:
                scores = torch.log_softmax(self._actor(seen), dim=1).numpy()
                action = (scores + generator.gumbel(size=scores.shape)).argmax(axis=1)
                extras = {"log_prob": scores[np.arange(len(scores)), action]}
            else:
                mean = self._actor(seen).numpy()
                noise = generator.standard_normal(mean.shape, np.float32)  # of standard deviation 1
                action = mean + noise
                extras = {"log_prob": -0.5 * (noise * noise).sum(axis=1) - self._constant}
            if self._critic is not None:
                extras["value"] = self._critic(seen).numpy()[:, 0]
        return action, extras


class Bare(RolloutContestant):
    """Of Gymnasium's environments alone: a list of them, stepped in a loop that writes into arrays made once.

    Nothing is checked, no final observation is kept, nobody counts, and nobody sees an environment break.
    """

    name, peer = "bare loop", False

    def blocks(self, load: Load) -> Run:
        """Collect blocks; see `RolloutContestant.blocks`."""
        acting, generator = Acting(load.env_id, critic=True), np.random.default_rng(0)
        space, actions = spaces_of(load.env_id)
        envs = [self._keep(gymnasium.make(load.env_id)) for _ in range(load.num_envs)]
        now = np.stack([env.reset(seed=row)[0] for row, env in enumerate(envs)]).astype(np.float32)
        by_step = (load.length, load.num_envs)
        observation, action = (np.empty((*by_step, *(part.shape or ())), np.float32) for part in (space, actions))
        reward, log_prob, value = (np.empty(by_step, np.float32) for _ in range(3))
        terminated, truncated = np.zeros(by_step, bool), np.zeros(by_step, bool)
        low, high = (actions.low, actions.high) if isinstance(actions, Box) else (None, None)

        def run() -> None:
            terminated[:] = truncated[:] = False
            for t in range(load.length):
                observation[t] = now
                chosen, extras = acting.act(now, generator)
                action[t], log_prob[t], value[t] = chosen, extras["log_prob"], extras["value"]
                executed = chosen.tolist() if low is None else chosen.clip(low, high)
                for row, env in enumerate(envs):
                    after, reward[t, row], over, late, _ = env.step(executed[row])
                    if over or late:
                        terminated[t, row], truncated[t, row] = over, late
                        after, _ = env.reset()
                    now[row] = after

        return run

    def step(self, load: Load) -> Run:
        """Step environments; see `RolloutContestant.step`."""
        envs = [self._keep(gymnasium.make(load.env_id)) for _ in range(load.num_envs)]
        actions = itertools.cycle([list(batch) for batch in draw_actions(load)])
        for row, env in enumerate(envs):
            env.reset(seed=row)

        def run() -> None:
            for batch in itertools.islice(actions, load.length):
                for env, action in zip(envs, batch, strict=True):
                    _, _, terminated, truncated, _ = env.step(action)
                    if terminated or truncated:
                        env.reset()

        return run


class Rlfeed(RolloutContestant):
    """Of rlfeed, everything switched on.

    Args:
        workers: Processes that step the environments; 0: this one.
    """

    name, peer = "rlfeed", False

    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.name = f"rlfeed, {workers} workers" if workers else "rlfeed, this process"
        self._mode: dict[str, Any] = {"mode": "pool", "layout": workers} if workers else {"mode": "serial"}

    def blocks(self, load: Load) -> Run:
        """Collect blocks; see `RolloutContestant.blocks`."""
        blocks = self._rollout(load, critic=True).blocks(load.length)
        return lambda: next(blocks)

    def store(self, load: Load, rows: int) -> Run:
        """Collect steps; see `RolloutContestant.store`."""
        rollout = self._rollout(load, critic=False)
        spaces = rollout.envs.observation_space, rollout.envs.action_space
        buffer = ReplayBuffer(*spaces, capacity=rows, num_envs=load.num_envs, extras={"log_prob": UNBOUNDED})
        return lambda: rollout.collect(buffer, steps=load.steps)

    def step(self, load: Load) -> Run:
        """Step environments; see `RolloutContestant.step`."""
        envs = self._keep(make_envs(load.env_id, load.num_envs, **self._mode))
        actions = itertools.cycle(draw_actions(load))
        envs.reset(0, [0] * load.num_envs)

        def run() -> None:
            for action in itertools.islice(actions, load.length):
                envs.step(action)

        return run

    def _rollout(self, load: Load, *, critic: bool) -> Rollout:
        handling = "strict" if isinstance(spaces_of(load.env_id)[1], Discrete) else "clip"
        envs = make_envs(load.env_id, load.num_envs, **self._mode)
        return self._keep(Rollout(envs, Acting(load.env_id, critic=critic), actions=handling))
