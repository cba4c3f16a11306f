"""What every training loop does: collect, learn, and on the way log, evaluate and save.

What is done next depends on two counters alone, env_steps and updates, so a resumed run goes on where it stood.
`ReplayLoop` learns from samples of a replay, `BlockLoop` from blocks that the policy has just taken.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from rlfeed.envs.resume import told
from rlfeed.errors import ConfigError
from rlfeed.nest import Nest
from rlfeed.train.agent import Agent, Learned
from rlfeed.train.checkpoint import Checkpoint, Checkpoints
from rlfeed.train.collectors import Collector
from rlfeed.train.evaluate import Evaluation
from rlfeed.train.means import Means
from rlfeed.train.schedule import Rounds
from rlfeed.types import Batch, Logger, Policy, PolicyContext, PolicyOutput

Evaluate = Callable[[Policy], Evaluation]
_OPTIONAL = ("learning_starts", "num_workers", "actors")  # settings that may be 0


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Say how long to train, and how often to do what.

    Every interval counts env steps, summed over environments. Several environments step at once: what is due then
    happens at the first step, or the first block, that reaches it.

    Args:
        total_steps: Env steps to train for.
        actors: Processes that step environments, each its own; 0 steps them in the learner: the same run every time.
            With actors it is another run every time: which weights an actor has when is up to the clock.
        actors_ahead: Env steps by which actors may be ahead of what the learner has learned from; beyond, they wait.
        publish_every: Updates from one publication of the learner's weights to the next; actors pull them.
        eval_every: Env steps from one evaluation to the next; the last policy is always evaluated.
        eval_episodes: Episodes of each evaluation, on environments of its own.
        checkpoint_every: Env steps from one checkpoint to the next; the first and the last are always saved.
        log_every: Env steps from one point of the curves to the next.
    """

    total_steps: int = 100_000
    actors: int = 0
    actors_ahead: int = 1_000
    publish_every: int = 20
    eval_every: int = 10_000
    eval_episodes: int = 20
    checkpoint_every: int = 10_000
    log_every: int = 1_000

    def __post_init__(self) -> None:
        values = [(f.name, getattr(self, f.name)) for f in fields(self)]
        least = {name: int(name not in _OPTIONAL) for name, value in values if type(value) is int and name != "seed"}
        wrong = [
            f"{name}: is {value}; expected at least {least[name]}."
            for name, value in values
            if name in least and value < least[name]
        ]
        if wrong := [*wrong, *self.findings()]:
            raise ConfigError(" ".join(wrong))

    def findings(self) -> list[str]:
        """Say what is wrong with settings beside each other.

        Returns:
            One sentence or two for each finding.
        """
        return []


