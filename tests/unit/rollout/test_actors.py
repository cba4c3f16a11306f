"""Actors, forked so that they are there at once; the start methods that people use are in the integration tests."""

import multiprocessing
import os
import signal
import subprocess
import time
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from support.endings import is_running
from torch import nn

from rlfeed.codec import decode, encode
from rlfeed.envs import make_envs
from rlfeed.envs.seeds import episode_seed
from rlfeed.envs.serial import SerialEnvs
from rlfeed.errors import CheckpointError, ConfigError, WorkerError
from rlfeed.feed import epoch
from rlfeed.replay import ReplayBuffer, Transition
from rlfeed.rollout.actors import Actors
from rlfeed.rollout.weights import Weights
from rlfeed.specs import ArraySpec
from rlfeed.testing import IdentifiableEnv
from rlfeed.types import PolicyOutput

HANG_S = 60.0
VERSION = ArraySpec((), np.dtype(np.int64))


class SeededEnv(gymnasium.Env):
    """An environment whose observation is (seed of its episode, step); episodes have 5 steps, or never end."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Discrete(1000)

    def __init__(self, length=5, fault=None):
        self.length, self.fault, self.seed, self.steps = length, fault, 0, 0

    def reset(self, *, seed=None, options=None):
        self.seed, self.steps = seed, 0
        return np.array([self.seed, 0.0]), {}

    def step(self, action):
        self.steps += 1
        if self.fault is not None:
            self.fault(self)
        return np.array([self.seed, float(self.steps)]), 1.0, self.steps == self.length, False, {}


class Module(nn.Module):
    """Acts by the version of its weights."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, observation):
        return torch.full((len(observation),), int(self.value) % 5)


def module_policy(actor, num_actors):
    module = Module()
    return module, module


def identifiable(first):
    return SerialEnvs([IdentifiableEnv(first + i) for i in range(2)])


def seeded(first):
    return SerialEnvs([SeededEnv()])


def endless(first):
    return SerialEnvs([SeededEnv(length=0)])


class Learner:
    """Two actors and what they share."""

    def __init__(self, make_envs=seeded, make_policy=module_policy, *, envs_per_actor=1, capacity=50_000, **options):
        space = make_envs(0)
        self.buffer = ReplayBuffer(
            space.observation_space,
            space.action_space,
            capacity=capacity,
            num_envs=2 * envs_per_actor,
            extras={"policy_version": VERSION},
        )
        self.module = Module()
        self.weights = Weights(self.module)
        options = {"num_actors": 2, "start_method": "fork", "seed": 7} | options
        self.actors = Actors(
            make_envs, make_policy, self.buffer, self.weights, envs_per_actor=envs_per_actor, **options
        )

    def publish(self, version):
        with torch.no_grad():
            self.module.value.fill_(float(version))
        self.weights.publish(self.module, version)

    def wait_for(self, condition):
        deadline = time.monotonic() + HANG_S
        while not condition():
            self.actors.wait(self.actors.env_steps, 0.01)
            assert time.monotonic() < deadline

    def stored(self):
        """Every stored step, by lane, in order."""
        lanes = {lane: [] for lane in range(self.buffer.num_envs)}
        for batch in epoch(self.buffer, Transition(), 64, shuffle=False):
            columns = zip(
                batch.ids.tolist(),
                batch.observation.tolist(),
                batch.action.tolist(),
                batch.next_observation.tolist(),
                batch.extras["policy_version"].tolist(),
                batch.terminated.tolist(),
                strict=True,
            )
            for step_id, *row in columns:
                lanes[step_id >> 44].append((step_id, *row))
        return {lane: sorted(rows) for lane, rows in lanes.items()}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.actors.close()


