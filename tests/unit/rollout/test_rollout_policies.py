"""What users bring as a policy, what it may return, random actions and exploration."""

import itertools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from support.known_streams import identifiable_envs

from rlfeed.errors import ConfigError, EnvContractError, PolicyError, SpaceError, UnsupportedError
from rlfeed.rollout import Actions, EpsilonGreedy, Rollout
from rlfeed.testing import ConstantRewardEnv
from rlfeed.types import PolicyContext, PolicyOutput

IDS = np.arange(2)


def context(rows, mode="explore", env_steps=0, mask=None, seed=0):
    return PolicyContext(
        np.zeros(rows, bool), mode, np.arange(rows), env_steps, None, np.zeros(rows, np.float32), mask,
        np.random.default_rng(seed),
    )  # fmt: skip


SPACES = [
    spaces.Discrete(4),
    spaces.Discrete(3, start=-2),
    spaces.MultiDiscrete([2, 5], start=[1, 0]),
    spaces.MultiBinary(3),
    spaces.Box(-1, 2, (2,), np.float32),
    spaces.Box(np.array([-np.inf, 0, -np.inf, 1], np.float32), np.array([np.inf, np.inf, 0, 2], np.float32)),
    spaces.Box(0, 255, (2, 2), np.uint8),
    spaces.Dict(a=spaces.Discrete(2, start=1), b=spaces.Tuple([spaces.Box(-3, 3, (1,)), spaces.Discrete(2)])),
]


def rows_of(action, count):
    if isinstance(action, dict):
        parts = {key: rows_of(part, count) for key, part in action.items()}
        return [{key: parts[key][row] for key in parts} for row in range(count)]
    if isinstance(action, tuple):
        parts = [rows_of(part, count) for part in action]
        return [tuple(part[row] for part in parts) for row in range(count)]
    return list(action)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_actions_drawn_lie_in_the_space_and_pass_the_check(space):
    actions = Actions(space)
    drawn = actions.draw(50, np.random.default_rng(0))
    assert all(space.contains(row) for row in rows_of(drawn, 50))
    fitted = actions.fit(drawn, np.arange(50))
    for row, again in zip(rows_of(drawn, 50), rows_of(fitted, 50), strict=True):
        np.testing.assert_equal(again, row)


def test_actions_drawn_cover_a_discrete_space_evenly_from_its_start():
    drawn = Actions(spaces.Discrete(3, start=5)).draw(3000, np.random.default_rng(0))
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [5, 6, 7]
    assert counts.min() > 900


def test_actions_drawn_with_a_mask_cover_exactly_what_is_allowed():
    mask = np.tile([True, False, True], (2000, 1))
    drawn = Actions(spaces.Discrete(3, start=5)).draw(2000, np.random.default_rng(0), mask)
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == [5, 7]
    assert counts.min() > 900


def test_actions_mask_that_does_not_fit_is_refused():
    with pytest.raises(EnvContractError, match=r"shape \(1, 2\)"):
        Actions(spaces.Discrete(3)).draw(1, np.random.default_rng(0), np.ones((1, 2), bool))
    with pytest.raises(EnvContractError, match="at least one"):
        Actions(spaces.Discrete(3)).draw(1, np.random.default_rng(0), np.zeros((1, 3), bool))
    with pytest.raises(UnsupportedError, match="Discrete"):
        Actions(spaces.Box(0, 1, (3,))).draw(1, np.random.default_rng(0), np.ones((1, 3), bool))


def test_actions_space_of_another_kind_is_refused():
    with pytest.raises(SpaceError, match=r'action_space\["word"\]'):
        Actions(spaces.Dict(word=spaces.Text(3)))


