import shutil

import numpy as np
import pytest
from support.replay_driver import Driver, row_files

from rlfeed.errors import CheckpointError
from rlfeed.replay import ReplayBuffer
from rlfeed.train.checkpoint import LATEST, Checkpoints


def save(checkpoints, env_steps):
    def replay(path):
        path.mkdir()
        (path / "rows.bin").write_bytes(bytes([env_steps % 256]) * 100)

    states = {"learner": {"weights": np.full(3, env_steps)}, "loop": {"updates": env_steps * 2}}
    return checkpoints.save(env_steps, states, {"replay": replay}, {"environments": "restarted"})


def entries(checkpoints):
    return sorted(p.name for p in checkpoints.directory.iterdir())


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints")


def test_latest_gives_what_was_saved(checkpoints):
    path = save(checkpoints, 5000)
    found = checkpoints.latest()

    assert path.name == "000000005000"
    assert (found.path, found.env_steps, found.info) == (path, 5000, {"environments": "restarted"})
    assert found.load("learner")["weights"].tolist() == [5000] * 3
    assert found.load("loop") == {"updates": 10000}
    assert (found.path / "replay" / "rows.bin").read_bytes() == bytes([5000 % 256]) * 100


def test_save_keeps_the_last_two_and_points_to_the_last(checkpoints):
    for env_steps in (0, 10, 20, 30):
        save(checkpoints, env_steps)

    assert entries(checkpoints) == ["000000000020", "000000000030", "LATEST"]
    assert (checkpoints.directory / LATEST).read_text() == "000000000030\n"


def test_save_orders_by_step_beyond_twelve_digits(checkpoints):
    save(checkpoints, 999_999_999_999)
    save(checkpoints, 1_000_000_000_000)

    assert checkpoints.latest().env_steps == 1_000_000_000_000


def test_save_disk_refuses_keeps_the_checkpoints_before(checkpoints):
    def refuse(path, **_):
        raise OSError(28, "No space left on device")

    save(checkpoints, 10)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(20, {"loop": {}}, {"replay": refuse})

    assert entries(checkpoints) == ["000000000010", "LATEST"]
    assert checkpoints.latest().env_steps == 10


def test_save_same_step_again_is_the_later_one(checkpoints):
    save(checkpoints, 10)
    for updates in range(12):
        checkpoints.save(10, {"loop": {"updates": updates}})

    assert entries(checkpoints) == ["000000000010.11", "000000000010.12", "LATEST"]
    assert checkpoints.latest().env_steps == 10
    assert checkpoints.latest().load("loop") == {"updates": 11}
    save(checkpoints, 11)
    assert checkpoints.latest().env_steps == 11


def test_latest_same_step_again_is_gone_goes_back_and_warns(checkpoints):
    save(checkpoints, 10)
    shutil.rmtree(save(checkpoints, 10))
    with pytest.warns(RuntimeWarning, match=r"000000000010\.1: was reported as saved and is gone"):
        assert checkpoints.latest().path.name == "000000000010"


def test_save_before_the_last_is_refused(checkpoints):
    save(checkpoints, 20)
    with pytest.raises(CheckpointError, match="holds a checkpoint later than env step 10"):
        save(checkpoints, 10)


def test_save_that_does_not_read_back_removes_nothing_older(checkpoints, monkeypatch):
    save(checkpoints, 10)
    save(checkpoints, 20)

    def refuse(path, **_):
        raise CheckpointError(f"{path}: is damaged")

    monkeypatch.setattr("rlfeed.train.checkpoint.verify_directory", refuse)
    with pytest.raises(CheckpointError, match="is damaged"):
        save(checkpoints, 30)
    monkeypatch.undo()

    assert entries(checkpoints) == ["000000000010", "000000000020", "000000000030", "LATEST"]
    assert (checkpoints.directory / LATEST).read_text() == "000000000020\n"


@pytest.mark.parametrize("name", ["learner.state", "loop.state", "replay/rows.bin", "MANIFEST.json"])
def test_latest_newest_is_damaged_goes_back_and_warns(checkpoints, name):
    save(checkpoints, 10)
    newest = save(checkpoints, 20)
    flip(newest / name)
    with pytest.warns(RuntimeWarning, match=r"Going back to .*010: .*000000000020"):
        found = checkpoints.latest()

    assert found.env_steps == 10
    assert newest.exists()


def test_latest_newest_is_gone_goes_back_and_warns(checkpoints):
    save(checkpoints, 10)
    shutil.rmtree(save(checkpoints, 20))
    with pytest.warns(RuntimeWarning, match=r"000000000020: was reported as saved and is gone"):
        assert checkpoints.latest().env_steps == 10


def test_latest_directory_was_renamed_goes_back_and_warns(checkpoints):
    first = save(checkpoints, 10)
    shutil.copytree(first, checkpoints.directory / "000000000099")
    with pytest.warns(RuntimeWarning, match="is of env step 10; expected that of its name"):
        assert checkpoints.latest().path == first


def test_latest_damaged_pointer_costs_nothing(checkpoints):
    save(checkpoints, 10)
    (checkpoints.directory / LATEST).write_bytes(b"\xff")

    assert checkpoints.latest().env_steps == 10


def test_latest_repair_lets_the_run_go_on_past_a_damaged_one(checkpoints):
    save(checkpoints, 10)
    flip(save(checkpoints, 20) / "loop.state")
    with pytest.warns(RuntimeWarning, match="Going back"):
        checkpoints.latest(repair=True)
    save(checkpoints, 15)
    save(checkpoints, 20)

    assert [p.name for p in checkpoints.paths()] == ["000000000015", "000000000020"]
    assert checkpoints.latest().load("loop") == {"updates": 40}
    assert any(name.startswith("000000000020.damaged-") for name in entries(checkpoints))


def test_latest_all_damaged_is_an_error_that_names_each(checkpoints):
    flip(save(checkpoints, 10) / "loop.state")
    flip(save(checkpoints, 20) / "learner.state")
    with pytest.raises(CheckpointError, match=r"no checkpoint that loads.*learner\.state was.*loop\.state was changed"):
        checkpoints.latest()


def test_latest_without_directory_is_an_error(checkpoints):
    with pytest.raises(CheckpointError, match="holds no checkpoint that loads; expected at least one"):
        checkpoints.latest()


def test_load_unknown_name_is_an_error(checkpoints):
    save(checkpoints, 10)
    with pytest.raises(CheckpointError, match=r"actor\.state: cannot be read"):
        checkpoints.latest().load("actor")


def test_save_replay_is_linked_from_checkpoint_to_checkpoint_while_old_ones_go(tmp_path):
    driver, checkpoints = Driver(rows=200), Checkpoints(tmp_path / "checkpoints")
    for number in range(4):
        driver.go_on(150 if number == 0 else 5)
        path = checkpoints.save(number, {}, {"replay": driver.buffer.save})
        driver.go_on(1)
    last, before = (checkpoint / "replay" for checkpoint in reversed(checkpoints.paths()))

    assert last == path / "replay"
    assert row_files(last) == ["rows-000000", "rows-000001", "rows-000002", "rows-000003"]
    assert all((last / name).samefile(before / name) for name in row_files(before))
    assert ReplayBuffer.load(checkpoints.latest().path / "replay").stats().inserted < driver.buffer.stats().inserted
    (last / "rows-000003").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="rows-000003 has 0 bytes"):
        assert checkpoints.latest().env_steps == 2
