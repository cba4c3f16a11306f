"""Scores go on where they were stopped, leave no seed out, and the document is what the files say."""

import json
import os
import signal
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.scripts import CHECKOUT, command_line, score_rows, score_runs, score_tables, scores_script

from agents import PRESETS
from rlfeed.errors import DivergedError, EnvNotFoundError
from rlfeed.train.aggregate import iqm

TINY = score_rows.Row(
    name="tiny-dqn",
    task="one action",
    preset="dqn",
    env_id="rlfeed.testing:ConstantRewardEnv",
    total_steps=200,
    goal=9.0,
    floor=-1.0,
    seeds=3,
    episodes=2,
    flags=("--env.num-envs", "2", "--env.kwargs.length", "5", "--learning-starts", "20", "--batch-size", "8"),
    explore=True,
)


@pytest.fixture(scope="module")
def record():
    return score_runs.run_seed(TINY, 1, lambda line: None)


class Runs:
    """Stand for training: remember what was asked for, and give the scores that were put in."""

    def __init__(self, monkeypatch, record, scores):
        self.asked, self._record, self._scores = [], record, list(scores)
        monkeypatch.setattr(scores_script, "run_seed", self)

    def __call__(self, row, seed, tell):
        self.asked.append(seed)
        score = self._scores.pop(0)
        if isinstance(score, BaseException):
            raise score
        return {**self._record, "row": row.name, "seed": seed, "score": score}


def call(out, *args, rows=(TINY,)):
    return scores_script.main([*args, "--jobs=0", f"--out={out}"], rows)


def lines_of(out):
    return (out / "scores" / "tiny-dqn.jsonl").read_text().splitlines()


def test_run_has_everything_there_is_to_know(record):
    assert (record["row"], record["seed"], record["crash"]) == ("tiny-dqn", 1, None)
    assert [point["env_steps"] for point in record["curve"]] == list(range(20, 201, 20))
    assert all(len(point["returns"]) == 2 for point in record["curve"])
    assert record["updates"] > 0
    assert record["train_s"] > 0
    assert {"python", "torch", "numpy", "gymnasium"} <= record["versions"].keys()
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_run_score_is_of_the_last_policy_alone(record):
    """Three evaluations of two episodes each, in both modes; the curve has no part in it."""
    assert record["final"].keys() == {"greedy", "explore"}
    assert [len(returns) for returns in record["final"]["greedy"]] == [2, 2, 2]
    assert record["score"] == pytest.approx(statistics.fmean(map(statistics.fmean, record["final"]["greedy"])))
    assert record["score_exploring"] == pytest.approx(
        statistics.fmean(map(statistics.fmean, record["final"]["explore"]))
    )


def test_run_has_the_settings_that_its_command_gives(record):
    """The command in the document makes the same run: what it is parsed to is what was run."""
    default = command_line.preset_of("dqn")

    parsed = command_line.parse(type(default), TINY.arguments(1), default=default, prog="", description="")

    assert record["settings"] == json.loads(json.dumps(score_runs.to_dict(parsed)))
    assert (parsed.total_steps, parsed.seed, parsed.env.kwargs) == (200, 1, {"length": 5})


def test_run_same_seed_gives_the_same_curve_and_another_another(record):
    again = score_runs.run_seed(TINY, 1, lambda line: None)

    assert (again["curve"], again["final"]) == (record["curve"], record["final"])


def test_run_that_crashes_counts_as_the_floor(monkeypatch):
    class Crashing:
        def __init__(self):
            self.settings = {}

        def train(self, look):
            raise DivergedError("train/loss: is nan.")

        def close(self):
            pass

    monkeypatch.setattr(score_runs, "make_run", lambda row, seed: Crashing())
    told = []

    crashed = score_runs.run_seed(TINY, 0, told.append)

    assert (crashed["score"], crashed["crash"]) == (-1.0, "DivergedError: train/loss: is nan.")
    assert told == ["tiny-dqn, seed 0: DivergedError: train/loss: is nan."]


def test_run_that_cannot_begin_is_no_result():
    with pytest.raises(EnvNotFoundError, match="Unheard-v0"):
        score_runs.run_seed(replace(TINY, env_id="Unheard-v0", flags=()), 0, lambda line: None)


def test_scores_interrupted_go_on_with_the_next_seed(tmp_path, monkeypatch, record):
    runs = Runs(monkeypatch, record, [5.0, KeyboardInterrupt(), 7.0, 9.0])

    assert call(tmp_path) == 130
    first = lines_of(tmp_path)
    assert call(tmp_path) == 0
    assert call(tmp_path) == 0

    assert runs.asked == [0, 1, 1, 2]
    assert lines_of(tmp_path)[:1] == first
    assert [json.loads(line)["score"] for line in lines_of(tmp_path)] == [5.0, 7.0, 9.0]


