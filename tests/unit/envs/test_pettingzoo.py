"""PettingZoo's parallel environments: every agent is a row, and one that has left takes no step."""

import itertools
import sys

import numpy as np
import pytest
from gymnasium import spaces
from support.foreign_envs import Troop
from support.scripts import train_script

from rlfeed.envs import ParallelEnvs, as_envs, episode_seed, make_envs
from rlfeed.errors import ConfigError, EnvContractError, EnvFailedError, EnvMakeError, EnvNotFoundError
from rlfeed.replay import ReplayBuffer, Transition
from rlfeed.rollout import Rollout

LIVES = (1, 3, 2)


def act(observation):
    return ((observation[:, 2] + observation[:, 3]) % 3).astype(np.int64)


def expected_stream(copy, agent, life, count, come=0):
    """List the first steps of an agent: it lives for so many steps of each episode."""
    steps = []
    for episode in itertools.count():
        for t in range(come, come + life):
            last = t == come + life - 1
            steps.append(
                {
                    "observation": [copy, agent, episode, t],
                    "next_observation": [copy, agent, episode, t + 1],
                    "action": (episode + t) % 3,
                    "reward": 1000.0 * copy + 100 * agent + 10 * episode + t + 1,
                    "ends": (last and agent % 2 == 0, last and agent % 2 == 1),
                    "is_first": t == come,
                }
            )
        if len(steps) >= count:
            return steps[:count]


def read_streams(rollout, count):
    streams = [[] for _ in range(rollout.num_envs)]
    while min(map(len, streams)) < count:
        step = next(rollout)
        for row, env in enumerate(step.env_ids):
            streams[env].append(
                {
                    "observation": step.observation[row].tolist(),
                    "next_observation": step.next_observation[row].tolist(),
                    "action": int(step.action[row]),
                    "reward": float(step.reward[row]),
                    "ends": (bool(step.terminated[row]), bool(step.truncated[row])),
                    "is_first": bool(step.is_first[row]),
                }
            )
    return [stream[:count] for stream in streams]


@pytest.mark.parametrize("lives", [LIVES, (2, 2), (1,), (4, 1, 1, 3)])
def test_agents_are_rows_and_those_that_left_take_no_step(lives):
    """rollout 3A.5: the environment begins its next episode when the last agent has left."""
    comes = (0,) * len(lives)
    rollout = Rollout(ParallelEnvs([Troop(copy, lives=lives, comes=comes) for copy in range(2)]), act)
    expected = [expected_stream(copy, agent, life, 9) for copy in range(2) for agent, life in enumerate(lives)]
    assert read_streams(rollout, 9) == expected


def test_agents_rows_of_each_step_are_those_that_live():
    rollout = Rollout(Troop(), act)
    ids = [next(rollout).env_ids.tolist() for _ in range(6)]
    assert ids == [[0, 1, 2], [1, 2], [1], [0, 1, 2], [1, 2], [1]]
    assert rollout.env_steps == 12
    assert [(r.env_id, r.length) for r in rollout.statistics.window] == [(0, 1), (2, 2), (1, 3)] * 2


def test_agent_that_comes_later_is_ready_from_then_on():
    troop = Troop(lives=(2, 2), comes=(0, 1))
    streams = read_streams(Rollout(troop, act), 6)
    assert streams == [expected_stream(0, 0, 2, 6), expected_stream(0, 1, 2, 6, come=1)]


def test_agents_episodes_have_the_seeds_of_their_copy():
    """rollout 3A.12"""
    troops = [Troop(copy) for copy in range(2)]
    rollout = Rollout(ParallelEnvs(troops), act, seed=6)
    for _ in range(4):
        next(rollout)
    rollout.restart()
    next(rollout)
    assert [troop.seeds for troop in troops] == [[episode_seed(6, copy, n) for n in range(3)] for copy in range(2)]


def test_agents_of_a_process_of_several_have_the_seeds_of_its_copies():
    envs = make_envs(Troop, 2, first_env_id=6)  # two copies of three agents are before
    next(Rollout(envs, act, seed=6))
    assert [troop.seeds for troop in envs._envs] == [[episode_seed(6, copy, 0)] for copy in (2, 3)]


def test_agents_masks_are_obeyed_in_random_mode():
    """rollout 3A.41: allowed is the action t % 3."""
    rollout = Rollout(Troop(lives=LIVES, masked=True), act, mode="random")
    for step in itertools.islice(rollout, 9):
        assert step.action.tolist() == (step.observation[:, 3] % 3).astype(int).tolist()


