"""Vector environments of other people: every mode, form and wrapper gives the true steps, and what breaks is named."""

import os
import signal
import time
from contextlib import contextmanager

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import vector as wrappers
from support.known_streams import act, expected_stream, read_streams

from rlfeed.envs import SerialEnvs, VectorEnvs, as_envs, episode_seed, gym_async
from rlfeed.errors import ConfigError, EnvContractError, EnvFailedError, EnvMakeError, UnsupportedError
from rlfeed.nest import leaves
from rlfeed.rollout import Rollout
from rlfeed.testing import IdentifiableEnv

MODES = tuple(AutoresetMode)
LENGTHS, ENDS = (3, 1, 2), ("terminated", "truncated", "both")


def makers(num_envs=2, kind=IdentifiableEnv, **kwargs):
    return [lambda env=env: kind(env, lengths=LENGTHS, ends=ENDS, **kwargs) for env in range(num_envs)]


def check_streams(vector, count=14):
    envs = VectorEnvs(vector)
    try:
        expected = [expected_stream(env, LENGTHS, ENDS, count) for env in range(envs.num_envs)]
        assert read_streams(Rollout(envs, act), count) == expected
    finally:
        envs.close()


# What comes out is the same in every form.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("observation", ["box", "dict"])
def test_vector_envs_any_mode_gives_the_true_steps(mode, copy, observation):
    """rollout 3A.1, 3A.4: the final observation is there, and no step joins two episodes."""
    check_streams(SyncVectorEnv(makers(3, observation=observation), copy=copy, autoreset_mode=mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shared_memory", [True, False])
def test_vector_envs_processes_give_the_true_steps(mode, shared_memory):
    check_streams(AsyncVectorEnv(makers(), shared_memory=shared_memory, context="fork", autoreset_mode=mode))


class Reuses(VectorWrapper):
    """Gives the same arrays in every step, as an environment in native code may."""

    def __init__(self, env):
        super().__init__(env)
        self.kept = None

    def reset(self, **kwargs):
        observation, infos = super().reset(**kwargs)
        self.kept = self.kept or (observation, np.zeros(self.num_envs), *np.zeros((2, self.num_envs), bool))
        self.kept[0][:] = observation
        return self.kept[0], infos

    def step(self, actions):
        *arrays, infos = super().step(actions)
        for mine, new in zip(self.kept, arrays, strict=True):
            mine[:] = new
        return *self.kept, infos


@pytest.mark.parametrize("mode", MODES)
def test_vector_envs_that_reuse_their_arrays_give_the_true_steps(mode):
    """rollout 3A.7"""
    check_streams(Reuses(SyncVectorEnv(makers(), autoreset_mode=mode)))


@pytest.mark.parametrize("mode", MODES)
def test_vector_envs_in_gymnasiums_wrappers_give_the_true_steps(mode):
    vector = wrappers.RecordEpisodeStatistics(SyncVectorEnv(makers(), autoreset_mode=mode))
    check_streams(wrappers.TransformReward(vector, lambda reward: reward))


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])  # those they take
def test_vector_envs_observation_wrappers_reach_the_final_observation(mode):
    space = spaces.Box(-np.inf, np.inf, (4,), np.float32)
    vector = SyncVectorEnv(makers(), autoreset_mode=mode)
    vector = wrappers.VectorizeTransformObservation(
        vector, gymnasium.wrappers.TransformObservation, func=lambda o: o + 100, observation_space=space
    )
    streams = read_streams(Rollout(VectorEnvs(vector), lambda o: np.zeros(len(o), np.int64)), 10)
    assert [step["next_observation"][2] for step in streams[0]] == [101, 102, 103, 101, 101, 102, 101, 102, 103, 101]


