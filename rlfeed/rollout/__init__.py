"""Rollouts: iterators that feed a model's outputs back as its next inputs."""

from rlfeed.rollout.actions import Actions
from rlfeed.rollout.actors import Actors, ActorStats
from rlfeed.rollout.feedback import Feedback
from rlfeed.rollout.policy import EpsilonGreedy, FunctionPolicy, ModulePolicy, adapt
from rlfeed.rollout.rollout import Rollout
from rlfeed.rollout.stacks import StackFrames
from rlfeed.rollout.statistics import EpisodeRecord, EpisodeStatistics, Timing
from rlfeed.rollout.weights import Weights

__all__ = [
    "Actions",
    "ActorStats",
    "Actors",
    "EpisodeRecord",
    "EpisodeStatistics",
    "EpsilonGreedy",
    "Feedback",
    "FunctionPolicy",
    "ModulePolicy",
    "Rollout",
    "StackFrames",
    "Timing",
    "Weights",
    "adapt",
]
