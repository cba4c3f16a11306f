"""The off-policy loop: collect, store, draw, learn, over the whole data path, for any agent.

    Rollout or Actors ──► ReplayBuffer ──► ReplayLoader ──► DeviceFeed ──► agent.learn

What is done next depends on two counters alone, env_steps and updates, so a resumed run goes on where it stood. With
actors the counter of env_steps is read when all that was due at its last value has been done.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from rlfeed.envs.resume import told
from rlfeed.errors import ConfigError, DivergedError, NotEnoughDataError
from rlfeed.feed import DeviceFeed, make_loader
from rlfeed.nest import Nest
from rlfeed.replay import ReplayBuffer
from rlfeed.replay.units import Unit
from rlfeed.rollout import Actors, Rollout
from rlfeed.rollout.acting import VERSION_COLUMN
from rlfeed.train.checkpoint import Checkpoint, Checkpoints
from rlfeed.train.collectors import ActorsCollector, Collector, RolloutCollector, acting_module
from rlfeed.train.evaluate import Evaluation
from rlfeed.train.schedule import Rounds
from rlfeed.types import Batch, Logger, Policy, PolicyContext, PolicyOutput

_LOOKAHEAD = 2  # batches for each worker: one that it makes and one that waits


class Agent(Protocol):
    """Act and learn; what the loop needs of an algorithm.

    ``policy`` explores in mode ``"explore"`` and does its best in mode ``"greedy"``; ``unit`` is what a sample of the
    replay becomes: `Transition`, `Sequence` or `Episode`.
    """

    @property
    def policy(self) -> Policy:
        """Give what acts."""
        ...

    @property
    def unit(self) -> Unit:
        """Give what a sample becomes."""
        ...

    def learn(self, batch: Batch, *, env_steps: int) -> Mapping[str, Tensor]:
        """Take one optimiser step.

        Args:
            batch: Samples, on the agent's device.
            env_steps: Steps taken so far, the clock of schedules.

        Returns:
            Scalars by tag, left on the device.
        """
        ...

    def scalars(self, env_steps: int) -> Mapping[str, float]:
        """Say where the schedules stand.

        Args:
            env_steps: Steps taken so far.

        Returns:
            Scalars by tag.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Give the state; see `Stateful`."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a state back; see `Stateful`."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Say how long to train, how often to do what, and how samples reach the learner.

    Every interval counts env steps, summed over environments. Several environments step at once: what is due then
    happens at the first step that reaches it.

    Args:
        total_steps: Env steps to train for.
        learning_starts: Env steps taken at random before the first update; at most a tenth of total_steps.
        train_every: Env steps from one round of updates to the next.
        updates_per_round: Updates (optimiser steps) in each round.
        batch_size: Samples per update.
        capacity: Rows of the replay buffer: one per stored step and one per episode; the oldest make room.
        actors: Processes that step environments, each its own; 0 steps them in the learner: the same run every time.
            With actors it is another run every time: which weights an actor has when is up to the clock.
        actors_ahead: Env steps by which actors may be ahead of what the learner has learned from; beyond, they wait.
        publish_every: Updates from one publication of the learner's weights to the next; actors pull them.
        num_workers: Processes that assemble batches; 0 assembles them in the learner, the fastest for small networks.
            Workers have batches drawn two ahead of them: as repeatable a run, and another one.
        eval_every: Env steps from one evaluation to the next; the last policy is always evaluated.
        eval_episodes: Episodes of each evaluation, on environments of its own.
        checkpoint_every: Env steps from one checkpoint to the next; the first and the last are always saved.
        log_every: Env steps from one point of the curves to the next.
    """

    total_steps: int = 60_000
    learning_starts: int = 1_000
    train_every: int = 64
    updates_per_round: int = 20
    batch_size: int = 256
    capacity: int = 100_000
    actors: int = 0
    actors_ahead: int = 1_000
    publish_every: int = 20
    num_workers: int = 0
    eval_every: int = 10_000
    eval_episodes: int = 20
    checkpoint_every: int = 10_000
    log_every: int = 1_000

    def __post_init__(self) -> None:
        wrong = []
        for f in fields(LoopConfig):
            value, least = getattr(self, f.name), 0 if f.name in ("learning_starts", "num_workers", "actors") else 1
            if value < least:
                wrong.append(f"{f.name}: is {value}; expected at least {least}.")
        if wrong:
            raise ConfigError(" ".join(wrong))


class OffPolicyLoop:
    """Train an agent from replay.

    Args:
        config: How long, how often, how many.
        agent: What learns.
        rollout: What collects: a rollout with the agent's policy, or actors.
        buffer: Where steps are kept.
        device: Where batches go.
        seed: Of the draws.
        evaluate: Plays evaluation episodes with a policy, on environments of its own.
        checkpoints: Where the run is saved.
        logger: Receives the curves.
        advance: Told the env steps after every step, to show progress.
        stop: Asked after every step and update; once it says True the run is saved and `run` returns.
    """

    def __init__(
        self,
        config: LoopConfig,
        agent: Agent,
        rollout: Rollout | Actors,
        buffer: ReplayBuffer,
        *,
        device: torch.device,
        seed: int,
        evaluate: Callable[[Policy], Evaluation],
        checkpoints: Checkpoints,
        logger: Logger,
        advance: Callable[[int], None] = lambda env_steps: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.agent, self.buffer = config, agent, buffer
        self.device, self.checkpoints, self.logger = device, checkpoints, logger
        self._evaluate, self._advance, self._stop = evaluate, advance, stop
        self.updates = 0
        self.evaluation: Evaluation | None = None

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

        prefill = min(config.learning_starts, config.total_steps // 10)
        self._collector = self._collector_for(rollout, prefill)
        self._rounds = Rounds(config.train_every, first=prefill)
        self._log_rounds = Rounds(config.log_every)
        self._eval_rounds = Rounds(config.eval_every)
        self._save_rounds = Rounds(config.checkpoint_every)
        self._means = _Means()

    @property
    def env_steps(self) -> int:
        """Count the steps taken, summed over environments.

        Returns:
            Env steps.
        """
        return self._collector.env_steps

    def _collector_for(self, rollout: Rollout | Actors, prefill: int) -> Collector:
        if isinstance(rollout, Rollout):
            return RolloutCollector(rollout, self.buffer, prefill)
        ahead, total = self.config.actors_ahead, self.config.total_steps
        module = acting_module(self.agent)
        return ActorsCollector(rollout, module, ahead=ahead, total_steps=total, random_steps=prefill)

    def run(self) -> bool:
        """Train to the end, or until stopped; either way the run is saved as it stands.

        Returns:
            True at the end, False where it was stopped before.

        Raises:
            DivergedError: If a loss or a gradient is no longer finite.
        """
        self._schedule()
        if self.env_steps == 0:
            self.save()  # a run that is killed early is resumed like any other
        try:
            while not self._stop():
                if self.updates < self._updates_due() and self._can_draw():
                    self._learn()
                elif self._report():
                    return True
                else:
                    self._collect()
        except _StoppedError:
            pass
        finally:
            if self._feed is not None:
                self._feed.close()
            self._feed = None
        self.save()
        return False

    def save(self) -> None:
        """Save a checkpoint of everything: agent, replay, rollout and counters.

        Raises:
            DivergedError: If a loss is no longer finite: what is saved would be lost anyway.
        """
        self._means.check(self.env_steps, self.updates)
        with self._collector.held():
            self._tell()
            self.logger.flush()  # what was logged before a checkpoint is not logged again after a resume
            states = {"rollout": self._collector.state_dict(), "loop": {"updates": self.updates}}
            self.checkpoints.save(
                self.env_steps,
                {"agent": self.agent.state_dict(), **states},
                {"replay": self.buffer.save},
                {"updates": self.updates, "environments": states["rollout"]["environments"]},
            )

    def restore(self, checkpoint: Checkpoint) -> str:
        """Go on from a checkpoint, whose replay the loop's buffer holds already.

        Environments come back exact or re-enacted where they can, and go on with the open episodes of the replay. The
        others begin their next episode; their open episodes are cut, which keeps all their steps.

        Args:
            checkpoint: The checkpoint.

        Returns:
            How the environments have come back, in a few words.

        Raises:
            CheckpointError: If it is of another agent, seed or number of environments.
        """
        self.agent.load_state_dict(checkpoint.load("agent"))
        self._collector.load_state_dict(checkpoint.load("rollout"))
        self.updates = checkpoint.load("loop")["updates"]
        self._collector.publish(self.updates)
        ways = self._collector.comebacks()
        restarted = [env_id for env_id, way in enumerate(ways) if way.startswith("restarted")]
        if restarted:
            self.buffer.cut(None if len(restarted) == len(ways) else restarted)
        return told(ways)

    def _updates_due(self) -> int:
        return self._rounds.due(self.env_steps) * self.config.updates_per_round

    def _can_draw(self) -> bool:
        """Say whether there is a sample to draw: the prefill may be shorter than one sample of the agent's unit."""
        if self.updates > 0 or self._feed is not None:
            return True
        try:
            self.buffer.sample(1, self.agent.unit)
        except NotEnoughDataError:
            return False
        return True

    def _collect(self) -> None:
        self._collector.collect()
        self._tell()
        self._advance(self.env_steps)

    def _tell(self) -> None:
        for episode in self._collector.finished():
            self.logger.scalar("charts/episodic_return", episode.total_reward, episode.env_steps)
            self.logger.scalar("charts/episodic_length", episode.length, episode.env_steps)

    def _learn(self) -> None:
        if self._feed is None:
            self._feed = DeviceFeed(self._loader, self.device)
        batch = next(self._feed)
        scalars = self.agent.learn(batch, env_steps=self.env_steps)
        if isinstance(self._collector, ActorsCollector):
            lag = self.updates - batch.extras[VERSION_COLUMN].float().mean()
            scalars = {**scalars, "replay/policy_lag": lag}
        self._means.add(scalars)
        self.updates += 1
        if self.updates % self.config.publish_every == 0:
            self._collector.publish(self.updates)

    def _schedule(self) -> None:
        """Set when what is due next; the clocks start here."""
        self._next_log, self._next_eval, self._next_save = (
            rounds.next(self.env_steps) for rounds in (self._log_rounds, self._eval_rounds, self._save_rounds)
        )
        self._began_s = self._logged_s = time.perf_counter()
        self._began = self._logged = (self.env_steps, self.updates, 0.0)

    def _report(self) -> bool:
        """Do what is due at this step besides learning: log, evaluate, save; True once the run is at its end."""
        env_steps, ended = self.env_steps, self.env_steps >= self.config.total_steps
        if ended or env_steps >= self._next_log:
            self._log()
            self._next_log = self._log_rounds.next(env_steps)
        paused_s = time.perf_counter()
        if ended or env_steps >= self._next_eval:
            self._play()
            self._next_eval = self._eval_rounds.next(env_steps)
        if ended or env_steps >= self._next_save:
            self.save()
            self._next_save = self._save_rounds.next(env_steps)
        # Rates are of collecting and learning: evaluations and saves would only dent them.
        paused_s = time.perf_counter() - paused_s
        self._began_s += paused_s
        self._logged_s += paused_s
        return ended

    def _play(self) -> None:
        self.evaluation = self._evaluate(_Stoppable(self.agent.policy, self._stop))
        self.logger.scalar("eval/mean_reward", self.evaluation.mean, self.env_steps)
        self.logger.scalar("eval/mean_ep_length", float(self.evaluation.lengths.mean()), self.env_steps)
        if self.evaluation.success is not None:
            self.logger.scalar("eval/success_rate", self.evaluation.success, self.env_steps)

    def _log(self) -> None:
        now_s, env_steps, statistics = time.perf_counter(), self.env_steps, self._collector.statistics
        elapsed_s, total_s = max(now_s - self._logged_s, 1e-9), max(now_s - self._began_s, 1e-9)
        wait_s = self._feed.stats().wait_s if self._feed else 0.0
        marks = (env_steps, self.updates, wait_s)
        steps, updates, waited_s = (mark - last for mark, last in zip(marks, self._logged, strict=True))
        replay = self.buffer.stats()
        scalars = {
            "time/fps": steps / elapsed_s,
            "charts/SPS": (env_steps - self._began[0]) / total_s,
            "replay/size": replay.steps,
            **self.agent.scalars(env_steps),
            **self._collector.scalars(),
        }
        if statistics.window:
            scalars["rollout/ep_rew_mean"] = statistics.mean_return
            scalars["rollout/ep_len_mean"] = statistics.mean_length
        if statistics.lost:
            scalars["rollout/lost"] = statistics.lost
        if not math.isnan(success := statistics.mean_success):
            scalars["rollout/success_rate"] = success
        if updates:
            scalars["time/updates_per_s"] = updates / elapsed_s
            scalars["feed/wait_ms"] = 1e3 * waited_s / updates
            scalars["replay/ratio"] = self.updates * self.config.batch_size / max(replay.inserted, 1)
            scalars |= self._means.check(env_steps, self.updates)
        for tag, value in scalars.items():
            self.logger.scalar(tag, value, env_steps)
        self._means, self._logged_s, self._logged = _Means(), now_s, marks


