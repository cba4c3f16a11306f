"""Readers in another process never see a row that was being written (I4)."""

import multiprocessing
import time

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

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


NUMBERS = np.arange(1, 9)
LANES = 8
SUMMED = Dict(numbers=Box(-(2**62), 2**62, (8,), np.int64), wide=Box(0, 255, (1100,), np.uint8))


def summed(lanes, number):
    """An observation of every lane that says its lane and number in all its bytes; nothing of it is zero."""
    value = (lanes + 1) * 2**32 + number
    wide = np.repeat((value % 255 + 1).astype(np.uint8)[:, None], 1100, axis=1)
    return {"numbers": value[:, None] * NUMBERS, "wide": wide}


def write_sums(writer, lanes):
    lanes, number = np.array(lanes), 0
    no = np.zeros(len(lanes), bool)
    while True:
        first, last = number % 9 == 0, number % 9 == 8
        action, reward = np.full(len(lanes), number % 7), np.full(len(lanes), number % 1000, np.float32)
        observation, successor = summed(lanes, number), summed(lanes, number + 1)
        step = Step(observation, action, reward, successor, no | last, no, is_first=no | first, env_ids=lanes)
        writer.add(step)
        number += 1


def broken(observation):
    """Which rows are no observation that `summed` could have made."""
    numbers, wide = observation["numbers"].numpy(), observation["wide"].numpy()
    value = numbers[:, 0]
    return (numbers != value[:, None] * NUMBERS).any(1) | (wide != (value % 255 + 1)[:, None]).any(1) | (value == 0)


def read_sums(buffer, rows, report):
    report.send("ready")
    report.recv()
    torn = unwritten = read = 0
    while read < rows:
        batch = buffer.sample(1024, Transition())
        value, after = batch.observation["numbers"][:, 0].numpy(), batch.next_observation["numbers"][:, 0].numpy()
        number, lane = value % 2**32, value // 2**32 - 1
        wrong = broken(batch.observation) | broken(batch.next_observation) | (after != value + 1)
        wrong |= (batch.reward.numpy() != number % 1000) | (batch.action.numpy() != number % 7)
        wrong |= (batch.terminated.numpy() != (number % 9 == 8)) | (batch.ids.numpy() >> 44 != lane)
        torn, unwritten = torn + int(wrong.sum()), unwritten + int((value == 0).sum())
        read += len(batch)
    report.send((read, torn, unwritten))


def stress(rows, writer_methods, reader_methods):
    """Four writers and four readers at once; gives what the readers saw and how many steps were written meanwhile."""
    buffer = ReplayBuffer(SUMMED, Discrete(7), capacity=LANES * 300, num_envs=LANES)
    writers, readers, reports = [], [], []
    for i, method in enumerate(writer_methods):
        lanes = [2 * i, 2 * i + 1]
        arguments = (buffer.writer(lanes), lanes)
        writers.append(multiprocessing.get_context(method).Process(target=write_sums, args=arguments, daemon=True))
    for method in reader_methods:
        report, theirs = multiprocessing.Pipe()
        arguments = (buffer, rows // len(reader_methods), theirs)
        readers.append(multiprocessing.get_context(method).Process(target=read_sums, args=arguments, daemon=True))
        reports.append(report)
    try:
        # One after the other: a process that imports beside others that never pause takes many times as long.
        for process, report in zip(readers, reports, strict=True):
            process.start()
            assert answer(report) == "ready"
        for i, process in enumerate(writers):
            process.start()
            wait_for_rows(buffer, i + 1, 1)
        wait_for_rows(buffer, len(writers), 600)  # every lane has wrapped
        before = buffer.stats().inserted
        for report in reports:
            report.send("begin")
        return np.sum([answer(report) for report in reports], axis=0).tolist(), buffer.stats().inserted - before
    finally:
        for process in (*writers, *readers):
            if process.pid is not None:
                process.kill()
                process.join()


def answer(report):
    assert report.poll(3000)
    return report.recv()


def wait_for_rows(buffer, writers, rows):
    """Wait until each lane of the first writers has so many rows."""
    deadline = time.monotonic() + 200
    heads = buffer._storage.heads()[0, : 2 * writers]
    while (heads < rows).any() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (heads >= rows).all()


def test_four_writers_and_four_readers_no_row_is_torn():
    """Trap 28, feed trap T24, in every start method: rows with sums, read while all lanes wrap again and again."""
    (read, torn, unwritten), written = stress(
        100_000, ("forkserver", "fork", "fork", "fork"), ("spawn", "fork", "fork", "fork")
    )
    assert read >= 100_000
    assert (torn, unwritten) == (0, 0)
    assert written > 4 * LANES * 300


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_four_writers_and_four_readers_ten_million_rows_none_is_torn():
    """Trap 28 at the size of the claim."""
    (read, torn, unwritten), written = stress(10_000_000, ("fork",) * 4, ("fork",) * 4)
    assert read >= 10_000_000
    assert (torn, unwritten) == (0, 0)
    assert written > 100 * LANES * 300