def test_agents_steps_go_into_a_buffer_and_come_back_whole():
    rollout = Rollout(Troop(), act)
    buffer = ReplayBuffer(rollout.envs.observation_space, rollout.envs.action_space, capacity=300, num_envs=3)
    assert rollout.collect(buffer, steps=30) == 30
    batch = buffer.sample(200, Transition())
    before, after = batch.observation.numpy(), batch.next_observation.numpy()
    np.testing.assert_array_equal(after, before + np.array([0, 0, 0, 1]))
    over = after[:, 3] == np.take(LIVES, before[:, 1].astype(int))
    np.testing.assert_array_equal(batch.terminated, over & (after[:, 1] != 1))


def test_agents_episodes_are_played_with_a_quota_for_each():
    lengths = [int(batch.lengths[0]) for batch in Rollout(Troop(), act).episodes(2)]
    assert sorted(lengths) == [1, 1, 2, 2, 3, 3]


# What is named.


class Other(Troop):
    """Does one thing otherwise."""

    def __init__(self, what, **kwargs):
        super().__init__(**kwargs)
        self.what = what

    def observation_space(self, agent):
        other = self.what == "space" and agent == "walker_2"
        return spaces.Box(-np.inf, np.inf, (5,), np.float32) if other else super().observation_space(agent)

    def reset(self, seed=None, options=None):
        observations, infos = super().reset(seed)
        if self.what == "empty":
            self.agents = []
        if self.what == "stranger":
            self.agents, observations["nobody"] = [*self.agents, "nobody"], np.zeros(4, np.float32)
        return observations if self.what == "alone" else (observations, infos)

    def step(self, actions):
        observations, rewards, terminated, truncated, infos = super().step(actions)
        if self.what == "silent":
            del observations["walker_0"]
        if self.what == "leaves":
            self.agents.remove("walker_1")
        if self.what == "raises":
            raise KeyError("lost")
        if self.what == "nan":
            rewards["walker_1"] = float("nan")
        if self.what == "four":
            return observations, rewards, terminated, infos
        return observations, rewards, terminated, truncated, infos


@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("empty", r"reset\(\) gave observations of .* and agents are \[\]; expected at least one agent"),
        ("stranger", r"there is an agent 'nobody'; expected one of possible_agents"),
        ("alone", r"reset\(\) returned a dict; expected a pair of dicts"),
        ("silent", r"step 1 of its episode 0, agent 'walker_0' \(env 0\): step\(\) gave no observations for it"),
        ("leaves", r"agent 'walker_1' \(env 1\): it is no longer in `agents`, but neither terminated nor truncated"),
        ("raises", r"copy 0 of 1, step 1 of its episode 0: step\(.*raised KeyError: 'lost'"),
        ("nan", r"agent 'walker_1' \(env 1\): reward is nan"),
        ("four", r"step\(\) returned 4 values .*; expected five dicts by agent"),
    ],
)
def test_agents_what_breaks_the_contract_is_named(what, part):
    with pytest.raises((EnvContractError, EnvFailedError), match=part):
        next(Rollout(Other(what), act))


def test_agents_of_different_spaces_are_refused_by_name():
    part = r"observation_space of agent 'walker_2' is Box.*\(5,\).*1 differ: \['walker_2'\]"
    with pytest.raises(ConfigError, match=part):
        as_envs(Other("space"))


def test_parallel_envs_the_same_or_unlike_environments_are_refused():
    troop = Troop()
    with pytest.raises(ConfigError, match="the same environment is there twice"):
        ParallelEnvs([troop, troop])
    with pytest.raises(ConfigError, match="copy 1 has the agents"):
        ParallelEnvs([troop, Troop(lives=(1, 1))])
    with pytest.raises(ConfigError, match="got no environment"):
        ParallelEnvs([])


# By name.


FILE = """
from support.foreign_envs import Troop

def parallel_env(lives=(1, 3, 2)):
    if not lives:
        raise ValueError("nobody")
    return Troop(lives=lives)

def other():
    return 3
"""


@pytest.fixture
def zoo(tmp_path):
    file = tmp_path / "zoo.py"
    file.write_text(FILE)
    yield file
    for name in [name for name in sys.modules if name.startswith("rlfeed_file_zoo")]:
        del sys.modules[name]  # what was imported by path is imported in other processes as well, of other tests