class Loop(ABC):
    """Train an agent; the base of `ReplayLoop` and `BlockLoop`.

    Args:
        config: How long, how often.
        agent: What learns.
        collector: What steps.
        device: Where batches go.
        logger: Receives the curves.
        evaluate: Plays evaluation episodes with a policy, on environments of its own; None: no evaluations.
        checkpoints: Where the run is saved; None: nowhere.
        advance: Told the env steps as they grow, to show progress.
        stop: Asked between steps and updates; once it says True the run is saved and `run` returns.
    """

    def __init__(
        self,
        config: LoopConfig,
        agent: Agent,
        collector: Collector,
        *,
        device: torch.device,
        logger: Logger,
        evaluate: Evaluate | None = None,
        checkpoints: Checkpoints | None = None,
        advance: Callable[[int], None] = lambda env_steps: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.agent, self.collector = config, agent, collector
        self.device, self.checkpoints, self.logger = device, checkpoints, logger
        self._evaluate, self._advance, self._stop = evaluate, advance, stop
        self.updates = 0
        self.evaluation: Evaluation | None = None
        self._published = 0
        self._log_rounds = Rounds(config.log_every)
        self._eval_rounds = Rounds(config.eval_every)
        self._save_rounds = Rounds(config.checkpoint_every)
        self._means = Means(None if checkpoints is None else checkpoints.directory.parent / "diverged.state")

    @property
    def env_steps(self) -> int:
        """Count the steps taken, summed over environments.

        Returns:
            Env steps.
        """
        return self.collector.env_steps

    @abstractmethod
    def collect(self) -> None:
        """Take at least one env step more, or come back soon without."""

    def learn_next(self) -> bool:
        """Do the next piece of learning that is due between two steps.

        Returns:
            False where none is.
        """
        return False

    def waited_s(self) -> float | None:
        """Say how long the learner has waited for batches.

        Returns:
            Seconds since the run began; None where it collects them itself.
        """
        return None

    def saved_parts(self) -> dict[str, Callable[[Path], object]]:
        """Name what is saved beside agent, rollout and counters.

        Returns:
            Functions that write a directory, by its name.
        """
        return {}

    def end(self) -> None:  # noqa: B027 - most loops hold nothing
        """Let go of what only a running loop needs."""

    def loop_scalars(self) -> dict[str, float]:
        """Give what this loop has to tell beside the others.

        Returns:
            Curves by tag.
        """
        return {}

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
                if self.learn_next():
                    continue
                if self._report():
                    return True
                self.collect()
                self._tell()
                self._advance(self.env_steps)
        except _StoppedError:
            pass
        finally:
            self.end()
        self.save()
        return False

    def save(self) -> None:
        """Save a checkpoint of everything: agent, collected steps and counters.

        Raises:
            DivergedError: If a loss is no longer finite: what is saved would be lost anyway.
        """
        self._means.settle()
        if self.checkpoints is None:
            return
        with self.collector.held():
            self._tell()
            self.logger.flush()  # what was logged before a checkpoint is not logged again after a resume
            states = {"rollout": self.collector.state_dict(), "loop": {"updates": self.updates}}
            self.checkpoints.save(
                self.env_steps,
                {"agent": self.agent.state_dict(), **states},
                self.saved_parts(),
                {"updates": self.updates, "environments": states["rollout"]["environments"]},
            )

    def restore(self, checkpoint: Checkpoint) -> str:
        """Go on from a checkpoint.

        Environments come back exact or re-enacted where they can; the others begin their next episode.

        Args:
            checkpoint: The checkpoint.

        Returns:
            How the environments have come back, in a few words.

        Raises:
            CheckpointError: If it is of another agent, seed or number of environments.
        """
        self.agent.load_state_dict(checkpoint.load("agent"))
        self.collector.load_state_dict(checkpoint.load("rollout"))
        self.updates = self._published = checkpoint.load("loop")["updates"]
        self.collector.publish(self.updates)
        return told(self.collector.comebacks())

    def _learn(self, batch: Batch, env_steps: int) -> Learned:
        """Have the agent learn from a batch, and note what it tells."""
        lag = self.collector.lag(batch, self.updates)
        learned = self.agent.learn(batch, env_steps=env_steps)
        self.updates += learned.updates
        self._means.add(batch, {**learned.scalars, **lag}, env_steps, self.updates)
        if self.updates - self._published >= self.config.publish_every:
            self._published = self.updates
            self.collector.publish(self.updates)
        return learned

    def _tell(self) -> None:
        for episode in self.collector.finished():
            self.logger.scalar("charts/episodic_return", episode.total_reward, episode.env_steps)
            self.logger.scalar("charts/episodic_length", episode.length, episode.env_steps)

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
        if self._evaluate is None:
            return
        self.evaluation = self._evaluate(_Stoppable(self.agent.policy, self._stop))
        self.logger.scalar("eval/mean_reward", self.evaluation.mean, self.env_steps)
        self.logger.scalar("eval/mean_ep_length", float(self.evaluation.lengths.mean()), self.env_steps)
        if self.evaluation.success is not None:
            self.logger.scalar("eval/success_rate", self.evaluation.success, self.env_steps)

    def _log(self) -> None:
        now_s, env_steps, statistics = time.perf_counter(), self.env_steps, self.collector.statistics
        elapsed_s, total_s = max(now_s - self._logged_s, 1e-9), max(now_s - self._began_s, 1e-9)
        marks = (env_steps, self.updates, self.waited_s() or 0.0)
        steps, updates, waited_s = (mark - last for mark, last in zip(marks, self._logged, strict=True))
        scalars: dict[str, float] = {
            "time/fps": steps / elapsed_s,
            "charts/SPS": (env_steps - self._began[0]) / total_s,
            **self.agent.scalars(env_steps),
            **self.collector.scalars(),
            **self.loop_scalars(),
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
            if self.waited_s() is not None:
                scalars["feed/wait_ms"] = 1e3 * waited_s / updates
            scalars |= self._means.take()
        for tag, value in scalars.items():
            self.logger.scalar(tag, value, env_steps)
        self._logged_s, self._logged = now_s, marks


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
