"""Episode statistics by hand count."""

import math

import numpy as np

from rlfeed.rollout import EpisodeRecord, EpisodeStatistics, Timing

BOTH = np.arange(2)


def flags(*values):
    return np.array(values, bool)


def test_statistics_returns_and_lengths_are_exact_for_each_environment():
    statistics = EpisodeStatistics(2)
    statistics.update(BOTH, np.array([0.1, 1.0]), None, None, 2)
    statistics.update(BOTH, np.array([0.2, 2.0]), flags(False, True), None, 4)
    assert statistics.finished == (EpisodeRecord(1, 3.0, 2, 4),)
    statistics.update(BOTH, np.array([0.3, 5.0]), flags(True, False), None, 6)
    assert statistics.finished == (EpisodeRecord(0, 0.1 + 0.2 + 0.3, 3, 6),)
    statistics.update(np.array([1]), np.array([7.0]), flags(True), None, 7)
    assert statistics.finished == (EpisodeRecord(1, 12.0, 2, 7),)
    assert statistics.episodes == 3
    assert statistics.mean_length == 7 / 3


def test_statistics_before_the_first_end_are_nan():
    statistics = EpisodeStatistics(1)
    assert math.isnan(statistics.mean_return)
    assert math.isnan(statistics.mean_length)


def test_statistics_window_holds_the_last_hundred():
    statistics = EpisodeStatistics(1)
    for reward in range(150):
        statistics.update(np.array([0]), np.array([float(reward)]), flags(True), None, reward + 1)
    assert statistics.episodes == 150
    assert statistics.mean_return == sum(range(50, 150)) / 100
    assert len(statistics.window) == 100


def test_statistics_lost_episode_is_none_and_leaves_nothing_to_the_next():
    statistics = EpisodeStatistics(2)
    statistics.update(BOTH, np.array([1.0, 1.0]), None, None, 2)
    statistics.update(BOTH, np.array([1.0, 50.0]), flags(True, True), flags(False, True), 3)
    assert statistics.finished == (EpisodeRecord(0, 2.0, 2, 3),)
    assert (statistics.episodes, statistics.lost) == (1, 1)
    statistics.update(BOTH, np.array([1.0, 4.0]), flags(False, True), None, 5)
    assert statistics.finished == (EpisodeRecord(1, 4.0, 1, 5),)


def test_statistics_restored_go_on_where_they_were():
    statistics = EpisodeStatistics(2)
    statistics.update(BOTH, np.array([3.0, 1.0]), flags(True, False), None, 2, success=np.array([1.0, np.nan]))
    statistics.update(BOTH, np.array([9.0, 1.0]), flags(False, True), None, 4, cut=flags(False, True))
    restored = EpisodeStatistics(2)
    restored.load_state_dict(statistics.state_dict())
    assert (restored.episodes, restored.cut, restored.mean_success) == (1, 1, 1.0)
    restored.update(BOTH, np.array([5.0, 7.0]), flags(True, True), None, 6)
    assert list(restored.window) == [
        EpisodeRecord(0, 3.0, 1, 2, 1.0), EpisodeRecord(0, 14.0, 2, 6), EpisodeRecord(1, 7.0, 1, 6),
    ]  # fmt: skip


def test_statistics_cut_episode_is_none_and_leaves_nothing_to_the_next():
    statistics = EpisodeStatistics(2)
    statistics.update(BOTH, np.array([1.0, 50.0]), flags(True, True), None, 2, cut=flags(False, True))
    assert statistics.finished == (EpisodeRecord(0, 1.0, 1, 2),)
    assert (statistics.episodes, statistics.cut, statistics.lost) == (1, 1, 0)
    statistics.update(BOTH, np.array([1.0, 4.0]), flags(False, True), None, 4)
    assert statistics.finished == (EpisodeRecord(1, 4.0, 1, 4),)


def test_statistics_success_is_averaged_over_the_episodes_that_told():
    statistics = EpisodeStatistics(2)
    assert math.isnan(statistics.mean_success)
    for told in ([1.0, np.nan], [0.0, 1.0]):
        statistics.update(BOTH, np.zeros(2), flags(True, True), None, 2, success=np.array(told))
    assert [record.success for record in statistics.window] == [1.0, None, 0.0, 1.0]
    assert statistics.mean_success == 2 / 3


def test_timing_rates_are_those_between_two_readings():
    before, after = Timing(1.0, 2.0, 3.0, 100), Timing(1.5, 2.0, 5.0, 200)
    rates = after.rates(before)
    assert (rates["policy"], rates["rest"]) == (200.0, 50.0)
    assert math.isnan(rates["environments"])
    assert after.rates()["environments"] == 100.0
