"""The replay buffer: shared lanes of rows, units that say how an index becomes a sample, samplers that say which."""

from rlfeed.replay.buffer import ReplayBuffer, ReplayStats
from rlfeed.replay.limiter import Limiter
from rlfeed.replay.samplers import Hindsight, Mixture, Prioritized, Recent, Uniform
from rlfeed.replay.units import Episode, Sequence, Transition

__all__ = [
    "Episode",
    "Hindsight",
    "Limiter",
    "Mixture",
    "Prioritized",
    "Recent",
    "ReplayBuffer",
    "ReplayStats",
    "Sequence",
    "Transition",
    "Uniform",
]
