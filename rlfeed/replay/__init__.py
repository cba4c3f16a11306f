"""The replay buffer: shared lanes of rows, units that say how an index becomes a sample, samplers that say which."""

from rlfeed.replay.buffer import ReplayBuffer
from rlfeed.replay.limiter import Limiter
from rlfeed.replay.samplers import Hindsight, Mixture, Prioritized, Recent, Uniform, sequence_priorities
from rlfeed.replay.stats import ReplayStats
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
    "sequence_priorities",
]