def test_scores_again_replaces_and_seeds_beyond_the_row_are_left_out_of_its_score(tmp_path, monkeypatch, record):
    runs = Runs(monkeypatch, record, [5.0, 6.0, 100.0])
    call(tmp_path, "--seeds", "0")

    call(tmp_path, "--seeds", "0", "--again")
    call(tmp_path, "--seeds", "7")

    assert runs.asked == [0, 0, 7]
    assert [json.loads(line)["score"] for line in lines_of(tmp_path)] == [6.0, 100.0]
    assert "| 6.00 [6.00, 6.00], not reached | 6.00; 1 of 3 run;" in (tmp_path / "agents.md").read_text()


def test_scores_unknown_row_is_refused(tmp_path, capsys):
    assert call(tmp_path, "--rows", "tiny-dqm") == 2
    assert "tiny-dqm are not there; expected some of those of --list. Did you mean" in capsys.readouterr().err


def test_scores_row_that_lacks_a_package_is_named_and_not_run(tmp_path, monkeypatch, record, capsys):
    runs = Runs(monkeypatch, record, [])
    monkeypatch.setitem(score_runs.PACKAGES, "rlfeed_unheard_of", "unheard-of")

    assert call(tmp_path, rows=[replace(TINY, needs=("rlfeed_unheard_of", "cuda"))]) == 0

    assert runs.asked == []
    told = capsys.readouterr().out
    assert told.count("tiny-dqn: not run, unheard-of is not installed (`make peers`)") == 1
    assert "| not run |" in (tmp_path / "agents.md").read_text()


def test_scores_list_says_what_is_there(tmp_path, monkeypatch, record, capsys):
    Runs(monkeypatch, record, [5.0, 6.0])
    call(tmp_path, "--seeds", "0", "2")
    capsys.readouterr()

    call(tmp_path, "--list")

    assert capsys.readouterr().out.split(maxsplit=1)[1] == "200 env steps, 2 of 3 seeds: 5.0, 6.0\n"


def test_scores_beside_runs_every_seed_in_a_process_of_its_own(tmp_path, monkeypatch, capsys):
    """One is killed, which counts; one ends with an error, which is told by the exit code alone."""
    ends, started, most = {0: 0, 1: -signal.SIGKILL, 2: 1}, [], []

    class Process:
        def __init__(self, command, env):
            self.seed = int(command[command.index("--seeds") + 1])
            assert command[2:4] == ["--rows", "tiny-dqn"]
            assert (command[-4:], env["OMP_NUM_THREADS"]) == (["--jobs", "0", "--out", f"{tmp_path}"], "1")
            started.append(self)
            self.looks = 0
            most.append(sum(process.looks < 2 for process in started))

        def poll(self):
            self.looks += 1
            return None if self.looks < 2 else ends[self.seed]

        @property
        def returncode(self):
            return ends[self.seed]

    monkeypatch.setattr(scores_script, "subprocess", SimpleNamespace(Popen=Process))
    monkeypatch.setattr(scores_script, "LOOK_S", 0.0)

    assert scores_script.main(["--jobs=2", f"--out={tmp_path}"], [TINY]) == 1

    assert [process.seed for process in started] == [0, 1, 2]
    assert max(most) == 2
    (killed,) = map(json.loads, lines_of(tmp_path))
    assert (killed["seed"], killed["score"], killed["crash"]) == (1, -1.0, "killed by SIGKILL")
    assert "-1.00 (crashed); 1 of 3 run" in (tmp_path / "agents.md").read_text()


def test_scores_terminated_leave_no_process_running(tmp_path, monkeypatch):
    started = []

    class Process:
        def __init__(self, command, env):
            self.ended = False
            started.append(self)

        def poll(self):
            os.kill(os.getpid(), signal.SIGTERM)

        def terminate(self):
            self.ended = True

        def wait(self):
            assert self.ended

    monkeypatch.setattr(scores_script, "subprocess", SimpleNamespace(Popen=Process))
    handler = signal.getsignal(signal.SIGTERM)

    assert scores_script.main(["--jobs=2", f"--out={tmp_path}"], [TINY]) == 143

    assert [process.ended for process in started] == [True, True]
    assert signal.getsignal(signal.SIGTERM) is handler


