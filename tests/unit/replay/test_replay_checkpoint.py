"""Saving what is new, loading it verified: the same rows, heads, counters and draws, or an error that says why not."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from support.batches import assert_same
from support.replay_driver import Driver, assert_equal_buffers, assert_holds, row_files
from support.replay_twin import make_step

from rlfeed import durable
from rlfeed.replay import (
    Episode,
    Mixture,
    Prioritized,
    Recent,
    ReplayBuffer,
    Sequence,
    Transition,
    Uniform,
    checkpoint,
)
from rlfeed.replay.samplers import sampler_from_json, sampler_to_json
from rlfeed.replay.storage import Section
from rlfeed.types import Step

RESERVED, EPISODES, STEPS = 1, 2, 3  # lines of Storage.heads


def new_bytes(directory):
    """What a saved directory takes beside what others hold too."""
    return sum(file.stat().st_size for file in directory.iterdir() if file.stat().st_nlink == 1)


@pytest.mark.parametrize("seed", range(6))
def test_save_load_save_at_any_point_gives_the_same_next_batches(seed, tmp_path):
    """Trap 32: what was loaded is saved and loaded again; trap 33: nothing is there twice."""
    driver = Driver(seed)
    copies = []
    for number in range(8):
        driver.go_on(int(driver.generator.choice([1, 3, 20, 80])), *copies)
        driver.buffer.save(tmp_path / str(number))
        loaded = ReplayBuffer.load(tmp_path / str(number))
        loaded.save(tmp_path / f"{number}-again")
        again = ReplayBuffer.load(tmp_path / f"{number}-again")
        for copy in (*copies, loaded, again):
            copy._drawn = driver.buffer._drawn
            start = driver.buffer._drawn
            if driver.twin.starts(Episode()) and driver.twin.starts(Sequence(2, burn_in=1)):
                assert_equal_buffers(copy, driver.buffer, batches=1)
            driver.buffer._drawn = start
        copies = [loaded, again]
    assert_holds(again, driver.twin)


def test_load_next_hundred_batches_are_identical_while_both_go_on(tmp_path):
    driver = Driver(seed=1)
    driver.go_on(150)
    driver.buffer.save(tmp_path / "first")
    driver.go_on(20)
    driver.buffer.sample(5, Transition())
    driver.buffer.save(tmp_path / "second")
    loaded = ReplayBuffer.load(tmp_path / "second")
    for _ in range(34):
        assert_equal_buffers(loaded, driver.buffer, batches=1)
        driver.go_on(2, loaded)


@pytest.mark.parametrize(
    "sampler", [Prioritized(), Recent(40.0), Mixture({Uniform(): 0.25, Prioritized(0.9): 0.75})], ids=repr
)
def test_load_next_hundred_batches_of_any_sampler_are_identical_priorities_included(sampler, tmp_path):
    """Trap 32: priorities that do not come back, or only once."""
    driver = Driver(seed=2, sampler=sampler)
    unit, copies, prioritized = Transition(n_step=2), [], not isinstance(sampler, Recent)
    for number in range(100):
        driver.go_on(2, *copies)
        if number in (20, 21, 60):
            source = copies[0] if number == 60 else driver.buffer  # the second generation is saved of a loaded one
            source.save(tmp_path / str(number))
            copies.insert(0, ReplayBuffer.load(tmp_path / str(number)))
        batch = driver.buffer.sample(16, unit)
        others = [copy.sample(16, unit) for copy in copies]
        for other in others:
            assert_same(other, batch)
        if prioritized:
            values = driver.generator.random(16)
            for buffer, given in zip((driver.buffer, *copies), (batch, *others), strict=True):
                buffer.update_priorities(given.ids, values)
    assert [copy.sampler for copy in copies] == [sampler] * 3


@pytest.mark.parametrize("seed", [3, 4])
def test_load_directory_names_the_first_row_of_every_live_episode(seed, tmp_path):
    driver = Driver(seed)
    driver.go_on(300)
    driver.buffer.save(tmp_path / "saved")
    storage = ReplayBuffer.load(tmp_path / "saved")._storage
    size = storage.lanes * storage.entries * 4
    directory = storage.memory.bytes[storage.directory_offset :][:size].view(np.uint32).reshape(storage.lanes, -1)
    checked = 0
    for lane, twin in enumerate(driver.twin.lanes):
        for row in twin.live():
            if twin.rows[row].index == 0:
                assert directory[lane, twin.rows[row].episode % storage.entries] == row % storage.rows
                checked += 1
    assert checked > 5


@pytest.mark.parametrize("ahead", [{RESERVED: 2}, {RESERVED: 1, EPISODES: 1}, {RESERVED: 2, STEPS: 1}], ids=str)
def test_save_beside_a_writer_that_was_killed_in_a_step_holds_what_was_committed(ahead, tmp_path):
    driver = Driver(lanes=1)
    driver.go_on(100)
    for line, change in ahead.items():
        driver.buffer._storage.heads()[line] += change
    driver.buffer.save(tmp_path / "saved")
    loaded = ReplayBuffer.load(tmp_path / "saved")
    driver.twin.lanes[0].capacity -= ahead[RESERVED]
    assert_holds(loaded, driver.twin)
    assert loaded._storage.heads()[EPISODES, 0] == driver.twin.lanes[0].episodes


@pytest.mark.parametrize("kind", ["private", "memmap"])
def test_load_storage_kind_comes_back(kind, tmp_path):
    driver = Driver(storage=kind, path=tmp_path / "rows.bin" if kind == "memmap" else None)
    driver.go_on(100)
    driver.buffer.save(tmp_path / "saved")
    driver.buffer = None
    loaded = ReplayBuffer.load(tmp_path / "saved")
    assert loaded.storage_kind == kind
    assert_holds(loaded, driver.twin)


def test_load_empty_buffer_and_lanes_gives_them_back(tmp_path):
    driver = Driver()
    driver.buffer.save(tmp_path / "empty")
    loaded = ReplayBuffer.load(tmp_path / "empty")
    assert len(loaded) == 0
    loaded.add(make_step(driver.twin, [1], [(False, False)], rewards=[1.0]))
    loaded.save(tmp_path / "one")
    assert_holds(ReplayBuffer.load(tmp_path / "one"), driver.twin)


def test_save_what_is_new_is_written_and_the_rest_linked(tmp_path):
    driver = Driver(rows=1000)
    driver.go_on(500)
    driver.buffer.save(tmp_path / "full")
    full = new_bytes(tmp_path / "full")
    driver.go_on(10)
    driver.buffer.save(tmp_path / "delta")
    assert row_files(tmp_path / "delta") == ["rows-000000", "rows-000001"]
    assert (tmp_path / "full" / "rows-000000").samefile(tmp_path / "delta" / "rows-000000")
    assert new_bytes(tmp_path / "delta") < 0.05 * full
    shutil.rmtree(tmp_path / "full")  # every directory stands alone
    assert_holds(ReplayBuffer.load(tmp_path / "delta"), driver.twin)


def test_save_after_load_goes_on_from_what_was_loaded(tmp_path):
    driver = Driver(rows=200)
    driver.go_on(300)
    driver.buffer.save(tmp_path / "0")
    driver.buffer = ReplayBuffer.load(tmp_path / "0")
    driver.go_on(5)
    driver.buffer.save(tmp_path / "1")
    assert (tmp_path / "0" / "rows-000000").samefile(tmp_path / "1" / "rows-000000")
    assert_holds(ReplayBuffer.load(tmp_path / "1"), driver.twin)


def test_save_into_a_directory_that_is_moved_afterwards_is_still_linked(tmp_path):
    """As a checkpoint of a run is: it is built under a temporary name."""
    driver = Driver(rows=200)
    for number in range(3):
        driver.go_on(150 if number == 0 else 5)
        with durable.build_directory(tmp_path / str(number)) as building:
            driver.buffer.save(building / "replay")
        durable.verify_directory(tmp_path / str(number))
    assert row_files(tmp_path / "2" / "replay") == ["rows-000000", "rows-000001", "rows-000002"]
    assert_holds(ReplayBuffer.load(tmp_path / "2" / "replay"), driver.twin)


@pytest.mark.parametrize("gone", ["removed", "emptied", "cut short", "other disk"])
def test_save_without_what_was_saved_before_is_full(gone, tmp_path, monkeypatch):
    driver = Driver(rows=200)
    driver.go_on(150)
    driver.buffer.save(tmp_path / "0")
    driver.go_on(5)
    driver.buffer.save(tmp_path / "1")
    if gone == "removed":
        shutil.rmtree(tmp_path / "1")
    elif gone == "emptied":
        (tmp_path / "1" / "rows-000001").unlink()  # the first file can still be linked
    elif gone == "cut short":
        (tmp_path / "1" / "rows-000001").unlink()
        (tmp_path / "1" / "rows-000001").write_bytes(b"x")
    else:

        def refuse(*_, **__):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
    driver.go_on(5)
    driver.buffer.save(tmp_path / "2")
    assert row_files(tmp_path / "2") == ["rows-000002"]
    assert_holds(ReplayBuffer.load(tmp_path / "2"), driver.twin)


def test_save_files_of_dead_rows_are_left_behind_and_few_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MOST_SAVES", 5)
    driver = Driver(rows=60)
    most = 0
    for number in range(40):
        driver.go_on(6)
        driver.buffer.save(tmp_path / str(number))
        names = row_files(tmp_path / str(number))
        spans = durable.load_state(tmp_path / str(number) / checkpoint.STATE)["spans"]
        assert (spans[:, 1] - spans[:, 0]).sum() <= 2 * driver.buffer.stats().rows + 18
        most = max(most, len(names))
    assert most == 5
    assert_holds(ReplayBuffer.load(tmp_path / "39"), driver.twin)


def test_save_a_buffer_sent_to_another_process_starts_with_everything(tmp_path):
    driver = Driver()
    driver.go_on(50)
    driver.buffer.save(tmp_path / "0")
    twin = object.__new__(ReplayBuffer)
    twin.__setstate__(driver.buffer.__getstate__())
    twin.save(tmp_path / "1")
    assert row_files(tmp_path / "1") == ["rows-000000"]
    assert not (tmp_path / "0" / "rows-000000").samefile(tmp_path / "1" / "rows-000000")


def test_load_a_lane_that_was_open_goes_on_and_one_that_was_cut_does_not(tmp_path):
    driver = Driver(lanes=2)
    for _ in range(3):
        driver.buffer.add(make_step(driver.twin, [0, 1], [(False, False)] * 2, rewards=[1.0, 2.0]))
    driver.buffer.save(tmp_path / "0")
    driver.buffer.cut([1])  # changes a row that was saved
    driver.twin.lanes[1].cut()
    driver.buffer.save(tmp_path / "1")
    driver.buffer = ReplayBuffer.load(tmp_path / "1")
    driver.go_on(20)
    assert_holds(driver.buffer, driver.twin)
    assert ReplayBuffer.load(tmp_path / "1").cut() == 1


@pytest.mark.parametrize("ahead", [1, 7, 30, 500])
def test_save_what_a_writer_overwrites_meanwhile_is_given_up_and_stays_so(ahead, tmp_path, monkeypatch):
    """Rows that may be torn are dead in what is loaded, also when the next steps are added there."""
    driver = Driver(lanes=1, rows=30)
    driver.go_on(100)
    copies = checkpoint.copy_rows

    def copies_beside_a_writer(storage, spans, reserved):
        storage.heads()[RESERVED] += ahead  # announced before the copy has ended
        begin, end = spans[:, 0].tolist()
        for section in storage.sections:
            for piece in storage.pieces(section, 0, begin, min(end, end + ahead - 30)):
                piece[:] = 255
        yield from copies(storage, spans, reserved)

    monkeypatch.setattr(checkpoint, "copy_rows", copies_beside_a_writer)
    driver.buffer.save(tmp_path / "0")
    monkeypatch.undo()
    loaded, lane = ReplayBuffer.load(tmp_path / "0"), driver.twin.lanes[0]
    reserved = len(lane.rows) + min(ahead, 30)
    if ahead >= 30:  # nothing is left to go on from
        lane.cut()
    for _ in range(40):
        lane.capacity = len(lane.rows) - (max(reserved, len(lane.rows)) - 30)
        assert len(loaded) == len(driver.twin)
        if len(loaded):
            assert set(loaded.sample(50, Transition()).ids.tolist()) <= driver.twin.starts(Transition())
        loaded.add(make_step(driver.twin, [0], [(False, False)], rewards=[1.0]))
    lane.capacity = 30
    loaded.save(tmp_path / "1")
    assert_holds(ReplayBuffer.load(tmp_path / "1"), driver.twin)


class Counter:
    """A part of a buffer, such as a priority tree."""

    def __init__(self, value):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_load_parts_take_back_what_was_saved_whenever_they_come(tmp_path):
    driver = Driver()
    driver.go_on(5)
    driver.buffer.keep("tree", Counter(np.arange(3)))
    driver.buffer._storage.words(3, 5)[:] = 7, 2**62
    driver.buffer.save(tmp_path / "0")
    ReplayBuffer.load(tmp_path / "0").save(tmp_path / "1")  # nobody asked for the tree here
    loaded, tree = ReplayBuffer.load(tmp_path / "1"), Counter(None)
    loaded.keep("tree", tree)
    assert tree.value.tolist() == [0, 1, 2]
    assert loaded._storage.words(3, 5).tolist() == [7, 2**62]


@pytest.mark.parametrize(
    "sampler",
    [Uniform(), Prioritized(0.7, 0.5, 0.8), Recent(1000.0), Mixture({Uniform(): 0.25, Prioritized(1.0): 0.75})],
    ids=repr,
)
def test_sampler_from_json_gives_the_sampler(sampler, tmp_path):
    durable.write_json(tmp_path / "f", sampler_to_json(sampler))
    assert sampler_from_json(durable.read_json(tmp_path / "f")) == sampler


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [(0, 0, []), (0, 7, [0, 1, 2]), (2, 4, [0, 1]), (6, 7, [2]), (11, 15, [3, 4]), (13, 17, [4, 0]), (30, 30, [])],
)
def test_pieces_a_section_with_one_place_to_three_rows_gives_the_places_of_the_rows(begin, end, expected):
    driver = Driver(lanes=2)
    storage, section = driver.buffer._storage, Section(0, 8, 5, every=3)
    storage.memory.bytes[:80] = np.repeat(np.arange(10, dtype=np.uint8), 8)
    pieces = storage.pieces(section, 1, begin, end)
    assert [int(value) - 5 for piece in pieces for value in piece[::8]] == expected
    storage.memory.bytes[:80] = 0


LOAD_AND_MEASURE = """
import pathlib, sys
from rlfeed.replay import ReplayBuffer
def bytes_of(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = bytes_of("VmRSS")
buffer = ReplayBuffer.load(sys.argv[1])
print(bytes_of("VmHWM") - before, buffer.stats().nbytes, len(buffer))
"""


def test_load_takes_the_memory_of_one_buffer(tmp_path):
    """Trap 33: dreamerv3#103 held its replay twice after loading."""
    buffer = ReplayBuffer(Box(-1, 1, (10_000,)), Discrete(2), capacity=2000)
    observation, no = np.zeros((1, 10_000), np.float32), np.array([False])
    for i in range(1999):
        action, reward, first = np.array([0]), np.zeros(1, np.float32), np.array([i == 0])
        buffer.add(Step(observation, action, reward, observation, no, no, is_first=first))
    buffer.save(tmp_path / "saved")
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_MEASURE, tmp_path / "saved"],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    taken, nbytes, steps = map(int, done.stdout.split())
    assert steps == len(buffer) == 1999
    assert nbytes == buffer.stats().nbytes > 80_000_000
    assert taken < 1.2 * nbytes
