"""A model in the place of environments: the same contract, the same rollout, the same episodes."""

import itertools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from rlfeed import Episode, ReplayBuffer, Rollout, Transition, epoch
from rlfeed.codec import decode, encode
from rlfeed.envs import Envs, ModelEnvs, as_envs
from rlfeed.errors import ConfigError, EnvContractError, SpaceError
from rlfeed.nest import leaves

BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTIONS = spaces.Discrete(4)


def drawn(generator):
    """Begin with a number of its own and step 0."""
    return np.array([generator.integers(1000), 0, -1], np.float32)


def count(observation, action):
    """Keep the number, count the step, show the action."""
    return np.stack([observation[:, 0], observation[:, 1] + 1, action], axis=1).astype(np.float32)


def ends(following):
    """End the episodes of number n after n % 5 + 1 steps."""
    return following[:, 1] > following[:, 0] % 5


def pays(observation, action, following):
    return observation[:, 0] + following[:, 1] / 100


def counting(**options):
    given = {"initial": drawn, "reward_fn": pays, "termination_fn": ends, "horizon": 4, "num_envs": 3, **options}
    model = given.pop("model", count)
    return ModelEnvs(model, observation_space=BOX, action_space=ACTIONS, **given)


def act(observation):
    return ((observation[:, 0] + observation[:, 1]) % 4).astype(np.int64)


def streams(envs, steps, seed=0, policy=act):
    """Give what a rollout gives, as plain tuples by environment."""
    found = [[] for _ in range(envs.num_envs)]
    for step in itertools.islice(Rollout(envs, policy, seed=seed), steps):
        fields = (step.observation, step.action, step.reward, step.next_observation, step.terminated, step.truncated)
        for row, env in enumerate(step.env_ids):
            found[env].append(tuple(np.asarray(field[row]).tolist() for field in (*fields, step.is_first)))
    return found


def test_model_envs_are_envs():
    envs = counting()
    assert isinstance(envs, Envs)
    assert as_envs(envs) is envs
    assert envs.name == "count"


def test_model_envs_rollout_gives_the_true_steps():
    for stream in streams(counting(), 40):
        number, step = None, 0
        for observation, action, reward, following, terminated, truncated, is_first in stream:
            number = observation[0] if is_first else number
            assert observation[:2] == [number, step]
            assert is_first == (step == 0)
            step += 1
            assert action == (number + step - 1) % 4
            assert following == [number, step, action]
            assert reward == np.float32(number + step / 100)
            assert terminated == (step == number % 5 + 1)
            assert truncated == (step == 4)  # both at once where the horizon is the last step, as TimeLimit has it
            step = 0 if terminated or truncated else step


def test_model_envs_episodes_depend_on_seed_row_and_episode_alone():
    few, many = streams(counting(num_envs=2), 30, seed=5), streams(counting(num_envs=6), 30, seed=5)
    same, other = few == many[:2], streams(counting(num_envs=2), 30, seed=6) == few
    assert (same, other) == (True, False)  # the streams themselves would be compared word by word
    starts = [stream[0][0][0] for stream in many]
    assert len(set(starts)) == 6
    envs = counting(num_envs=2)
    again = Rollout(envs, act, seed=5)
    state = again.state_dict()
    first = [next(again).observation[:, 0].tolist() for _ in range(30)]
    again.load_state_dict(state)
    assert [next(again).observation[:, 0].tolist() for _ in range(30)] == first
    # An episode's number says how it begins: the second episode of a fresh run is the one resumed with.
    later = counting(num_envs=2).reset(5, [1, 1]).observation[:, 0].tolist()
    ends_at = [next(i for i, step in enumerate(stream) if i and step[-1]) for stream in few]
    assert later == [stream[i][0][0] for stream, i in zip(few, ends_at, strict=True)]


