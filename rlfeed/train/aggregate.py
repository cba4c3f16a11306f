"""What several seeds say together: interquartile mean, bootstrap intervals, probability of improvement.

A handful of seeds is a small sample of a wide distribution, often with one run that failed: its mean says little, its
best says nothing. The interquartile mean leaves out the lowest and the highest quarter, and the interval says how much
another handful of seeds might differ.

Source:
    Agarwal et al. 2021, Deep reinforcement learning at the edge of the statistical precipice, section 4.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64
from numpy import ndarray
from numpy.typing import ArrayLike

from rlfeed.errors import ConfigError

Statistic = Callable[..., Float64[ndarray, " *resamples"]]


@dataclass(frozen=True, slots=True)
class Estimate:
    """Hold a figure and the interval it was estimated with.

    Args:
        value: The figure.
        low: Where the interval begins.
        high: Where it ends.
    """

    value: float
    low: float
    high: float


def iqm(*tasks: ArrayLike, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Estimate:
    """Take the interquartile mean of all scores, with a stratified bootstrap interval.

    Args:
        *tasks: The scores of each task, ``[seeds]``; where there are several tasks, normalised alike.
        level: Share of resamples inside the interval, above 0 and below 1.
        resamples: How often scores are drawn again, with replacement, each task's among its own; at least 1.
        seed: Of these draws, at least 0.

    Returns:
        The figure and its interval.

    Raises:
        ConfigError: If a task has no scores or one that is not finite, or an argument is wrong.

    Source:
        Agarwal et al. 2021, sections 4.1 and 4.3.
    """
    return _estimate(lambda *scores: interquartile_mean(np.concatenate(scores, axis=-1)), tasks, level, resamples, seed)


def improvement(
    scores: ArrayLike, others: ArrayLike, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Estimate how probable it is that a run of one algorithm beats a run of another; ties count half.

    Args:
        scores: Of the one, ``[seeds]``.
        others: Of the other, ``[other_seeds]``, on the same task.
        level: Share of resamples inside the interval, above 0 and below 1.
        resamples: How often both are drawn again, at least 1.
        seed: Of these draws, at least 0.

    Returns:
        The probability and its interval; one that has 0.5 inside decides nothing.

    Raises:
        ConfigError: If there are no scores or one is not finite, or an argument is wrong.

    Source:
        Agarwal et al. 2021, section 4.3: the statistic of Mann and Whitney.
    """
    return _estimate(probability_of_improvement, (scores, others), level, resamples, seed)


def interquartile_mean(scores: Float[ndarray, "*resamples scores"]) -> Float64[ndarray, " *resamples"]:
    """Average the middle half: a quarter of the scores, rounded down, is left out on either side.

    Args:
        scores: Along the last axis, at least one.

    Returns:
        Their interquartile means.
    """
    count = scores.shape[-1]
    ordered = np.sort(np.asarray(scores, np.float64), axis=-1)
    return ordered[..., count // 4 : count - count // 4].mean(axis=-1)


def probability_of_improvement(
    scores: Float[ndarray, "*resamples scores"], others: Float[ndarray, "*resamples others"]
) -> Float64[ndarray, " *resamples"]:
    """Count the pairs in which a score is the higher one, ties half.

    Args:
        scores: Along the last axis, at least one.
        others: What each is paired with, likewise.

    Returns:
        Shares of all pairs.
    """
    differences = scores[..., :, None] - others[..., None, :]
    return (np.sign(differences).mean(axis=(-2, -1)) + 1) / 2


def _estimate(
    statistic: Statistic, samples: tuple[ArrayLike, ...], level: float, resamples: int, seed: int
) -> Estimate:
    columns = [np.asarray(sample, np.float64) for sample in samples]
    wrong = [
        f"scores {number}: are {column.tolist()}; expected one finite number for each seed, at least one."
        for number, column in enumerate(columns)
        if column.ndim != 1 or not column.size or not np.isfinite(column).all()
    ]
    if not columns:
        wrong.append("scores: there are none; expected those of at least one task.")
    if not 0 < level < 1:
        wrong.append(f"level: is {level}; expected a share above 0 and below 1, such as 0.95.")
    if resamples < 1 or seed < 0:
        wrong.append(f"resamples, seed: are {resamples} and {seed}; expected at least 1 and at least 0.")
    if wrong:
        raise ConfigError(" ".join(wrong))
    generator = np.random.default_rng(seed)
    drawn = [column[generator.integers(len(column), size=(resamples, len(column)))] for column in columns]
    low, high = np.quantile(statistic(*drawn), [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(statistic(*columns)), float(low), float(high))
