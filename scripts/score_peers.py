"""Score stable-baselines3 in the same harness: the same environments, evaluations and episodes."""

# pyright: reportMissingImports=false

from dataclasses import replace
from typing import Any

import command_line
import numpy as np
import torch
from command_line import preset_of
from score_rows import PEER, Row
from score_runs import Look
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn

from agents.training import EVALUATION_ENVS, build_envs
from rlfeed.envs.source import EnvSource
from rlfeed.train.evaluate import Evaluation, evaluate
from rlfeed.train.schedule import Rounds
from rlfeed.types import Mode


class Grid(BaseFeaturesExtractor):
    """See a grid ``[H, W, C]`` through the one convolution of MinAtar's authors, 16 channels of 3 x 3.

    Args:
        observation_space: The grid.
    """

    def __init__(self, observation_space: Any) -> None:
        height, width, channels = observation_space.shape
        super().__init__(observation_space, features_dim=16 * (height - 2) * (width - 2))
        self.convolution = nn.Conv2d(channels, 16, kernel_size=3)

    def forward(self, grid: Tensor) -> Tensor:
        """Encode a batch.

        Args:
            grid: ``[B, H, W, C]`` float.

        Returns:
            ``[B, features]``.
        """
        return self.convolution(grid.permute(0, 3, 1, 2)).relu().flatten(1)


NETWORK = {"features_extractor_class": Grid, "net_arch": [128]}
SETTINGS: dict[str, dict[str, Any]] = {
    # Young and Tian 2019, appendix, with Adam.
    "dqn": {
        "num_envs": 1,
        "learning_rate": 2.5e-4,
        "buffer_size": 100_000,
        "learning_starts": 5_000,
        "batch_size": 32,
        "train_freq": 1,
        "target_update_interval": 1_000,
        "exploration_fraction": 0.2,
        "exploration_final_eps": 0.1,
    },
    # gymnax-blines, agents/*-MinAtar/ppo.yaml.
    "ppo": {
        "num_envs": 64,
        "n_steps": 128,
        "batch_size": 1_024,
        "n_epochs": 4,
        "learning_rate": 5e-4,
        "gamma": 0.999,
        "gae_lambda": 0.95,
        "clip_range": 0.2,
        "ent_coef": 0.01,
    },
}


class Peer:
    """Train an algorithm of stable-baselines3.

    Args:
        row: What is trained.
        seed: The run's.
    """

    def __init__(self, row: Row, seed: int) -> None:
        algorithm = row.preset.removeprefix(PEER)
        default: Any = preset_of("dqn")  # for its flags: environment, steps and evaluations are anybody's
        arguments = row.arguments(seed)
        self._config = command_line.parse(type(default), arguments, default=default, prog=row.name, description="")
        self.settings = dict(SETTINGS[algorithm])
        settings = dict(self.settings)
        source = EnvSource(self._config.env.id, dict(self._config.env.kwargs), ())
        envs = DummyVecEnv([source] * settings.pop("num_envs"))
        kind: Any = {"dqn": DQN, "ppo": PPO}[algorithm]
        self._model = kind("MlpPolicy", envs, policy_kwargs=NETWORK, seed=seed, device="cpu", **settings)
        torch.set_num_threads(1)
        evaluation = replace(self._config.env, mode="serial")
        self._evaluation_envs = build_envs(evaluation, min(row.episodes, EVALUATION_ENVS))

    @property
    def updates(self) -> int:
        """Count the optimiser steps.

        Returns:
            Updates; PPO counts epochs itself.
        """
        minibatches = 1
        if isinstance(self._model, PPO):
            minibatches = self._model.n_steps * self._model.n_envs // self._model.batch_size
        return self._model._n_updates * minibatches

    def train(self, look: Look) -> None:
        """Train to the end; see `Run`."""
        config = self._config
        self._model.learn(config.total_steps, callback=_Looks(look, config.eval_every, config.total_steps))
        look(self._model.num_timesteps)  # not before the last updates

    def play(self, episodes: int, seed: int, mode: Mode) -> Evaluation:
        """Let the policy of now play; see `Run`."""

        def act(observation: np.ndarray) -> np.ndarray:
            return self._model.predict(observation, deterministic=mode == "greedy")[0]

        return evaluate(self._evaluation_envs, act, episodes=episodes, seed=seed)

    def training_return(self) -> None:
        """Tell nothing: its monitors are left out; see `Run`."""

    def close(self) -> None:
        """Close the environments; see `Run`."""
        self._model.get_env().close()
        self._evaluation_envs.close()


class _Looks(BaseCallback):
    """Evaluate whenever it is due before the end."""

    def __init__(self, look: Look, every: int, total_steps: int) -> None:
        super().__init__()
        self._look, self._rounds, self._total_steps = look, Rounds(every), total_steps
        self._next = every

    def _on_step(self) -> bool:
        if self._next <= self.num_timesteps < self._total_steps:
            self._look(self.num_timesteps)
            self._next = self._rounds.next(self.num_timesteps)
        return True
