"""What environments return wrongly is named: environment, step, key, what it was and what it should be."""

import itertools

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from rlfeed.envs import SerialEnvs, VectorEnvs, make_envs
from rlfeed.errors import EnvContractError, EnvFailedError
from rlfeed.rollout import Rollout

BOX = spaces.Box(-10, 10, (2,), np.float32)
FINE = np.zeros(2, np.float32)


class Scripted(gymnasium.Env):
    """Returns what it is told to: from reset, then from each step."""

    def __init__(self, space=BOX, first=FINE, steps=(), action_space=None):
        self.observation_space, self.first, self.steps = space, first, list(steps)
        self.action_space = action_space or spaces.Discrete(3)
        self.calls = 0

    def reset(self, *, seed=None, options=None):
        return self.first, {}

    def step(self, action):
        self.calls += 1
        out = self.steps[min(self.calls, len(self.steps)) - 1]
        if isinstance(out, Exception):
            raise out
        return out


RAISES_AT_THREE = """
from rlfeed.testing import ConstantRewardEnv
class Dies(ConstantRewardEnv):
    def step(self, action):
        if self._step == 2:
            raise KeyError("three")
        return super().step(action)
"""


def problem(env, steps=3, beside=0, error=EnvContractError):
    envs = SerialEnvs([*(Scripted(env.observation_space, env.first, [good(env.first)]) for _ in range(beside)), env])
    rollout = Rollout(envs, lambda o: np.zeros(envs.num_envs, np.int64))
    with pytest.raises(error) as caught:
        list(itertools.islice(rollout, steps))
    return str(caught.value)


def good(observation):
    return observation, 1.0, False, False, {}


def test_observation_float64_for_float32_box_is_rounded_with_one_warning():
    env = Scripted(steps=[good(FINE), good(np.array([0.1, 2.0])), good(np.array([0.3, 2.0]))])
    rollout = Rollout(SerialEnvs([env]), lambda o: np.zeros(1, np.int64))
    with pytest.warns(RuntimeWarning, match="observation has dtype float64 but its space says float32") as caught:
        steps = list(itertools.islice(rollout, 3))
    assert len(caught) == 1
    assert "env 0 of 1, step 2 of its episode 0" in str(caught[0].message)
    assert "Cast it in reset() and step(), or declare dtype=np.float64" in str(caught[0].message)
    assert steps[2].observation.dtype == np.float32
    assert steps[2].observation.tolist() == [[np.float32(0.1), 2.0]]


@pytest.mark.filterwarnings("ignore:Scripted")
def test_observation_float64_too_large_for_float32_is_refused():
    text = problem(Scripted(steps=[good(np.array([0.0, 1e39]))]))
    assert "observation[1] is inf, not finite; expected finite numbers" in text


def test_observation_wrong_key_names_both_sides():
    space = spaces.Dict(a=BOX, b=BOX)
    text = problem(Scripted(space, {"a": FINE, "b": FINE}, [good({"a": FINE, "c": FINE})]))
    assert "has the keys ['a', 'c']; expected a dict with the keys ['a', 'b']" in text


def test_observation_wrong_shape_in_a_nested_part_names_the_part():
    space = spaces.Dict(arm=spaces.Tuple([BOX, BOX]))
    text = problem(Scripted(space, {"arm": (FINE, np.zeros(3, np.float32))}))
    assert 'observation["arm"][1] has shape (3,) but its space says (2,)' in text


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_observation_not_finite_names_the_entry(value):
    text = problem(Scripted(steps=[good(np.array([0, value], np.float32))]))
    assert f"observation[1] is {value}, not finite" in text


def test_observation_huge_but_finite_passes():
    space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    envs = SerialEnvs([Scripted(space, steps=[good(np.full(2, 3e38, np.float32))])])
    step = next(Rollout(envs, lambda o: np.zeros(1, np.int64)))
    assert step.next_observation.tolist() == [[np.float32(3e38)] * 2]


def test_observation_outside_its_box_by_more_than_the_boxs_width_is_refused():
    text = problem(Scripted(steps=[good(np.array([0, 30.5], np.float32))]))
    assert "env 0 of 1, step 1 of its episode 0: observation[1] is 30.5, outside its space; expected -10 to 10" in text


def test_observation_just_outside_its_box_passes_with_one_warning():
    env = Scripted(steps=[good(FINE), good(np.array([0, 29.5], np.float32)), good(np.array([-11, 0], np.float32))])
    rollout = Rollout(SerialEnvs([env]), lambda o: np.zeros(1, np.int64))
    said = r"observation\[1\] is 29.5, outside its space; expected -10 to 10"
    with pytest.warns(RuntimeWarning, match=said) as caught:
        steps = list(itertools.islice(rollout, 3))
    assert len(caught) == 1
    assert [step.next_observation[0].tolist() for step in steps] == [[0, 0], [0, 29.5], [-11, 0]]


@pytest.mark.parametrize("value", [-1, 7])
def test_observation_outside_an_integer_box_is_refused(value):
    space = spaces.Box(0, 6, (2,), np.int16)
    text = problem(Scripted(space, np.zeros(2, np.int16), [good(np.array([0, value], np.int16))]))
    assert f"observation[1] is {value}, outside its space; expected 0 to 6" in text


