"""A fault injector: environments that break in every way, through the public names only."""

import itertools
import warnings
from functools import partial

import numpy as np
import pytest
from support.breaking import ACTIONS, DEADLY, LENGTH, RAISING, BreakingEnv, Twin

from rlfeed.envs import EnvSource, PoolEnvs


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("rlfeed.envs.faults._FIRST_WAIT_S", 0.0)


def pool(plan, num_envs, workers, *, min_ready=None, max_restarts=99, step_timeout_s=60.0, **kwargs):
    source = EnvSource(partial(BreakingEnv, plan, **kwargs))
    rules = {"min_ready": min_ready, "max_restarts": max_restarts, "step_timeout_s": step_timeout_s}
    return PoolEnvs(source, num_envs, workers, context="fork", **rules)


def random_plan(generator, num_envs, often):
    """Let each step of each episode break with some probability, and each reset with a third of it."""
    plan = {}
    for env, episode, at in itertools.product(range(num_envs), range(40), range(LENGTH + 1)):
        if generator.random() < (often if at else often / 3):
            kinds = [*RAISING, *DEADLY] if at else [*RAISING[:4], *DEADLY]
            plan[env, episode, at] = str(generator.choice(kinds))
    return plan


def vectors(observation, nested):
    return observation["a"] if nested else observation


def play(envs, steps, nested=False):
    """Step; give what became of each row's actions, and check what can be read off the observations."""
    ready, acted = envs.reset(0, [0] * envs.num_envs), {}
    fates = {row: [] for row in range(envs.num_envs)}
    actions = itertools.count()
    for _ in range(steps):
        before = vectors(ready.observation, nested)
        action = (2 * (next(actions) % 2) + before[:, 2]).astype(np.int64) % (ACTIONS - 1)  # of the step's parity
        if ready.action_mask is not None:
            np.testing.assert_array_equal(ready.action_mask, np.arange(ACTIONS) % 2 == before[:, 2:3] % 2)
        acted |= {int(row): (before[k], action[k]) for k, row in enumerate(ready.env_ids)}
        outcome = envs.step(action)
        ids = ready.env_ids if outcome.env_ids is None else outcome.env_ids
        after = vectors(outcome.next_observation, nested)
        none = np.zeros(len(ids), bool)
        lost, cut = (none if flags is None else flags for flags in (outcome.lost, outcome.cut))
        for k, row in enumerate(ids):
            (env, episode, at, _), action = acted.pop(int(row))
            fate = "lost" if lost[k] else "ended" if outcome.terminated[k] else "cut" if cut[k] else ""
            fates[row].append((int(episode), int(at) + 1, fate))
            assert env == row
            assert not outcome.truncated[k]
            if fate != "lost":
                assert after[k].tolist() == [row, episode, at + 1, action]
                assert outcome.reward[k] == (at + 1) / 8
                if nested:
                    image, number = (leaf[k] for leaf in outcome.next_observation["b"])
                    assert (image == (31 * row + 7 * episode + at + 1) % 251).all()
                    assert number == at + 1
            shown = vectors(outcome.ready.observation, nested)[outcome.ready.env_ids == row][0]
            if fate:
                assert shown[2:].tolist() == [0, -1]
                assert shown[1] > episode
            else:
                assert shown.tolist() == after[k].tolist()
        ready = outcome.ready
    return fates


@pytest.mark.parametrize(
    ("seed", "num_envs", "workers", "more"),
    [
        (0, 4, 2, {}),
        (1, 5, 1, {"nested": True}),
        (2, 3, 3, {"masked": True}),
        (3, 6, 2, {"nested": True, "masked": True, "min_ready": 1}),
        *[
            pytest.param(seed, 1 + seed % 6, 1 + seed % (1 + seed % 6), more, marks=pytest.mark.slow)
            for seed in range(4, 24)
            for more in ({"min_ready": 1}, {"nested": bool(seed % 2), "masked": True})
        ],
    ],
)
def test_environments_that_break_by_plan_lose_what_the_slow_twin_says_and_no_more(seed, num_envs, workers, more):
    """Rollout 3B, 3A.32, 3A.33: every row's every step is named, whole, ended, lost or cut exactly as it must be."""
    plan = random_plan(np.random.default_rng(seed), num_envs, often=0.04)
    steps = 40
    envs = pool(plan, num_envs, workers, **more)
    rows = [range(round(w * num_envs / workers), round((w + 1) * num_envs / workers)) for w in range(workers)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fates = play(envs, steps, nested=more.get("nested", False))
    envs.close()
    broke = 0
    for worker in rows:
        twin = Twin(worker, plan)
        taken = len(fates[worker[0]])
        expected = [twin.step() for _ in range(taken)]
        for row in worker:
            assert fates[row] == [step[row] for step in expected]
        broke += twin.faults + twin.deaths
    assert len(caught) == len(envs.faults) == broke
    assert broke > 0 or num_envs < 4
    assert all("env" in str(warning.message) for warning in caught)
