"""In how many processes environments are stepped: as asked for, or by a measurement that says why."""

import time

import numpy as np
import pytest

from rlfeed.envs import EnvSource, PoolEnvs
from rlfeed.envs.layouts import choose_layout, measure_step, suggest_layout
from rlfeed.testing import IdentifiableEnv


@pytest.mark.parametrize("layout", [2, "2x4", (2, 4), [2, 4], "2"])
def test_layout_may_be_written_in_several_ways(layout):
    assert choose_layout(None, 8, layout, mode="pool").workers == 2


@pytest.mark.parametrize(
    ("step_us", "num_envs", "cores", "workers"),
    [(6, 32, 2, 0), (40, 8, 2, 0), (40, 32, 2, 2), (500, 8, 4, 4), (500, 3, 16, 3), (1000, 1, 16, 0), (1000, 8, 1, 0)],
)
def test_suggested_layout_takes_processes_where_they_pay(step_us, num_envs, cores, workers):
    choice = suggest_layout(step_us * 1e-6, num_envs, cores)
    assert choice.workers == workers
    assert f"a step takes {step_us} us" in choice.why
    assert choice.why.startswith(f"{workers} worker processes" if workers else "this process")


class Slow(IdentifiableEnv):
    def step(self, action):
        end = 2e5
        while end:
            end -= 1
        return super().step(action)


class Interrupted(IdentifiableEnv):
    """A light environment on a busy machine: one step in five waits until others have had the processor."""

    def step(self, action):
        if self.episode % 5 == 1 and self.step_in_episode == 0:
            time.sleep(0.005)
        return super().step(action)


def test_measured_step_is_that_of_a_machine_that_nobody_else_uses():
    assert measure_step(Interrupted(lengths=(1,)), 1.0) < 0.001


def test_auto_layout_measures_and_says_why(monkeypatch):
    monkeypatch.setattr("rlfeed.envs.layouts.processors", lambda: 2)
    light, heavy = (choose_layout(EnvSource(env), 4, "auto", mode="auto") for env in (IdentifiableEnv, Slow))
    assert light.workers == 0
    assert "this process" in light.why
    assert heavy.workers == 2
    assert "2 worker processes: a step takes" in heavy.why
    monkeypatch.setattr("rlfeed.envs.layouts.has_guard", lambda: False)
    unguarded = choose_layout(EnvSource(Slow), 4, "auto", mode="auto")
    assert unguarded.workers == 0
    assert "the script has no `if __name__ == '__main__':`" in unguarded.why


@pytest.mark.parametrize(("quick_s", "wakeful"), [(0.0, True), (60.0, False)])
def test_workers_stay_awake_where_waking_them_takes_long(quick_s, wakeful, monkeypatch):
    monkeypatch.setattr("rlfeed.envs.vector._QUICK_S", quick_s)
    monkeypatch.setattr("rlfeed.envs.vector.processors", lambda: 2)
    envs = PoolEnvs(EnvSource(IdentifiableEnv), 4, 2, context="fork")
    envs.reset(0, [0] * 4)
    observations = [envs.step(np.full(4, 2)).next_observation[:, 2].tolist() for _ in range(3)]
    assert bool(envs._slab.calls[:, 4].all()) == wakeful
    assert observations == [[1] * 4, [2] * 4, [3] * 4]
    envs.close()