def test_actors_store_every_step_once_with_its_true_successor_and_the_version_that_chose_it():
    with Learner(identifiable, envs_per_actor=2, limit=0, pull_every=1) as learner:
        for version in range(1, 6):
            learner.publish(version)
            learner.actors.limit = 200 * version
            learner.wait_for(lambda version=version: learner.actors.env_steps >= 200 * version)
    actors, lanes = learner.actors, learner.stored()

    assert 1000 <= actors.env_steps == learner.buffer.stats().inserted == sum(map(len, lanes.values())) < 1004
    stored = [len(rows) for rows in lanes.values()]
    assert [stats.env_steps for stats in actors.stats()] == [sum(stored[:2]), sum(stored[2:])]
    for lane, rows in lanes.items():
        for _, observation, action, successor, version, _ in rows:
            assert observation[0] == successor[0] == lane
            assert successor == [lane, observation[1], observation[2] + 1, action]
            assert action == version % 5
        versions = [row[4] for row in rows]
        assert versions == sorted(versions)
    assert {row[4] for rows in lanes.values() for row in rows} == {1, 2, 3, 4, 5}


def test_actors_tell_of_every_episode_although_nobody_listens_meanwhile():
    with Learner(lambda first: SerialEnvs([SeededEnv(length=1)]), limit=2500) as learner:
        learner.actors.start()
        deadline = time.monotonic() + HANG_S
        while learner.actors.env_steps < 2500:  # more of them than a pipe holds
            time.sleep(0.01)
            assert time.monotonic() < deadline
        assert learner.actors.statistics.episodes == 0
        learner.wait_for(lambda: learner.actors.statistics.episodes >= 2500)
        assert {record.env_id for record in learner.actors.statistics.window} <= {0, 1}
    assert learner.actors.statistics.episodes == learner.actors.env_steps
    assert learner.actors.statistics.mean_return == 1.0


def test_actors_go_on_while_the_learner_sleeps():
    with Learner() as learner:
        learner.wait_for(lambda: learner.actors.env_steps > 0)
        seen = []
        for _ in range(5):
            time.sleep(0.1)
            seen.append(learner.actors.env_steps)
    assert len(set(seen)) > 1
    assert [stats.waited_s for stats in learner.actors.stats()] == [0.0, 0.0]


@pytest.mark.parametrize("envs_per_actor", [1, 2])
def test_actors_episodes_have_the_seeds_that_they_have_in_one_process(envs_per_actor):
    """Rollout 3A.12: the same episodes however environments are shared out."""

    def make(first):
        return make_envs(SeededEnv, envs_per_actor, mode="serial", first_env_id=first)

    with Learner(make, envs_per_actor=envs_per_actor) as learner:
        learner.wait_for(lambda: min(stats.env_steps for stats in learner.actors.stats()) > 40)
    for lane, rows in learner.stored().items():
        seeds = list(dict.fromkeys(row[1][0] for row in rows))
        assert len(seeds) > 3
        assert seeds == [episode_seed(7, lane, number) for number in range(len(seeds))]


def test_actors_draw_random_numbers_of_their_own():
    with Learner(random_steps=10**9) as learner:
        learner.wait_for(lambda: min(stats.env_steps for stats in learner.actors.stats()) >= 20)
    lanes = learner.stored()
    actions = [[row[2] for row in rows] for rows in lanes.values()]
    both = min(map(len, actions))

    assert both >= 20
    assert actions[0][:both] != actions[1][:both]
    assert len(set(actions[0])) > 3  # and not those of the module, which are all 0


def test_actor_that_is_killed_is_named_its_episode_cut_and_another_goes_on_with_the_next_episode():
    with Learner(endless) as learner:
        actors = learner.actors
        learner.wait_for(lambda: min(stats.env_steps for stats in actors.stats()) > 10)
        before, survivor = actors.stats()[0].env_steps, actors.processes[1]
        os.kill(actors.processes[0], signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match=r"actor 0 \(envs 0 \.\. 0\) was killed by SIGKILL while it was taking"):
            learner.wait_for(lambda: actors.stats()[0].env_steps > before + 20)
        assert actors.processes[1] == survivor
        assert [stats.restarts for stats in actors.stats()] == [1, 0]
    lanes = learner.stored()
    seeds = [list(dict.fromkeys(row[1][0] for row in rows)) for rows in lanes.values()]

    assert seeds[0] == [episode_seed(7, 0, 0), episode_seed(7, 0, 1)]
    assert len(seeds[1]) == 1  # its episode was never cut
    for rows in lanes.values():
        for _, observation, _, successor, _, terminated in rows:
            assert successor == [observation[0], observation[1] + 1]
            assert not terminated


