"""Where a loop's env steps come from: a rollout in its own process, or actors in theirs."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import nn

from rlfeed.errors import UnsupportedError
from rlfeed.log import tags
from rlfeed.replay import ReplayBuffer
from rlfeed.rollout import Actors, EpisodeRecord, EpisodeStatistics, Rollout


@runtime_checkable
class ActingAgent(Protocol):
    """Give actors what they act with; what a loop needs of an agent beside `Agent` where it has actors."""

    def actor(self, number: int, count: int) -> tuple[Any, nn.Module]:
        """Give what an actor acts with.

        Args:
            number: The actor's, from 0.
            count: How many there are: each may explore in its own way.

        Returns:
            A policy, and the module whose weights the learner's has learned: its own with 0 and 1.
        """
        ...


class Collector(Protocol):
    """Take env steps and store them."""

    statistics: EpisodeStatistics

    @property
    def env_steps(self) -> int:
        """Count the steps that the loop has seen."""
        ...

    def collect(self) -> None:
        """Store at least one step more, or come back soon without."""
        ...

    def finished(self) -> tuple[EpisodeRecord, ...]:
        """Give the episodes that ended since this was asked last."""
        ...

    def publish(self, updates: int) -> None:
        """Have what acts use the weights of now.

        Args:
            updates: That made them.
        """
        ...

    def scalars(self) -> dict[str, float]:
        """Say what there is to say since this was asked last, by tag."""
        ...

    def held(self) -> Any:
        """Let nobody step in a block of code; what is counted is exact then."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Give the state; see `Stateful`."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state back; see `Stateful`."""
        ...

    def comebacks(self) -> tuple[str, ...]:
        """Say how each environment came back with the state."""
        ...


class RolloutCollector:
    """Step a rollout in this process, with the weights that are learned.

    Args:
        rollout: What steps.
        buffer: Where steps go.
        random_steps: Env steps that are taken at random first.
    """

    def __init__(self, rollout: Rollout, buffer: ReplayBuffer, random_steps: int) -> None:
        self._rollout, self._buffer, self._random_steps = rollout, buffer, random_steps
        self.statistics = rollout.statistics
        self._last = rollout.timing()

    @property
    def env_steps(self) -> int:
        """Count the steps.

        Returns:
            Env steps.
        """
        return self._rollout.env_steps

    def collect(self) -> None:
        """Take one step in every environment."""
        rollout = self._rollout
        rollout.mode = "random" if rollout.env_steps < self._random_steps else "explore"
        self._buffer.add(next(rollout))

    def finished(self) -> tuple[EpisodeRecord, ...]:
        """Give the episodes that ended in the last step; see `Collector`."""
        finished, self.statistics.finished = self.statistics.finished, ()
        return finished

    def publish(self, updates: int) -> None:
        """Do nothing: it acts with the weights themselves; see `Collector`."""

    def scalars(self) -> dict[str, float]:
        """Give the speed of each stage; see `Collector`."""
        last, self._last = self._last, self._rollout.timing()
        return {f"time/{stage}_fps": rate for stage, rate in self._last.rates(last).items() if math.isfinite(rate)}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Do nothing: it steps when told to."""
        yield

    def state_dict(self) -> dict[str, Any]:
        """Give the rollout's state; see `Stateful`."""
        return self._rollout.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the rollout's state back; see `Stateful`."""
        self._rollout.load_state_dict(state)

    def comebacks(self) -> tuple[str, ...]:
        """Say how each environment came back; see `Collector`."""
        return self._rollout.comebacks


class ActorsCollector:
    """Let actors step, and say what of it the loop has seen.

    The loop's clock stands still while it learns what is due: the actors go on meanwhile, by so many steps.

    Args:
        actors: What steps.
        module: The learner's, whose weights are published.
        ahead: Env steps by which the actors may be ahead of the loop.
        total_steps: Env steps at which they stop.
        random_steps: Env steps that are taken at random first.
    """

    def __init__(self, actors: Actors, module: nn.Module, *, ahead: int, total_steps: int, random_steps: int) -> None:
        self._actors, self._module, self._ahead, self._total_steps = actors, module, ahead, total_steps
        self.statistics, self.env_steps = actors.statistics, actors.env_steps
        actors.random_steps, self._told = random_steps, 0
        self._last = self._mark()

    def collect(self) -> None:
        """Wait for steps, a tenth of a second at most."""
        self._actors.limit = min(self.env_steps + self._ahead, self._total_steps)
        self._actors.wait(self.env_steps)
        self.env_steps = self._actors.env_steps

    def finished(self) -> tuple[EpisodeRecord, ...]:
        """Give the episodes that ended since this was asked last; see `Collector`.

        They come in the order of the common clock; one that is told of late counts from where the others are.
        """
        records = []
        for record in sorted(self._actors.finished(), key=lambda record: record.env_steps):
            self._told = max(self._told, record.env_steps)
            records.append(replace(record, env_steps=self._told))
        return tuple(records)

    def publish(self, updates: int) -> None:
        """Publish the learner's weights.

        Args:
            updates: That made them: their version.
        """
        self._actors.weights.publish(self._module, updates)

    def scalars(self) -> dict[str, float]:
        """Give each actor's speed, how old its weights are, and how long it waited; see `Collector`."""
        (then_s, steps, waited_s), now = self._last, self._mark()
        self._last, elapsed_s = now, max(now[0] - then_s, 1e-9)
        stats = self._actors.stats()
        lags = [self._actors.weights.version - entry.version for entry in stats]
        scalars = {
            "actors/policy_lag": float(np.mean(lags)),
            "actors/waited": float(np.mean((now[2] - waited_s) / elapsed_s)),
            "actors/restarts": float(sum(entry.restarts for entry in stats)),
        }
        for actor, rate in enumerate((now[1] - steps) / elapsed_s):
            tag = f"actors/steps_per_s/{actor}"
            tags.register(tag, "env steps / s", f"Env steps per second of actor {actor}, while it waited too.")
            scalars[tag] = float(rate)
        return scalars

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the actors: what is counted is exact then."""
        with self._actors.held():
            self.env_steps = self._actors.env_steps
            yield

    def state_dict(self) -> dict[str, Any]:
        """Give the actors' state; see `Stateful`."""
        return self._actors.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the actors' state back; see `Stateful`."""
        self._actors.load_state_dict(state)
        self.env_steps = self._actors.env_steps
        self._last = self._mark()

    def comebacks(self) -> tuple[str, ...]:
        """Say that actors begin new episodes; see `Collector`."""
        return ("restarted",)

    def _mark(self) -> tuple[float, np.ndarray, np.ndarray]:
        stats = self._actors.stats()
        steps, waited_s = [entry.env_steps for entry in stats], [entry.waited_s for entry in stats]
        return time.perf_counter(), np.array(steps), np.array(waited_s)


def acting_module(agent: Any) -> nn.Module:
    """Give the module whose weights actors pull.

    Args:
        agent: The learner's.

    Returns:
        The module.

    Raises:
        UnsupportedError: If the agent has no actors.
    """
    if not isinstance(agent, ActingAgent):
        raise UnsupportedError(
            f"{type(agent).__name__}: has no method actor(number, count); expected one that gives an actor's policy "
            "and its module. Write it, or use actors=0."
        )
    return agent.actor(0, 1)[1]