@pytest.mark.parametrize(
    ("space", "action", "part"),
    [
        (spaces.Discrete(4), np.array([1]), "has shape (1,); expected (2,)"),
        (spaces.Discrete(4), np.int64(1), "has shape (); expected (2,)"),
        (spaces.Discrete(4), np.array([1.0, 2.0]), "has dtype float64; expected int64 for Discrete(4)"),
        (spaces.Discrete(4), np.array([1, 4]), "env 1: action is 4, outside Discrete(4)"),
        (spaces.Discrete(4, start=2), np.array([0, 2]), "env 0: action is 0, outside Discrete(4, start=2)"),
        (spaces.MultiBinary(2), np.array([[0, 256], [0, 0]]), "env 0: action[1] is 256"),
        (spaces.MultiDiscrete([2, 3]), np.array([[0, 0], [0, 3]]), "env 1: action[1] is 3"),
        (spaces.Box(-1, 1, (1,)), np.array([[0.0], [1.5]]), "env 1: action[0] is 1.5"),
        (spaces.Box(-1, 1, (1,)), np.array([[np.nan], [0.0]]), "env 0: action[0] is nan"),
        (spaces.Box(-np.inf, np.inf, (1,)), np.array([[np.inf], [0.0]]), "expected finite"),
        (spaces.Box(-1, 1, (1,)), np.array([["a"], ["b"]]), "has dtype <U1"),
        (spaces.Dict(a=spaces.Discrete(2)), np.array([0, 1]), "action: is ndarray; expected a dict"),
        (spaces.Dict(a=spaces.Discrete(2)), {"b": np.array([0, 1])}, "is ['b']; expected a dict with the keys ['a']"),
        (spaces.Dict(a=spaces.Discrete(2)), {"a": np.array([0, 2])}, 'action["a"] is 2'),
        (spaces.Tuple([spaces.Discrete(2)]), [np.array([0, 1])], "is list; expected a tuple of 1 parts"),
    ],
)
def test_actions_that_do_not_fit_are_refused_with_the_place(space, action, part):
    with pytest.raises(PolicyError) as error:
        Actions(space).fit(action, IDS)
    assert part in str(error.value)


def test_actions_are_executed_and_stored_in_the_dtype_of_the_space():
    given = np.array([[0.1], [0.2]])
    fitted = Actions(spaces.Box(-1, 1, (1,), np.float32)).fit(given, IDS)
    assert fitted.dtype == np.float32
    given[:] = 9.0
    np.testing.assert_array_equal(fitted, np.array([[0.1], [0.2]], np.float32))


def test_rollout_function_gets_numpy_and_module_gets_tensors():
    seen = []

    class Module(torch.nn.Module):
        def forward(self, observation):
            seen.append((type(observation["vector"]), observation["image"].dtype, torch.is_inference_mode_enabled()))
            return torch.tensor([1, 2])

    def function(observation):
        seen.append((type(observation["vector"]), observation["image"].dtype))
        return [3, 4]

    for policy in (Module(), function):
        step = next(Rollout(identifiable_envs("serial", 2, observation="dict"), policy))
        assert (step.action.dtype, step.action.shape) == (np.int64, (2,))
    assert seen == [(torch.Tensor, torch.uint8, True), (np.ndarray, np.uint8)]


@pytest.mark.parametrize("policy", [3, "dqn", dict])
def test_rollout_what_is_no_policy_is_refused(policy):
    with pytest.raises(ConfigError, match="expected a Policy, an nn"):
        Rollout(ConstantRewardEnv(), policy)


class Returns:
    def __init__(self, out, initial=()):
        self.out, self.initial = out, initial

    def initial_carry(self, num_envs):
        return self.initial

    def __call__(self, observation, carry, context):
        return self.out


@pytest.mark.parametrize(
    ("policy", "part"),
    [
        (Returns(np.zeros(1, int)), "returned a ndarray; expected a PolicyOutput"),
        (Returns(PolicyOutput(np.zeros(1, int)), np.zeros((1, 2))), "a carry of () where it was given carry (1, 2)"),
        (Returns(PolicyOutput(np.zeros(1, int), np.zeros((1, 3))), np.zeros((1, 2))), "carry (1, 3)"),
        (Returns(PolicyOutput(np.zeros(1, int), np.zeros(1))), "where it was given ()"),
        (Returns(PolicyOutput(np.zeros(1, int), (), {"value": np.zeros(2)})), 'extras["value"] has shape (2,)'),
        (Returns(PolicyOutput(np.array([7]))), "env 0: action is 7"),
    ],
)
def test_rollout_output_that_does_not_fit_is_refused(policy, part):
    with pytest.raises(PolicyError) as error:
        next(Rollout(ConstantRewardEnv(), policy))
    assert part in str(error.value)


def test_rollout_extras_without_names_are_refused():
    output = PolicyOutput(np.zeros(1, int))
    object.__setattr__(output, "extras", np.zeros(1))  # the tests' own check of types would refuse it before
    with pytest.raises(PolicyError, match="extras are ndarray; expected a dict"):
        next(Rollout(ConstantRewardEnv(), Returns(output)))


