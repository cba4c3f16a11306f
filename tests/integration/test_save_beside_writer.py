"""Saving while another process writes: what is loaded holds only whole rows, and goes on."""

import itertools
import multiprocessing

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from rlfeed.replay import Episode, ReplayBuffer, Transition
from rlfeed.types import Step

WIDTH = 600  # floats: a column of its own, wide enough to be caught half written


def numbered_step(number, first):
    """Step t shows t everywhere, its successor t + 1; episodes have seven steps."""
    now, no = np.full((1, WIDTH), number, np.float32), np.array([False])
    action, reward, last = np.array([number % 7]), np.array([number], np.float32), np.array([number % 7 == 6])
    return Step(now, action, reward, now + 1, last, no, is_first=np.array([first]))


def write_for_ever(buffer, ready):
    for number in itertools.count():
        buffer.add(numbered_step(number, number % 7 == 0))
        if number == 3000:
            ready.set()


@pytest.mark.parametrize("rows", [60, 4000, 30_000], ids=["lapped in a save", "wraps", "grows"])
def test_save_beside_a_writer_loads_whole_rows_and_goes_on(rows, tmp_path):
    buffer = ReplayBuffer(Box(-1, 1e9, (WIDTH,), np.float32), Discrete(7), capacity=rows)
    ready = multiprocessing.get_context("fork").Event()
    writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(buffer, ready), daemon=True)
    writer.start()
    seen = 0
    try:
        assert ready.wait(60)
        for number in range(6):
            before = buffer.stats().inserted
            buffer.save(tmp_path / str(number))
            assert buffer.stats().inserted > before  # the writer really ran beside
            loaded = ReplayBuffer.load(tmp_path / str(number))
            seen += check(loaded)
            go_on(loaded)
            loaded.save(tmp_path / f"{number}-again")
            assert check(ReplayBuffer.load(tmp_path / f"{number}-again")) > 0
    finally:
        writer.kill()
        writer.join()
    assert seen > 0 or rows == 60
    buffer.save(tmp_path / "dead")  # its writer died at any point
    check(ReplayBuffer.load(tmp_path / "dead"))


def check(buffer):
    """Compare what can be drawn with what its number says; give how many steps there are."""
    steps = len(buffer)
    if steps:
        batch = buffer.sample(300, Transition())
        assert (batch.observation == batch.observation[:, :1]).all()
        assert (batch.next_observation == batch.observation + 1).all()
        assert (batch.reward == batch.observation[:, 0]).all()
        assert (batch.action == batch.reward.long() % 7).all()
    if steps > 20:
        episodes = buffer.sample(20, Episode())
        assert (episodes.lengths[episodes.terminated.any(1)] == 7).all()  # the others were cut by go_on
        assert (episodes.reward[:, 0] % 7 == 0).all()
        assert (episodes.terminated == (episodes.reward % 7 == 6)).all()
    return steps


def go_on(buffer):
    """Add two episodes to what was loaded, cutting what is open: nothing that was given up comes back."""
    buffer.cut()
    inserted = buffer.stats().inserted
    start = 7 * (inserted // 7 + 1)
    for number in range(start, start + 14):
        held = len(buffer)
        buffer.add(numbered_step(number, number % 7 == 0))
        assert len(buffer) <= held + 1
    assert buffer.stats().inserted == inserted + 14