@pytest.mark.parametrize(
    ("space", "value", "stored"),
    [
        (spaces.Discrete(4), 3, 3),
        (spaces.Discrete(4), np.int32(2), 2),
        (spaces.MultiBinary(2), np.array([1, 0]), [1, 0]),
        (spaces.MultiBinary(2), np.array([True, False]), [1, 0]),
        (spaces.MultiDiscrete([3, 4]), [2, 3], [2, 3]),
        (spaces.Box(0, 255, (2,), np.uint8), np.array([0, 255], np.int64), [0, 255]),
        (spaces.Box(-1, 1, (2,), np.float64), np.array([0.5, 1], np.float32), [0.5, 1.0]),
    ],
)
def test_observation_that_loses_nothing_is_cast_to_the_dtype_of_the_space(space, value, stored):
    ready = SerialEnvs([Scripted(space, value)]).reset(0, [0])
    assert ready.observation.dtype == space.dtype
    assert ready.observation[0].tolist() == stored


@pytest.mark.parametrize(
    ("space", "value", "part"),
    [
        (spaces.Box(0, 255, (2,), np.uint8), np.array([0, 256]), "dtype int64 but its space says uint8"),
        (spaces.Box(0, 255, (2,), np.uint8), np.array([0.0, 1.0]), "dtype float64 but its space says uint8"),
        (spaces.Discrete(4), 4, "outside its space; expected 0 to 3"),
        (spaces.Discrete(3, start=5), 4, "outside its space; expected 5 to 7"),
        (spaces.MultiDiscrete([2, 2]), np.array([0, 2]), "observation[1] is 2, outside its space"),
        (BOX, None, "observation has shape ()"),
        (BOX, {"a": FINE}, "observation has shape ()"),
    ],
)
def test_observation_that_does_not_fit_its_space_is_refused(space, value, part):
    assert part in problem(Scripted(space, value))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39, None, "1", np.ones(2), np.float64("nan"), 1j])
def test_reward_that_is_no_finite_scalar_is_refused(value):
    text = problem(Scripted(steps=[(FINE, value, False, False, {})]), beside=1)
    assert "env 1 of 2, step 1 of its episode 0: reward is" in text


def test_reward_of_one_entry_is_taken_for_a_scalar_with_a_warning():
    """Rollout 3A.15: the shape of an action, in half of all environments with continuous ones."""
    envs = SerialEnvs([Scripted(steps=[(FINE, np.array([2.5], np.float32), False, False, {})])])
    with pytest.warns(RuntimeWarning, match=r"reward is an array of shape \(1,\): its one entry is taken"):
        step = next(Rollout(envs, lambda o: np.zeros(1, np.int64)))
    assert step.reward.tolist() == [2.5]


@pytest.mark.parametrize("value", [2, True, 2.5, np.float32(2.5), np.int64(2), np.array(2.5)])
def test_reward_any_real_scalar_passes(value):
    envs = SerialEnvs([Scripted(steps=[(FINE, value, False, False, {})])])
    step = next(Rollout(envs, lambda o: np.zeros(1, np.int64)))
    assert (step.reward.dtype, step.reward.tolist()) == (np.float32, [float(value)])


@pytest.mark.parametrize("position", [2, 3])
@pytest.mark.parametrize("value", [0, 1, None, np.zeros(2, bool), "False"])
def test_flag_that_is_no_bool_is_refused(position, value):
    result = [FINE, 0.0, False, False, {}]
    result[position] = value
    assert f"{('terminated', 'truncated')[position - 2]} is" in problem(Scripted(steps=[tuple(result)]))


def test_flag_numpy_bools_pass():
    envs = SerialEnvs([Scripted(steps=[(FINE, 0.0, np.bool_(True), np.array(False), {})])])
    step = next(Rollout(envs, lambda o: np.zeros(1, np.int64)))
    assert (step.terminated.tolist(), step.truncated.tolist()) == ([True], [False])


def test_step_of_the_old_gym_with_four_values_is_explained():
    assert "step() returned 4 values; expected the five" in problem(Scripted(steps=[(FINE, 0.0, False, {})]))


def test_reset_of_the_old_gym_without_info_is_explained():
    class Old(Scripted):
        def reset(self, *, seed=None, options=None):
            return FINE

    assert "reset() returned a ndarray; expected the pair" in problem(Old())


def test_step_that_raises_says_where_and_keeps_the_cause():
    text = problem(Scripted(steps=[good(FINE), KeyError("lost")]), beside=2, error=EnvFailedError)
    assert "env 2 of 3, step 2 of its episode 0 (seed " in text
    assert "raised KeyError: 'lost'" in text


def test_rollout_after_a_step_that_raised_begins_the_next_episode():
    env = Scripted(steps=[good(FINE), KeyError("lost"), good(FINE)])
    rollout = Rollout(env, lambda o: np.zeros(1, np.int64))
    next(rollout)
    with pytest.raises(EnvFailedError):
        next(rollout)
    assert next(rollout).is_first.tolist() == [True]
    assert rollout.state_dict()["next_episodes"].tolist() == [2]


