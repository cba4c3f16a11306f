"""Train presets on probes, each with settings small enough for a problem of a few observations."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from agents import PRESETS
from agents.training import train
from rlfeed.envs import make_envs
from rlfeed.nest import map_nest
from rlfeed.rollout import EpsilonGreedy
from rlfeed.testing.probes import PROBES
from rlfeed.train.evaluate import evaluate
from rlfeed.types import PolicyContext

NEVER = 10**9
REPLAY = {"learning_starts": 80, "train_every": 8, "updates_per_round": 4, "batch_size": 32}
BLOCKS = {"block_length": 5}  # coprime with the 8 steps of P6
NETWORK = {"lr": 1e-2, "widths": (32,)}


@dataclass(frozen=True)
class Small:
    """Settings of a preset: of its agent and its loop, how many environments and env steps; and of the agent by probe.

    ``recurrent`` says that it has a memory, which ``control`` takes away.
    """

    agent: dict[str, Any]
    loop: dict[str, Any]
    num_envs: int
    total_steps: int
    actions: tuple[str, ...] = ("discrete",)
    control: dict[str, Any] | None = None
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def recurrent(self) -> bool:
        return self.control is not None


_DQN = {"n_step": 3, "target_every": 10, "epsilon_end": 0.2, **NETWORK}
# 50 is far to go for a network that begins at 0.
_ENDLESS_SAC = {"lr": 0.03, "n_step": 5, "tau": 0.5}
_ENDLESS_R2D2 = {"lr": 0.03, "n_step": 5, "length": 8, "target_every": 5}
_REGULATOR_SAC = {"lr": 3e-3, "critic_widths": (64, 64), "tau": 0.05}
_ENDLESS_DQN = {"lr": 0.3, "n_step": 5, "target_every": 5, "widths": ()}
_PPO = {"epochs": 4, "minibatches": 2, **NETWORK}
_PQN = {"epochs": 4, "minibatches": 2, "epsilon_end": 0.2, **NETWORK}
_PQN_RNN = {**_PQN, "core_width": 16}
_R2D2 = {"lr": 1e-2, "widths": (16,), "memory_width": 16, "length": 4, "burn_in": 2, "n_step": 2, "target_every": 20}
_SAC = {
    "lr": 1e-2, "lr_end": 1e-4, "actor_widths": (32,), "critic_widths": (32,), "learn_alpha": False, "alpha": 1e-3,
    "tau": 0.1,
}  # fmt: skip
SMALL = {
    "ppo": Small(_PPO, BLOCKS, 4, 3000, ("discrete", "continuous"), probes={"P7": {"lr": 0.1}}),
    "ppo_rnn": Small(
        {**_PPO, "core_width": 16}, BLOCKS, 4, 4000, ("discrete", "continuous"), {"core": "none"}, {"P7": {"lr": 0.1}}
    ),
    "pqn": Small(_PQN, BLOCKS, 4, 4000, probes={"P7": {"lr": 0.1}}),
    "pqn_rnn": Small(_PQN_RNN, BLOCKS, 4, 4000, control={"core": "none"}, probes={"P7": {"lr": 0.1}}),
    "dqn": Small(_DQN, REPLAY, 1, 800, probes={"P7": _ENDLESS_DQN}),
    "rainbow": Small(
        {**_DQN, "atoms": 21, "v_min": -2.0, "v_max": 2.0},
        REPLAY,
        1,
        1500,
        probes={"P7": {**_ENDLESS_DQN, "v_min": 0.0, "v_max": 60.0, "lr": 0.03}},
    ),
    "sac": Small(
        _SAC,
        REPLAY,
        1,
        4000,
        ("continuous",),
        probes={"P7": _ENDLESS_SAC, "P14": _REGULATOR_SAC, "P15": {"alpha": 0.1}},
    ),
    "r2d2": Small(_R2D2, REPLAY, 4, 3000, control={"memory": "none"}, probes={"P7": _ENDLESS_R2D2}),
}


def config_for(preset: str, probe: str, agent: dict[str, Any], mode: str = "serial", **loop: Any) -> Any:
    """Give a preset's whole run with small settings."""
    small, config = SMALL[preset], PRESETS[preset]()
    settings = {"gamma": PROBES[probe].gamma, **small.agent, **small.probes.get(probe, {}), **agent}
    run = {
        "agent": replace(config.agent, **settings),
        "env": replace(config.env, num_envs=small.num_envs, mode=mode),
        "device": "cpu",
        "total_steps": small.total_steps,
        "eval_every": NEVER,
        "log_every": NEVER,
        "eval_episodes": 500 if probe == "P11" else 20,  # the mean of coins
    }
    return replace(config, **{**run, **small.loop, **loop})


def train_on(preset: str, probe: str, *, agent: Any = None, kwargs: Any = None, **loop: Any) -> tuple[Any, float]:
    """Train a preset on a probe; give the agent and the mean return of greedy episodes."""
    known, kwargs = PROBES[probe], dict(kwargs or {})
    if len(known.actions) > 1:
        kwargs.setdefault("actions", SMALL[preset].actions[0])
    learned, evaluation = train(config_for(preset, probe, agent or {}, **loop), env=partial(known.make, **kwargs))
    return learned, evaluation.mean


def value_errors(agent: Any, probe: str, rows: slice = slice(None)) -> np.ndarray:
    """Compare the values that an agent estimates with the answers, each as the first observation of an episode."""
    seen, values = PROBES[probe].answers(PROBES[probe].gamma)
    if hasattr(agent, "values"):
        estimated = agent.values(map_nest(torch.as_tensor, seen)).numpy()
    else:
        estimated = agent.policy(seen, agent.policy.initial_carry(len(seen)), _first(len(seen))).extras["values"].max(1)
    return np.abs(estimated - values)[rows]


def wobbling_return(agent: Any, probe: str, epsilon: float, episodes: int = 100) -> float:
    """Play with so many random actions among the greedy ones."""
    envs = make_envs(PROBES[probe].make, 5)
    policy = EpsilonGreedy(_Greedy(agent.policy), lambda env_steps: epsilon, envs.action_space)
    return evaluate(envs, policy, episodes=episodes, mode="explore").mean


def _first(rows: int) -> PolicyContext:
    nothing = np.zeros(rows, np.float32)
    ids, generator = np.arange(rows), np.random.default_rng(0)
    return PolicyContext(np.ones(rows, bool), "greedy", ids, 0, nothing.astype(np.int64), nothing, None, generator)


class _Greedy:
    """Let a policy do its best, whatever the mode."""

    def __init__(self, policy: Any) -> None:
        self.initial_carry, self._policy = policy.initial_carry, policy

    def __call__(self, observation: Any, carry: Any, context: PolicyContext) -> Any:
        return self._policy(observation, carry, replace(context, mode="greedy"))