def test_model_envs_fill_a_buffer_whose_samples_are_the_true_steps():
    envs = counting()
    buffer = ReplayBuffer(BOX, ACTIONS, capacity=900, num_envs=3)
    Rollout(envs, act).collect(buffer, steps=300)
    seen = 0
    for batch in epoch(buffer, Transition(), 50):
        number, step = batch.observation[:, 0], batch.observation[:, 1] + 1
        assert torch.equal(batch.next_observation[:, 0], number)  # no pair joins two episodes
        assert torch.equal(batch.next_observation[:, 1], step)
        assert torch.equal(batch.terminated, step > number % 5)
        assert torch.equal(batch.truncated, step == 4)
        seen += len(batch)
    assert seen == 300
    lengths = [int(n) for batch in epoch(buffer, Episode(), 8) for n in batch.lengths]
    assert sum(lengths) == 300
    assert max(lengths) == 4


def test_model_envs_serve_blocks_and_episodes():
    rollout = Rollout(counting(), act)
    block = next(rollout.blocks(6))
    assert block.observation.shape == (3, 7, 3)
    ended = (block.terminated | block.truncated)[:, :-1].sum()
    assert len(block.final_index) >= ended
    played = list(rollout.episodes(2))
    assert len(played) == 6
    for episode in played:
        number, length = int(episode.observation[0, 0, 0]), int(episode.lengths[0])
        assert length == min(number % 5 + 1, 4)
        assert episode.observation[0, :, 1].tolist() == list(range(length + 1))


class CartPole:
    """CartPole's equations, written down once more; its float64 state is the carry, as the environment keeps it."""

    def __call__(self, observation, action, state):
        x, speed, angle, turn = state.T
        force = np.where(action == 1, 10.0, -10.0)
        sine, cosine = np.sin(angle), np.cos(angle)
        push = (force + 0.05 * np.square(turn) * sine) / 1.1
        bend = (9.8 * sine - cosine * push) / (0.5 * (4.0 / 3.0 - 0.1 * np.square(cosine) / 1.1))
        pull = push - 0.05 * bend * cosine / 1.1
        state = np.stack([x + 0.02 * speed, speed + 0.02 * pull, angle + 0.02 * turn, turn + 0.02 * bend], axis=1)
        return state.astype(np.float32), state


def test_model_envs_of_cartpoles_equations_play_the_episodes_of_gymnasiums_cartpole():
    real = gymnasium.make("CartPole-v1", max_episode_steps=25, disable_env_checker=True)
    angle = 12 * 2 * np.pi / 360
    envs = ModelEnvs(
        CartPole(),
        observation_space=real.observation_space,
        action_space=real.action_space,
        initial=lambda generator: generator.uniform(-0.05, 0.05, 4).astype(np.float32),
        initial_carry=lambda observation: observation.astype(np.float64),
        reward_fn=lambda observation, action, following: np.ones(len(observation)),
        termination_fn=lambda following: (np.abs(following[:, 0]) > 2.4) | (np.abs(following[:, 2]) > angle),
        horizon=25,
        num_envs=4,
    )
    causes = set()
    for episode in Rollout(envs, lambda observation: None, seed=3, mode="random").episodes(10):
        real.reset(seed=0)
        real.unwrapped.state = episode.observation[0, 0].numpy().astype(np.float64)
        for t in range(int(episode.lengths[0])):
            following, reward, terminated, truncated, _ = real.step(int(episode.action[0, t]))
            assert episode.observation[0, t + 1].tolist() == following.tolist()
            assert episode.reward[0, t] == reward
            assert (bool(episode.terminated[0, t]), bool(episode.truncated[0, t])) == (terminated, truncated)
        assert terminated or truncated
        causes.add((terminated, truncated))
    assert len(causes) >= 2  # the comparison saw both ends


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.modes = set()

    def forward(self, observation, action):
        self.modes.add((self.training, torch.is_inference_mode_enabled()))
        return self.dropout(self.layer(torch.cat([observation, action], dim=1)))