def test_sync_vector_mode_refuses_the_same_observations():
    envs = make_envs(lambda: Scripted(steps=[good(np.zeros(3, np.float32))]), 2, mode="sync")
    envs.reset(0, [0, 0])
    with pytest.raises(EnvContractError, match=r"env 0 of 2, step 1 of its episode 0: observation has shape \(3,\)"):
        envs.step(np.zeros(2, np.int64))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium logs a worker's error as a warning
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_vector_modes_step_that_raises_says_where(mode, tmp_path):
    (tmp_path / "dies.py").write_text(RAISES_AT_THREE)
    rollout = Rollout(make_envs(f"{tmp_path}/dies.py", 2, mode=mode), lambda o: np.zeros(2, np.int64))
    with pytest.raises(EnvFailedError, match=r"env \d of 2, step 3 of its episode 0: step\(.*raised KeyError: 'three'"):
        list(itertools.islice(rollout, 5))
    rollout.close()


def test_vector_envs_flags_that_are_no_bools_are_refused():
    class Integers(gymnasium.vector.VectorWrapper):
        def step(self, actions):
            observation, reward, terminated, truncated, infos = super().step(actions)
            return observation, reward, terminated.astype(int), truncated, infos

    vector = Integers(gymnasium.vector.SyncVectorEnv([lambda: Scripted(steps=[good(FINE)])]))
    with pytest.raises(EnvContractError, match=r"terminated is int64 of shape \(1,\); expected bool"):
        next(Rollout(vector, lambda o: np.zeros(1, np.int64)))


def test_vector_envs_reward_not_finite_names_the_row():
    vector = gymnasium.vector.SyncVectorEnv(
        [lambda r=r: Scripted(steps=[(FINE, r, False, False, {})]) for r in (0.0, np.nan)], autoreset_mode="SameStep"
    )
    envs = VectorEnvs(vector)
    envs.reset(0, [0, 0])
    with pytest.raises(EnvContractError, match="env 1 of 2: reward is nan"):
        envs.step(np.zeros(2, np.int64))


def test_vector_environment_of_its_own_gives_whole_episodes():
    # CartPole's vector implementation knows NEXT_STEP only and takes one seed for all environments.
    vector = gymnasium.make_vec("CartPole-v1", 3, vectorization_mode="vector_entry_point")
    rollout = Rollout(vector, lambda o: (o[:, 2] > 0).astype(np.int64))
    successor, ended = {}, {}
    for _ in range(150):
        step = next(rollout)
        for row, env in enumerate(step.env_ids.tolist()):
            assert step.is_first[row] == ended.get(env, True)
            if not step.is_first[row]:
                np.testing.assert_array_equal(step.observation[row], successor[env])
            successor[env], ended[env] = step.next_observation[row], step.terminated[row] or step.truncated[row]
            fallen = abs(step.next_observation[row][2]) > 12 * np.pi / 180 or abs(step.next_observation[row][0]) > 2.4
            assert fallen == step.terminated[row]
    assert rollout.statistics.episodes > 3
    assert all(r.total_reward == r.length > 1 for r in rollout.statistics.window)


def test_environment_that_writes_into_its_action_does_not_change_the_step():
    class Writes(Scripted):
        def step(self, action):
            action[:] = 7.0
            return good(FINE)

    env = Writes(action_space=spaces.Box(-1, 1, (2,), np.float32))
    step = next(Rollout(env, lambda o: np.full((1, 2), 0.5, np.float32)))
    assert step.action.tolist() == [[0.5, 0.5]]


class Masked(gymnasium.Env):
    """Allows only the action (step + episode) % 3, says so in the info, and dies of any other."""

    observation_space = BOX
    action_space = spaces.Discrete(3)

    def __init__(self):
        self.t, self.episode = 0, -1

    def mask(self):
        return {"action_mask": np.arange(3) == (self.t + self.episode) % 3}

    def reset(self, *, seed=None, options=None):
        self.t, self.episode = 0, self.episode + 1
        return FINE, self.mask()

    def step(self, action):
        if action != (self.t + self.episode) % 3:
            raise ValueError(f"action {action} is not allowed")
        self.t += 1
        return FINE, 1.0, self.t == 4, False, self.mask()


@pytest.mark.parametrize(
    "layout", [{}, *({"mode": "sync", "autoreset": a} for a in ("same_step", "next_step", "disabled"))]
)
def test_action_mask_from_infos_is_obeyed_in_random_mode(layout):
    rollout = Rollout(make_envs(Masked, 2, **layout), lambda o: np.zeros(len(o), np.int64), mode="random")
    for _ in range(20):
        next(rollout)
    assert rollout.statistics.episodes >= 6
    assert {r.length for r in rollout.statistics.window} == {4}


def test_action_mask_that_allows_nothing_is_refused():
    class Stuck(Masked):
        def mask(self):
            return {"action_mask": np.zeros(3, bool)}

    with pytest.raises(EnvContractError, match="at least one True"):
        next(Rollout(Stuck(), lambda o: np.zeros(1, np.int64)))
