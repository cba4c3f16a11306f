"""`check_env`: every kind of broken environment is found in words of its own, and nothing else is."""

import functools
import random
import threading

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from support.start_method import start_method

from rlfeed.envs import EnvSource, Finding, check_env
from rlfeed.envs.check import examine
from rlfeed.errors import ConfigError, EnvNotFoundError
from rlfeed.testing import BROKEN, HealthyEnv, IdentifiableEnv, broken, failing

GYMNASIUM_IDS = (
    "CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "FrozenLake-v1",
    "Taxi-v4", "CliffWalking-v1", "Blackjack-v1",
)  # fmt: skip
check_here = functools.partial(check_env, workers=False)


def errors(findings):
    return [finding for finding in findings if finding.severity == "error"]


def problems(findings, severity="error"):
    return [finding.problem for finding in findings if finding.severity == severity]


@pytest.mark.parametrize("name", BROKEN)
def test_check_env_broken_environment_is_found_in_its_own_words(name):
    """rollout 3A.15, 3A.17, 3A.18, 3A.19, 3A.20, 3A.23, 3A.24 and others, one for each name"""
    make, words = BROKEN[name]
    found = errors(check_here(make, call_timeout_s=1.0 if name == "hangs" else 60.0))
    assert [words in finding.problem for finding in found] == [True] + [False] * (name == "takes no seed")
    assert all(finding.where and finding.expected and finding.fix for finding in found)


# Faults that can meet in one environment, in the order of their inheritance; of a group at most one.
GROUPS = [
    ["integer flags"], ["four values"], ["bare reset"], ["NaN observation"], ["outside space"], ["reset outside space"],
    ["wide observation", "reuses array"], ["array reward", "NaN reward", "no reward"], ["no info", "success in words"],
    ["writes into action"], ["global NumPy", "global random", "forgets seed", "own entropy", "seeds the world"],
    ["changes action space", "changes folder"], ["cannot be closed twice"], ["state one way"],
]  # fmt: skip


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.tuples(*(st.sampled_from([None, *group]) for group in GROUPS)))
def test_check_env_faults_together_are_all_found_at_once_and_none_is_invented(drawn):
    names = [name for name in drawn if name is not None]
    both = type("Combined", (*(BROKEN[name][0] for name in names), HealthyEnv), {})
    said = problems(check_here(both))
    assert [name for name in names if not any(BROKEN[name][1] in text for text in said)] == []
    assert [text for text in said if not any(BROKEN[name][1] in text for name in names)] == []


def test_check_env_healthy_environment_has_no_finding_at_all():
    assert check_here(HealthyEnv) == []


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Taxi-v4", "Blackjack-v1"])
def test_check_env_gymnasiums_own_environment_has_no_error(env_id):
    assert errors(check_here(env_id, episodes=2, max_steps=200)) == []


@pytest.mark.slow
@pytest.mark.parametrize("env_id", GYMNASIUM_IDS)
def test_check_env_gymnasiums_own_environment_has_no_error_in_workers_and_whole_episodes(env_id):
    assert errors(check_env(env_id, episodes=4)) == []


def test_check_env_finding_says_where_it_was_first_and_how_often():
    [finding] = check_here(broken.NaNObservation)
    assert finding.where.startswith("NaNObservation: episode 0, step 4, observation (the first of ")
    assert finding == Finding(
        finding.where, "observation[1] is nan", "finite numbers: one NaN ruins all weights of a network", finding.fix
    )


def test_finding_is_printed_with_rule_and_fix():
    assert str(Finding("here", "is 1", "0", "Return 0.", severity="note")) == (
        "note: here: is 1\n    expected: 0\n    fix: Return 0."
    )


def test_check_env_nested_part_is_named():
    class Nested(HealthyEnv):
        def __init__(self):
            super().__init__()
            self.observation_space = spaces.Dict(arm=spaces.Tuple([self.observation_space, spaces.Discrete(2)]))

        def _observe(self):
            return {"arm": (super()._observe().astype(np.float64), 2)}

    assert problems(check_here(Nested)) == [
        'observation["arm"][0] has dtype float64 but its space says float32',
        'observation["arm"][1] is 2, outside 0 to 1',
    ]


