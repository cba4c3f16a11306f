"""Actions that are clipped or rescaled: what the policy chose and what the environment got are both kept."""

import itertools

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from rlfeed.envs import make_envs
from rlfeed.errors import ConfigError, FieldError, PolicyError, SpaceError
from rlfeed.replay import ReplayBuffer, Transition
from rlfeed.rollout import Actions, Rollout
from rlfeed.train.evaluate import evaluate
from rlfeed.types import PolicyOutput

BOUNDS = np.array([-2, 0], np.float32), np.array([2, 10], np.float32)


class Echoes(gymnasium.Env):
    """Shows the action it got; refuses one outside its space. Its episodes have four steps."""

    def __init__(self, space=None):
        self.action_space = space or spaces.Box(*BOUNDS)
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.steps = 0

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        if not self.action_space.contains(action):
            raise ValueError(action)
        self.steps += 1
        shown = np.zeros(2, np.float32)
        shown[: np.size(action)] = action
        return shown, 0.0, False, self.steps == 4, {}


def always(*values):
    return lambda observation: np.tile(np.array(values, np.float32), (len(observation), 1))


@pytest.mark.parametrize("mode", ["serial", "sync"])
def test_actions_clipped_reach_the_environment_inside_and_the_step_as_they_were_chosen(mode):
    step = next(Rollout(make_envs(Echoes, 2, mode=mode), always(-3, 4), actions="clip"))
    assert step.action.tolist() == [[-3, 4]] * 2
    assert step.env_action.tolist() == step.next_observation.tolist() == [[-2, 4]] * 2


@pytest.mark.parametrize(
    ("chosen", "executed"), [((-1, -1), (-2, 0)), ((1, 1), (2, 10)), ((0, 0.5), (0, 7.5)), ((-9, 9), (-2, 10))]
)
def test_actions_rescaled_map_minus_one_and_one_onto_the_bounds_exactly(chosen, executed):
    step = next(Rollout(Echoes(), always(*chosen), actions="rescale"))
    assert step.action.tolist() == [list(chosen)]
    assert step.env_action.tolist() == step.next_observation.tolist() == [list(executed)]


def test_actions_strict_rollout_has_no_env_action_and_refuses_what_lies_outside():
    assert next(Rollout(Echoes(), always(1, 1))).env_action is None
    with pytest.raises(PolicyError, match="actions='clip'"):
        next(Rollout(Echoes(), always(-3, 4)))


