"""Samplers say which index is drawn; one per buffer."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Stream = Literal["sample", "loader"]
_STREAMS: dict[Stream, int] = {"sample": 0, "loader": 1}


@dataclass(frozen=True, slots=True)
class Uniform:
    """Draw every valid start with the same probability, first and last included."""


@dataclass(frozen=True, slots=True)
class Prioritized:
    """Draw starts in proportion to priority^alpha.

    Args:
        alpha: 0 is uniform, 1 is fully proportional.
        beta: Exponent of the importance weights, 0 .. 1.
        eta: Share of the maximum in a sequence's priority, eta max + (1 - eta) mean.
    """

    alpha: float = 0.6
    beta: float = 0.4
    eta: float = 0.9


@dataclass(frozen=True, slots=True)
class Recent:
    """Draw newer steps more often.

    Args:
        half_life: Steps inserted since, after which a step is drawn half as often.
    """

    half_life: float


@dataclass(frozen=True)
class Mixture:
    """Draw each sample with one of several samplers.

    Args:
        samplers: Fractions by sampler; they sum to 1.
    """

    samplers: Mapping["Uniform | Prioritized | Recent", float]


@dataclass(frozen=True, slots=True)
class Hindsight:
    """Relabel goals on the gathered copy; for ``Transition(relabel=...)``.

    Args:
        strategy: ``"future"``, ``"final"`` or ``"episode"``: where the new goals come from.
        fraction: Share of the samples that get a new goal, 0 .. 1.
        reward_fn: Computes rewards from achieved and desired goals.
    """

    strategy: Literal["future", "final", "episode"]
    fraction: float
    reward_fn: Callable[..., Any]


Sampler = Uniform | Prioritized | Recent | Mixture


def sampler_to_json(sampler: Sampler) -> dict[str, Any]:
    """Say a sampler in JSON.

    Args:
        sampler: Any of them.

    Returns:
        Its name and its settings.
    """
    if isinstance(sampler, Mixture):
        return {"name": "Mixture", "samplers": [[sampler_to_json(s), share] for s, share in sampler.samplers.items()]}
    return {"name": type(sampler).__name__, **asdict(sampler)}


def sampler_from_json(value: dict[str, Any]) -> Sampler:
    """Read what `sampler_to_json` gave.

    Args:
        value: A name and settings.

    Returns:
        The sampler.

    Raises:
        KeyError: If there is no sampler of that name.
        TypeError: If the settings are not its.
    """
    if value["name"] == "Mixture":
        return Mixture({_plain_sampler(part): share for part, share in value["samplers"]})
    return _plain_sampler(value)


def _plain_sampler(value: dict[str, Any]) -> Uniform | Prioritized | Recent:
    settings = dict(value)
    return {kind.__name__: kind for kind in (Uniform, Prioritized, Recent)}[settings.pop("name")](**settings)


def stream_key(seed: int, stream: Stream, rank: int = 0, turn: int = 0) -> int:
    """Derive the Philox key of one stream of draws: the same seed never gives two streams the same draws.

    Args:
        seed: The run's seed, >= 0.
        stream: Which stream of that seed.
        rank: Which of several learners, >= 0.
        turn: Which pass over a dataset, >= 0.

    Returns:
        64 bits, as int64.
    """
    words = np.random.SeedSequence((seed, _STREAMS[stream], rank, turn)).generate_state(1, np.uint64)
    return int(words.view(np.int64)[0])
