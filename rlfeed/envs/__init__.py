"""Environments: made by name, and one contract for what comes out of them."""

from rlfeed.envs.autoreset import Envs, Outcome, Ready
from rlfeed.envs.check import Finding, check_env
from rlfeed.envs.envpool import EnvPoolEnvs
from rlfeed.envs.faults import Fault
from rlfeed.envs.gym_vector import VectorEnvs
from rlfeed.envs.make import as_envs, make_envs
from rlfeed.envs.model import ModelEnvs
from rlfeed.envs.moments import RunningMoments
from rlfeed.envs.normalize import NormalizedEnvs
from rlfeed.envs.pettingzoo import ParallelEnvs
from rlfeed.envs.seeds import NumberedEpisodes, episode_seed
from rlfeed.envs.serial import SerialEnvs
from rlfeed.envs.source import EnvSource
from rlfeed.envs.vector import PoolEnvs

__all__ = [
    "EnvPoolEnvs",
    "EnvSource",
    "Envs",
    "Fault",
    "Finding",
    "ModelEnvs",
    "NormalizedEnvs",
    "NumberedEpisodes",
    "Outcome",
    "ParallelEnvs",
    "PoolEnvs",
    "Ready",
    "RunningMoments",
    "SerialEnvs",
    "VectorEnvs",
    "as_envs",
    "check_env",
    "episode_seed",
    "make_envs",
]