@pytest.mark.parametrize(("flag", "reward"), [(np.bool_, np.float32), (np.array, np.array), (bool, int)])
def test_check_env_numpy_scalars_are_accepted(flag, reward):
    """rollout 3A.16"""

    class Scalars(HealthyEnv):
        def step(self, action):
            observation, value, terminated, truncated, info = super().step(action)
            return observation, reward(value), flag(terminated), flag(truncated), info

    assert check_here(Scalars) == []


@pytest.mark.parametrize(
    ("space", "mask", "words"),
    [
        (spaces.Discrete(3, start=5), [0, 1, 1], None),
        (spaces.MultiDiscrete([2, 3], start=[1, 1]), [0, 1, 1, 0, 1], None),
        (spaces.MultiBinary(2), [0, 1, 1, 0], None),
        (spaces.MultiDiscrete([2, 2]), [0, 0, 1, 1], "allows no action"),
        (spaces.Box(0, 1, (2,)), [1, 1], "the action space has no single actions"),
    ],
)
@pytest.mark.parametrize("key", ["info", "observation"])
def test_check_env_masks_of_every_kind_are_checked_and_obeyed(space, mask, words, key):
    """rollout 3A.41"""
    mask = np.array(mask, bool)
    allowed = {
        "Discrete": lambda action: mask[action - 5],
        "MultiDiscrete": lambda action: mask[action[0] - 1] and mask[2 + action[1] - 1],
        "MultiBinary": lambda action: action[0] == 1 and action[1] == 0,
    }.get(type(space).__name__)

    class Masked(HealthyEnv):
        def __init__(self):
            super().__init__()
            self.action_space = space
            if key == "observation":
                entries = spaces.MultiBinary(len(mask))
                self.observation_space = spaces.Dict(x=self.observation_space, action_mask=entries)

        def _observe(self):
            x = super()._observe()
            return x if key == "info" else {"x": x, "action_mask": mask.astype(np.int8)}

        def _info(self):
            return {"action_mask": mask.copy()} if key == "info" else {}

        def _move(self, action):
            if words is None and not allowed(action):
                raise ValueError("forbidden")
            super()._move(action * 0)

    said = problems(check_here(Masked))
    if words is None or (key == "observation" and isinstance(space, spaces.Box)):  # just an entry of that name
        assert said == []
    else:
        assert len(said) == 1
        assert words in said[0]


def test_check_env_environment_that_hangs_keeps_what_was_found_before():
    class Both(broken.WideObservation, failing.Hangs):
        pass

    death, before = check_here(Both, call_timeout_s=0.5)
    assert death.where == "Both: episode 0, step 4, in step()"
    assert "did not return within 0.5 s" in death.problem
    assert "failing.py" in death.problem
    assert "float64" in before.problem


def test_check_env_constructor_that_hangs_is_found():
    def waits():
        threading.Event().wait()

    [finding] = check_here(waits, call_timeout_s=0.5)
    assert finding.where == "waits: the constructor"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (broken.GivesItsMemoryAway, "writing into a returned observation changed what came next"),
        (broken.RemembersEpisodes, "played in a fresh environment the episode is another one"),
        (lambda: gymnasium.wrappers.TimeLimit(gymnasium.wrappers.TimeLimit(HealthyEnv(), 50), 5), "that of 5 fires"),
        (lambda: IdentifiableEnv(lengths=(3,), ends=("both",)), "terminated and truncated at once"),
        (lambda: IdentifiableEnv(lengths=(2000,)), "went on for 100 steps and nothing limits it"),
        (lambda: gymnasium.make("CliffWalking-v1", max_episode_steps=9), "every seed gives the same episode"),
    ],
)
def test_check_env_what_may_be_right_is_a_note(make, words):
    """rollout 3A.6, 3A.7"""
    findings = check_here(make, max_steps=100)
    assert errors(findings) == []
    assert any(words in problem for problem in problems(findings, "note"))