class _Means:
    """Average scalars where they are computed; reading them waits for the device, so it is done once per log."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, scalars: Mapping[str, Tensor]) -> None:
        self._count += 1
        for tag, value in scalars.items():
            self._sums[tag] = self._sums[tag] + value if tag in self._sums else value

    def check(self, env_steps: int, updates: int) -> dict[str, float]:
        """Give the means; one value that is not finite in any update is enough to raise."""
        if not self._count:
            return {}
        values = (torch.stack(list(self._sums.values())) / self._count).tolist()
        means = dict(zip(self._sums, values, strict=True))
        for tag, value in means.items():
            if not math.isfinite(value):
                raise DivergedError(
                    f"{tag}: is {value} at env step {env_steps}, in the last {self._count} of {updates} updates; "
                    "expected finite values. Lower the learning rate, or look at the rewards and observations."
                )
        return means


class _StoppedError(Exception):
    """The run was asked to stop in the middle of an evaluation."""


class _Stoppable:
    """Ask before every action whether to stop: an evaluation may take longer than a user likes to wait."""

    def __init__(self, policy: Policy, stop: Callable[[], bool]) -> None:
        self._policy, self._stop = policy, stop

    def initial_carry(self, num_envs: int) -> Nest:
        return self._policy.initial_carry(num_envs)

    def __call__(self, observation: Nest, carry: Nest, context: PolicyContext) -> PolicyOutput:
        if self._stop():
            raise _StoppedError
        return self._policy(observation, carry, context)
