"""scripts/train.py with actors: forked, so that they are there at once; as people start them in the slow test."""

from pathlib import Path

import pytest
from support.scripts import train_script
from support.start_method import start_method
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlfeed.replay import ReplayBuffer, Transition
from rlfeed.train.run import read_marker

SHORT = [
    "--actors=2", "--env.num-envs=2", "--total-steps=600", "--eval-every=300", "--eval-episodes=4",
    "--checkpoint-every=300", "--log-every=200", "--updates-per-round=4", "--batch-size=32", "--agent.widths", "32",
    "--agent.epsilon-power=7", "--device=cpu",
]  # fmt: skip


def train(*args):
    with start_method("fork"):
        return train_script.main([str(arg) for arg in args])


def test_train_with_actors_ends_as_any_run_does_and_is_resumed(tmp_path, capsys):
    run = tmp_path / "run"
    assert train("dqn", *SHORT, "--run-dir", run) == 0
    assert read_marker(run) == "DONE"
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    assert {"actors/steps_per_s/0", "actors/steps_per_s/1", "actors/waited", "replay/policy_lag"} <= set(
        events.Tags()["scalars"]
    )

    assert train("--resume", run, "--total-steps=900", "--actors-ahead=50") == 0
    checkpoint = Path(max((run / "checkpoints").glob("0*")))
    buffer = ReplayBuffer.load(checkpoint / "replay")
    assert 900 <= int(checkpoint.name) == buffer.stats().inserted < 900 + 4
    assert buffer.num_envs == 4
    versions = buffer.sample(600, Transition()).extras["policy_version"]
    assert 0 == versions.min() < versions.max()
    assert "evaluation: mean" in capsys.readouterr().out


def test_train_with_actors_an_unknown_environment_is_told_before_any_process_starts(capsys):
    assert train_script.main(["dqn", "--actors=2", "--env.id=CartPool-v1"]) == 2
    assert "CartPole-v1" in capsys.readouterr().err


@pytest.mark.slow
def test_dqn_with_two_actors_solves_cartpole(tmp_path, capsys):
    assert train_script.main(["dqn", "--actors=2", "--seed=1", "--device=cpu", "--run-dir", str(tmp_path / "run")]) == 0
    mean = float(capsys.readouterr().out.split("evaluation: mean ")[1].split()[0])
    assert mean >= 450