def test_check_env_prints_and_conventions_are_notes(capfd):
    class Talks(HealthyEnv):
        def __init__(self):
            super().__init__()
            self.action_space = spaces.Tuple(
                [spaces.Box(0, 1, (1,)), spaces.Box(-np.inf, np.inf, (1,)), spaces.Discrete(1)]
            )
            self.observation_space = spaces.Box(0, 1, (8, 8, 3), np.float32)

        def _observe(self):
            return np.full((8, 8, 3), abs(self._position[0]), np.float32)

        def _move(self, action):
            print("moving", action)  # noqa: T201
            super()._move(action[0])

    findings = check_here(Talks)
    assert errors(findings) == []
    said = "\n".join(problems(findings, "note"))
    for words in (
        "action_space[0] is not symmetric", "action_space[1] has no bounds", "action_space[2] has one action only",
        "looks like an image", "step() printed 'moving",
    ):  # fmt: skip
        assert words in said
    assert capfd.readouterr().out == ""


def test_check_env_environment_given_as_object_is_checked_and_not_touched():
    env = broken.WideObservation()
    assert "float64" in problems(check_env(env))[0]
    assert env._step == 0
    assert check_env(HealthyEnv()) == []


def test_check_env_made_environment_is_made_again():
    env = gymnasium.make("CartPole-v1", max_episode_steps=6)
    assert errors(check_here(env)) == []


def test_check_env_leaves_the_worlds_generators_alone():
    before = random.getstate()
    check_here(broken.GlobalRandom)
    assert random.getstate() == before


def test_check_env_in_a_worker_process_plays_the_same_or_says_what_differs():
    with start_method("fork"):
        assert check_env(HealthyEnv) == []
        [finding] = check_env(broken.DependsOnItsProcess)
    assert finding.where == "DependsOnItsProcess: in a worker process, episode 0, step 1"


def test_check_env_maker_that_cannot_be_sent_to_a_worker_is_found():
    """rollout 3A.23"""
    lock = threading.Lock()
    with start_method("spawn"):  # a fork would take it along
        [finding] = check_env(lambda: HealthyEnv() if lock else None)
    assert "variable lock = <unlocked" in finding.problem


@pytest.mark.parametrize(
    ("make", "resume"),
    [(HealthyEnv, "re-enacted"), (broken.RemembersEpisodes, "restarted"), (broken.GlobalRandom, "restarted")],
)
def test_examine_says_how_a_run_is_resumed_and_how_fast_it_is(make, resume):
    report = examine(make, workers=False)
    assert report.resume == resume
    assert report.episodes == 3
    assert 18 <= report.steps <= 39
    assert report.step_s > 0


def test_examine_state_that_comes_back_is_exact():
    class Saved(failing.StateWithoutGenerator):
        def get_state(self):
            return super().get_state(), self.np_random.bit_generator.state

        def set_state(self, state):
            super().set_state(state[0])
            self.np_random.bit_generator.state = state[1]

    report = examine(Saved, workers=False, timed=False)
    assert (report.findings, report.resume, report.step_s) == ([], "exact", None)
    limited = examine(lambda: gymnasium.wrappers.TimeLimit(Saved(), 7), workers=False, timed=False)
    assert (errors(limited.findings), limited.resume) == ([], "exact")


def test_check_env_state_that_no_checkpoint_can_hold_is_found():
    class Objects(failing.StateWithoutGenerator):
        def get_state(self):
            return {"generator": self.np_random}

    [finding] = check_here(Objects)
    assert finding.problem.startswith('get_state()["generator"]: is')


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: check_env("CartPol-v1"), EnvNotFoundError, "Did you mean"),
        (lambda: check_env(dict), ConfigError, "expected a gymnasium.Env"),
        (lambda: check_env(EnvSource(HealthyEnv, {"size": 3})), ConfigError, "has no parameter 'size'"),
        (lambda: check_env(HealthyEnv, episodes=0), ConfigError, "episodes is 0"),
        (lambda: check_env(HealthyEnv, call_timeout_s=0), ConfigError, "call_timeout_s is 0"),
    ],
)
def test_check_env_bad_input_is_an_error(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
