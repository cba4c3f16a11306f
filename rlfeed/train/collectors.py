"""Where a loop's env steps come from: a rollout in its own process, or actors in theirs."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from rlfeed.log import tags
from rlfeed.replay import ReplayBuffer
from rlfeed.replay.in_order import InOrder
from rlfeed.rollout import Actors, EpisodeRecord, EpisodeStatistics, Rollout
from rlfeed.rollout.acting import VERSION_COLUMN
from rlfeed.types import Batch

_ENDLESS = int(np.iinfo(np.int64).max)


class Collector(Protocol):
    """Take env steps and store them."""

    statistics: EpisodeStatistics

    @property
    def env_steps(self) -> int:
        """Count the steps that the loop has seen."""
        ...

    def collect(self) -> Batch | None:
        """Take at least one step more, or come back soon without.

        Returns:
            The steps, ``[N, T]``, where they are learned from as a block; None where they are stored, or there are
            none yet.
        """
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

    def lag(self, batch: Batch, updates: int) -> dict[str, Tensor]:
        """Say how old a batch is.

        Args:
            batch: What is learned from.
            updates: Of the run, before it.

        Returns:
            Curves by tag; none where the weights that are learned act themselves.
        """
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


class _OwnRollout:
    """Step a rollout in this process, with the weights that are learned."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout
        self.statistics = rollout.statistics
        self._last = rollout.timing()

    @property
    def env_steps(self) -> int:
        """Count the steps.

        Returns:
            Env steps.
        """
        return self._rollout.env_steps

    def finished(self) -> tuple[EpisodeRecord, ...]:
        """Give the episodes that have ended; see `Collector`."""
        return self.statistics.take()

    def publish(self, updates: int) -> None:
        """Do nothing: it acts with the weights themselves; see `Collector`."""

    def scalars(self) -> dict[str, float]:
        """Give the speed of each stage; see `Collector`."""
        last, self._last = self._last, self._rollout.timing()
        return {f"time/{stage}_fps": rate for stage, rate in self._last.rates(last).items() if math.isfinite(rate)}

    def lag(self, batch: Batch, updates: int) -> dict[str, Tensor]:
        """Give nothing; see `Collector`."""
        return {}

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


class RolloutCollector(_OwnRollout):
    """Step a rollout in this process, and store its steps.

    Args:
        rollout: What steps.
        buffer: Where steps go.
        random_steps: Env steps that are taken at random first.
    """

    def __init__(self, rollout: Rollout, buffer: ReplayBuffer, random_steps: int) -> None:
        super().__init__(rollout)
        self._buffer, self._random_steps = buffer, random_steps

    def collect(self) -> None:
        """Take one step in every environment."""
        rollout = self._rollout
        rollout.mode = "random" if rollout.env_steps < self._random_steps else "explore"
        self._buffer.add(next(rollout))


class RolloutBlocks(_OwnRollout):
    """Step a rollout in this process, a block at a time.

    Args:
        rollout: What steps.
        length: Steps of each environment in a block, at least 1.
    """

    def __init__(self, rollout: Rollout, length: int) -> None:
        super().__init__(rollout)
        self._blocks = rollout.blocks(length)

    def collect(self) -> Batch:
        """Take the steps of a block; see `Collector`."""
        return next(self._blocks)


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

    def collect(self) -> Batch | None:
        """Wait for steps, a tenth of a second at most; see `Collector`."""
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

    def lag(self, batch: Batch, updates: int) -> dict[str, Tensor]:
        """Count the updates since those of the weights that acted; see `Collector`."""
        return {"replay/policy_lag": updates - batch.extras[VERSION_COLUMN].float().mean()}

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


class ActorBlocks(ActorsCollector):
    """Let actors step, and give what they store as blocks, each step once.

    The loop's clock counts the steps that it was given. Steps that are stored and not given when a run is saved are
    not learned from after a resume.

    Args:
        actors: What steps.
        module: The learner's, whose weights are published.
        reader: Reads what they store.
        count: Windows in a block.
        ahead: Env steps by which the actors may be ahead of the loop; enough for two windows of every lane.
    """

    def __init__(self, actors: Actors, module: nn.Module, reader: InOrder, *, count: int, ahead: int) -> None:
        super().__init__(actors, module, ahead=ahead, total_steps=_ENDLESS, random_steps=0)
        self._reader, self._count = reader, count
        self._unread = 0  # steps that were stored and are not given, from before a resume

    def collect(self) -> Batch | None:
        """Give a block, or wait for one, a tenth of a second at most; see `Collector`."""
        stored = self._actors.env_steps
        self._actors.limit = self.env_steps + self._unread + self._ahead
        block = self._reader.take(self._count)
        if block is None:
            self._actors.wait(stored)
        else:
            mask: Any = block.mask
            self.env_steps += int(mask.sum())
        return block

    def lag(self, batch: Batch, updates: int) -> dict[str, Tensor]:
        """Count the updates since those of the weights that acted; see `Collector`."""
        mask: Any = batch.mask
        versions = batch.extras[VERSION_COLUMN]
        return {"replay/policy_lag": updates - (versions * mask).sum() / mask.sum()}  # closing rows have none

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the actors; the loop's clock stands where it stood."""
        with self._actors.held():
            yield

    def state_dict(self) -> dict[str, Any]:
        """Give the actors' state, and the loop's clock; see `Stateful`."""
        return {**self._actors.state_dict(), "given": self.env_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the actors' state back; see `Stateful`."""
        super().load_state_dict(state)
        self.env_steps = int(state["given"])
        self._unread = self._actors.env_steps - self.env_steps