def test_actors_whose_environments_break_go_on_and_count_what_was_lost():
    def make(first):
        warnings.simplefilter("ignore")  # in the actor, which would tell its user
        faults = iter([broken])

        def broken_once(env):
            for fault in faults if env.steps == 3 else ():
                fault(env)

        kwargs = {"fault": broken_once}
        return make_envs(SeededEnv, kwargs=kwargs, mode="serial", on_fault="restart", first_env_id=first)

    with Learner(make) as learner:
        learner.wait_for(lambda: learner.actors.statistics.lost == 2 and learner.actors.statistics.episodes > 4)
    assert [stats.restarts for stats in learner.actors.stats()] == [0, 0]
    assert learner.actors.statistics.lost == 2
    for rows in learner.stored().values():
        assert [row[1][1] for row in rows[:4]] == [0.0, 1.0, 0.0, 1.0]  # the third step was lost, the episode cut
    assert learner.actors.env_steps == sum(map(len, learner.stored().values()))


def hang(env):
    if env.steps == 3:
        time.sleep(1e6)


def broken(env):
    if env.steps == 3:
        raise ArithmeticError("of the environment")


def test_actor_that_hangs_is_ended_and_named():
    def make(first):
        return SerialEnvs([SeededEnv(fault=hang if first else None)])

    said = r"actor 1 .* has been taking a step for .*step_timeout_s is 1\.5"
    with Learner(make, step_timeout_s=1.5, on_death="raise") as learner, pytest.raises(WorkerError, match=said) as seen:
        learner.wait_for(lambda: False)
    assert "its steps are kept" in str(seen.value)
    assert len(learner.stored()[1]) == 2


def test_actor_whose_environment_ends_its_process_in_silence_is_named_all_the_same():
    def make(first):
        return SerialEnvs([SeededEnv(fault=lambda env: os._exit(0) if first and env.steps == 3 else None)])

    with (
        Learner(make, on_death="raise") as learner,
        pytest.raises(WorkerError, match=r"actor 1 .* ended with exit code 0 while it was taking a step"),
    ):
        learner.wait_for(lambda: False)


def test_actor_that_raises_again_and_again_is_given_up_with_its_traceback():
    def make(first):
        return SerialEnvs([SeededEnv(fault=broken if first else None)])

    with Learner(make, max_restarts=2) as learner:
        warned = pytest.warns(RuntimeWarning, match=r"raised EnvFailedError: .* of its episode \d")
        with warned as warnings, pytest.raises(WorkerError, match=r"ArithmeticError(?s:.*)died 3 times") as seen:
            learner.wait_for(lambda: False)
    assert "in broken" in str(seen.value)
    assert len(warnings) == 2
    lane = learner.stored()[1]
    assert [row[1][1] for row in lane] == [0.0, 1.0] * 3  # three cut episodes, of which all steps are kept


@pytest.mark.parametrize(
    ("make_envs", "make_policy", "message"),
    [
        (identifiable, module_policy, r"make_envs\(\d\) gave 2 environments; expected 1"),
        (seeded, lambda actor, num_actors: (None, Module()), "policy: is None"),
        (seeded, lambda actor, num_actors: (Module(), nn.Linear(1, 1)), "weight is .*Publish and pull the same module"),
    ],
)
def test_actor_that_cannot_begin_raises_at_once(make_envs, make_policy, message):
    with (
        Learner(make_envs, make_policy, envs_per_actor=1) as learner,
        pytest.raises(WorkerError, match=rf"actor \d(?s:.*)ConfigError: .*{message}"),
    ):
        learner.wait_for(lambda: False)


