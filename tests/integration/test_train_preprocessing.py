"""Wrappers and normalisation of a run: on its command line, in its evaluations, after a resume from elsewhere."""

import json
import re
from pathlib import Path

from support.scripts import evaluate_script, train_script

from rlfeed.train.checkpoint import Checkpoints

WRAPPER = """
import gymnasium

class Scaled(gymnasium.RewardWrapper):
    def __init__(self, env, factor):
        super().__init__(env)
        self.factor = factor

    def reward(self, reward):
        return reward * self.factor
"""
SHORT = [
    "--total-steps=400", "--eval-every=200", "--eval-episodes=3", "--checkpoint-every=400", "--updates-per-round=2",
    "--batch-size=16", "--agent.widths", "16", "--device=cpu", "--run-dir=run",
]  # fmt: skip


def counted(run):
    """Give the observations counted and the episodes ended so far."""
    state = Checkpoints(run / "checkpoints").latest().load("rollout")
    return state["envs"]["observation"][0]["count"], state["statistics"]["episodes"]


def evaluation(capsys):
    return re.search(r"evaluation: .*", capsys.readouterr().out)[0]


def test_wrapped_and_normalised_run_is_evaluated_and_resumed_as_it_was(tmp_path, monkeypatch, capsys):
    """rollout 3A.43: evaluation of a checkpoint normalises with its statistics, and shows rewards as they were."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(WRAPPER)
    wrappers = ["--env.wrappers", "mine.py:Scaled:factor=0.5", "--env.wrappers", "TimeLimit:max_episode_steps=60"]
    flags = ["--env.normalize-observation", "--env.normalize-reward"]
    assert train_script.main(["dqn", *SHORT, *wrappers, *flags]) == 0
    last = evaluation(capsys)
    settings = json.loads(Path("run/config.json").read_text())["config"]["env"]
    assert settings["wrappers"] == [f"{tmp_path}/mine.py:Scaled:factor=0.5", "TimeLimit:max_episode_steps=60"]
    # One observation for each step, and one more for each episode begun: evaluations counted nothing.
    count, episodes = counted(tmp_path / "run")
    assert count == 400 + episodes + 1

    Path("elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluate_script.main(["../run", "--episodes", "3"]) == 0
    assert evaluation(capsys) == last
    assert train_script.main(["--resume", "../run", "--total-steps", "500"]) == 0
    count, episodes = counted(tmp_path / "run")
    assert count == 500 + episodes + 1  # the open episode went on; what came back was not counted again
