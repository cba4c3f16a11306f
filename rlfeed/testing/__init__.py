"""Environments with known answers, for tests of rlfeed and of what is built on it."""

from rlfeed.testing.environments import ConstantRewardEnv, IdentifiableEnv

__all__ = ["ConstantRewardEnv", "IdentifiableEnv"]
