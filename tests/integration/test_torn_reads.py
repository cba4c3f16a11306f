"""Readers in another process never see a row that was being written (I4)."""

import multiprocessing

import numpy as np
from gymnasium.spaces import Box, Discrete

from rlfeed.replay import Episode, ReplayBuffer, Transition
from rlfeed.types import Step

WIDTH = 600  # floats: a column of its own, wide enough to be caught half written


def write_for_ever(buffer, ready):
    step, index = 0, 0
    while True:
        first, last = index == 0, index == 6
        observation = np.full((1, WIDTH), step, np.float32)
        action, reward, no = np.array([step % 7]), np.array([step], np.float32), np.array([False])
        buffer.add(
            Step(observation, action, reward, observation + 1, np.array([last]), no, is_first=np.array([first]))
        )
        step, index = step + 1, 0 if last else index + 1
        if step == 200:
            ready.set()


def test_reader_beside_a_writer_sees_no_torn_row():
    buffer = ReplayBuffer(Box(-1, 1e9, (WIDTH,), np.float32), Discrete(7), capacity=24)  # wraps all the time
    ready = multiprocessing.get_context("fork").Event()
    writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(buffer, ready), daemon=True)
    writer.start()
    try:
        assert ready.wait(60)
        before = buffer.stats().inserted
        for _ in range(1500):
            batch = buffer.sample(4, Transition())
            # Row t holds t everywhere; its successor, t + 1: any mix of two writes breaks one of these.
            assert (batch.observation == batch.observation[:, :1]).all()
            assert (batch.next_observation == batch.observation + 1).all()
            assert (batch.reward == batch.observation[:, 0]).all()
            assert (batch.action == batch.reward.long() % 7).all()
            episodes = buffer.sample(1, Episode())
            assert (episodes.observation[0, 1:] == episodes.reward[0, :, None] + 1).all()
            assert episodes.terminated[0].tolist() == [False] * 6 + [True]
        assert buffer.stats().inserted > before + 1000  # the writer really ran beside
    finally:
        writer.kill()
        writer.join()