def test_rollout_extras_of_the_policy_are_in_the_step_as_arrays_that_stay():
    buffer = np.zeros(2)

    class Valued:
        def initial_carry(self, num_envs):
            return ()

        def __call__(self, observation, carry, context):
            buffer[:] += 1  # one array, written again in every call
            return PolicyOutput(np.zeros(2, int), (), {"value": buffer, "nest": {"log_prob": torch.ones(2)}})

    steps = list(itertools.islice(Rollout(identifiable_envs("serial", 2), Valued()), 3))
    assert [step.extras["value"].tolist() for step in steps] == [[1, 1], [2, 2], [3, 3]]
    assert isinstance(steps[0].extras["nest"]["log_prob"], np.ndarray)


def test_rollout_mode_is_checked_and_reaches_the_policy():
    modes = []

    class Notes:
        def initial_carry(self, num_envs):
            return ()

        def __call__(self, observation, carry, context):
            modes.append((context.mode, context.env_steps))
            return PolicyOutput(np.zeros(2, int))

    rollout = Rollout(identifiable_envs("serial", 2), Notes())
    next(rollout)
    rollout.mode = "greedy"
    next(rollout)
    assert modes == [("explore", 0), ("greedy", 2)]
    with pytest.raises(ConfigError, match="Did you mean 'greedy'"):
        rollout.mode = "gredy"
    with pytest.raises(ConfigError, match="seed is -1"):
        Rollout(ConstantRewardEnv(), Notes(), seed=-1)


def test_rollout_random_mode_draws_from_its_own_seed_and_reaches_every_action():
    def play(seed):
        rollout = Rollout(identifiable_envs("serial", 2), lambda o: 1 / 0, seed=seed, mode="random")
        return np.concatenate([step.action for step in itertools.islice(rollout, 100)])

    first = play(1)
    np.testing.assert_array_equal(play(1), first)
    assert not np.array_equal(play(2), first)
    assert set(first) == {0, 1, 2, 3, 4}


def test_rollout_action_mask_among_the_observations_reaches_the_policy():
    class Masked(ConstantRewardEnv):
        def __init__(self):
            super().__init__(actions=3)
            self.observation_space = spaces.Dict(action_mask=spaces.MultiBinary(3))

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return {"action_mask": np.array([0, 0, 1], np.int8)}, {}

        def step(self, action):
            assert action == 2
            return {"action_mask": np.array([0, 0, 1], np.int8)}, *super().step(action)[1:]

    rollout = Rollout(Masked(), EpsilonGreedy(lambda o: np.array([2]), lambda s: 1.0, spaces.Discrete(3)))
    for _ in itertools.islice(rollout, 20):
        pass
    rollout.mode = "random"
    for _ in itertools.islice(rollout, 20):
        pass


def test_epsilon_greedy_takes_the_share_of_random_actions_that_the_schedule_says():
    policy = EpsilonGreedy(lambda o: np.full(len(o), 3), lambda steps: 0.5 if steps < 10 else 0.0, spaces.Discrete(4))
    observation = np.zeros((4000, 1), np.float32)
    actions = policy(observation, (), context(4000)).action
    # Half are random, a quarter of those choose 3 as well.
    assert abs((actions == 3).mean() - 0.625) < 0.03
    assert (policy(observation, (), context(4000, env_steps=10)).action == 3).all()
    assert (policy(observation, (), context(4000, mode="greedy")).action == 3).all()


def test_epsilon_greedy_leaves_the_array_of_the_policy_alone():
    own = np.full(100, 3)
    policy = EpsilonGreedy(lambda o: own, lambda steps: 1.0, spaces.Discrete(4))
    assert set(policy(np.zeros((100, 1)), (), context(100)).action) == {0, 1, 2, 3}
    assert set(own) == {3}


def test_epsilon_greedy_epsilon_out_of_range_is_refused():
    policy = EpsilonGreedy(lambda o: np.zeros(1, int), lambda steps: 1.5, spaces.Discrete(2))
    with pytest.raises(ConfigError, match=r"epsilon is 1\.5 at 0 env steps"):
        policy(np.zeros((1, 1)), (), context(1))


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_rollout_any_action_space_reaches_the_environment_as_it_declares(space):
    class Takes(gymnasium.Env):
        observation_space = spaces.Box(0, 1, (1,), np.float32)
        action_space = space

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            if not space.contains(action):
                raise ValueError(action)
            return np.zeros(1, np.float32), 0.0, False, False, {}

    from rlfeed.envs import make_envs

    for mode in ("serial", "sync"):
        rollout = Rollout(make_envs(Takes, 2, mode=mode), lambda o: 1 / 0, mode="random")
        for _ in itertools.islice(rollout, 3):
            pass