@pytest.mark.parametrize("handling", ["clip", "rescale"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_actions_not_finite_are_refused_also_where_they_would_be_clipped(handling, value):
    with pytest.raises(PolicyError, match="expected finite"):
        next(Rollout(Echoes(), lambda o: np.array([[value, 0.0]]), actions=handling))


def test_log_prob_of_a_clipped_action_is_that_of_the_policys_own_action():
    """rollout 3A.25: a learner that recomputes log_prob from the stored action finds what the actor had."""

    class Gaussian:
        def initial_carry(self, num_envs):
            return ()

        def __call__(self, observation, carry, context):
            action = context.generator.normal(0, 5, (len(observation), 2)).astype(np.float32)
            return PolicyOutput(action, (), {"log_prob": log_prob(action)})

    def log_prob(action):
        return (-((action / 5.0) ** 2).sum(-1) / 2).astype(np.float32)

    space = spaces.Box(*BOUNDS)
    extras = {"log_prob": spaces.Box(-np.inf, 0, ()), "env_action": space}
    buffer = ReplayBuffer(Echoes().observation_space, space, capacity=64, extras=extras, storage="private")
    Rollout(Echoes(), Gaussian(), actions="clip").collect(buffer, steps=40)
    batch = buffer.sample(64, Transition())
    action = batch.action.numpy()
    np.testing.assert_array_equal(batch.extras["log_prob"].numpy(), log_prob(action))
    np.testing.assert_array_equal(batch.extras["env_action"].numpy(), np.clip(action, *BOUNDS))
    np.testing.assert_array_equal(batch.next_observation.numpy(), np.clip(action, *BOUNDS))
    assert (action != np.clip(action, *BOUNDS)).any()


def test_env_action_is_stored_where_declared_and_missed_where_a_strict_rollout_gives_none():
    space = spaces.Box(*BOUNDS)
    plain = ReplayBuffer(Echoes().observation_space, space, capacity=64, storage="private")
    Rollout(Echoes(), always(-3, 4), actions="clip").collect(plain, steps=4)
    assert plain.sample(4, Transition()).extras == {}
    declared = ReplayBuffer(
        Echoes().observation_space, space, capacity=64, extras={"env_action": space}, storage="private"
    )
    with pytest.raises(FieldError, match=r'extras\["env_action"\] is missing'):
        Rollout(Echoes(), always(1, 1)).collect(declared, steps=4)


def test_previous_action_is_the_policys():
    seen = []

    class Notes:
        def initial_carry(self, num_envs):
            return ()

        def __call__(self, observation, carry, context):
            seen.append(context.prev_action.tolist())
            return PolicyOutput(np.array([[0.5, 0.25]], np.float32))

    list(itertools.islice(Rollout(Echoes(), Notes(), actions="rescale"), 6))
    assert seen == [[[0, 0]], *[[[0.5, 0.25]]] * 3, [[0, 0]], [[0.5, 0.25]]]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_random_rescaled_actions_fill_minus_one_to_one_and_the_environments_box(dtype):
    space = spaces.Box(-3, 5, (2,), dtype)
    rollout = Rollout(Echoes(space), always(0, 0), mode="random", actions="rescale")
    steps = list(itertools.islice(rollout, 200))
    chosen, executed = (np.concatenate([getattr(s, name) for s in steps]) for name in ("action", "env_action"))
    assert chosen.dtype == executed.dtype == dtype
    assert -1 <= chosen.min() < -0.9
    assert 0.9 < chosen.max() <= 1
    np.testing.assert_allclose(executed, chosen * 4 + 1, rtol=3e-3 if dtype == np.float16 else 1e-6, atol=1e-3)


def test_rescaled_box_of_the_widest_float64_bounds_does_not_overflow():
    limit = np.finfo(np.float64).max
    actions = Actions(spaces.Box(-limit, limit, (1,), np.float64), "rescale")
    assert actions.executed(np.array([[-1.0], [0.0], [1.0]])).tolist() == [[-limit], [0.0], [limit]]
    assert np.isfinite(Actions(actions.space).draw(50, np.random.default_rng(0))).all()


def test_actions_of_other_kinds_stay_strict_beside_a_box_that_is_rescaled():
    space = spaces.Dict(
        move=spaces.Box(-4, 4, (1,)), press=spaces.Discrete(3, start=2), level=spaces.Box(0, 9, (1,), np.int64)
    )
    actions = Actions(space, "rescale")
    given = {"move": np.array([[0.5]]), "press": np.array([4]), "level": np.array([[9]])}
    executed = actions.executed(actions.fit(given, np.arange(1)))
    assert {key: part.tolist() for key, part in executed.items()} == {"move": [[2.0]], "press": [4], "level": [[9]]}
    for key, value in (("press", np.array([5])), ("level", np.array([[10]]))):
        with pytest.raises(PolicyError, match=rf'action\["{key}"\]'):
            actions.fit({**given, key: value}, np.arange(1))


def test_rescaling_names_every_part_without_bounds():
    half = spaces.Box(np.array([0, -np.inf], np.float32), np.array([1, 0], np.float32))
    space = spaces.Dict(fine=spaces.Box(0, 1), half=half, free=spaces.Box(-np.inf, np.inf, (1,)))
    with pytest.raises(SpaceError, match=r'action_space\["half"\].*action_space\["free"\]'):
        Actions(space, "rescale")
    with pytest.raises(ConfigError, match="Did you mean 'rescale'"):
        Rollout(Echoes(), always(0, 0), actions="rescael")


def test_evaluation_handles_actions_as_the_rollout_did():
    assert evaluate(Echoes(), always(-9, 9), episodes=1, actions="clip").lengths.tolist() == [4]


def test_episodes_with_env_actions_are_stored_by_buffers_that_declare_them_and_by_others():
    space = spaces.Box(*BOUNDS)
    episode = next(Rollout(Echoes(), always(-3, 4), actions="clip").episodes(1))
    assert episode.extras["env_action"].tolist() == [[[-2, 4]] * 4]
    for extras in ({}, {"env_action": space}):
        buffer = ReplayBuffer(Echoes().observation_space, space, capacity=64, extras=extras, storage="private")
        buffer.extend(episode)
        batch = buffer.sample(4, Transition())
        assert batch.action.tolist() == [[-3, 4]] * 4
        assert {name: part.tolist() for name, part in batch.extras.items()} == dict.fromkeys(extras, [[-2, 4]] * 4)
