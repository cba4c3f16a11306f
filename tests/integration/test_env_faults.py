"""A fault injector: environments that break in every way, through the public names only."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support.breaking import ACTIONS, DEADLY, LENGTH, RAISING, BreakingEnv, Twin

from rlfeed.envs import EnvSource, PoolEnvs, episode_seed, make_envs
from rlfeed.errors import EnvContractError, EnvFailedError
from rlfeed.replay import Episode, ReplayBuffer, Sequence, Transition
from rlfeed.rollout import Rollout
from rlfeed.testing import IdentifiableEnv
from rlfeed.train.evaluate import evaluate


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


# ------------------------------------------------------------------------------------------------- through the rollout


def test_steps_of_environments_that_break_are_stored_whole_and_no_sample_joins_two_episodes():
    """Invariants I1 to I3 under faults: from the pool through the rollout into samples of every unit."""
    plan = random_plan(np.random.default_rng(7), 4, often=0.06)
    envs = pool(plan, 4, 2)
    buffer = ReplayBuffer(envs.observation_space, envs.action_space, capacity=4000, num_envs=4)
    rollout = Rollout(envs, lambda observation: np.full(len(observation), 3), seed=0)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        rollout.collect(buffer, steps=160)
    twins = [Twin(rows, plan) for rows in ((0, 1), (2, 3))]
    kept = []
    while len(kept) < len(buffer):
        kept += [(row, *step) for twin in twins for row, step in twin.step().items() if step[2] != "lost"]
    lost = rollout.statistics.lost
    assert lost > 5
    assert rollout.env_steps == len(buffer) == len(kept)
    assert rollout.statistics.episodes == sum(fate == "ended" for *_, fate in kept)
    stored = {(row, episode, at) for row, episode, at, _ in kept}
    assert len(stored) == len(kept)  # no seed was played twice
    one = buffer.sample(2000, Transition(n_step=1))
    before, after = one.observation.numpy(), one.next_observation.numpy()
    assert (after[:, 2] == before[:, 2] + 1).all()
    assert (after[:, :2] == before[:, :2]).all()
    assert (one.terminated.numpy() == (after[:, 2] == LENGTH)).all()
    assert {tuple(row) for row in after[:, :3].astype(int).tolist()} == stored
    for unit in (Sequence(4, burn_in=2), Sequence(4, boundary="strict"), Episode(), Transition(n_step=3)):
        batch = buffer.sample(300, unit)
        seen = batch.observation.numpy()
        if isinstance(unit, Transition):
            seen = np.stack([seen, batch.next_observation.numpy()], 1)
            assert (seen[:, 0, :2] == seen[:, 1, :2]).all()
            continue
        for observations, length in zip(seen, batch.lengths.tolist(), strict=True):
            steps = observations[: length + 1]
            assert (steps[:, :2] == steps[0, :2]).all()
            assert (np.diff(steps[:, 2]) == 1).all()
    rollout.close()


def test_evaluation_plays_its_quota_in_whole_episodes_whatever_breaks():
    """Rollout 3A.10: lost and cut episodes are none, another one is played for each."""
    plan = {}
    for env, episode in itertools.product(range(4), range(0, 40, 2)):
        plan[env, episode, 1 + (env + episode) % 4] = "kill" if env == 1 else "raise"
    seeds = np.random.SeedSequence(0, spawn_key=(2,)).generate_state(1, np.uint64)
    made = {episode_seed(int(seeds[0]), *both): both for both in itertools.product(range(4), range(40))}
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr("support.breaking.SEEDS", made)
        result = evaluate(envs := pool(plan, 4, 2), lambda observation: np.full(len(observation), 1), episodes=10)
    envs.close()
    assert caught
    assert result.lengths.tolist() == [LENGTH] * 10
    assert result.returns.tolist() == [sum(at / 8 for at in range(1, LENGTH + 1))] * 10


def test_episodes_of_a_rollout_are_whole_whatever_breaks():
    """An episode that was cut beside one that broke is none either, and joins no other."""
    plan = {(env, episode, 3): "kill" if env == 1 else "raise" for env in (1, 2) for episode in (0, 2)}
    envs = pool(plan, 4, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rollout = Rollout(envs, lambda observation: np.full(len(observation), 1))
        played = [batch.observation[0].numpy() for batch in rollout.episodes(2)]
        cut = rollout.statistics.cut
    rollout.close()
    assert caught
    assert cut
    assert sorted(int(observations[0, 0]) for observations in played) == [0, 0, 1, 1, 2, 2, 3, 3]
    for observations in played:
        assert observations[:, 2].tolist() == list(range(LENGTH + 1))
        assert (observations[:, :2] == observations[0, :2]).all()


def test_run_that_is_given_up_ends_with_the_environments_own_traceback_and_can_be_closed():
    """Rollout 3A.35."""
    envs = pool({(1, episode, 2): "no text" for episode in range(40)}, 2, 2, max_restarts=2)
    rollout = Rollout(envs, lambda observation: np.full(len(observation), 3))
    with pytest.warns(RuntimeWarning) as caught, pytest.raises(EnvFailedError) as error:
        list(itertools.islice(rollout, 20))
    assert len(caught) == 2
    assert "env 1 of 2, step 2 of its episode 2" in str(error.value)
    assert "raise NoTextError" in str(error.value)
    assert "broke 3 times in a row" in str(error.value)
    rollout.close()


# ------------------------------------------------------------------------------------------------- what nobody listed


def once(file):
    """Be True in one call of all processes."""
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class Odd(BreakingEnv):
    """Do one odd thing, once, in the third step of whoever comes first."""

    def __init__(self, how, file):
        super().__init__()
        self.how, self.file, self.parent = how, str(file), os.getppid()

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        if self.at == 3 and once(self.file):
            return ODD[self.how](self, observation, reward, terminated, truncated, info)
        return observation, reward, terminated, truncated, info


class Unreadable:
    """Raise whoever asks."""

    def __array__(self, *_, **__):
        raise ValueError("no array")

    def __len__(self):
        raise TypeError("no length")

    __bool__ = __eq__ = __iter__ = __len__
    __hash__ = None


class Spoilt(np.ndarray):
    def __array_finalize__(self, _):
        self.note = lambda: None


def with_memory_spent(env, *result):
    raise MemoryError


def without_end(env, *result):
    return without_end(env, *result)


def with_a_child_that_outlives_it(env, *result):
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,), daemon=False).start()
    os._exit(5)


def from_elsewhere(env, *result):
    os.chdir("/")
    os.environ.clear()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    threading.Thread(target=time.sleep, args=(1000,)).start()
    os.write(1, b"x" * 1_000_000)
    env.observation_space = env.action_space = None
    return result


ODD = {
    "an observation that raises": lambda env, o, *rest: (Unreadable(), *rest),
    "a reward that raises": lambda env, o, r, *rest: (o, Unreadable(), *rest),
    "a flag that raises": lambda env, o, r, t, *rest: (o, r, Unreadable(), *rest),
    "an observation of torch": lambda env, o, *rest: (torch.from_numpy(o), *rest),
    "a list": lambda env, o, *rest: (o.tolist(), *rest),
    "a subclass": lambda env, o, *rest: (o.view(Spoilt), *rest),
    "big-endian": lambda env, o, *rest: (o.astype(">f4"), *rest),
    "every second number": lambda env, o, *rest: (np.repeat(o, 2)[::2], *rest),
    "numbers that cannot be written": lambda env, o, *rest: (np.broadcast_to(o, o.shape), *rest),
    "a reward of NumPy": lambda env, o, r, *rest: (o, np.float32(r), *rest),
    "a reward array": lambda env, o, r, *rest: (o, np.array(r), *rest),
    "a fraction": lambda env, o, r, *rest: (o, Fraction(3, 8), *rest),
    "a reward of torch": lambda env, o, r, *rest: (o, torch.tensor(r), *rest),
    "flags of NumPy": lambda env, o, r, t, u, i: (o, r, np.bool_(t), np.array(u), i),
    "flags that are numbers": lambda env, o, r, t, u, i: (o, r, 0, 0, i),
    "no info": lambda env, *result: (*result[:4], None),
    "an info that raises": lambda env, *result: (*result[:4], {"is_success": Unreadable()}),
    "a huge info": lambda env, *result: (*result[:4], {"all": np.zeros(10**7)}),
    "nothing": lambda env, *result: None,
    "memory": with_memory_spent,
    "recursion": without_end,
    "a child": with_a_child_that_outlives_it,
    "everything of the process": from_elsewhere,
    "closed files": lambda env, *result: os.closerange(0, 400) or result,
}
HARMLESS = {
    "an observation of torch", "a list", "a subclass", "big-endian", "every second number", "a reward of NumPy",
    "numbers that cannot be written", "a reward array", "flags of NumPy", "no info", "an info that raises",
    "a huge info", "everything of the process",
}  # fmt: skip


@pytest.mark.parametrize("how", ODD)
def test_odd_thing_of_one_environment_is_harmless_or_named_and_nobody_elses_trouble(how, tmp_path, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        envs = PoolEnvs(EnvSource(partial(Odd, how, tmp_path / "once")), 2, 2, context="fork")
        fates = play(envs, 12)
    envs.close()
    odd = [row for row in fates if any(fate in ("lost", "cut") for *_, fate in fates[row])]
    assert len(odd) == len(caught) == len(envs.faults) == (how not in HARMLESS)
    for warning in caught:
        assert f"env {odd[0]}" in str(warning.message) or f"environments {odd[0]} to" in str(warning.message)
    whole = [(e, t, "ended" if t == LENGTH else "") for e in range(3) for t in range(1, LENGTH + 1)][:12]
    assert all(fates[row] == whole for row in fates if row not in odd)


# ------------------------------------------------------------------------------------------------- time, starts, ends


class Pausing(IdentifiableEnv):
    """Take its time over a step, and for ever over one of them."""

    def __init__(self, file=None, step_s=0.0):
        super().__init__()
        self.file, self.step_s = file, step_s

    def step(self, action):
        if self.file is not None and once(self.file):
            signal.pause()
        time.sleep(self.step_s)
        return super().step(action)


def test_environment_that_hangs_is_found_also_behind_those_that_are_always_ready(tmp_path):
    """Rollout 3A.34, with first-ready batches."""
    make = EnvSource(partial(Pausing, str(tmp_path / "once"), 0.002))
    envs = PoolEnvs(make, 3, 3, context="fork", min_ready=1, step_timeout_s=1.0)
    ready, late_s = envs.reset(0, [0] * 3), time.monotonic() + 60
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while not envs.faults:
            ready = envs.step(np.full(len(ready.env_ids), 3)).ready
            assert time.monotonic() < late_s
    envs.close()
    assert "did not return within 1 s" in str(caught[0].message)
    assert "raise step_timeout_s" in str(caught[0].message)


def test_timeouts_count_the_time_of_an_environment_and_not_of_those_before_it():
    """Rollout 3A.39: a step of all takes longer than one may."""
    envs = PoolEnvs(EnvSource(partial(Pausing, step_s=0.3)), 6, 1, context="fork", step_timeout_s=1.2)
    ready = envs.reset(0, [0] * 6)
    assert envs.step(np.full(len(ready.env_ids), 3)).lost is None
    envs.close()


class MakesTrouble(BreakingEnv):
    """Break in the second step; cannot be made anew the first time, in this process or another."""

    def __init__(self, files, ending):
        super().__init__(masked=True)
        self.files, self.ending = files, ending
        if os.path.exists(f"{files}broke") and once(f"{files}made"):  # noqa: PTH110
            raise OSError("the port is taken")

    def reset(self, *, seed=None, options=None):
        if once(f"{self.files}first"):
            raise ValueError("no first reset")
        return super().reset(seed=seed)

    def step(self, action):
        if self.at == 1 and once(f"{self.files}broke"):
            if self.ending:
                os._exit(3)
            raise ValueError("broke")
        return super().step(action)


@pytest.mark.parametrize("ending", [False, True])
def test_environment_that_cannot_be_made_anew_is_tried_again_and_keeps_its_masks(ending, tmp_path):
    """Constructors fail for a while, as where a port is taken; the first reset of all failed, too."""
    envs = PoolEnvs(EnvSource(partial(MakesTrouble, f"{tmp_path}/", ending)), 1, 1, context="fork")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fates = play(envs, 9)
    envs.close()
    first, broke, made = (str(warning.message) for warning in caught)
    assert "no first reset" in first
    assert ("exit code 3" if ending else "ValueError: broke") in broke
    assert "the port is taken" in made
    assert [fate for *_, fate in fates[0]] == ["", "lost", *[""] * 4, "ended", "", ""]


def interrupt_a_rollout():
    """Interrupt a rollout sixty times, at other instructions each time."""
    envs = PoolEnvs(EnvSource(IdentifiableEnv), 2, 2, context="fork", step_timeout_s=120.0)
    rollout = Rollout(envs, lambda observation: np.full(len(observation), 3))
    next(rollout)
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    interrupted = 0
    for number in range(60):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.001 + number * 1e-5)
            for _ in range(10**6):
                next(rollout)
        except KeyboardInterrupt:
            interrupted += 1
    for step in itertools.islice(rollout, 20):
        assert (step.next_observation[:, 2] == step.observation[:, 2] + 1).all()
    rollout.close()
    sys.stdout.write(f"interrupted {interrupted}\n")


def test_interrupt_between_any_two_instructions_costs_no_hang():
    """In a process of its own: an interrupt that is late would end the whole test run."""
    tests = Path(__file__).parents[1]
    code = f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests / 'integration')!r}]; import test_env_faults as t; "
    code += "t.interrupt_a_rollout()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=150, check=False)
    assert run.stdout.split() == ["interrupted", "60"], run.stderr


@pytest.mark.slow
def test_a_hundred_kills_under_load_cost_no_hang_no_handle_and_no_process():
    """Rollout 3A.32."""
    generator = np.random.default_rng(0)
    envs = PoolEnvs(EnvSource(IdentifiableEnv), 4, 2, context="fork", max_restarts=10**6)
    rollout = Rollout(envs, lambda observation: np.full(len(observation), 3))
    next(rollout)
    handles, killed = len(os.listdir("/proc/self/fd")), 0  # noqa: PTH208

    def kill():
        nonlocal killed
        while killed < 100:
            time.sleep(generator.random() * 0.03)
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(generator.choice(envs.processes)), signal.SIGKILL)
                killed += 1

    killer = threading.Thread(target=kill)
    killer.start()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in rollout:
            kept = np.ones(4, bool) if step.lost is None else ~step.lost
            assert (step.next_observation[kept, 1:3] == step.observation[kept, 1:3] + [0, 1]).all()
            if not killer.is_alive():
                break
    assert len(caught) > 10
    assert len(os.listdir("/proc/self/fd")) <= handles  # noqa: PTH208
    processes = envs.processes
    rollout.close()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@pytest.mark.parametrize("autoreset", ["same_step", "next_step", "disabled"])
@pytest.mark.parametrize("mode", ["sync", pytest.param("async", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", ["raise", "no text", "nan", "shape", "values"])
def test_gymnasiums_modes_raise_what_broke_by_name_and_can_be_closed(mode, autoreset, fault):
    envs = make_envs(partial(BreakingEnv, {(1, 0, 3): fault}), 2, mode=mode, autoreset=autoreset)
    rollout = Rollout(envs, lambda observation: np.full(len(observation), 3))
    with pytest.raises((EnvFailedError, EnvContractError)) as error:
        list(itertools.islice(rollout, 10))
    assert "env 1 of 2" in str(error.value) or "values to unpack" in str(error.value)
    rollout.close()