def test_actor_whose_steps_do_not_fit_raises_at_once():
    def policy(actor, num_actors):
        action = np.zeros(1, np.int64)
        return lambda observation: PolicyOutput(action, (), {"odd": np.zeros(1)}), Module()

    with (
        Learner(make_policy=policy) as learner,
        pytest.raises(WorkerError, match=r"FieldError: .*extras\['odd'\] is not declared"),
    ):
        learner.wait_for(lambda: False)


def test_actors_held_store_nothing_and_go_on_from_their_state_with_the_next_episodes():
    first = Learner()
    with first as learner:
        learner.wait_for(lambda: learner.actors.env_steps > 40)
        with learner.actors.held():
            at = learner.actors.env_steps
            state = decode(np.frombuffer(b"".join(encode(learner.actors.state_dict())), np.uint8))
            assert learner.buffer.stats().inserted == at
            time.sleep(0.05)
            assert learner.actors.env_steps == at
        learner.wait_for(lambda: learner.actors.env_steps > at)

    with Learner() as learner:
        learner.actors.load_state_dict(state)
        assert learner.actors.env_steps == at
        before = state["env_steps"]
        learner.wait_for(
            lambda: all(now.env_steps > then + 10 for now, then in zip(learner.actors.stats(), before, strict=True))
        )
    for lane, rows in learner.stored().items():
        begun = int(state["begun"][lane, 0])
        seeds = list(dict.fromkeys(row[1][0] for row in rows))
        assert seeds == [episode_seed(7, 0, begun + i) for i in range(len(seeds))]
        assert rows[0][1][1] == 0.0


def test_actors_of_another_shape_refuse_a_state():
    with Learner() as learner:
        state = learner.actors.state_dict()
    with Learner(seed=8) as other, pytest.raises(CheckpointError, match=r"seed 7 and \(2, 1\)"):
        other.actors.load_state_dict(state)


def test_actors_wrong_arguments_are_all_told():
    with pytest.raises(ConfigError) as seen:
        Learner(num_actors=0, pull_every="now", step_timeout_s=0, on_death="ignore", max_restarts=True)
    for name in ("num_actors is 0", "pull_every is 'now'", "step_timeout_s is 0", "on_death is 'ign", "max_restarts"):
        assert name in str(seen.value)


def test_actors_closed_leave_no_process_and_lanes_that_others_may_claim():
    with Learner(endless) as learner:
        learner.wait_for(lambda: min(stats.env_steps for stats in learner.actors.stats()) > 0)
        processes = learner.actors.processes
    assert learner.actors.processes == [None, None]
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert learner.buffer.cut() == 0  # what was open has been cut
    learner.buffer.writer([0, 1])
    with pytest.raises(ConfigError, match="were closed"):
        learner.actors.poll()


def die(pipe):
    """Be a learner that is killed."""
    learner = Learner(endless)
    learner.wait_for(lambda: min(stats.env_steps for stats in learner.actors.stats()) > 0)
    pipe.send(learner.actors.processes)
    os.kill(os.getpid(), signal.SIGKILL)


def test_learner_that_is_killed_takes_its_actors_along():
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    learner = context.Process(target=die, args=(theirs,))
    learner.start()
    processes = mine.recv()
    deadline = time.monotonic() + HANG_S / 3
    while any(map(is_running, processes)):
        time.sleep(0.02)
        assert time.monotonic() < deadline
    learner.join()
    assert len(processes) == 2


def test_what_environments_of_an_actor_started_ends_with_it(tmp_path):
    def start(env):
        if not hasattr(env, "simulator"):
            env.simulator = subprocess.Popen(["sleep", "1000"])
            (tmp_path / str(env.simulator.pid)).touch()

    with Learner(lambda first: SerialEnvs([SeededEnv(fault=start)])) as learner:
        learner.wait_for(lambda: learner.actors.env_steps > 20)
        os.kill(learner.actors.processes[0], signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match="actor 0"):
            learner.wait_for(lambda: learner.actors.stats()[0].restarts and len(list(tmp_path.iterdir())) == 3)
    deadline = time.monotonic() + HANG_S / 3
    while any(is_running(int(file.name)) for file in tmp_path.iterdir()):
        time.sleep(0.02)
        assert time.monotonic() < deadline
