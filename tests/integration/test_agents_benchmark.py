"""The agents' benchmark compares the same work: who takes other steps or updates is refused, runs begin anew."""

import json
from dataclasses import replace

import pytest
from support.scripts import agents_benchmark, benchmark_script

from agents import PRESETS

SMALL = replace(
    agents_benchmark.WORKS["dqn"],
    env_steps=96,
    updates=2 * 11,
    flags=(
        *agents_benchmark.DQN_FLAGS,
        "--learning-starts",
        "8",
        "--batch-size",
        "4",
        "--train-every",
        "8",
        "--updates-per-round",
        "2",
    ),
)


def test_ours_takes_the_steps_and_updates_it_promises_run_by_run():
    contestant = agents_benchmark.Ours(replace(SMALL, updates=2 * 12))

    for _ in range(2):
        contestant.begin()
        contestant.run()


def test_contestant_that_takes_other_updates_is_refused():
    contestant = agents_benchmark.Ours(SMALL)
    contestant.begin()

    with pytest.raises(agents_benchmark.WrongWorkError, match="96 env steps and 24 updates; expected 96 and 22"):
        contestant.run()


@pytest.mark.parametrize("name", [name for name, work in agents_benchmark.WORKS.items() if work.preset in PRESETS])
def test_work_has_settings_that_its_preset_knows(name):
    contestant = agents_benchmark.Ours(agents_benchmark.WORKS[name])

    assert contestant._config.total_steps == agents_benchmark.WORKS[name].env_steps


@pytest.mark.slow
@pytest.mark.parametrize("name", agents_benchmark.WORKS)
@pytest.mark.filterwarnings("ignore")  # theirs
def test_benchmark_agents_measures_both(name, tmp_path):
    """Both have taken the promised number of updates, or it would have raised."""
    pytest.importorskip("stable_baselines3")
    pytest.importorskip("sb3_contrib")
    path = tmp_path / "rounds.json"

    benchmark_script.main([f"agents-{name}", "--rounds=1", f"--json={path}"])

    (table,) = json.loads(path.read_text())["tables"]
    assert {"rlfeed", "stable-baselines3"} == table["us"].keys() == table["cpu_us"].keys()
