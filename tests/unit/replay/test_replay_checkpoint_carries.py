"""Recurrent state in checkpoints: the actor's, stored every so many steps, and the learner's, written back."""

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from support.batches import assert_same

from rlfeed import durable
from rlfeed.errors import CheckpointError
from rlfeed.replay import ReplayBuffer, Sequence, checkpoint
from rlfeed.types import Step

LANES, WIDTH = 2, 3


class Driver:
    """A buffer whose carry at row r of lane l is (l, r, 0); episodes have five steps."""

    def __init__(self, every, rows=60):
        carry = Box(-np.inf, np.inf, (WIDTH,), np.float32)
        self.buffer = ReplayBuffer(
            Discrete(1000), Discrete(2), capacity=LANES * rows, num_envs=LANES, extras={"carry": carry},
            carry_every=every, storage="private",
        )  # fmt: skip
        self.every, self.steps, self.live = every, 0, {}
        self.generator = np.random.default_rng(every)

    def go_on(self, steps):
        for _ in range(steps):
            step, lane = self.steps, np.arange(LANES)
            row = step // 5 * 6 + step % 5
            carry = np.stack([lane, np.full(LANES, row), 0 * lane], 1).astype(np.float32)
            first, last, no = (np.full(LANES, flag) for flag in (step % 5 == 0, step % 5 == 4, False))
            now = np.full(LANES, step)
            self.buffer.add(
                Step(now, 0 * now, now.astype(np.float32), now + 1, last, no, is_first=first, carry=carry)
            )
            self.live |= {(index, row): (index, row, 0) for index in range(LANES) if step % 5 % self.every == 0}
            self.steps += 1

    def write_back(self, count, mark):
        """Rewrite some carries that can still be read, and remember what they are now."""
        head = int(self.buffer._storage.heads()[0, 0])
        places = [place for place in self.live if head - self.buffer._storage.rows <= place[1] < head - 1]
        places = [place for place in places if place[1] % 6]  # first steps keep their zeros
        chosen = [places[i] for i in self.generator.permutation(len(places))[:count]]
        values = np.array([(lane, row, mark) for lane, row in chosen], np.float32)
        ids = np.array([(lane << 44) | row for lane, row in chosen])
        assert self.buffer.update(ids, carry=values) == len(chosen)
        self.live |= {place: (*place, mark) for place in chosen}


def assert_carries(buffer, driver):
    """Every window begins with the carry that its first row has."""
    batch = buffer.sample(400, Sequence(3, stride=driver.every))
    seen = set()
    for identity, carry in zip(batch.ids.tolist(), batch.carry.tolist(), strict=True):
        place = (identity >> 44, identity & (2**44 - 1))
        assert tuple(carry) == (driver.live[place] if place[1] % 6 else (0, 0, 0))
        seen.add(carry[2])
    return seen


@pytest.mark.parametrize("every", [1, 2])
def test_save_load_carries_come_back_those_of_the_learner_too(every, tmp_path):
    driver = Driver(every)
    for number in range(12):
        driver.go_on(int(driver.generator.choice([2, 5, 30])))
        if number > 2:
            driver.write_back(20, number)
        driver.buffer.save(tmp_path / str(number))
        loaded = ReplayBuffer.load(tmp_path / str(number))
        seen = assert_carries(loaded, driver)
        assert (number > 3) <= (len(seen) > 2)  # marks of several rounds
        if number % 4 == 3:
            driver.buffer = loaded
    loaded.save(tmp_path / "again")
    assert_carries(ReplayBuffer.load(tmp_path / "again"), driver)


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_load_every_place_of_a_live_row_holds_what_it_held(every, tmp_path):
    driver = Driver(every)
    for number in range(8):
        driver.go_on(int(driver.generator.choice([1, 13, 70])))
        driver.buffer.save(tmp_path / str(number))
        before, after = driver.buffer._storage, ReplayBuffer.load(tmp_path / str(number))._storage
        committed, reserved = before.heads()[:2]
        for lane in range(LANES):
            begin, end = max(0, int(reserved[lane]) - before.rows), int(committed[lane])
            for section in before.sections:
                pieces = zip(
                    before.pieces(section, lane, begin, end), after.pieces(section, lane, begin, end), strict=True
                )
                assert all(np.array_equal(left, right) for left, right in pieces)


def test_save_only_what_was_written_back_since_is_written(tmp_path):
    driver = Driver(1, rows=600)
    driver.go_on(400)
    driver.write_back(500, 1)
    driver.buffer.save(tmp_path / "0")
    driver.write_back(4, 2)
    driver.buffer.save(tmp_path / "1")
    pitch = driver.buffer._storage.overlay_pitch
    assert (tmp_path / "0" / "carries-000000").stat().st_size == 500 * (8 + pitch)
    assert (tmp_path / "1" / "carries-000000").samefile(tmp_path / "0" / "carries-000000")
    assert (tmp_path / "1" / "carries-000001").stat().st_size == 4 * (8 + pitch)
    driver.buffer.save(tmp_path / "2")
    assert not (tmp_path / "2" / "carries-000002").exists()
    for buffer in (driver.buffer, ReplayBuffer.load(tmp_path / "2")):
        assert {1.0, 2.0} <= assert_carries(buffer, driver)


def test_save_carries_written_back_again_and_again_do_not_pile_up(tmp_path):
    driver = Driver(1)
    driver.go_on(100)
    for number in range(12):
        driver.write_back(80, number)
        driver.buffer.save(tmp_path / str(number))
        sizes = [file.stat().st_size for file in (tmp_path / str(number)).glob("carries-*")]
        assert sum(sizes) <= 3 * driver.buffer._storage.overlay_bytes
    assert len(sizes) < 5
    assert_carries(ReplayBuffer.load(tmp_path / "11"), driver)


def test_load_carries_of_another_layout_are_refused(tmp_path):
    driver = Driver(1)
    driver.go_on(20)
    driver.write_back(5, 1)
    driver.buffer.save(tmp_path / "0")
    state = durable.load_state(tmp_path / "0" / checkpoint.STATE)
    entries = np.frombuffer((tmp_path / "0" / "carries-000000").read_bytes(), np.int64).copy()
    entries[0] = 1 << 40
    with durable.build_directory(tmp_path / "1") as building:
        durable.save_state(building / checkpoint.STATE, state)
        (building / "rows-000000").write_bytes((tmp_path / "0" / "rows-000000").read_bytes())
        (building / "carries-000000").write_bytes(entries.tobytes())
    with pytest.raises(CheckpointError, match="carries-000000: holds carries of another layout"):
        ReplayBuffer.load(tmp_path / "1")


def test_load_next_batches_of_sequences_are_identical(tmp_path):
    driver = Driver(1)
    driver.go_on(90)
    driver.write_back(40, 1)
    driver.buffer.save(tmp_path / "0")
    loaded = ReplayBuffer.load(tmp_path / "0")
    for _ in range(10):
        assert_same(loaded.sample(16, Sequence(3)), driver.buffer.sample(16, Sequence(3)))