def test_model_envs_of_a_model_that_was_fitted_follow_the_closed_form():
    # x' = A x + b u with a constant push u: x_t = A^t x_0 + (A^(t-1) + ... + 1) b u.
    a, b = np.array([[0.9, 0.2], [-0.1, 0.8]]), np.array([0.3, -0.5])
    generator = np.random.default_rng(0)
    x, u = generator.normal(size=(50, 2)), generator.normal(size=(50, 1))
    fitted = np.linalg.lstsq(np.concatenate([x, u], axis=1), x @ a.T + u * b, rcond=None)[0]
    model = Linear()
    with torch.no_grad():
        model.layer.weight.copy_(torch.from_numpy(fitted.T))
    space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    envs = ModelEnvs(
        model,
        observation_space=space,
        action_space=spaces.Box(-1, 1, (1,), np.float32),
        initial=lambda generator: x[generator.integers(50)].astype(np.float32),
        reward_fn=lambda observation, action, following: -(following**2).sum(1),
        termination_fn=None,
        horizon=12,
        num_envs=5,
    )
    played = list(Rollout(envs, lambda observation: np.full((len(observation), 1), 0.4, np.float32)).episodes(1))
    assert len(played) == 5
    for episode in played:
        states = episode.observation[0].numpy().astype(np.float64)
        for t in range(13):
            pushes = sum((np.linalg.matrix_power(a, k) for k in range(t)), np.zeros((2, 2)))
            expected = np.linalg.matrix_power(a, t) @ states[0] + pushes @ b * 0.4
            np.testing.assert_allclose(states[t], expected, atol=1e-5)
        np.testing.assert_allclose(episode.reward[0], -(states[1:] ** 2).sum(1), atol=1e-5)
    assert model.modes == {(False, True)}  # evaluation mode, no graph
    assert model.training
    assert model.dropout.training


def test_model_envs_module_that_is_partly_frozen_is_left_as_it_was():
    model = Linear()
    model.layer.eval()
    envs = ModelEnvs(
        model,
        observation_space=spaces.Box(-9, 9, (2,), np.float32),
        action_space=spaces.Box(-1, 1, (1,), np.float32),
        initial=lambda generator: np.zeros(2, np.float32),
        reward_fn=lambda observation, action, following: following[:, 0],
        termination_fn=None,
    )
    next(Rollout(envs, lambda observation: np.zeros((1, 1), np.float32)))
    assert [part.training for part in (model, model.layer, model.dropout)] == [True, False, True]


AGED = spaces.Dict(position=spaces.Box(-9, 9, (1,), np.float32), age=spaces.Box(0, 9, (), np.int64))
PUSHED = spaces.Dict(push=spaces.Box(0, 1, (1,), np.float32), turn=spaces.Discrete(2))


