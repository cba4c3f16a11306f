"""How long training takes beside stable-baselines3: the same task, the same settings, the same number of updates."""

# pyright: reportMissingImports=false

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import command_line
import torch
from command_line import preset_of
from contest import Case, Contest
from contestants import NotServedError
from score_rows import MASKED_CARTPOLE

from agents.training import Silence, build_parts, new_buffer, new_loop, new_source
from rlfeed.envs.source import EnvSource
from rlfeed.errors import EnvMakeError, EnvNotFoundError


@dataclass(frozen=True, kw_only=True)
class Work:
    """Say what both train.

    Args:
        env_id: The environment.
        env_steps: Steps of a run, over all environments.
        updates: Optimiser steps of a run; a contestant that takes another number is no contestant.
        preset: Of rlfeed.
        flags: Its settings, as ``scripts/train.py`` takes them.
        peer: Makes stable-baselines3's model.
        num_envs: Environments stepped together.
        minibatches: Updates that the peer counts as one.
    """

    env_id: str
    env_steps: int
    updates: int
    preset: str
    flags: tuple[str, ...]
    peer: Callable[[Any], Any]
    num_envs: int = 1
    minibatches: int = 1


class Ours:
    """Train with rlfeed, evaluations and curves left out.

    Args:
        work: What is trained.
    """

    name = "rlfeed"

    def __init__(self, work: Work) -> None:
        default = preset_of(work.preset)
        arguments = ["--env.id", work.env_id, "--env.num-envs", f"{work.num_envs}", *work.flags]
        arguments += ["--total-steps", f"{work.env_steps}", "--env.mode", "serial", "--device", "cpu"]
        self._config = command_line.parse(type(default), arguments, default=default, prog=work.preset, description="")
        self._work = work

    def begin(self) -> None:
        """Make a run."""
        torch.set_num_threads(1)  # as scripts/train.py has it
        parts = build_parts(self._config)
        buffer = new_buffer(self._config, parts)
        source = new_source(self._config, parts, buffer)
        self._loop = new_loop(self._config, parts, source, buffer, logger=Silence(), evaluate=None)

    def run(self) -> None:
        """Train to the end."""
        self._loop.run()
        _check(self.name, self._work, self._loop.env_steps, self._loop.updates)


class StableBaselines3:
    """Train with stable-baselines3, as its documentation begins: `make_vec_env`, then ``learn``.

    Args:
        work: What is trained.
    """

    name = "stable-baselines3"

    def __init__(self, work: Work) -> None:
        from stable_baselines3.common.env_util import make_vec_env

        self._work, self._make_envs, self._source = work, make_vec_env, EnvSource(work.env_id)

    def begin(self) -> None:
        """Make a model."""
        self._model = self._work.peer(self._make_envs(self._source, n_envs=self._work.num_envs, seed=0))

    def run(self) -> None:
        """Train to the end."""
        model = self._model.learn(self._work.env_steps)
        _check(self.name, self._work, model.num_timesteps, model._n_updates * self._work.minibatches)


class WrongWorkError(RuntimeError):
    """Report a contestant that has done more or less than it was to do."""


def _check(name: str, work: Work, env_steps: int, updates: int) -> None:
    if (env_steps, updates) != (work.env_steps, work.updates):
        raise WrongWorkError(
            f"{name}: took {env_steps} env steps and {updates} updates; expected {work.env_steps} and {work.updates}."
        )


def _falling(value: float) -> Callable[[float], float]:
    return lambda remaining: remaining * value


def _ppo(envs: Any) -> Any:
    from stable_baselines3 import PPO

    settings = {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8}
    schedules = {"learning_rate": _falling(1e-3), "clip_range": _falling(0.2)}
    return PPO("MlpPolicy", envs, seed=0, device="cpu", **settings, **schedules)


def _recurrent_ppo(envs: Any) -> Any:
    from sb3_contrib import RecurrentPPO
    from torch.nn import ReLU

    settings = {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8}
    schedules = {"learning_rate": _falling(1e-3), "clip_range": _falling(0.2)}
    network = {"activation_fn": ReLU, "lstm_hidden_size": 64, "enable_critic_lstm": True, "net_arch": [64]}
    kwargs = {**settings, **schedules, "policy_kwargs": network}
    return RecurrentPPO("MlpLstmPolicy", envs, seed=0, device="cpu", **kwargs)


