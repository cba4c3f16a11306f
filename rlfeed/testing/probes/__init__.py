"""Probe environments: small enough that the right answer is known, each made to isolate one part of an agent.

Go through them in order: an agent that fails P5 and passes P1 to P4 mixes up rows of a batch. P1 to P5 are those of
Jones 2021 (Debugging reinforcement learning systems). Environments of two steps do not show what goes wrong in backward
recursions, at truncations, and over resets; the others do.
"""

from rlfeed.testing.probes.base import Probe, ProbeEnv
from rlfeed.testing.probes.control import OffsetEnv, RegulatorEnv, TemperatureEnv
from rlfeed.testing.probes.memory import AlternateEnv, CorridorEnv, LeakEnv, RecallEnv
from rlfeed.testing.probes.table import PROBES
from rlfeed.testing.probes.values import (
    ArmEnv,
    ChainEnv,
    EndlessEnv,
    LotteryEnv,
    MatchEnv,
    PowersEnv,
    RandomLengthEnv,
    SignEnv,
)

__all__ = [
    "PROBES",
    "AlternateEnv",
    "ArmEnv",
    "ChainEnv",
    "CorridorEnv",
    "EndlessEnv",
    "LeakEnv",
    "LotteryEnv",
    "MatchEnv",
    "OffsetEnv",
    "PowersEnv",
    "Probe",
    "ProbeEnv",
    "RandomLengthEnv",
    "RecallEnv",
    "RegulatorEnv",
    "SignEnv",
    "TemperatureEnv",
]
