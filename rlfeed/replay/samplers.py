"""Samplers say which index is drawn; one per buffer."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float64, Int64

from rlfeed.errors import ConfigError, FieldError

Stream = Literal["sample", "loader", "epoch", "stream"]
Strategy = Literal["future", "final", "episode"]
_STREAMS: dict[Stream, int] = {"sample": 0, "loader": 1, "epoch": 2, "stream": 3}


@dataclass(frozen=True, slots=True)
class Uniform:
    """Draw every valid start with the same probability, first and last included."""


@dataclass(frozen=True, slots=True)
class Prioritized:
    """Draw starts in proportion to priority^alpha.

    A new step has the greatest priority that is stored (1 where there is none), or the one that its actor gave as
    ``extras["priority"]``. A step whose priority is 0 is not drawn; add a constant to what you give where that is not
    meant. A batch's importance weights are ``(N P(i))^-beta``, divided by the greatest of the batch, or by the greatest
    that any stored start would have.

    Args:
        alpha: 0 is uniform, 1 is fully proportional.
        beta: Exponent of the importance weights, 0 .. 1; anneal it with `ReplayBuffer.set_beta`.
        eta: Share of the maximum in a sequence's priority, eta max + (1 - eta) mean; 0 .. 1.
        scale: ``"batch"`` or ``"buffer"``: whose greatest weight becomes 1.

    Raises:
        ConfigError: If one is out of its range.

    Source: Schaul et al. 2016, "Prioritized experience replay", sections 3.3 and 3.4; Kapturowski et al. 2019,
    "Recurrent experience replay in distributed reinforcement learning", section 2.3, for eta.
    """

    alpha: float = 0.6
    beta: float = 0.4
    eta: float = 0.9
    scale: Literal["batch", "buffer"] = "batch"

    def __post_init__(self) -> None:
        wrong = [] if 0.0 <= self.alpha < math.inf else [f"alpha is {self.alpha!r}; expected a number >= 0"]
        outside = {name: value for name, value in (("beta", self.beta), ("eta", self.eta)) if not 0.0 <= value <= 1.0}
        wrong += [f"{name} is {value!r}; expected 0 .. 1" for name, value in outside.items()]
        if self.scale not in ("batch", "buffer"):
            wrong.append(f"scale is {self.scale!r}; expected 'batch' or 'buffer'")
        if wrong:
            raise ConfigError("Prioritized: " + "; ".join(wrong) + ".")


@dataclass(frozen=True, slots=True)
class Recent:
    """Draw newer steps more often.

    Age is counted in rows written to the same lane, times the number of lanes.

    Args:
        half_life: Steps inserted since, after which a step is drawn half as often; > 0.

    Raises:
        ConfigError: If it is not above 0.
    """

    half_life: float

    def __post_init__(self) -> None:
        if not 0.0 < self.half_life < math.inf:
            raise ConfigError(f"Recent: half_life is {self.half_life!r}; expected a number of steps above 0.")


@dataclass(frozen=True)
class Mixture:
    """Draw each sample with one of several samplers, in exact proportion.

    Where one of them is `Prioritized`, importance weights are ``(N P)^-beta`` with P of the whole mixture. The share of
    `Recent` in P counts every row, also those that may start nothing; with burn-in, N counts starts until they are
    overwritten themselves.

    Args:
        samplers: Fractions by sampler; they sum to 1.

    Raises:
        ConfigError: If they do not, or a sampler is a mixture itself, or two are prioritized.
    """

    samplers: Mapping["Uniform | Prioritized | Recent", float]

    def __post_init__(self) -> None:
        kinds = (Uniform, Prioritized, Recent)
        wrong = [f"has a {type(sampler).__name__}" for sampler in self.samplers if not isinstance(sampler, kinds)]
        if sum(isinstance(sampler, Prioritized) for sampler in self.samplers) > 1:
            wrong.append("has two Prioritized, but a buffer keeps one set of priorities")
        if any(isinstance(sampler, Prioritized) and sampler.scale == "buffer" for sampler in self.samplers):
            wrong.append("has Prioritized(scale='buffer'), which only a sampler of its own can be scaled to")
        if not self.samplers:
            wrong.append("is empty")
        elif finding := check_fractions(list(self.samplers.values())):
            wrong.append(finding)
        if wrong:
            raise ConfigError(
                f"Mixture: {'; '.join(wrong)}; expected Uniform, Prioritized or Recent with fractions that sum to 1."
            )


@dataclass(frozen=True, slots=True)
class Hindsight:
    """Relabel goals on the gathered copy; for ``Transition(relabel=...)``.

    The observation is a Dict with observation, achieved_goal and desired_goal. A relabelled sample has the achieved
    goal of another observation of its episode as the desired one, now and next, and the rewards that go with it; ends
    and discounts stay as the environment gave them. Only episodes that have ended or were cut are sampled.

    Args:
        strategy: Whose achieved goal: ``"future"``, of any observation after the step's own; ``"final"``, of the
            episode's last one; ``"episode"``, of any that is stored, but the first.
        fraction: Share of the samples that get a new goal, 0 .. 1.
        reward_fn: Gives the rewards ``[M]`` of M steps from two arrays ``[M, ...]``: the goals that they achieved and
            the goals that are desired.

    Raises:
        ConfigError: If an argument is wrong.

    Source: Andrychowicz et al. 2017, "Hindsight experience replay", section 4.5.
    """

    strategy: Strategy
    fraction: float
    reward_fn: Callable[[np.ndarray, np.ndarray], Any]

    def __post_init__(self) -> None:
        wrong = []
        if self.strategy not in get_args(Strategy):
            wrong.append(f"strategy is {self.strategy!r}; expected one of {get_args(Strategy)}")
        if not isinstance(self.fraction, int | float) or not 0 <= self.fraction <= 1:
            wrong.append(f"fraction is {self.fraction!r}; expected 0 .. 1")
        if not callable(self.reward_fn):
            wrong.append(f"reward_fn is {self.reward_fn!r}; expected a function of achieved and desired goals")
        if wrong:
            raise ConfigError("Hindsight: " + "; ".join(wrong) + ".")


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


def subkey(key: int, index: int) -> int:
    """Derive the key of a part of a stream.

    Args:
        key: Of the stream.
        index: Which part, >= 0.

    Returns:
        64 bits, as int64.
    """
    bits = (key ^ ((index + 1) * 0x9E3779B97F4A7C15)) & (1 << 64) - 1
    return bits - (1 << 64) if bits >> 63 else bits


def check_fractions(fractions: Sequence[float]) -> str:
    """Check that fractions share something out.

    Args:
        fractions: A millionth or more each, and 1 in sum.

    Returns:
        What is wrong, or nothing.
    """
    if not all(1e-6 <= fraction <= 1.0 for fraction in fractions) or abs(sum(fractions) - 1.0) > 1e-6:
        return f"the fractions are {list(fractions)}, {sum(fractions)} in sum"
    return ""


def shares(number: int, count: int, fractions: Sequence[float]) -> tuple[Int64[np.ndarray, " B"], list[int]]:
    """Share draws out in exact proportion: of the first n draws, part c has n times its fraction, to within one or two.

    Args:
        number: The first draw.
        count: B.
        fractions: They sum to 1; a millionth is the finest.

    Returns:
        Which part each draw belongs to, and how many draws before ``number`` each part has had: its own numbering.
    """
    out = np.full(count, len(fractions) - 1, np.int64)
    left = np.arange(count)  # not given to a part yet
    place, before, rest = np.arange(number, number + count, dtype=np.int64), [], Fraction(1)
    first = number
    for part, fraction in enumerate(fractions[:-1]):
        exact = Fraction(fraction).limit_denominator(10**6)
        ratio = min(Fraction(1), (exact / rest).limit_denominator(10**6))
        a, b = ratio.numerator, ratio.denominator
        rounds, r = np.divmod(place, b)
        had = r * a // b
        mine = (r + 1) * a // b > had
        out[left[mine]] = part
        left, place = left[~mine], (rounds * (b - a) + r - had)[~mine]
        before.append(first * a // b)
        first -= before[-1]
        rest -= exact
    return out, [*before, first]


def sequence_priorities(
    values: Float64[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], eta: float
) -> Float64[np.ndarray, " B"]:
    """Give sequences one priority each: eta max + (1 - eta) mean of their steps'.

    Args:
        values: The steps' priorities, >= 0.
        mask: Which steps count.
        eta: Share of the maximum.

    Returns:
        The sequences' priorities; 0 where no step counts.

    Raises:
        FieldError: If the shapes differ.

    Source: Kapturowski et al. 2019, "Recurrent experience replay in distributed reinforcement learning", section 2.3.
    """
    if values.shape != mask.shape or values.ndim != 2:
        raise FieldError(
            f"update_priorities: values has shape {values.shape}; expected {mask.shape}, one per step, or (B,)."
        )
    kept = np.where(mask, values, 0.0)
    if not (np.isfinite(kept) & (kept >= 0.0)).all():
        raise FieldError("update_priorities: values has numbers that are not finite or below 0; expected none.")
    return eta * kept.max(axis=1, initial=0.0) + (1.0 - eta) * kept.sum(axis=1) / np.maximum(mask.sum(axis=1), 1)