class Forms(VectorWrapper):
    """Gives final observations otherwise than Gymnasium: batched as observations are, as a list, by the old name."""

    def __init__(self, env, form):
        super().__init__(env)
        self.form = form

    def step(self, actions):
        *rest, infos = super().step(actions)
        if "final_obs" in infos:
            rows = list(infos["final_obs"])
            if self.form == "batched":
                rows = rest[0].copy() if not isinstance(rest[0], dict) else {k: v.copy() for k, v in rest[0].items()}
                for row, final in enumerate(infos["final_obs"]):
                    for target, part in [(rows, final)] if final is not None and not isinstance(final, dict) else []:
                        target[row] = part
                    for key in final if isinstance(final, dict) else ():
                        rows[key][row] = final[key]
            infos = {"final_observation" if self.form == "old" else "final_obs": rows}
        return *rest, infos


@pytest.mark.parametrize("form", ["batched", "list", "old"])
@pytest.mark.parametrize("observation", ["box", "dict"])
def test_vector_envs_final_observations_in_any_form_are_taken(form, observation):
    """rollout 3A.1"""
    vector = SyncVectorEnv(makers(observation=observation), autoreset_mode=AutoresetMode.SAME_STEP)
    check_streams(Forms(vector, form))


def test_vector_envs_without_final_observations_are_refused():
    """B24."""
    class Forgets(VectorWrapper):
        def step(self, actions):
            *rest, _ = super().step(actions)
            return *rest, {}

    rollout = Rollout(Forgets(SyncVectorEnv(makers(), autoreset_mode=AutoresetMode.SAME_STEP)), act)
    with pytest.raises(EnvContractError, match='info has no "final_obs" although an episode ended'):
        read_streams(rollout, 5)


# Modes.


class Vector(VectorEnv):
    """The least of a vector environment: one number a row that counts its steps."""

    def __init__(self, num_envs=2):
        self.num_envs = num_envs
        self.single_observation_space = spaces.Box(0, 99, (1,), np.float32)
        self.single_action_space = spaces.Discrete(2)
        self.seeds, self.count = [], np.zeros((num_envs, 1), np.float32)

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.count[:] = 0
        return self.count, {}

    def step(self, actions):
        self.count += 1
        return self.count, np.ones(self.num_envs), *np.zeros((2, self.num_envs), bool), {}


def test_vector_envs_metadata_that_another_class_wrote_is_not_believed(monkeypatch):
    # As ale-py's class does: it writes into the dict that every vector environment inherits.
    monkeypatch.setitem(VectorEnv.metadata, "autoreset_mode", AutoresetMode.SAME_STEP)
    with pytest.raises(ConfigError, match="metadata of its own has no autoreset_mode"):
        as_envs(Vector())
    vector = Vector()
    vector.autoreset_mode = AutoresetMode.NEXT_STEP
    assert as_envs(vector)._mode is AutoresetMode.NEXT_STEP


def test_vector_envs_one_environment_twice_is_refused():
    """rollout 3A.20"""
    env = IdentifiableEnv()
    with pytest.raises(ConfigError, match="environments 0 and 1 are the same object"):
        as_envs(SyncVectorEnv([lambda: env] * 2))


def test_vector_envs_batches_of_some_environments_are_refused():
    vector = Vector(4)
    vector.metadata, vector.batch_size = {"autoreset_mode": AutoresetMode.NEXT_STEP}, 2
    with pytest.raises(UnsupportedError, match="gives batches of 2 of its 4 environments"):
        as_envs(vector)


# Seeds.


def test_vector_envs_native_gets_one_seed_at_each_reset():
    vector = Vector()
    vector.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    rollout = Rollout(vector, lambda o: np.zeros(len(o), np.int64), seed=3)
    next(rollout)
    rollout.restart()
    next(rollout)
    assert vector.seeds == [episode_seed(3, 0, 0), episode_seed(3, 0, 1)]


def test_vector_envs_disabled_plays_the_episodes_of_serial_environments():
    """rollout 3A.12"""

    def build(env):
        return lambda: IdentifiableEnv(env, lengths=())  # 1 to 6 steps, drawn from the episode's seed

    vector = SyncVectorEnv([build(0), build(1)], autoreset_mode=AutoresetMode.DISABLED)
    rollouts = [Rollout(envs, act, seed=5) for envs in (vector, SerialEnvs([build(0)(), build(1)()]))]
    assert read_streams(rollouts[0], 40) == read_streams(rollouts[1], 40)


