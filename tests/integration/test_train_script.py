import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from support import two_ends
from support.scripts import CHECKOUT, command_line, evaluate_script, train_script
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import PRESETS
from rlfeed.train.run import read_marker

FILE = Path(two_ends.__file__)
SHORT = [
    "--total-steps=1200", "--eval-every=600", "--eval-episodes=4", "--checkpoint-every=500", "--log-every=200",
    "--updates-per-round=4", "--batch-size=32", "--agent.widths", "32", "--device=cpu",
]  # fmt: skip


def train(*args):
    return train_script.main([str(arg) for arg in args])


def scalars(run):
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def learned(run, name="agent"):
    checkpoint = sorted((run / "checkpoints").glob("0*"))[-1]
    return (checkpoint / f"{name}.state").read_bytes()


@pytest.fixture(autouse=True)
def _in_a_new_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Give a finished run on CartPole, trained once for all tests; copy it before changing it."""
    run = tmp_path_factory.mktemp("runs") / "cartpole"
    assert train("dqn", *SHORT, "--run-dir", run) == 0
    return run


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def flags(config, prefix="--"):
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            yield from flags(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name.replace("_", "-")


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_help_documents_every_field_with_a_sentence(preset, capsys):
    assert train(preset, "--help") == 0
    text = re.sub(r"[│╭╮╰╯─\s]+", " ", capsys.readouterr().out)
    for flag in [*flags(PRESETS[preset]()), "--resume", "--dry-run"]:
        entry = re.search(rf" {re.escape(flag)}[ ,](.*?) \(default: ", text)
        assert entry, flag
        assert re.search(r"[A-Z]\w*( \S+){3,}\.$", entry[1]), entry[0]


def test_dry_run_tells_settings_memory_and_device_and_writes_nothing(tmp_path, capsys):
    assert train("--total-steps", "1e5", "--capacity", "2_000", "--agent.gamma", "0.9", "--dry-run") == 0
    out = capsys.readouterr().out
    config = json.loads(out[: out.index("\nreplay: ")])
    assert config["preset"] == "dqn"
    assert config["config"]["total_steps"] == 100_000
    assert config["config"]["capacity"] == 2_000
    assert config["config"]["agent"]["gamma"] == 0.9
    assert re.search(r"replay: .* of 2000 rows.* MB", out)
    assert re.search(r"device: \w+ \(auto: .+\)", out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("--total-step", "--total-steps"), ("--agent.gama", "--agent.gamma"), ("--env.num-env", "--env.num-envs")],
)
def test_misspelt_flag_suggests_the_right_one(typed, meant, capsys):
    assert train(typed, "3") == 2
    assert meant in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--env.id", "CartPoles-v1"], "EnvNotFoundError: CartPoles-v1: .*Did you mean 'CartPole-v1'"),
        (["--env.id", "nowhere.py:TwoEnds"], "EnvNotFoundError: .*nowhere.py"),
        (["--env.id", f"{FILE}:TwoEnd"], "EnvNotFoundError: .*Did you mean 'TwoEnds'"),
        (["--env.id", f"{FILE}:NoEnvironment"], r"ConfigError: .*expected a gymnasium\.Env"),
        (["--env.id", f"{FILE}:Breaks"], r"EnvMakeError: (?s:.*)two_ends\.py(?s:.*)KeyError: 'no such map'"),
        (["--env.id", f"{FILE}:TwoEnds", "--env.kwargs.sise", "3"], r"ConfigError: .*sise.*size"),
        (["--env.id", f"{FILE}:Says"], r'SpaceError: .*\["says"\].*Text'),
        (["--env.id", "Pendulum-v1"], "SpaceError: action_space: is Box.*DQN plays Discrete"),
        (["--capacity", "1e13"], "CapacityError: .*TB"),
        (["--device", "cuda:99"], "DeviceError: .*cuda:99"),
        (["--resume", "nowhere"], "RunDirectoryError: run directory nowhere: is not there"),
        (["--resume", "."], r"RunDirectoryError: run directory \.: holds no run"),
        (["dqm"], "ConfigError: preset: is 'dqm'.*Did you mean 'dqn'"),
        (["--env.kwargs.size"], r"ConfigError: --env\.kwargs\.size: has no value"),
        (["--actors=2", "--env.normalize-reward"], r"env\.normalize_\*: is asked for with 2 actors"),
        (["--env.wrappers"], r"ConfigError: --env\.wrappers: has no value"),
        (["--env.wrappers", "TimeLimits"], "EnvNotFoundError: wrapper 'TimeLimits'.*Did you mean 'TimeLimit'"),
        (["--env.wrappers", "TimeLimit:steps=3"], "ConfigError: .*no parameter 'steps'.*max_episode_steps"),
        (["--total-steps", "1.5"], "expected a whole number"),
        (["--agent.lr", "-1"], r"agent\.lr: is -1\.0; expected above 0"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(args, message, tmp_path, capsys):
    assert train(*args) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err)
    assert "rlfeed/" not in captured.err  # no traceback of ours
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5), ("-0.5", -0.5), ("1e3", 1000.0), ("true", True), ("True", True), ("None", None), ("[1, 2]", [1, 2]),
        ("(1, 'a')", [1, "a"]), ('{"a": {"b": 1}}', {"a": {"b": 1}}), ('"5"', "5"), ("north", "north"), ("", ""),
        ("__import__('os')", "__import__('os')"),
    ],
)  # fmt: skip
def test_env_kwargs_value_is_read_as_what_it_looks_like(text, value):
    joined = command_line.join_env_kwargs(["--seed", "1", "--env.kwargs.x", text])
    assert joined[:3] == ["--seed", "1", "--env.kwargs"]
    read = json.loads(joined[3])["x"]
    assert (read, type(read)) == (value, type(value))


def test_env_kwargs_with_equals_signs_keep_what_follows():
    joined = command_line.join_env_kwargs(["--env.kwargs.a=--x=1", "--seed", "1", "--env.kwargs.b", "-3"])
    assert joined == ["--seed", "1", "--env.kwargs", '{"a": "--x=1", "b": -3}']


def test_env_wrappers_are_gathered_in_their_order():
    given = ["--env.wrappers", "A:x=-1", "B", "--seed", "1", "--env.wrappers=C:y=--z"]
    assert command_line.join_env_wrappers(given) == ["--seed", "1", "--env.wrappers", "A:x=-1", "B", "C:y=--z"]


def test_finished_run_ends_with_three_lines(finished, capsys):
    assert train(*SHORT, "--run-dir", "again") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == "run: again"
    assert re.fullmatch(r"evaluation: mean \d+\.\d+ std \d+\.\d+ episodes 4", lines[-2])
    assert lines[-1] == "curves: tensorboard --logdir again"
    # The same seed gives the same run.
    assert learned(Path("again")) == learned(finished)


def test_finished_run_is_marked_and_says_what_it_was(finished):
    assert read_marker(finished) == "DONE"
    assert json.loads((finished / "config.json").read_text())["config"]["total_steps"] == 1200
    assert "--total-steps=1200" in (finished / "command.txt").read_text()
    assert [path.name for path in sorted((finished / "checkpoints").glob("0*"))] == ["000000001000", "000000001200"]


def test_finished_run_has_its_curves_over_env_steps(finished):
    curves = scalars(finished)
    assert set(curves) == {
        "charts/SPS", "charts/episodic_length", "charts/episodic_return", "eval/mean_ep_length", "eval/mean_reward",
        "feed/wait_ms", "replay/ratio", "replay/size", "rollout/ep_len_mean", "rollout/ep_rew_mean",
        "rollout/exploration_rate", "time/fps", "time/updates_per_s", "train/grad_norm", "train/learning_rate",
        "train/loss", "train/q_mean", "time/policy_fps", "time/environments_fps", "time/rest_fps",
    }  # fmt: skip
    assert [step for step, _ in curves["train/loss"]] == [200, 400, 600, 800, 1000, 1200]
    assert [step for step, _ in curves["eval/mean_reward"]] == [600, 1200]
    assert all(step <= 1200 for points in curves.values() for step, _ in points)


def test_evaluate_gives_the_run_s_last_evaluation_again(finished, capsys):
    assert evaluate_script.main([str(finished / "checkpoints"), "--episodes", "4"]) == 0
    out = capsys.readouterr().out
    _, mean = scalars(finished)["eval/mean_reward"][-1]
    assert f"evaluation: mean {mean:.{1 if mean >= 10 else 4}f} std " in out
    assert "episodes 4" in out


def test_evaluate_of_no_run_is_bad_input(capsys):
    assert evaluate_script.main(["nowhere"]) == 2
    assert "RunDirectoryError: run directory nowhere: is not there" in capsys.readouterr().err


def test_taken_run_directory_is_refused(copied, capsys):
    assert train(*SHORT, "--run-dir", copied) == 2
    assert re.search("RunDirectoryError: .*holds a run.*--resume", capsys.readouterr().err)
    assert read_marker(copied) == "DONE"


def test_resume_of_a_finished_run_says_how_to_extend_it(copied, capsys):
    assert train("--resume", copied) == 2
    assert re.search("RunDirectoryError: .*is DONE at env step 1200.*--total-steps", capsys.readouterr().err)
    assert read_marker(copied) == "DONE"


def test_resume_with_other_settings_names_them(copied, capsys):
    assert train("--resume", copied, "--agent.gamma", "0.5", "--total-steps", "2000") == 2
    assert re.search(r"ConfigError: .*agent\.gamma is 0\.5 but was 0\.99; ", capsys.readouterr().err)


def test_resume_twice_with_more_steps_goes_on_bit_equal_in_the_same_curves(copied, tmp_path, capsys):
    shutil.copytree(copied, tmp_path / "other")
    for run in (copied, tmp_path / "other"):
        assert train("--resume", run / "checkpoints" / "LATEST", "--total-steps", "1600") == 0
        out = capsys.readouterr().out
        assert "changed: total_steps from 1200 to 1600" in out
        assert "resumed at env step 1200 of 1600" in out
        assert out.splitlines()[-3] == f"run: {run}"
        assert read_marker(run) == "DONE"
    assert learned(copied) == learned(tmp_path / "other")
    assert learned(copied, "rollout") == learned(tmp_path / "other", "rollout")
    for points in scalars(copied).values():
        steps = [step for step, _ in points]
        assert steps == sorted(steps)
        assert steps[-1] > 1200


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signal_saves_marks_and_says_how_to_go_on(name, code, monkeypatch, capsys):
    monkeypatch.setattr(two_ends, "taken", 0)
    before = signal.getsignal(getattr(signal, name))
    monkeypatch.setenv(two_ends.SIGNAL, name)
    monkeypatch.setenv(two_ends.AT, "333")
    # A measurement of the layout would take steps too.
    assert train(*SHORT, "--env.id", "support.two_ends:TwoEnds", "--env.mode=serial", "--run-dir", "run") == code
    out = capsys.readouterr().out.splitlines()
    assert out[-2:] == [
        "stopped at env step 333 of 1200, saved",
        "go on with: python scripts/train.py --resume run",
    ]
    assert read_marker("run") == "STOPPED"
    assert sorted(path.name for path in Path("run/checkpoints").glob("0*"))[-1] == "000000000333"
    assert signal.getsignal(getattr(signal, name)) is before


def test_diverged_run_is_marked_failed_and_exits_1(monkeypatch, capsys):
    assert train(*SHORT, "--run-dir", "run", "--agent.lr", "1e30", "--agent.max-grad-norm", "1e30") == 1
    assert re.search(r"DivergedError: train/\w+: is (nan|inf) at env step", capsys.readouterr().err)
    assert read_marker("run") == "FAILED"
    assert "DivergedError" in Path("run/FAILED").read_text()


def test_custom_environment_killed_in_the_middle_is_resumed_from_elsewhere(tmp_path):
    shutil.copy(FILE, tmp_path / "my_env.py")
    script = [sys.executable, "-W", "error", str(CHECKOUT / "scripts" / "train.py")]
    made = [
        "--env.id", "my_env.py:TwoEnds", "--env.kwargs.size", "5", "--env.kwargs.name", "row", "--env.num-envs", "2",
        "--num-workers", "1", "--run-dir", "run",
    ]  # fmt: skip
    killed = subprocess.run(
        [*script, "dqn", *SHORT, *made],
        cwd=tmp_path,
        env={**os.environ, two_ends.AT: "900", two_ends.SIGNAL: "SIGKILL"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert read_marker(tmp_path / "run") is None
    saved = int((tmp_path / "run" / "checkpoints" / "LATEST").read_text())
    (tmp_path / "elsewhere").mkdir()
    resumed = subprocess.run(
        [*script, "--resume", "../run", "--num-workers", "0"],
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed at env step {saved} of 1200" in resumed.stdout
    assert re.search(r"\nevaluation: mean \d+\.\d+ std \d+\.\d+ episodes 4\n", resumed.stdout)
    assert read_marker(tmp_path / "run") == "DONE"
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["env"]["kwargs"] == {"size": 5, "name": "row"}
    steps = [step for step, _ in scalars(tmp_path / "run")["time/fps"]]
    assert steps == sorted(set(steps))
    assert steps[-1] == 1200