@pytest.mark.parametrize("tail", ["", ":parallel_env"])
def test_make_envs_pettingzoo_by_file_makes_copies(tail, zoo):
    envs = make_envs(f"pettingzoo:{zoo}{tail}", 2, kwargs={"lives": (1, 2, 1)})
    assert (envs.num_envs, envs.name) == (6, "troop_v0")


@pytest.mark.parametrize("maker", [Troop, lambda lives: Troop(lives=lives)])
def test_make_envs_class_or_function_of_the_parallel_interface_makes_copies(maker):
    envs = make_envs(maker, 2, kwargs={"lives": (2, 2, 1)})
    assert (envs.num_envs, type(envs)) == (6, ParallelEnvs)


def test_make_envs_pettingzoo_what_is_wrong_is_named(zoo):
    with pytest.raises(EnvNotFoundError, match=r"zoo.py has no 'paralel_env'.*Did you mean 'parallel_env'"):
        make_envs(f"pettingzoo:{zoo}:paralel_env")
    with pytest.raises(EnvMakeError, match=r"(?s)its constructor raised ValueError.*ValueError: nobody"):
        make_envs(f"pettingzoo:{zoo}", kwargs={"lives": ()})
    with pytest.raises(ConfigError, match="made a int; expected an environment of PettingZoo's parallel interface"):
        make_envs(f"pettingzoo:{zoo}:other")
    with pytest.raises(ConfigError, match=r"is a Troop of PettingZoo; .*give ParallelEnvs\("):
        make_envs(lambda: Troop(), mode="sync")


@pytest.mark.parametrize(
    ("env_id", "absolute"),
    [
        ("pettingzoo:zoo.py:other", "pettingzoo:{}/zoo.py:other"),
        ("zoo.py:Env", "{}/zoo.py:Env"),
        ("pettingzoo:butterfly/pistonball-v6", "pettingzoo:butterfly/pistonball-v6"),
    ],
)
def test_train_script_file_of_a_parallel_environment_is_named_from_anywhere(env_id, absolute, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_script._absolute(env_id) == absolute.format(tmp_path)


def test_train_script_agents_are_rows_of_the_buffer(zoo, tmp_path):
    run = tmp_path / "run"
    argv = ["dqn", "--env.id", f"pettingzoo:{zoo}", "--total-steps", "120", "--run-dir", str(run)]
    assert train_script.main([*argv, "--eval-episodes", "3", "--learning-starts", "12"]) == 0
    assert (run / "DONE").exists()


# The real package, where it is installed.


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its own modules
def test_real_pettingzoo_agrees_that_the_stand_in_is_a_parallel_environment():
    package = pytest.importorskip("pettingzoo", reason="PettingZoo is not installed (extra: pettingzoo)")
    from pettingzoo.test import parallel_api_test

    parallel_api_test(type("Real", (Troop, package.ParallelEnv), {})(), num_cycles=20)


@pytest.mark.parametrize(
    ("env_id", "kwargs", "agents"),
    [
        ("butterfly/pistonball-v6", {"n_pistons": 4, "max_cycles": 9}, 4),
        ("butterfly/knights_archers_zombies-v11", {"max_cycles": 30, "line_death": True}, 4),
        ("classic/rps-v2", {"max_cycles": 5}, 2),
    ],
)
def test_real_pettingzoo_gives_whole_episodes(env_id, kwargs, agents):
    pytest.importorskip("pettingzoo", reason="PettingZoo is not installed (extra: pettingzoo)")
    pytest.importorskip("pygame", reason="pygame is not installed, which these environments need")
    envs = make_envs(f"pettingzoo:{env_id}", 2, kwargs=kwargs)
    rollout = Rollout(envs, lambda o: np.zeros(len(o), np.int64), mode="random")
    before = {}
    for step in itertools.islice(rollout, 90):
        for row, env in enumerate(step.env_ids.tolist()):
            assert step.is_first[row] == (before.get(env) is None)
            if before.get(env) is not None:
                np.testing.assert_array_equal(step.observation[row], before[env])
            before[env] = None if step.terminated[row] or step.truncated[row] else step.next_observation[row]
    assert envs.num_envs == 2 * agents
    assert rollout.statistics.episodes >= 2 * agents
    rollout.close()