def _dqn(envs: Any) -> Any:
    from stable_baselines3 import DQN

    settings = {"learning_rate": 2.3e-3, "batch_size": 64, "buffer_size": 100_000, "learning_starts": 255}
    settings |= {"train_freq": 256, "gradient_steps": 128, "target_update_interval": 256}
    settings |= {"exploration_fraction": 0.16, "exploration_final_eps": 0.04}
    return DQN("MlpPolicy", envs, policy_kwargs={"net_arch": [256, 256]}, seed=0, device="cpu", **settings)


def _sac(envs: Any) -> Any:
    from stable_baselines3 import SAC

    settings = {"learning_rate": 1e-3, "buffer_size": 100_000, "learning_starts": 54}
    return SAC("MlpPolicy", envs, seed=0, device="cpu", **settings)


PPO_FLAGS = ("--block-length", "32", "--agent.epochs", "20", "--agent.minibatches", "1")
PPO_FLAGS += ("--agent.gamma", "0.98", "--agent.lam", "0.8", "--agent.lr", "1e-3", "--agent.clip-end", "0.0")
PPO_FLAGS += ("--agent.no-recompute", "--agent.no-normalize-observation", "--agent.entropy-weight", "0.0")
DQN_FLAGS = ("--learning-starts", "256", "--train-every", "256", "--updates-per-round", "128", "--batch-size", "64")
DQN_FLAGS += ("--agent.target-every", "128", "--agent.widths", "256", "256", "--agent.lr", "2.3e-3")
DQN_FLAGS += ("--agent.n-step", "1", "--agent.no-double")
# learning_starts is at most a tenth of the run: 55 steps, in both.
SAC_FLAGS = ("--learning-starts", "256", "--train-every", "1", "--updates-per-round", "1", "--batch-size", "256")
SAC_FLAGS += ("--agent.lr", "1e-3", "--agent.actor-widths", "256", "256", "--agent.critic-widths", "256", "256")

WORKS = {
    "ppo": Work(
        env_id="CartPole-v1",
        env_steps=5_120,
        updates=400,
        preset="ppo",
        flags=PPO_FLAGS,
        peer=_ppo,
        num_envs=8,
    ),
    "dqn": Work(env_id="CartPole-v1", env_steps=3_072, updates=12 * 128, preset="dqn", flags=DQN_FLAGS, peer=_dqn),
    "sac": Work(env_id="Pendulum-v1", env_steps=550, updates=496, preset="sac", flags=SAC_FLAGS, peer=_sac),
    "sac-mujoco": Work(env_id="HalfCheetah-v4", env_steps=550, updates=496, preset="sac", flags=SAC_FLAGS, peer=_sac),
    "ppo-rnn": Work(
        env_id=MASKED_CARTPOLE,
        env_steps=1_280,
        updates=100,
        preset="ppo_rnn",
        flags=(*PPO_FLAGS, "--agent.widths", "64"),
        peer=_recurrent_ppo,
        num_envs=8,
    ),
}


class AgentsBenchmark:
    """Let both train.

    Args:
        contest: Times it.
    """

    def __init__(self, contest: Contest) -> None:
        self._contest = contest

    def measure(self, name: str) -> None:
        """Train whole runs in alternating rounds.

        Args:
            name: Of the work.
        """
        work, cases, notes = WORKS[name], {}, {}
        for kind in (Ours, StableBaselines3):
            try:
                contestant = kind(work)
                contestant.begin()
            except ImportError:
                notes[kind.name] = "not installed"
            except (EnvNotFoundError, EnvMakeError, NotServedError) as reason:
                notes[kind.name] = str(reason)
            else:
                cases[kind.name] = Case(
                    contestant.run,
                    settle=contestant.begin,  # outside of both clocks
                    per=work.env_steps,
                    peer=kind is StableBaselines3,
                    clock=time.perf_counter,
                    most=1,
                )
        title = (
            f"train {work.preset}, {work.num_envs} x {work.env_id}, {work.env_steps:,} env steps and {work.updates:,}"
        )
        if cases:
            clock = time.process_time
            self._contest.measure(f"{title} updates; wall clock, an env step", cases, notes, cpu=clock, rate=True)