def test_vector_cartpole_has_the_episode_lengths_of_single_ones():
    """rollout 3A.45: the same states and actions, through time limits and falls."""
    native = gymnasium.make_vec("CartPole-v1", 4, vectorization_mode="vector_entry_point", max_episode_steps=12)
    single = [gymnasium.make("CartPole-v1", max_episode_steps=12) for _ in range(4)]
    rollout = Rollout(native, lambda o: (np.arange(len(o)) % 2 == 0).astype(np.int64))
    lengths, expected, begun = [], [], [0] * 4
    for _ in range(60):
        step = next(rollout)
        for row, env in enumerate(step.env_ids):
            if step.is_first[row]:
                single[env].reset()
                single[env].unwrapped.state = step.observation[row].astype(np.float64)
            begun[env] += 1
            observation, _, terminated, truncated, _ = single[env].step(step.action[row])
            np.testing.assert_allclose(step.next_observation[row], observation, rtol=1e-5, atol=1e-5)
            assert (step.terminated[row], step.truncated[row]) == (terminated, truncated)
            if terminated or truncated:
                expected.append((env, begun[env]))
                begun[env] = 0
        lengths += [(record.env_id, record.length) for record in rollout.statistics.finished]
    assert lengths == expected
    assert {length == 12 for _, length in lengths} == {True, False}


# A reset in the middle.


@pytest.mark.parametrize("shared_memory", [True, False])
def test_vector_envs_restarted_after_an_end_take_no_step_that_is_a_reset(shared_memory):
    # Gymnasium's workers without shared memory reset once more at the first step after a manual reset.
    build = [lambda: IdentifiableEnv(0, lengths=LENGTHS), lambda: IdentifiableEnv(1, lengths=[9])]
    rollout = Rollout(AsyncVectorEnv(build, shared_memory=shared_memory, context="fork"), act)
    assert [next(rollout).terminated.tolist() for _ in range(3)][-1] == [True, False]
    rollout.restart()
    steps = [next(rollout) for _ in range(3)]
    rollout.close()
    rows = [(step.observation[i, :3].tolist(), step.reward[i]) for step in steps for i in range(len(step))]
    begun = 1 if shared_memory else 2
    assert next(row for row in rows if row[0][0] == 0) == ([0, begun, 0], np.float32(10 * begun + 0.01))
    assert [row[0] for row in rows if row[0][0] == 1] == [[1, 1, 0], [1, 1, 1], [1, 1, 2]]
    assert all(reward > 0 for _, reward in rows)


# What breaks.


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda o, r, te, tr, i: (o, r[:, None], te, tr, i), r"reward has shape \(2, 1\); expected \(2,\)"),
        (lambda o, r, te, tr, i: (o, ["a", "b"], te, tr, i), "expected numbers"),
        (lambda o, r, te, tr, i: (o[:1], r, te, tr, i), "observation has 1 rows; expected 2"),
        (lambda o, r, te, tr, i: (o, r, te, tr, [{}, {}]), "infos are a list; expected a dict"),
        (lambda o, r, te, tr, i: (o, r, te, i), r"step\(\) returned 4 values; expected 5: observations, rewards, ter"),
        (lambda o, r, te, tr, i: 1 / 0, r"Changed: step\(\) raised ZeroDivisionError"),
    ],
)
def test_vector_envs_what_breaks_the_contract_is_named(change, part):
    class Changed(Vector):
        def step(self, actions):
            return change(*super().step(actions))

    vector = Changed()
    vector.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    with pytest.raises((EnvContractError, EnvFailedError), match=part):
        next(Rollout(vector, lambda o: np.zeros(len(o), np.int64)))


def test_vector_envs_reset_of_the_old_gym_is_explained():
    class Old(Vector):
        def reset(self, *, seed=None, options=None):
            return super().reset()[0]

    vector = Old()
    vector.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    with pytest.raises(EnvContractError, match=r"reset\(\) returned a ndarray; expected 2: observations, infos"):
        next(Rollout(vector, lambda o: np.zeros(len(o), np.int64)))


