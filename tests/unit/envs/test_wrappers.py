"""Wrappers by name: found, read, checked, applied in order, sent to workers; time limits stay apart from ends."""

import itertools
import pickle

import gymnasium
import numpy as np
import pytest

from rlfeed.envs import EnvSource, make_envs
from rlfeed.envs.wrappers import NamedWrapper, absolute_wrapper, as_wrapper
from rlfeed.errors import ConfigError, EnvMakeError, EnvNotFoundError
from rlfeed.rollout import Rollout
from rlfeed.testing import ConstantRewardEnv

FILE = '''
import gymnasium

class Scaled(gymnasium.RewardWrapper):
    def __init__(self, env, factor=2.0, *, label="x"):
        super().__init__(env)
        self.factor, self.label = factor, label

    def reward(self, reward):
        return reward * self.factor

class Shifted(gymnasium.RewardWrapper):
    def __init__(self, env, by):
        super().__init__(env)
        self.by = by

    def reward(self, reward):
        return reward + self.by
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return str(path)


def first_reward(*wrappers, **layout):
    envs = make_envs(ConstantRewardEnv, 1, wrappers=wrappers, **layout)
    return float(next(Rollout(envs, lambda o: np.ones(1, np.int64))).reward[0])


def test_wrappers_by_name_are_applied_in_their_order(file):
    """rollout 3A.29."""
    assert first_reward(f"{file}:Scaled:factor=3", f"{file}:Shifted:by=1") == 4.0
    assert first_reward(f"{file}:Shifted:by=1", f"{file}:Scaled:factor=3") == 6.0


def test_wrappers_of_gymnasium_by_name_and_functions_stand_side_by_side():
    envs = make_envs(
        ConstantRewardEnv, wrappers=["TimeLimit:max_episode_steps=4", lambda env: env, "TimeAwareObservation"]
    )
    step = list(itertools.islice(Rollout(envs, lambda o: np.ones(1, np.int64)), 4))[-1]
    assert (step.terminated.tolist(), step.truncated.tolist()) == ([False], [True])
    assert envs.observation_space.shape == (2,)
    assert step.next_observation.tolist() == [[np.float32(0.4), 4.0]]


@pytest.mark.parametrize(
    ("text", "kwargs"),
    [
        ("NAME", {}),
        ("NAME:factor=2", {"factor": 2}),
        ("NAME:factor=-2.5,label='a:b=c,d'", {"factor": -2.5, "label": "a:b=c,d"}),
        ("NAME:label=north", {"label": "north"}),
        ("NAME:label=true", {"label": True}),
        ("NAME:label=None", {"label": None}),
        ("NAME:label=(84,84), factor=1e3", {"label": (84, 84), "factor": 1000.0}),
        ("NAME:label={'a': [1, 2]}", {"label": {"a": [1, 2]}}),
    ],
)
def test_wrapper_arguments_are_read_as_what_they_look_like(text, kwargs, file):
    assert NamedWrapper.parse(text.replace("NAME", f"{file}:Scaled")).kwargs == kwargs


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("TimeLimits", EnvNotFoundError, "Did you mean 'TimeLimit'"),
        ("nowhere.py:Scaled", EnvNotFoundError, "holds no file of that name"),
        ("no_such_module:Scaled", EnvNotFoundError, "there is no module 'no_such_module'"),
        ("gymnasium.wrappers:TimeLimits", EnvNotFoundError, "gymnasium.wrappers: has no 'TimeLimits'.*'TimeLimit'"),
        ("TimeLimit:max_steps=3", ConfigError, r"no parameter 'max_steps'; expected .*\['max_episode_steps'\]"),
        ("TimeLimit", ConfigError, "needs max_episode_steps"),
        ("TimeLimit:max_episode_steps", ConfigError, "cannot be read"),
        ("TimeLimit:max_episode_steps=/a", ConfigError, "its arguments cannot be read"),
        ("TimeLimit:max_episode_steps=f(1)", ConfigError, "its arguments cannot be read"),
        ("TimeLimit:max_episode_steps=1)+g(2", ConfigError, "its arguments cannot be read"),
        ("", ConfigError, "cannot be read"),
        ("NormalizeReward", ConfigError, "--env.normalize-reward"),
        (3, ConfigError, "has 3; expected names"),
    ],
)
def test_wrapper_that_cannot_be_had_is_named_before_anything_is_made(text, error, message):
    with pytest.raises(error, match=message):
        make_envs(ConstantRewardEnv, wrappers=[text])


def test_wrapper_that_raises_names_the_cause(file):
    with pytest.raises(EnvMakeError, match=r"wrapper 'TimeLimit': raised ValueError: .*Mend its arguments"):
        make_envs(ConstantRewardEnv, wrappers=["TimeLimit:max_episode_steps=-1"])


def test_wrapper_is_found_again_after_it_was_sent_to_another_process(file):
    source = EnvSource(ConstantRewardEnv, {}, (as_wrapper(f"{file}:Scaled:factor=7"),))
    env = pickle.loads(pickle.dumps(source))()
    assert (type(env).__name__, env.factor) == ("Scaled", 7)


def test_wrapper_file_is_named_from_anywhere(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute_wrapper("mine.py:Scaled:label='b.py:c'") == f"{file}:Scaled:label='b.py:c'"
    for text in ("TimeLimit:max_episode_steps=3", "package.module:Name", "RecordVideo:video_folder='a.py:b'"):
        assert absolute_wrapper(text) == text


class Endless(gymnasium.Env):
    """Terminates at its fourth step, if nothing stops it before."""

    observation_space = gymnasium.spaces.Box(0, 10, (1,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        return np.full(1, self.t, np.float32), 1.0, self.t == 4, False, {}


@pytest.mark.parametrize(
    ("limits", "flags"),
    [
        ((3,), (False, True)),
        ((3, 9), (False, True)),
        ((9, 3), (False, True)),
        ((4, 4), (True, True)),
        ((9,), (True, False)),
    ],
)
def test_time_limits_nested_or_not_truncate_and_both_flags_count_as_terminated(limits, flags):
    """rollout 3A.6: with both flags there is no future to bootstrap from."""
    from rlfeed.replay import ReplayBuffer, Transition

    envs = make_envs(Endless, wrappers=[f"TimeLimit:max_episode_steps={limit}" for limit in limits])
    buffer = ReplayBuffer(envs.observation_space, envs.action_space, capacity=64, storage="private")
    Rollout(envs, lambda o: np.zeros(1, np.int64)).collect(buffer, steps=12)
    batch = buffer.sample(64, Transition(gamma=0.9))
    ends = batch.terminated | batch.truncated
    assert {(bool(t), bool(u)) for t, u in zip(batch.terminated[ends], batch.truncated[ends], strict=True)} == {flags}
    assert set(batch.discount[ends].tolist()) == {0.0 if flags[0] else np.float32(0.9)}


def test_frame_skip_by_name_adds_rewards_up_and_stops_at_the_end():
    envs = make_envs(Endless, wrappers=["RepeatAction:num_repeats=3"])
    steps = list(itertools.islice(Rollout(envs, lambda o: [0]), 3))
    assert [(float(s.reward[0]), bool(s.terminated[0])) for s in steps] == [(3, False), (1, True), (3, False)]


def test_atari_other_environments_are_refused_with_what_to_name():
    with pytest.raises(ConfigError, match="ale_py:ALE/Pong-v5"):
        make_envs("CartPole-v1", wrappers=["atari"])
    with pytest.raises(ConfigError, match="Did you mean 'machado'"):
        make_envs("CartPole-v1", wrappers=["atari:protocol=machada"])


@pytest.mark.parametrize(
    ("protocol", "actions", "sticky", "noop_max"), [("machado", 18, 0.25, 0), ("dqn", 6, 0.0, 30)]
)
def test_atari_pong_is_as_the_protocol_says(protocol, actions, sticky, noop_max):
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    env = EnvSource("ale_py:ALE/Pong-v5", {}, (as_wrapper(f"atari:protocol={protocol}"),))()
    assert env.action_space.n == actions
    assert (env.observation_space.shape, env.observation_space.dtype) == ((84, 84), np.uint8)
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == np.float32(sticky)
    assert (env.noop_max, env.frame_skip, env.terminal_on_life_loss) == (noop_max, 4, False)
    env.reset(seed=3)
    before = env.unwrapped.ale.getEpisodeFrameNumber()
    env.step(0)
    assert env.unwrapped.ale.getEpisodeFrameNumber() - before == 4
    env.close()
