"""The loop of agents that learn from a replay: collect, store, draw, learn, over the whole data path.

    Rollout or Actors ──► ReplayBuffer ──► ReplayLoader ──► DeviceFeed ──► agent.learn
                              ▲                                                │
                              └────────────────── priorities ──────────────────┘

With actors the counter of env_steps is read when all that was due at its last value has been done.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlfeed.errors import NotEnoughDataError
from rlfeed.feed import DeviceFeed, make_loader
from rlfeed.replay import ReplayBuffer
from rlfeed.rollout import Actors, Rollout
from rlfeed.train.agent import ReplayAgent
from rlfeed.train.checkpoint import Checkpoint
from rlfeed.train.collectors import ActorsCollector, RolloutCollector
from rlfeed.train.loop import Loop, LoopConfig
from rlfeed.train.schedule import Rounds

_LOOKAHEAD = 2  # batches for each worker: one that it makes and one that waits


@dataclass(frozen=True, kw_only=True)
class ReplayLoopConfig(LoopConfig):
    """Say how samples reach the learner.

    Args:
        learning_starts: Env steps taken at random before the first update, at least a batch of them; at most a tenth of
            total_steps are. 0 learns as soon as there is anything to draw.
        train_every: Env steps from one round of updates to the next.
        updates_per_round: Updates (optimiser steps) in each round.
        batch_size: Samples per update.
        capacity: Rows of the replay buffer: one per stored step and one per episode; the oldest make room.
        num_workers: Processes that assemble batches; 0 assembles them in the learner, the fastest for small networks.
            Workers have batches drawn two ahead of them: as repeatable a run, and another one.
    """

    learning_starts: int = 1_000
    train_every: int = 64
    updates_per_round: int = 20
    batch_size: int = 256
    capacity: int = 100_000
    num_workers: int = 0

    def findings(self) -> list[str]:
        """Say what is wrong with settings beside each other; see `LoopConfig.findings`."""
        found = super().findings()
        if self.capacity < self.batch_size:
            found.append(
                f"batch_size: is {self.batch_size}, more than the capacity of {self.capacity} rows; expected at most "
                "that. Raise --capacity."
            )
        if 0 < self.learning_starts < min(self.batch_size, self.total_steps // 10):  # a short run has no more to store
            found.append(
                f"batch_size: is {self.batch_size}, more than the {self.learning_starts} steps stored before learning "
                f"starts; expected at most those. Set --learning-starts {self.batch_size} or a smaller batch."
            )
        return found


class ReplayLoop(Loop):
    """Train an agent from replay.

    Args:
        config: How long, how often, how many.
        agent: What learns.
        source: What collects: a rollout with the agent's policy, or actors.
        buffer: Where steps are kept.
        seed: Of the draws.
        **rest: As `Loop` has them.
    """

    config: ReplayLoopConfig
    agent: ReplayAgent

    def __init__(
        self,
        config: ReplayLoopConfig,
        agent: ReplayAgent,
        source: Rollout | Actors,
        buffer: ReplayBuffer,
        *,
        seed: int,
        **rest: Any,
    ) -> None:
        prefill = min(config.learning_starts, config.total_steps // 10)
        if isinstance(source, Rollout):
            collector = RolloutCollector(source, buffer, prefill)
        else:
            module, ahead = agent.actor(0, 1)[1], config.actors_ahead
            collector = ActorsCollector(
                source, module, ahead=ahead, total_steps=config.total_steps, random_steps=prefill
            )
        super().__init__(config, agent, collector, **rest)
        self.buffer = buffer
        self._loader = make_loader(
            buffer,
            agent.unit,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            lookahead=_LOOKAHEAD * config.num_workers,
            on_worker_death="restart",
            seed=seed,
        )
        self._feed: DeviceFeed | None = None
        self._rounds = Rounds(config.train_every, first=prefill)

    def collect(self) -> None:
        """Store at least one env step more; see `Loop`."""
        self.collector.collect()

    def learn_next(self) -> bool:
        """Take an update, where one is due and there is something to draw; see `Loop`."""
        if self.updates >= self._rounds.due(self.env_steps) * self.config.updates_per_round or not self._can_draw():
            return False
        if self._feed is None:
            self._feed = DeviceFeed(self._loader, self.device)
        if (beta := self.agent.beta(self.env_steps)) is not None:
            self.buffer.set_beta(beta)
        batch = next(self._feed)
        learned = self._learn(batch, self.env_steps)
        if learned.priorities is not None:
            self._feed.update_priorities(batch, learned.priorities)
        return True

    def waited_s(self) -> float:
        """Say how long the learner has waited for batches; see `Loop`."""
        return self._feed.stats().wait_s if self._feed else 0.0

    def saved_parts(self) -> dict[str, Callable[[Path], object]]:
        """Name the replay; see `Loop`."""
        return {"replay": self.buffer.save}

    def end(self) -> None:
        """Let the feed go; see `Loop`."""
        if self._feed is not None:
            self._feed.close()
        self._feed = None

    def loop_scalars(self) -> dict[str, float]:
        """Say how full the replay is, and how often a step has been drawn; see `Loop`."""
        replay = self.buffer.stats()
        scalars: dict[str, float] = {"replay/size": replay.steps}
        if self.updates:
            scalars["replay/ratio"] = self.updates * self.config.batch_size / max(replay.inserted, 1)
        return scalars

    def restore(self, checkpoint: Checkpoint) -> str:
        """Go on from a checkpoint, whose replay the loop's buffer holds already.

        Environments that come back go on with the open episodes of the replay. The others begin their next episode;
        their open episodes are cut, which keeps all their steps.

        Args:
            checkpoint: The checkpoint.

        Returns:
            How the environments have come back, in a few words.

        Raises:
            CheckpointError: If it is of another agent, seed or number of environments.
        """
        how = super().restore(checkpoint)
        ways = self.collector.comebacks()
        restarted = [env_id for env_id, way in enumerate(ways) if way.startswith("restarted")]
        if restarted:
            self.buffer.cut(None if len(restarted) == len(ways) else restarted)
        return how

    def _can_draw(self) -> bool:
        """Say whether there is a sample to draw: the prefill may be shorter than one sample of the agent's unit."""
        if self.updates > 0 or self._feed is not None:
            return True
        try:
            self.buffer.sample(1, self.agent.unit)
        except NotEnoughDataError:
            return False
        return True
