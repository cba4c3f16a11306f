"""The worker pool: the episodes of one process, for any layout, and a run that goes on when environments break."""

import itertools
import os
import signal
import warnings
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from support.faulty import IN_PROCESS, FaultyEnv

from rlfeed.envs import EnvSource, PoolEnvs, episode_seed, make_envs
from rlfeed.errors import ConfigError, EnvContractError, EnvFailedError, EnvMakeError, WorkerError
from rlfeed.rollout import Rollout
from rlfeed.testing import IdentifiableEnv

SEEDS = {episode_seed(0, env, episode): (env, episode) for env in range(4) for episode in range(40)}


def pool(target, num_envs, workers, **kwargs):
    wanted = {"context": "fork", "step_timeout_s": 60.0, **kwargs}
    return PoolEnvs(EnvSource(target), num_envs, workers, **wanted)


def faulty(plan, workers, num_envs=4, **kwargs):
    return pool(partial(FaultyEnv, plan=plan, seeds=SEEDS), num_envs, workers, **kwargs)


def fives(observation):
    return np.full(len(observation), 3, np.int64)


def same(a, b):
    fields = ("observation", "action", "reward", "next_observation", "terminated", "truncated", "is_first")
    for field in fields:
        left, right = getattr(a, field), getattr(b, field)
        if isinstance(left, dict):
            assert all(np.array_equal(left[key], right[key]) for key in left), field
        else:
            assert np.array_equal(left, right), field


# ------------------------------------------------------------------------------------------------- the same episodes


@pytest.mark.parametrize(("num_envs", "workers"), [(8, 1), (8, 2), (8, 4), (8, 8), (5, 2)])
def test_pool_plays_the_episodes_of_one_process_in_any_layout(num_envs, workers):
    """Rollout 3A.12 and 3A.13: seeds belong to (run, environment, episode), not to processes."""
    seed = 2**64 - 1 - num_envs  # seeds may be of any size
    alone = Rollout(make_envs("CartPole-v1", num_envs, mode="serial"), fives, seed=seed, mode="random")
    shared = Rollout(pool("CartPole-v1", num_envs, workers), fives, seed=seed, mode="random")
    for a, b in itertools.islice(zip(alone, shared, strict=True), 60):
        same(a, b)
    assert [r.total_reward for r in alone.statistics.window] == [r.total_reward for r in shared.statistics.window]
    assert len(alone.statistics.window) > num_envs
    shared.close()


@pytest.mark.parametrize("where", ["serial", "pool"])
def test_first_env_id_numbers_the_environments_of_a_process_beside_others(where):
    """Episodes and faults are those of the same numbers in one process."""
    plan = {(3, 0, 4): "raise"}
    make = partial(FaultyEnv, plan=plan, seeds=SEEDS)
    if where == "pool":
        envs = faulty(plan, 2, num_envs=2, first_env_id=2)
    else:
        envs = make_envs(make, 2, mode="serial", on_fault="restart", first_env_id=2)
    rollout = Rollout(envs, fives)
    with pytest.warns(RuntimeWarning, match="env 3 of 4, step 4 of its episode 0"):
        steps = list(itertools.islice(rollout, 5))
    assert [step.observation[:, 0].tolist() for step in steps] == [[2, 3]] * 5
    assert envs.faults[0].env_id == 3
    envs.close()