class World(nn.Module):
    """Dict observations and actions, a reward that is learned, and a recurrent carry."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def predict(self, observation, action, carry):
        assert isinstance(observation["position"], torch.Tensor)
        age = carry["age"] + 1
        moved = observation["position"] + action["push"] * self.scale + action["turn"][:, None]
        return {"position": moved, "age": age.to(torch.int64)}, {"age": age}

    def reward(self, observation, action, following):
        return following["position"][:, 0] * self.scale

    def ended(self, following):
        return following["position"][:, 0] > 2.5


def test_model_envs_of_dicts_with_a_carry_keep_one_age_per_row():
    world = World()
    envs = ModelEnvs(
        world.predict,
        observation_space=AGED,
        action_space=PUSHED,
        initial=lambda generator: {"position": np.zeros(1, np.float32), "age": np.int64(0)},
        initial_carry=lambda observation: {"age": torch.zeros(len(observation["age"]))},
        reward_fn=world.reward,
        termination_fn=world.ended,
        horizon=5,
        num_envs=3,
    )

    def push(observation):
        # Rows end after 3, 2 and 5 steps, again and again.
        return {"push": np.array([[1.0], [0.5], [0.0]], np.float32), "turn": np.array([0, 1, 0])}

    ages, rewards = [], []
    for step in itertools.islice(Rollout(envs, push), 10):
        ages.append(step.next_observation["age"].tolist())
        rewards.append(step.reward.tolist())
        assert (step.observation["age"] == step.next_observation["age"] - 1).all()
    assert [list(row) for row in zip(*ages, strict=True)] == [
        [1, 2, 3, 1, 2, 3, 1, 2, 3, 1],
        [1, 2, 1, 2, 1, 2, 1, 2, 1, 2],
        [1, 2, 3, 4, 5, 1, 2, 3, 4, 5],
    ]
    assert rewards[:3] == [[1, 1.5, 0], [2, 3, 0], [3, 1.5, 0]]


def seen(step):
    return [np.asarray(leaf).tolist() for _, leaf in leaves((step.observation, step.next_observation, step.reward))]


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_model_envs_come_back_exact_in_the_middle_of_an_episode_through_a_file(cut):
    world = World()
    with torch.no_grad():
        world.scale.fill_(0.7)

    def act(observation):
        return {"push": observation["position"] * 0 + 0.9, "turn": observation["age"] % 2}

    def rollout():
        return Rollout(
            ModelEnvs(
                world.predict,
                observation_space=AGED,
                action_space=PUSHED,
                initial=lambda generator: {"position": generator.random(1, np.float32), "age": np.int64(0)},
                initial_carry=lambda observation: {"age": observation["age"].float()},
                reward_fn=world.reward,
                termination_fn=world.ended,
                horizon=3,
                num_envs=3,
            ),
            act,
            seed=4,
        )

    first = rollout()
    for _ in range(cut):
        next(first)
    state = decode(np.frombuffer(b"".join(bytes(part) for part in encode(first.state_dict())), np.uint8))
    expected = [seen(next(first)) for _ in range(12)]
    second = rollout()
    second.load_state_dict(state)
    assert state["environments"] == "exact"
    assert second.comebacks == ("exact",) * 3
    found = [seen(next(second)) for _ in range(12)]
    assert found == expected
    assert second.statistics.episodes == first.statistics.episodes


def test_model_envs_functions_that_write_into_what_they_get_change_nothing():
    def model(observation, action):
        observation[:, 1] += 1
        observation[:, 2] = action
        action[:] = 0
        return observation

    def reward_fn(observation, action, following):
        reward = pays(observation, action, following)
        observation[:] = action[:] = following[:] = 0
        return reward

    careful, careless = counting(termination_fn=None), counting(model=model, reward_fn=reward_fn, termination_fn=None)
    same = streams(careful, 20) == streams(careless, 20)
    assert same


def test_model_envs_model_that_reuses_one_array_gives_steps_that_can_be_kept():
    buffer = np.zeros((3, 3), np.float32)

    def model(observation, action):
        buffer[:] = count(observation, action)
        return buffer

    same = streams(counting(model=model), 20) == streams(counting(), 20)
    assert same


def diverging(observation, action):
    """Break row 1 in step 3 of every episode."""
    following = count(observation, action)
    following[1, 2] = np.nan if following[1, 1] == 3 else following[1, 2]
    return following


def test_model_envs_prediction_that_is_not_finite_names_row_step_and_value():
    rollout = Rollout(counting(model=diverging, termination_fn=None), act)
    for _ in range(2):
        next(rollout)
    match = r"diverging: env 1 of 3, step 3 of its episode 0: observation\[2\] is nan"
    with pytest.raises(EnvContractError, match=match):
        next(rollout)


@pytest.mark.filterwarnings("ignore:diverging. env 1")
def test_model_envs_prediction_that_is_not_finite_loses_that_step_of_that_row():
    envs = counting(model=diverging, termination_fn=None, on_fault="restart", max_restarts=2)
    twin = streams(counting(termination_fn=None), 7)
    rollout, buffer = Rollout(envs, act), ReplayBuffer(BOX, ACTIONS, capacity=90, num_envs=3)
    found = [[] for _ in range(3)]
    for step in itertools.islice(rollout, 7):
        buffer.add(step)
        assert (step.lost is None) == (step.next_observation[1, 1] != 2 or step.observation[1, 1] != 2)
        for row in range(3):
            lost = step.lost is not None and step.lost[row]
            found[row].append("lost" if lost else step.observation[row].tolist())
            assert not lost or not (step.terminated[row] or step.truncated[row])
    for row in (0, 2):
        assert found[row] == [step[0] for step in twin[row]]
    assert [entry if entry == "lost" else entry[1] for entry in found[1]] == [0, 1, "lost", 0, 1, "lost", 0]
    assert found[1][0][0] != found[1][3][0]  # another episode, with a beginning of its own
    assert [(fault.env_id, fault.episode) for fault in envs.faults] == [(1, 0), (1, 1)]
    assert rollout.env_steps == len(buffer) == 7 * 3 - 2
    for batch in epoch(buffer, Transition(), 4):
        assert torch.equal(batch.observation[:, 0], batch.next_observation[:, 0])
        assert torch.equal(batch.observation[:, 1] + 1, batch.next_observation[:, 1])
    next(rollout)
    with pytest.raises(EnvContractError, match="episode 2") as error:
        next(rollout)
    assert "broke 3 times in a row" in str(error.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e300])
def test_model_envs_reward_that_is_not_finite_is_a_fault_too(value):
    envs = counting(reward_fn=lambda o, a, f: np.where(np.arange(3) == 2, value, 0.0))
    with pytest.raises(EnvContractError, match="env 2 of 3, step 1 of its episode 0: reward is"):
        next(Rollout(envs, act))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"model": lambda o, a: count(o, a)[:2]}, "observation is a ndarray of shape (2, 3); expected an array or"),
        ({"model": lambda o, a: None}, "observation is a NoneType of shape ()"),
        ({"model": lambda o, a: count(o, a)[:, :2]}, "env 0 of 3, step 1 of its episode 0: observation has shape (2,)"),
        ({"model": lambda o, a: {"x": o}}, "step 1 of its episode 0: observation has shape () but its space says (3,)"),
        ({"reward_fn": lambda o, a, f: o[:, :1]}, "reward_fn returned shape (3, 1); expected (3,)"),
        ({"termination_fn": lambda f: f[:, 0]}, "termination_fn returned float32 of shape (3,); expected bool"),
        ({"termination_fn": lambda f: False}, "termination_fn returned bool of shape (); expected bool of shape (3,)"),
        ({"initial": lambda g: np.zeros((1, 3), np.float32)}, "observation has shape (1, 3) but its space says (3,)"),
    ],
)
def test_model_envs_function_that_returns_something_else_is_named(options, part):
    with pytest.raises(EnvContractError) as error:
        next(Rollout(counting(**options), act))
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({"num_envs": 0}, ConfigError, "num_envs is 0"),
        ({"num_envs": None}, ConfigError, "num_envs is None"),
        ({"horizon": 0}, ConfigError, "horizon is 0"),
        ({"horizon": 2.5}, ConfigError, "horizon is 2.5"),
        ({"on_fault": "restrat"}, ConfigError, "Did you mean 'restart'"),
        ({"max_restarts": -1}, ConfigError, "max_restarts is -1"),
    ],
)
def test_model_envs_wrong_argument_is_named(options, error, part):
    with pytest.raises(error) as found:
        counting(**options)
    assert part in str(found.value)


def test_model_envs_space_that_cannot_be_stored_is_named():
    with pytest.raises(SpaceError, match="observation_space"):
        ModelEnvs(
            count,
            observation_space=spaces.Text(3),
            action_space=ACTIONS,
            initial=drawn,
            reward_fn=pays,
            termination_fn=None,
        )