class Parts(gymnasium.Env):
    """Observations and actions of several parts: the observation repeats the action."""

    def __init__(self, kind):
        parts = {"a": spaces.Discrete(3, start=2), "b": spaces.Box(-1, 1, (2,), np.float32)}
        self.kind = kind
        space = spaces.Dict(parts) if kind is dict else spaces.Tuple(list(parts.values()))
        self.observation_space = self.action_space = spaces.Dict(inner=space) if kind is dict else space
        self.t = 0

    def reset(self, *, seed=None, options=None):
        self.t = 0
        parts = (np.int64(2), np.zeros(2, np.float32))
        return ({"inner": dict(zip("ab", parts, strict=True))} if self.kind is dict else parts), {}

    def step(self, action):
        self.t += 1
        return action, 0.0, False, self.t == 2, {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [dict, tuple])
@pytest.mark.parametrize("worker", [False, True])
def test_vector_envs_observations_and_actions_of_several_parts_stay_together(mode, kind, worker):
    """rollout 3A.21"""
    build = [lambda: Parts(kind) for _ in range(2)]
    vector = AsyncVectorEnv(build, context="fork", autoreset_mode=mode) if worker else SyncVectorEnv(
        build, autoreset_mode=mode
    )
    rollout = Rollout(vector, lambda o: o, mode="random")
    for _ in range(7):
        step = next(rollout)
        for (_, action), (_, seen) in zip(leaves(step.action), leaves(step.next_observation), strict=True):
            np.testing.assert_array_equal(action, seen)
    assert {record.length for record in rollout.statistics.window} == {2}
    rollout.close()


class Breaks(IdentifiableEnv):
    """Env 1 fails in its second step, in one of several ways."""

    def __init__(self, env, *, how, **kwargs):
        super().__init__(env, **kwargs)
        self.how = how

    def step(self, action):
        if self.env == 1 and self.step_in_episode == 1:
            if self.how == "raise":
                raise KeyError("lost")
            if self.how == "unpicklable":
                raise type("Local", (Exception,), {})("lost")
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return super().step(action)


@contextmanager
def nothing_left(vector):
    workers = list(vector.unwrapped.processes)
    yield
    assert [worker.is_alive() for worker in workers] == [False] * len(workers)
    assert all(worker.exitcode is not None for worker in workers)  # waited for: no zombies


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("how", "part"),
    [
        ("raise", "env 1 of 2 raised KeyError: 'lost'.*in step\n.*KeyError: 'lost'"),
        ("unpicklable", "env 1 of 2 raised an exception that cannot be pickled"),
        ("kill", r"the process of env 1 of 2 was killed by SIGKILL in step\(\)"),
        ("hang", r"env 1 of 2 did not come back from step\(\) within 0.4 s"),
    ],
)
def test_vector_envs_worker_that_fails_is_named_and_none_is_left(how, part, wrapped, monkeypatch):
    """rollout 3B, 3A.32, 3A.34: what Gymnasium answers with EOFError, or waits for without end."""
    monkeypatch.setattr("rlfeed.envs.gym_async._LAST_WORDS_S", 0.5)
    vector = AsyncVectorEnv(makers(kind=Breaks, how=how), context="fork")
    envs = VectorEnvs(wrappers.RecordEpisodeStatistics(vector) if wrapped else vector, step_timeout_s=0.4)
    rollout = Rollout(envs, act)
    next(rollout)
    with nothing_left(vector):
        began = time.monotonic()
        with pytest.raises(EnvFailedError, match=f"(?s){part}"):
            next(rollout)
        assert time.monotonic() - began < 60  # a guard against hanging
    with pytest.raises(EnvFailedError, match="was called after its workers were ended"):
        next(rollout)
    rollout.close()