class Nested(gymnasium.Env):
    """Nested observations and actions; each observation holds the action before it, and a mask that allows few."""

    observation_space = spaces.Dict(
        image=spaces.Box(0, 255, (8, 8, 1), np.uint8),
        arms=spaces.Tuple([spaces.MultiDiscrete([5, 7]), spaces.Box(-9, 9, (), np.float64)]),
    )
    action_space = spaces.Dict(go=spaces.Discrete(4, start=2), turn=spaces.Box(-1, 1, (2,), np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return self._observation(0, 0.0), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.at += 1
        observation = self._observation(int(action["go"]), float(action["turn"][0]))
        action["turn"][:] = 7  # a careless environment
        return observation, 0.5, self.at == 4, self.at == 3 and bool(self.np_random.random() < 0.5), {}

    def _observation(self, go, turn):
        image = np.full((8, 8, 1), self.np_random.integers(256), np.uint8)
        return {"image": image, "arms": (np.array([max(go - 1, 0), self.at]), np.float64(turn))}


def test_pool_carries_nested_spaces_of_every_kind():
    alone = Rollout(make_envs(Nested, 3, mode="serial"), lambda o: None, seed=1, mode="random")
    shared = Rollout(pool(Nested, 3, 2), lambda o: None, seed=1, mode="random")
    for a, b in itertools.islice(zip(alone, shared, strict=True), 25):
        np.testing.assert_array_equal(a.observation["image"], b.observation["image"])
        np.testing.assert_array_equal(a.next_observation["arms"][0], b.next_observation["arms"][0])
        np.testing.assert_array_equal(b.next_observation["arms"][1], b.action["turn"][:, 0])
        np.testing.assert_array_equal(a.terminated, b.terminated)
        np.testing.assert_array_equal(a.truncated, b.truncated)
        assert np.abs(b.action["turn"]).max() <= 1
    shared.close()


class Masked(IdentifiableEnv):
    """Allows the actions of the step's parity, and says how an episode went."""

    def reset(self, *, seed=None, options=None):
        observation, _ = super().reset(seed=seed)
        return observation, self._info(False)

    def step(self, action):
        assert int(action) % 2 == self.step_in_episode % 2
        *result, _ = super().step(action)
        return *result, self._info(result[2])

    def _info(self, terminated):
        return {"action_mask": np.arange(5) % 2 == self.step_in_episode % 2, "is_success": terminated}


@pytest.mark.parametrize("mode", ["serial", "pool"])
def test_masks_belong_to_the_observation_and_success_to_the_end(mode):
    """Rollout 3A.41: no masked action is ever taken; the environment would raise."""
    envs = make_envs(Masked, 3, mode="serial") if mode == "serial" else pool(Masked, 3, 2, on_fault="raise")
    ready = envs.reset(0, [0, 0, 0])
    generator, told = np.random.default_rng(0), []
    for _ in range(30):
        np.testing.assert_array_equal(ready.action_mask, np.arange(5) % 2 == ready.observation[:, 2:3] % 2)
        outcome = envs.step(np.array([generator.choice(np.flatnonzero(mask)) for mask in ready.action_mask]))
        ready, ended = outcome.ready, outcome.terminated | outcome.truncated
        if outcome.success is None:
            assert not ended.any()
        else:
            np.testing.assert_array_equal(outcome.success[ended], outcome.terminated[ended])
            assert np.isnan(outcome.success[~ended]).all()
            told += outcome.success[ended].tolist()
    assert {0.0, 1.0} == set(told)
    envs.close()


def test_pool_arrays_of_a_step_are_never_written_again():
    rollout = Rollout(pool(IdentifiableEnv, 4, 2), fives)
    kept = [(step, step.next_observation.copy(), step.reward.copy()) for step in itertools.islice(rollout, 30)]
    for step, observation, reward in kept:
        np.testing.assert_array_equal(step.next_observation, observation)
        np.testing.assert_array_equal(step.reward, reward)
    rollout.close()


def test_pool_environments_that_are_ready_first_come_first_and_none_is_lost():
    """A row's steps are those of one process, in order, whoever else was ready with them."""
    envs = pool(partial(FaultyEnv, seeds=SEEDS, lengths=(3, 1, 2)), 4, 4, min_ready=1)
    ready, seen, sizes = envs.reset(0, [0] * 4), {i: [] for i in range(4)}, set()
    acted = dict.fromkeys(range(4))
    for _ in range(200):
        for row, env_id in enumerate(ready.env_ids):
            acted[int(env_id)] = ready.observation[row]
        outcome = envs.step(np.full(len(ready.env_ids), 2))
        ids = range(4) if outcome.env_ids is None else outcome.env_ids.tolist()
        sizes.add(len(ids))
        for row, env_id in enumerate(ids):
            seen[env_id].append((*acted[env_id][:3], *outcome.next_observation[row]))
        ready = outcome.ready
        np.testing.assert_array_equal(ready.env_ids, ids)
    assert min(sizes) < 4
    for env_id, steps in seen.items():
        lengths = itertools.cycle((3, 1, 2))
        episodes = itertools.chain.from_iterable(
            [(env_id, e, t, env_id, e, t + 1, 2) for t in range(next(lengths))] for e in itertools.count()
        )
        assert steps == list(itertools.islice(episodes, len(steps)))
    envs.close()


# ------------------------------------------------------------------------------------------------- faults


def play(envs, steps):
    """Step and check after every step that no row joins two episodes; give the steps of each row that count."""
    rollout = Rollout(envs, fives)
    rows = {i: [] for i in range(envs.num_envs)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in itertools.islice(rollout, steps):
            for row, env_id in enumerate(step.env_ids):
                before, after = step.observation[row], step.next_observation[row]
                if step.lost is not None and step.lost[row]:
                    rows[env_id].append("lost")
                    continue
                assert before[1] == after[1]
                assert after[2] == before[2] + 1
                assert bool(step.is_first[row]) == (before[2] == 0)
                rows[env_id].append((int(before[1]), int(after[2])))
    return rows, [str(w.message) for w in caught], rollout


def whole(episodes, steps):
    """List (episode, step) of a row of six-step episodes that nothing befalls."""
    return list(itertools.islice(((e, t) for e in episodes for t in range(1, 7)), steps))


@pytest.mark.parametrize("fault", IN_PROCESS)
@pytest.mark.parametrize("where", ["serial", "pool"])
def test_fault_of_one_environment_costs_its_step_and_nobody_elses(fault, where):
    """Rollout 3B and 3A.19, 3A.33: named; its episode is cut, a new one begins; the others do not notice."""
    plan = {(1, 1, 4): fault}
    make = partial(FaultyEnv, plan=plan, seeds=SEEDS)
    envs = faulty(plan, 2) if where == "pool" else make_envs(make, 4, mode="serial", on_fault="restart")
    rows, said, rollout = play(envs, 20)
    # Episode 0 whole, three steps of episode 1, the lost one, then episode 2.
    assert rows[1] == [*whole([0], 6), *whole([1], 3), "lost", *whole([2, 3], 10)]
    for env_id in (0, 2, 3):
        assert rows[env_id] == whole([0, 1, 2, 3], 20)
    (text,) = said
    assert "env 1 of 4, step 4 of its episode 1" in text
    assert "its episode is cut" in text.lower()
    if fault == "raise":
        assert "step(np.int64(3)) raised ZeroDivisionError: the wheel came off" in text
        assert "break_at" in text  # the environment's own traceback
        assert f"seed {episode_seed(0, 1, 1)}" in text
    (fault,) = envs.faults
    assert (fault.env_id, fault.episode) == (1, 1)
    assert rollout.statistics.lost == 1
    envs.close()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("kill", "was killed by SIGKILL. Play that episode in this process"),
        ("segfault", "was killed by SIGSEGV"),
        ("exit", "ended with exit code 7"),
        ("hang", "did not return within 0.5 s, and its process was ended"),
    ],
)
def test_death_of_a_worker_costs_its_environments_their_episodes_and_no_whole_step(fault, words):
    """Rollout 3A.32, 3A.34: env 2 dies at step 4 of episode 1; env 3 beside it is cut; 0 and 1 do not notice."""
    envs = faulty({(2, 1, 4): fault}, 2, step_timeout_s=0.5 if fault == "hang" else 60.0)
    before = envs.processes
    rows, said, rollout = play(envs, 20)
    assert rows[0] == rows[1] == whole([0, 1, 2, 3], 20)
    assert rows[2] == [*whole([0], 6), *whole([1], 3), "lost", *whole([2, 3], 10)]
    # Env 3 comes after env 2 in its process: its step was in flight, too.
    assert rows[3] == [*whole([0], 6), *whole([1], 3), "lost", *whole([2, 3], 10)]
    (text,) = said
    for part in (
        f"env 2 of 4, step 4 of its episode 1 (seed {episode_seed(0, 2, 1)}): step(3) in worker 1 "
        f"(process {before[1]}, environments 2 to 3)",
        words,
        "So are those beside it, of env 3.",
    ):
        assert part in text, text
    assert envs.processes[0] == before[0]
    assert envs.processes[1] != before[1]
    assert rollout.statistics.lost == 2
    envs.close()


def test_death_of_a_worker_keeps_steps_that_were_whole_before_it():
    """Env 1 dies after env 0 in its process has stepped: that step is stored, and its episode cut after it."""
    envs = faulty({(1, 0, 3): "kill", (1, 1, 6): "kill"}, 1, num_envs=2)
    rows, said, rollout = play(envs, 12)
    # The first death cuts env 0 after three whole steps; at the second its sixth step ends the episode by itself.
    assert rows[0] == [*whole([0], 3), *whole([1], 6), *whole([2], 3)]
    assert rows[1] == [*whole([0], 2), "lost", *whole([1], 5), "lost", *whole([2], 3)]
    assert len(said) == 2
    assert [record.length for record in rollout.statistics.window] == [6]
    envs.close()


def test_death_while_a_new_episode_begins_keeps_the_end_of_the_one_before():
    envs = faulty({(0, 1, 0): "kill"}, 2)
    rows, said, rollout = play(envs, 14)
    assert rows[0] == whole([0, 2, 3], 14)  # episode 1 could not begin
    assert rows[1] == whole([0, 1, 2], 14)  # it ended with the same step: its next episode has lost nothing
    assert rows[2] == rows[3] == whole([0, 1, 2], 14)
    assert f"reset(seed={episode_seed(0, 0, 1)}) in worker 0" in said[0]
    assert rollout.statistics.lost == 0
    envs.close()


@pytest.mark.parametrize("fault", ["raise", "hang"])
def test_first_reset_that_fails_begins_the_next_episode(fault):
    envs = faulty({(3, 0, 0): fault}, 2, step_timeout_s=0.5)
    rows, said, _ = play(envs, 8)
    assert rows[3] == whole([1, 2], 8)
    assert rows[0] == rows[1] == rows[2] == whole([0, 1], 8)
    assert "reset(" in said[0]
    envs.close()


def test_worker_that_is_killed_from_outside_is_replaced():
    envs = faulty({}, 2)
    rollout = Rollout(envs, fives)
    first = list(itertools.islice(rollout, 4))
    os.kill(envs.processes[0], signal.SIGKILL)
    with pytest.warns(RuntimeWarning, match=r"worker 0 .* was killed by SIGKILL between two calls"):
        step = next(rollout)
    assert step.lost.tolist() == [True, True, False, False]
    assert first[-1].lost is None
    assert [next(rollout).observation[:, 2].tolist() for _ in range(2)] == [[0, 0, 5, 5], [1, 1, 0, 0]]
    envs.close()


def test_worker_that_is_stopped_is_ended_within_the_timeout():
    envs = faulty({}, 2, step_timeout_s=0.5)
    rollout = Rollout(envs, fives)
    next(rollout)
    os.kill(envs.processes[1], signal.SIGSTOP)
    with pytest.warns(RuntimeWarning, match=r"worker 1 .* did not return within 0.5 s"):
        step = next(rollout)
    assert step.lost.tolist() == [False, False, True, True]
    assert next(rollout).lost is None
    envs.close()


@pytest.mark.parametrize("where", ["serial", "pool"])
def test_crash_loop_ends_loudly(where, monkeypatch):
    """Rollout 3A.33, 3A.35: the environment that fails in every episode is given up, with what it said."""
    waits = []
    monkeypatch.setattr("rlfeed.envs.faults.time.sleep", waits.append)
    plan = {(1, episode, 2): "raise" for episode in range(40)}
    make = partial(FaultyEnv, plan=plan, seeds=SEEDS)
    envs = faulty(plan, 2) if where == "pool" else make_envs(make, 4, mode="serial", on_fault="restart")
    rollout = Rollout(envs, fives)
    with pytest.warns(RuntimeWarning) as caught, pytest.raises(EnvFailedError, match="the wheel came off") as error:
        list(itertools.islice(rollout, 100))
    assert len(caught) == 5
    assert "broke 6 times in a row, max_restarts is 5" in str(error.value)
    assert waits == [0.1, 0.2, 0.4, 0.8]
    envs.close()


def test_faults_are_forgiven_after_an_episode_that_ends():
    plan = {(1, episode, 2): "raise" for episode in range(1, 40, 2)}
    rows, said, _ = play(faulty(plan, 2, max_restarts=1), 60)
    assert len(said) > 5
    assert rows[0] == whole(range(10), 60)


@pytest.mark.parametrize("where", ["serial", "pool"])
def test_on_fault_raise_raises_the_fault(where):
    plan = {(1, 0, 2): "nan"}
    make = partial(FaultyEnv, plan=plan, seeds=SEEDS)
    envs = faulty(plan, 2, on_fault="raise") if where == "pool" else make_envs(make, 4, mode="serial")
    with pytest.raises(EnvContractError, match=r"env 1 of 4, step 2 of its episode 0: observation\[0\] is nan"):
        list(itertools.islice(Rollout(envs, fives), 5))
    envs.close()


@pytest.mark.parametrize("fault", ["raise", "kill"])
def test_rollout_goes_on_after_a_fault_that_was_raised(fault):
    envs = faulty({(1, 0, 2): fault}, 2, on_fault="raise")
    rollout = Rollout(envs, fives)
    with pytest.raises(EnvFailedError, match="env 1 of 4, step 2 of its episode 0"):
        list(itertools.islice(rollout, 5))
    assert [next(rollout).observation[:, 1:3].tolist() for _ in range(2)] == [[[1, 0]] * 4, [[1, 1]] * 4]
    assert envs.episodes.tolist() == [1, 1, 1, 1]
    envs.close()


# ------------------------------------------------------------------------------------------------- start and end


class CannotBeMade(IdentifiableEnv):
    def __init__(self, parent=os.getpid()):  # noqa: B008 - when this module is imported: before the fork
        super().__init__()
        if os.getpid() != parent:
            raise OSError("no licence for a second one")


class DiesInItsConstructor(IdentifiableEnv):
    def __init__(self, parent=os.getpid()):  # noqa: B008
        super().__init__()
        if os.getpid() != parent:
            os._exit(5)


def test_constructor_that_raises_in_a_worker_shows_its_traceback():
    with pytest.raises(EnvMakeError, match="no licence for a second one"):
        pool(CannotBeMade, 2, 2)


def test_constructor_that_ends_its_process_is_told():
    with pytest.raises(WorkerError, match=r"worker 0 ended with exit code 5 before its environments were made"):
        pool(DiesInItsConstructor, 2, 1)


def test_one_instance_for_all_environments_is_refused_in_a_worker():
    """Rollout 3A.20: ``[lambda: env] * n``."""
    env = IdentifiableEnv()
    with pytest.raises(ConfigError, match="environments 0 and 1 are the same object"):
        pool(lambda: env, 4, 2)


class Threaded(IdentifiableEnv):
    """Rewards the number of threads that torch would take."""

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, float(torch.get_num_threads()), *rest


def test_worker_has_one_thread_for_torch():
    """rollout 3A.38: several processes with a thread for every core each hold each other up."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rollout = Rollout(pool(Threaded, 2, 2), fives)
        assert next(rollout).reward.tolist() == [1.0, 1.0]
        rollout.close()
    finally:
        torch.set_num_threads(before)


def test_close_leaves_no_process():
    envs = pool(IdentifiableEnv, 4, 2)
    processes = envs.processes
    envs.reset(0, [0] * 4)
    envs.close()
    envs.close()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"layout": 9}, "layout is 9 for 8 environments"),
        ({"layout": 0}, "layout is 0"),
        ({"layout": (3, 2)}, r"layout is \(3, 2\)"),
        ({"layout": "some"}, "layout is 'some'"),
        ({"layout": "²"}, "layout is '²'"),
        ({"layout": 2, "mode": "serial"}, "expected them of a pool only"),
        ({"min_ready": 0}, "min_ready: is 0; expected 1 to 8"),
        ({"min_ready": "2"}, "min_ready: is '2'; expected 1 to 8"),
        ({"mode": "pool", "step_timeout_s": 0}, "step_timeout_s: is 0; expected seconds above 0"),
        ({"mode": "pool", "step_timeout_s": "5"}, "step_timeout_s: is '5'; expected seconds above 0"),
        ({"on_fault": "ignore"}, "on_fault is 'ignore'"),
        ({"max_restarts": -1}, "max_restarts is -1"),
    ],
)
def test_make_envs_settings_of_a_pool_that_do_not_fit_are_refused(kwargs, words):
    with pytest.raises(ConfigError, match=words):
        make_envs(IdentifiableEnv, 8, **kwargs)


class Typed(IdentifiableEnv):
    """Knows the types of the actions it got."""

    types = frozenset()

    def step(self, action):
        Typed.types |= {type(action)}
        return super().step(action)


class ActionKept(gymnasium.Wrapper):
    """A wrapper of the user's own."""


def test_actions_of_own_environments_are_numpys_and_those_of_gymnasiums_are_ints():
    envs = make_envs(Typed, 2, mode="serial")
    envs.reset(0, [0, 0])
    envs.step(np.array([1, 2]))
    assert Typed.types == {np.int64}
    cartpole = make_envs("CartPole-v1", 2, mode="serial")._group
    wrapped = make_envs("CartPole-v1", 2, mode="serial", wrappers=[ActionKept])._group
    assert [type(action) for action in cartpole.split(np.array([0, 1]))] == [int, int]
    assert [type(action) for action in wrapped.split(np.array([0, 1]))] == [np.int64, np.int64]
