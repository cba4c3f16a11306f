"""A saved buffer that is damaged, of another version or of other spaces, and a disk that refuses: typed errors."""

import os
import resource
import shutil

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from support.replay_driver import SPACE, Driver, assert_holds, row_files

from rlfeed import durable
from rlfeed.errors import CheckpointError, RunDirectoryError
from rlfeed.replay import ReplayBuffer, checkpoint
from rlfeed.types import Step


def test_load_every_single_changed_byte_is_found(tmp_path):
    buffer = ReplayBuffer(Discrete(3), Discrete(2), capacity=8, storage="private")
    one, no = np.array([1]), np.array([False])
    step = Step(one, one, one.astype(np.float32), one + 1, no, no, is_first=~no)
    buffer.add(step)
    buffer.save(tmp_path / "good")
    generator, missed = np.random.default_rng(0), []
    for file in sorted((tmp_path / "good").iterdir()):
        good = file.read_bytes()
        for at in range(0, len(good), 1 if len(good) < 2000 else 7):
            bad = bytearray(good)
            bad[at] ^= int(generator.integers(1, 256))
            file.write_bytes(bad)
            try:
                ReplayBuffer.load(tmp_path / "good")
                missed.append((file.name, at))
            except CheckpointError:
                pass
        file.write_bytes(good)
    assert missed == []
    assert len(ReplayBuffer.load(tmp_path / "good")) == 1


@pytest.mark.parametrize("name", ["MANIFEST.json", "buffer", "rows-000000", "rows-000001"])
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_load_missing_or_truncated_file_is_refused_by_name(name, damage, tmp_path):
    driver = Driver()
    for number in range(2):
        driver.go_on(20)
        driver.buffer.save(tmp_path / str(number))
    file = tmp_path / "1" / name
    file.unlink() if damage == "missing" else os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=name):
        ReplayBuffer.load(tmp_path / "1")


def rewrite(directory, change):
    """Change the state of a saved buffer as another version, or a stranger, would: with checksums that fit."""
    state = durable.load_state(directory / checkpoint.STATE)
    change(state)
    files = {file.name: file.read_bytes() for file in directory.iterdir() if file.name.startswith("rows-")}
    shutil.rmtree(directory)
    with durable.build_directory(directory) as building:
        durable.save_state(building / checkpoint.STATE, state)
        for name, content in files.items():
            (building / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(version=1), "has version 1; expected 2"),
        (lambda s: s.pop("heads"), "is not the state of a buffer"),
        (lambda s: s.update(heads=s["heads"].astype(np.int32)), "tables are of other shapes"),
        (lambda s: s.update(words=s["words"][:5]), "tables are of other shapes"),
        (lambda s: s.update(spans=s["spans"] * 0), "do not fit together"),
        (lambda s: s["heads"].__setitem__(0, s["heads"][0] + 1), "do not fit together"),
        (lambda s: s["heads"].__setitem__(2, s["heads"][2] + 1), "row .* of lane 0 does not continue"),
        (lambda s: s.update(numbers=s["numbers"] + 1), "is not the state of a buffer, .*rows-000001"),
        (lambda s: s["layout"].update(lanes="3"), "tables are of other shapes"),
        (lambda s: s["layout"].update(fields={}), "rows-000000: goes on after its rows"),
        (lambda s: s["state"].update(sampler={"name": "Other"}), "is not the state of a buffer"),
    ],
)
def test_load_state_that_says_something_else_is_refused(change, message, tmp_path):
    driver = Driver()
    driver.go_on(20)
    driver.buffer.save(tmp_path / "saved")
    rewrite(tmp_path / "saved", change)
    with pytest.raises(CheckpointError, match=message):
        ReplayBuffer.load(tmp_path / "saved")


def test_load_rows_that_do_not_continue_each_other_are_refused(tmp_path):
    driver = Driver(lanes=1)
    driver.go_on(20)
    piece = next(driver.buffer._storage.pieces(driver.buffer._storage.sections[0], 0, 7, 8))
    piece[4] ^= 8  # whether the row begins an episode
    driver.buffer.save(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"row [78] of lane 0 does not continue the one before"):
        ReplayBuffer.load(tmp_path / "saved")


def test_load_with_other_spaces_says_both(tmp_path):
    driver = Driver()
    driver.go_on(5)
    driver.buffer.save(tmp_path / "saved")
    assert len(ReplayBuffer.load(tmp_path / "saved", observation_space=SPACE, action_space=Discrete(11)))
    with pytest.raises(CheckpointError, match=r"spaces: .* float32 \(3,\), .*; expected observation int64 \(\)"):
        ReplayBuffer.load(tmp_path / "saved", observation_space=Discrete(3))
    with pytest.raises(CheckpointError, match=r"action int64 \(\); expected action float32 \(2,\)"):
        ReplayBuffer.load(tmp_path / "saved", action_space=Box(-1, 1, (2,), np.float32))


def test_save_existing_directory_is_refused_and_nothing_is_forgotten(tmp_path):
    driver = Driver()
    driver.go_on(50)
    driver.buffer.save(tmp_path / "0")
    with pytest.raises(RunDirectoryError):
        driver.buffer.save(tmp_path / "0")
    driver.go_on(3)
    driver.buffer.save(tmp_path / "1")
    assert row_files(tmp_path / "1") == ["rows-000000", "rows-000001"]


def test_save_full_disk_is_an_error_and_the_next_save_works(tmp_path):
    driver = Driver(rows=300)
    driver.go_on(200)
    driver.buffer.save(tmp_path / "0")
    driver.go_on(200)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"could not be written .*File too large.*Nothing was lost"):
            driver.buffer.save(tmp_path / "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    ReplayBuffer.load(tmp_path / "0")
    driver.go_on(10)
    driver.buffer.save(tmp_path / "1")
    assert row_files(tmp_path / "1") == ["rows-000000", "rows-000001"]
    assert_holds(ReplayBuffer.load(tmp_path / "1"), driver.twin)