def test_vector_envs_close_ends_an_environment_that_does_not_close(monkeypatch):
    class Stays(IdentifiableEnv):
        def close(self):
            if os.getpid() != main:
                time.sleep(600)

    main = os.getpid()
    monkeypatch.setattr("rlfeed.envs.gym_async._LEAVE_S", 0.3)
    vector = AsyncVectorEnv(makers(kind=Stays), context="fork")
    with nothing_left(vector):
        VectorEnvs(vector).close()


# Masks.


class Masked(gymnasium.Env):
    """Allows only the action (step + episode) % 3; at an end it has no action to allow, and says so or nothing."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, at_end):
        self.at_end, self.t, self.episode = at_end, 0, -1

    def info(self, ended=False):
        if ended:
            return {} if self.at_end == "nothing" else {"action_mask": np.zeros(3, np.int8)}
        return {"action_mask": (np.arange(3) == (self.t + self.episode) % 3).astype(np.int8)}

    def reset(self, *, seed=None, options=None):
        self.t, self.episode = 0, self.episode + 1
        return np.zeros(1, np.float32), self.info()

    def step(self, action):
        if action != (self.t + self.episode) % 3:
            raise ValueError(f"action {action} is not allowed")
        self.t += 1
        ended = self.t == 2 + self.episode % 3
        return np.zeros(1, np.float32), 1.0, ended, False, self.info(ended)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at_end", ["nothing", "zeros"])
def test_vector_envs_masks_are_those_of_the_rows_that_act(mode, at_end):
    """rollout 3A.41"""
    vector = SyncVectorEnv([lambda: Masked(at_end)] * 2, autoreset_mode=mode)
    rollout = Rollout(vector, lambda o: np.zeros(len(o), np.int64), mode="random")
    for _ in range(25):
        next(rollout)
    assert [r.length for r in rollout.statistics.window if r.env_id == 0][:4] == [2, 3, 4, 2]


# Success.


class Succeeds(IdentifiableEnv):
    """Tells at the end of an episode whether its number is even, but not in every third one."""

    def step(self, action):
        *rest, _ = super().step(action)
        told = self.step_in_episode == self.length and self.episode % 3 != 2
        return *rest, {"is_success": self.episode % 2 == 0, "other": 1} if told else {}


@pytest.mark.parametrize("mode", MODES)
def test_vector_envs_success_is_told_for_the_episodes_that_tell_it(mode):
    envs = VectorEnvs(SyncVectorEnv(makers(kind=Succeeds), autoreset_mode=mode))
    ready, told = envs.reset(0, [0, 0]), []
    for _ in range(14):
        acted = ready.env_ids
        outcome = envs.step(np.zeros(len(acted), np.int64))
        if outcome.success is not None:
            told += [(int(outcome.next_observation[row, 1]), outcome.success[row]) for row in range(len(acted))]
        ready = outcome.ready
    assert told[:6] == [(0, 1.0)] * 2 + [(1, 0.0)] * 2 + [(3, 0.0)] * 2


def test_vector_envs_success_of_one_row_leaves_the_others_untold():
    build = [lambda: Succeeds(0, lengths=[1]), lambda: IdentifiableEnv(1, lengths=[1])]
    envs = VectorEnvs(SyncVectorEnv(build, autoreset_mode=AutoresetMode.SAME_STEP))
    envs.reset(0, [0, 0])
    success = envs.step(np.zeros(2, np.int64)).success
    assert success is not None
    assert (success[0], bool(np.isnan(success[1]))) == (1.0, True)


def test_start_async_worker_that_cannot_make_its_environment_is_an_error(monkeypatch, capfd):
    def only_here():
        if os.getpid() != main:
            raise RuntimeError("no display")
        return IdentifiableEnv()

    main = os.getpid()
    monkeypatch.setattr(gym_async, "AsyncVectorEnv", lambda *a, context, **k: AsyncVectorEnv(*a, context="fork", **k))
    with pytest.raises(EnvMakeError, match="Display-v0: a worker ended while it made its environment"):
        gym_async.start_async([only_here] * 2, AutoresetMode.SAME_STEP, "Display-v0")
    assert "RuntimeError: no display" in capfd.readouterr().err
