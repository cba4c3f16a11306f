"""What a training run is made of, as frozen dataclasses.

The docstrings are the command line's help, and the fields are the keys of a run's ``config.json``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch

from rlfeed.envs.faults import MAX_RESTARTS, OnFault
from rlfeed.envs.make import EnvsMode
from rlfeed.errors import ConfigError, UnsupportedError, suggest
from rlfeed.train.agent import Agent
from rlfeed.train.block_loop import BlockLoopConfig
from rlfeed.train.loop import LoopConfig
from rlfeed.train.replay_loop import ReplayLoopConfig


@dataclass(frozen=True, kw_only=True)
class AgentConfig(ABC):
    """Hold an algorithm's settings; each agent has a subclass.

    Args:
        compile: Whether updates are compiled by torch.compile: faster where they are many, after a minute or so in
            which they are compiled. Results differ in the last digits.
        bfloat16: Whether forward passes of updates multiply matrices in bfloat16: for large networks on a GPU.
    """

    compile: bool = False
    bfloat16: bool = False

    @abstractmethod
    def build(
        self,
        observation_space: Any,
        action_space: Any,
        *,
        total_steps: int,
        seed: int,
        device: torch.device,
        num_envs: int = 1,
    ) -> Agent:
        """Make the agent.

        Args:
            observation_space: The Gymnasium space of one environment's observations.
            action_space: The Gymnasium space of one environment's actions.
            total_steps: Environment steps of the whole run, the end of every schedule.
            seed: The run's seed.
            device: Where the agent learns and acts.
            num_envs: Environments that step together.

        Returns:
            The agent, untrained.

        Raises:
            SpaceError: If the agent cannot play these spaces.
        """

    def findings(self, run: Any) -> list[str]:
        """Say what is wrong with these settings beside those of the run.

        Args:
            run: The `TrainConfig` they belong to.

        Returns:
            One sentence or two for each finding.
        """
        return []


def check(settings: Any, rules: dict[str, tuple[bool, str]]) -> None:
    """Check an agent's settings, all of them at once.

    Args:
        settings: The configuration.
        rules: By field: whether it holds, and what is expected.

    Raises:
        ConfigError: If a rule does not hold.
    """
    broken = [(name, say) for name, (ok, say) in rules.items() if not ok]
    if wrong := [f"agent.{name}: is {getattr(settings, name)}; expected {say}." for name, say in broken]:
        raise ConfigError(" ".join(wrong))


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Say which environment to train on.

    Args:
        id: Gymnasium id, path/to/file.py:ClassName, or package.module:ClassName.
        num_envs: Environments stepped together, each with its own episodes.
        kwargs: Arguments of the environment's constructor. One at a time as --env.kwargs.NAME VALUE, where VALUE is
            read as JSON or a Python literal if it is one, else as text.
        wrappers: Wrappers, applied in order, as NAME or NAME:key=value,key=value. The name is one of
            gymnasium.wrappers, atari, package.module:Name, or path/to/file.py:Name. May be given several times.
        normalize_observation: Whether observations of floats get mean 0 and variance 1; the statistics are saved.
        normalize_reward: Whether rewards are divided by the deviation of the discounted return; evaluations and curves
            show rewards as they were.
        mode: Where environments are stepped: serial (this process), pool (worker processes), auto (decides between
            these by a short measurement), or sync, async and vector (Gymnasium's). The episodes are the same.
        layout: Of a pool: auto, a number of processes, or PROCESSESxENVIRONMENTS such as 2x8.
        on_fault: When an environment raises, hangs, breaks its contract or dies: raise ends the run, restart loses the
            step and begins a new episode; by default restart in a pool and raise elsewhere.
        max_restarts: With restart: how often in a row, without an episode that ends, one environment is begun anew.
        step_timeout_s: Of pool and async: seconds that one call of an environment may take.
    """

    id: str = "CartPole-v1"
    num_envs: int = 1
    kwargs: dict[str, Any] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()
    normalize_observation: bool = False
    normalize_reward: bool = False
    mode: EnvsMode = "auto"
    layout: str = "auto"
    on_fault: OnFault | None = None
    max_restarts: int = MAX_RESTARTS
    step_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.num_envs < 1:
            raise ConfigError(f"env.num_envs: is {self.num_envs}; expected at least 1.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """Hold everything that decides a training run; `ReplayTrainConfig` and `BlockTrainConfig` say how it learns.

    Args:
        env: The environment.
        agent: The algorithm's settings.
        seed: Seeds networks, episodes, exploration and draws: the same seed gives the same run on one device.
        device: Where to learn: cpu, cuda, cuda:N, mps, or auto (cuda, then mps, then cpu).
        run_dir: Directory of this run; default runs/ENVIRONMENT/PRESET/DATE-TIME-sSEED-HEX.
    """

    env: EnvConfig = field(default_factory=EnvConfig)
    agent: AgentConfig
    seed: int = 0
    device: str = "auto"
    run_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed < 0:
            raise ConfigError(f"seed: is {self.seed}; expected 0 or more.")
        if self.actors and (self.env.normalize_observation or self.env.normalize_reward):
            raise UnsupportedError(
                f"env.normalize_*: is asked for with {self.actors} actors, each of which would have statistics of its "
                "own; expected --actors 0. Leave one of the two out."
            )

    def findings(self) -> list[str]:
        """Say what is wrong with settings beside each other; see `LoopConfig.findings`."""
        return [*super().findings(), *self.agent.findings(self)]


@dataclass(frozen=True, kw_only=True)
class ReplayTrainConfig(TrainConfig, ReplayLoopConfig):
    """Hold everything that decides a run of an agent that learns from a replay."""


@dataclass(frozen=True, kw_only=True)
class BlockTrainConfig(TrainConfig, BlockLoopConfig):
    """Hold everything that decides a run of an agent that learns from what it has just done."""

    def findings(self) -> list[str]:
        """Say what is wrong with settings beside each other; see `LoopConfig.findings`."""
        found, least = super().findings(), 2 * self.actors * self.env.num_envs * (self.block_length + 1)
        if self.actors_ahead < least:
            found.append(
                f"actors_ahead: is {self.actors_ahead}; expected at least {least}: two blocks of {self.block_length} "
                f"steps of the {self.actors * self.env.num_envs} environments of all actors. Set it, or shorten blocks."
            )
        return found


def to_dict(config: Any) -> dict[str, Any]:
    """Turn a configuration into what JSON can hold.

    Args:
        config: A configuration dataclass.

    Returns:
        Nested dicts of its fields.
    """
    return asdict(config)


def from_dict(default: Any, values: Mapping[str, Any], where: str = "config") -> Any:
    """Take a configuration back from nested dicts.

    Args:
        default: A configuration of the type to make; it gives the fields that are not in ``values``.
        values: Fields by name, as `to_dict` gave them.
        where: What the dict is called in an error.

    Returns:
        A configuration of the default's type.

    Raises:
        ConfigError: If a key is no field; the nearest is suggested.
    """
    names = [f.name for f in fields(default)]
    unknown = [f"{where}.{key}: is not a setting.{suggest(key, names)}" for key in values if key not in names]
    if unknown:
        raise ConfigError(" ".join(unknown))
    changes = {key: _decode(getattr(default, key), value, f"{where}.{key}") for key, value in values.items()}
    return replace(default, **changes)


def _decode(default: Any, value: Any, where: str) -> Any:
    if is_dataclass(default):
        return from_dict(default, value, where)
    return tuple(value) if isinstance(default, tuple) else value  # JSON knows lists only


def differences(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """Compare two configurations of one type.

    Args:
        old: A configuration.
        new: Another.

    Returns:
        (name as in the command line's flags, old value, new value) for each field that differs.
    """
    found = []
    for f in fields(old):
        a, b = getattr(old, f.name), getattr(new, f.name)
        if is_dataclass(a) and type(a) is type(b):
            found += [(f"{f.name}.{name}", x, y) for name, x, y in differences(a, b)]
        elif a != b:
            found.append((f.name, a, b))
    return found