def cells_of(text, task):
    line = next(line for line in text.splitlines() if line.startswith(f"| {task} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_documents_show_what_was_reached_and_the_curves_of_what_was_not(tmp_path, record):
    rows = [
        TINY,
        replace(TINY, name="other", task="the other", goal=2.0, at_most=True),
        replace(TINY, name="c", task="C"),
    ]
    for seed, score in enumerate([10.0, 9.0, 11.0]):
        curve = [{"env_steps": 100, "returns": [1.0, 3.0]}, {"env_steps": 200, "returns": [score]}]
        exploring = {"score_exploring": score / 2}
        score_tables.keep(tmp_path, {**record, "seed": seed, "score": score, **exploring, "curve": curve})
        score_tables.keep(tmp_path, {**record, "row": "other", "seed": seed, "score": score, "curve": curve})

    written = score_tables.documents(tmp_path, rows)

    text, expected = written["agents.md"], iqm([10.0, 9.0, 11.0])
    assert cells_of(text, "one action")[3:5] == ["≥ 9", f"**10.0 [{expected.low:.2f}, {expected.high:.1f}]**"]
    assert cells_of(text, "one action")[5] == "10.0, 9.00, 11.0; exploring 5.00"
    assert cells_of(text, "the other")[3:5] == ["≤ 2", f"10.0 [{expected.low:.2f}, {expected.high:.1f}], not reached"]
    assert cells_of(text, "C")[4] == "not run"
    curves = text.partition("## Curves of what was not reached")[2].partition("## Commands")[0]
    assert "### the other, `dqn`" in curves
    assert "one action" not in curves
    assert "| 100 | 2.00 | 2.00 | 2.00 | 2.00 |\n| 200 | 10.0 | 10.0 | 9.00 | 11.0 |" in curves
    assert f"python scripts/train.py dqn --env.id {TINY.env_id} --env.num-envs 2 --env.kwargs" in text
    assert written["scores/seeds.csv"].splitlines()[1].startswith("tiny-dqn,0,10.0,5.0,")
    assert "tiny-dqn,2,100,2.0,1.0" in written["scores/curves.csv"].splitlines()


def test_documents_compare_ours_with_a_peer_on_the_same_task(tmp_path, record):
    peer = replace(TINY, name="peer", preset="sb3-dqn")
    longer = replace(TINY, name="longer", preset="sb3-ppo", total_steps=300)
    for row, scores in {"tiny-dqn": [3.0, 4.0], "peer": [1.0, 3.0], "longer": [0.0, 0.0]}.items():
        for seed, score in enumerate(scores):
            score_tables.keep(tmp_path, {**record, "row": row, "seed": seed, "score": score})

    text = score_tables.documents(tmp_path, [TINY, peer, longer])["agents.md"]

    compared = text.partition("## Beside stable-baselines3")[2].partition("## Curves")[0]
    assert "| one action | `dqn` | `sb3-dqn` | 200 | 0.88 [0.50, 1.00] |" in compared
    assert "sb3-ppo" not in compared


def test_documents_show_how_much_faster_training_is(tmp_path):
    """Round by round: a machine that is twice as slow in one round tells the same."""
    (tmp_path / "scores").mkdir()
    title = "train ppo, 8 x CartPole-v1, 5,120 env steps and 400 updates; wall clock, an env step"
    us = {"rlfeed": [100.0, 200.0, 100.0], "stable-baselines3": [150.0, 300.0, 150.0]}
    cpu_us = {"rlfeed": [50.0] * 3, "stable-baselines3": [60.0] * 3}
    alone = {"title": "train sac; wall clock", "us": {"rlfeed": [1.0] * 3}, "cpu_us": {"rlfeed": [1.0] * 3}}
    versions = {"torch": "2.13.0", "mujoco": "not installed"}
    record = {"versions": versions, "tables": [{"title": title, "us": us, "cpu_us": cpu_us}, alone]}
    assert "\nNot run.\n" in score_tables.documents(tmp_path, [])["agents.md"]
    (tmp_path / "scores" / "speed.json").write_text(json.dumps(record))

    text = score_tables.documents(tmp_path, [])["agents.md"]

    assert "| ppo, 8 x CartPole-v1, 5,120 env steps and 400 updates | 100 | 150 | 1.50 | 1.20 |" in text
    assert "| sac | not run | | | |" in text
    assert "Medians of 3 rounds; torch 2.13.0.\n" in text


def test_rows_have_names_of_their_own_and_presets_and_goals_that_can_be_missed():
    names = [row.name for row in score_rows.ROWS]

    assert len(set(names)) == len(names)
    for row in score_rows.ROWS:
        assert row.is_reached(row.floor) == (row.at_most or row.goal is None), row.name
        assert row.name.endswith(row.preset.replace("_", "-"))


@pytest.mark.parametrize("row", [row for row in score_rows.ROWS if row.preset in PRESETS], ids=lambda row: row.name)
def test_row_has_settings_that_its_preset_knows(row):
    default = command_line.preset_of(row.preset)

    parsed = command_line.parse(type(default), row.arguments(3), default=default, prog="", description="")

    assert (parsed.total_steps, parsed.eval_every, parsed.seed) == (row.total_steps, row.total_steps // 10, 3)


def test_committed_document_is_what_the_files_say():
    directory = CHECKOUT / "docs" / "benchmarks"

    for name, text in score_tables.documents(directory, score_rows.ROWS).items():
        assert (directory / name).read_text() == text, f"{name}: run `make scores ARGS=--tables`"
