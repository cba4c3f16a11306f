"""Scores of several seeds: golden rows, the slow obvious twin, and what nobody should average."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlfeed.errors import ConfigError
from rlfeed.train.aggregate import improvement, interquartile_mean, iqm, probability_of_improvement

SCORES = st.floats(-1e3, 1e3)


def slow_interquartile_mean(scores):
    middle = sorted(scores)
    for _ in range(len(scores) // 4):
        middle = middle[1:-1]
    return sum(middle) / len(middle)


def test_interquartile_mean_golden_row_leaves_out_the_outlier():
    assert interquartile_mean(np.array([0, 1, 2, 3, 4, 5, 6, 100.0])) == 3.5


def test_interquartile_mean_of_five_is_that_of_the_middle_three():
    assert interquartile_mean(np.array([500.0, 0.0, 480.0, 490.0, 500.0])) == pytest.approx(490)


@given(arrays(float, st.integers(1, 12), elements=SCORES))
def test_interquartile_mean_is_that_of_the_slow_twin(scores):
    assert interquartile_mean(scores) == pytest.approx(slow_interquartile_mean(scores.tolist()))


@pytest.mark.parametrize("count", range(1, 13))
def test_interquartile_mean_is_scipys(count):
    stats = pytest.importorskip("scipy.stats")
    scores = np.random.default_rng(count).normal(size=count)

    assert interquartile_mean(scores) == pytest.approx(stats.trim_mean(scores, 0.25))


def test_iqm_interval_is_that_of_every_possible_resample():
    """Oracle: three scores have 27 resamples, alike probable; 2.5 of them on either side are outside."""
    scores = [1.0, 2.0, 10.0]
    means = sorted(slow_interquartile_mean(drawn) for drawn in itertools.product(scores, repeat=3))

    estimate = iqm(scores, level=1 - 5 / 27, resamples=50_000)

    assert estimate.value == pytest.approx(13 / 3)
    assert (estimate.low, estimate.high) == pytest.approx((means[2], means[-3]))


def test_iqm_several_tasks_draws_each_among_its_own():
    """A resample that mixed the tasks would now and then be all of one."""
    estimate = iqm([0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], level=0.999)

    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((3 / 5, 3 / 5, 3 / 5))


def test_iqm_same_seed_gives_the_same_interval_and_another_another():
    scores = np.random.default_rng(0).normal(size=7)

    assert iqm(scores, resamples=100) == iqm(scores, resamples=100)
    assert iqm(scores, resamples=100) != iqm(scores, resamples=100, seed=1)


def test_iqm_one_seed_has_no_width():
    assert iqm([3.0]) == iqm([3.0, 3.0, 3.0])


def test_iqm_interval_covers_as_often_as_it_says():
    """Of 200 samples of 20 normal scores the interval of 90 % has their centre inside in about 180; small samples
    make it a little too narrow."""
    generator = np.random.default_rng(0)
    estimates = [iqm(generator.normal(size=20), level=0.9, resamples=400) for _ in range(200)]

    assert 160 <= sum(estimate.low <= 0 <= estimate.high for estimate in estimates) <= 194


@given(arrays(float, st.integers(1, 6), elements=SCORES), arrays(float, st.integers(1, 6), elements=SCORES))
def test_probability_of_improvement_counts_pairs(scores, others):
    wins = sum((a > b) + 0.5 * (a == b) for a, b in itertools.product(scores, others))

    assert probability_of_improvement(scores, others) == pytest.approx(wins / (len(scores) * len(others)))


def test_improvement_better_in_every_pair_is_certain():
    estimate = improvement([3.0, 4.0], [1.0, 2.0, 2.5])

    assert (estimate.low, estimate.value, estimate.high) == (1.0, 1.0, 1.0)


def test_improvement_alike_scores_decide_nothing():
    estimate = improvement([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])

    assert estimate.low < 0.5 == estimate.value < estimate.high


@pytest.mark.parametrize("scores", [[], [1.0, float("nan")], [[1.0, 2.0]]])
def test_iqm_scores_that_are_none_are_refused(scores):
    with pytest.raises(ConfigError, match=r"scores 1: are .*expected one finite number for each seed"):
        iqm([1.0], scores)


def test_iqm_wrong_arguments_are_refused_together():
    with pytest.raises(ConfigError, match=r"there are none.*level: is 95.*resamples, seed: are 0 and -1"):
        iqm(level=95, resamples=0, seed=-1)
