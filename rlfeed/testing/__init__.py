"""Environments with known answers, and broken ones, for tests of rlfeed and of what is built on it."""

from rlfeed.testing.broken import BROKEN
from rlfeed.testing.environments import ConstantRewardEnv, HealthyEnv, IdentifiableEnv

__all__ = ["BROKEN", "ConstantRewardEnv", "HealthyEnv", "IdentifiableEnv"]
