import json
import os
import re
import signal
import subprocess
import sys

import pytest

from rlfeed.errors import CheckpointError, RunDirectoryError
from rlfeed.train.run import RunDirectory, default_path, describe_machine, read_config, read_marker

HOLDER = """
import os, signal, sys
from rlfeed.train.run import RunDirectory

run = RunDirectory.resume(sys.argv[1])
reader, writer = os.pipe()
if os.fork() == 0:
    os.write(writer, b"x")
    sys.stdin.read()  # lives until the test closes its end
    os._exit(0)
os.read(reader, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
CONFIG = {"env": {"id": "CartPole-v1"}, "sizes": (64, 64)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "x"


def stopped(path):
    with RunDirectory.create(path, CONFIG) as run:
        run.checkpoints.save(10, {"loop": {}})
        run.mark("STOPPED", "SIGINT")


@pytest.mark.parametrize(
    ("env_id", "start"),
    [
        ("CartPole-v1", r"runs/CartPole-v1/dqn/"),
        ("ALE/Pong-v5", r"runs/ALE-Pong-v5/dqn/"),
        ("/elsewhere/envs/maze.py:Maze", r"runs/maze\.py-Maze/dqn/"),
        ("my_pkg.envs:Maze", r"runs/my_pkg\.envs-Maze/dqn/"),
        ("..", r"runs/env/dqn/"),
    ],
)
def test_default_path_names_env_preset_time_and_seed(env_id, start):
    assert re.fullmatch(start + r"\d{8}-\d{6}-s7-[0-9a-f]{4}", str(default_path(env_id, "dqn", 7)))


def test_create_writes_what_the_run_is(path):
    with RunDirectory.create(path, CONFIG, ["scripts/train.py", "dqn", "--env.id", "My Env"]) as run:
        assert run.config == {"env": {"id": "CartPole-v1"}, "sizes": [64, 64]}
        assert read_marker(path) is None

    assert read_config(path) == run.config
    assert (path / "command.txt").read_text() == "scripts/train.py dqn --env.id 'My Env'\n"
    assert json.loads((path / "env.json").read_text())["versions"]["torch"]
    assert sorted(p.name for p in path.iterdir()) == ["DONE", "command.txt", "config.json", "env.json", "run.lock"]


def test_create_in_an_empty_directory_is_allowed(path):
    path.mkdir(parents=True)
    RunDirectory.create(path, CONFIG).close()

    assert read_config(path)["env"] == {"id": "CartPole-v1"}


def test_create_where_a_run_is_refuses_and_says_how_to_go_on(path):
    stopped(path)
    before = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
    with pytest.raises(RunDirectoryError, match=rf"holds a run \(STOPPED, 1 checkpoints\).*--resume {path}, or choose"):
        RunDirectory.create(path, {})

    assert {p.name: p.stat().st_mtime_ns for p in path.iterdir()} == before


def test_create_where_other_files_are_refuses_and_leaves_no_trace(path):
    path.mkdir(parents=True)
    (path / "thesis.tex").write_text("")
    with pytest.raises(RunDirectoryError, match=r"holds thesis\.tex; expected a new or empty directory"):
        RunDirectory.create(path, CONFIG)

    assert [p.name for p in path.iterdir()] == ["thesis.tex"]


def test_create_where_a_file_is_refuses(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(RunDirectoryError, match="is a file"):
        RunDirectory.create(tmp_path / "f", CONFIG)


@pytest.mark.parametrize("other", [lambda p: RunDirectory.resume(p), lambda p: RunDirectory.create(p, {})])
def test_second_writer_while_a_run_is_held_is_refused(path, other):
    with RunDirectory.create(path, CONFIG) as run:
        run.checkpoints.save(10, {"loop": {}})
        with pytest.raises(RunDirectoryError):
            other(path)


def test_resume_held_run_names_its_holder(path):
    holder = rf"in use by process {os.getpid()} on \S+ since"
    with RunDirectory.create(path, CONFIG), pytest.raises(RunDirectoryError, match=holder):
        RunDirectory.resume(path)


def test_resume_after_the_holder_was_killed_and_its_forked_child_lives_works(path):
    stopped(path)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert holder.wait(timeout=120) == -signal.SIGKILL
    assert json.loads((path / "run.lock").read_text())["pid"] == holder.pid
    try:
        RunDirectory.resume(path).close()
        assert json.loads((path / "run.lock").read_text())["pid"] == os.getpid()
    finally:
        holder.stdin.close()


def test_resume_takes_leftovers_away_and_the_marker_once_the_run_begins(path):
    stopped(path)
    (path / ".DONE.tmp-0123abcd").write_text("")
    run = RunDirectory.resume(path)

    assert read_marker(path) == "STOPPED"
    assert not (path / ".DONE.tmp-0123abcd").exists()
    assert run.checkpoints.latest().env_steps == 10
    with run:
        assert read_marker(path) is None
    assert read_marker(path) == "DONE"


def test_resume_without_checkpoint_is_refused_and_lets_go(path):
    RunDirectory.create(path, CONFIG).close()
    for _ in range(2):
        with pytest.raises(RunDirectoryError, match="has no checkpoint"):
            RunDirectory.resume(path)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(parents=True)])
def test_resume_where_no_run_is_is_refused(path, make):
    make(path)
    with pytest.raises(RunDirectoryError, match=r"(is not a directory|has no config\.json); expected one that"):
        RunDirectory.resume(path)


def test_resume_damaged_config_is_an_error(path):
    stopped(path)
    (path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: is not JSON"):
        RunDirectory.resume(path)


def test_run_raises_is_marked_failed_with_the_traceback(path):
    def train():
        with RunDirectory.create(path, CONFIG) as run:
            run.mark("STOPPED")
            raise ZeroDivisionError("here")

    with pytest.raises(ZeroDivisionError):
        train()

    assert read_marker(path) == "FAILED"
    assert not (path / "STOPPED").exists()
    assert re.search(r"test_run\.py.*ZeroDivisionError: here\n$", (path / "FAILED").read_text(), re.DOTALL)
    RunDirectory.create(path.with_name("y"), CONFIG).close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit(130)])
def test_run_interrupted_is_marked_stopped(path, error):
    with pytest.raises((KeyboardInterrupt, SystemExit)), RunDirectory.create(path, CONFIG):
        raise error

    assert read_marker(path) == "STOPPED"


def test_run_marked_before_its_end_keeps_the_marker(path):
    stopped(path)

    assert read_marker(path) == "STOPPED"
    assert (path / "STOPPED").read_text() == "SIGINT\n"


def test_describe_machine_is_json_and_leaves_cuda_alone():
    import torch

    json.dumps(describe_machine())
    assert not torch.cuda.is_initialized()


def test_resume_with_other_settings_keeps_them_for_the_next_resume(tmp_path):
    run = RunDirectory.create(tmp_path / "run", {"total": 10})
    run.checkpoints.save(1, {"agent": {}}, {}, {})
    run.close()
    RunDirectory.resume(tmp_path / "run", {"total": 20}).close()
    assert RunDirectory.resume(tmp_path / "run").config == {"total": 20}


def test_create_where_nothing_can_be_written_is_refused():
    with pytest.raises(RunDirectoryError, match="cannot be made"):
        RunDirectory.create("/proc/nowhere/run", {})
