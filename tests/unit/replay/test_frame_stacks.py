"""Frame stacks: stored once, stacked when sampled, as Gymnasium's wrapper would have shown them."""

import pickle

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.wrappers import FrameStackObservation
from support.batches import assert_same

from rlfeed.errors import ConfigError
from rlfeed.replay import Episode, ReplayBuffer, Sequence, Transition
from rlfeed.types import Step

PIXELS = Box(0, 255, (36, 36), np.uint8)  # above 1 KB: a column of its own
VALUES = Box(-np.inf, np.inf, (2,), np.float32)


class Counting(gymnasium.Env):
    """Episodes of seven steps whose observation names episode and step."""

    action_space = Discrete(2)

    def __init__(self, space):
        self.observation_space, self.episode = space, -1

    def reset(self, *, seed=None, options=None):
        self.episode, self.index = self.episode + 1, 0
        return self._observe(), {}

    def step(self, action):
        self.index += 1
        return self._observe(), float(self.index), self.index == 7, False, {}

    def _observe(self):
        space = self.observation_space
        return np.full(space.shape, 10 * self.episode + self.index, space.dtype)


def play(space, frames, buffer, steps):
    """Store single frames; give what the wrapper shows before and after each step, by the step's id."""
    single, stacked = Counting(space), FrameStackObservation(Counting(space), frames, padding_type="reset")
    shown, first = {}, True
    for _ in range(steps):
        if first:
            (observation, _), (stack, _) = single.reset(), stacked.reset()
        following, reward, terminated, truncated, _ = single.step(0)
        next_stack = stacked.step(0)[0]
        step = [np.asarray(x)[None] for x in (observation, 0, np.float32(reward), following, terminated, truncated)]
        identity = int(buffer.add(Step(*step, is_first=np.array([first])))[0])
        shown[identity] = stack.copy(), next_stack.copy()
        observation, stack, first = following, next_stack, terminated
    return shown


@pytest.mark.parametrize("space", [PIXELS, VALUES], ids=["column", "record"])
@pytest.mark.parametrize("frames", [2, 4, 10])
def test_stacks_equal_those_of_gymnasiums_wrapper(space, frames):
    """B5, B6, (f). Also where an episode is shorter than the stack, and after the lane of 30 rows has wrapped twice."""
    buffer = ReplayBuffer(space, Discrete(2), capacity=30, frame_stack=frames, storage="private")
    shown = play(space, frames, buffer, 60)
    batch = buffer.sample(200, Transition())
    assert len(set(batch.ids.tolist())) > 15
    for i, identity in enumerate(batch.ids.tolist()):
        assert np.array_equal(batch.observation[i], shown[identity][0])
        assert np.array_equal(batch.next_observation[i], shown[identity][1])
    windows = buffer.sample(50, Episode())
    for i, identity in enumerate(windows.ids.tolist()):
        assert np.array_equal(windows.observation[i, 7], shown[identity + 6][1])
        for t in range(7):
            assert np.array_equal(windows.observation[i, t], shown[identity + t][0])


def test_stacks_of_one_step_share_their_frames():
    buffer = ReplayBuffer(PIXELS, Discrete(2), capacity=30, frame_stack=4, storage="private")
    play(PIXELS, 4, buffer, 20)
    batch = buffer.sample(8, Transition())
    assert batch.observation.shape == batch.next_observation.shape == (8, 4, 36, 36)
    assert batch.next_observation.data_ptr() - batch.observation.data_ptr() == 36 * 36
    assert torch.equal(batch.observation[:, 1:], batch.next_observation[:, :-1])
    for copy in (batch.clone(), pickle.loads(pickle.dumps(batch)), batch.map(torch.clone)):
        assert_same(copy, batch)
    apart = buffer.sample(8, Transition(n_step=2))
    assert apart.observation.is_contiguous()
    assert apart.next_observation.is_contiguous()


def test_stacks_by_name_leave_other_entries_single():
    space = Dict(camera=PIXELS, joints=VALUES)
    buffer = ReplayBuffer(space, Discrete(2), capacity=30, frame_stack={"camera": 3}, storage="private")
    step = {key: np.zeros((1, *part.shape), part.dtype) for key, part in space.items()}
    flags = [np.array([False])] * 2
    buffer.add(Step(step, np.array([0]), np.ones(1, np.float32), step, *flags, is_first=np.ones(1, bool)))
    batch = buffer.sample(2, Sequence(1))
    assert batch.observation["camera"].shape == (2, 2, 3, 36, 36)
    assert batch.observation["joints"].shape == (2, 2, 2)


def test_stacks_of_a_loaded_and_of_a_pickled_buffer_are_the_same(tmp_path):
    buffer = ReplayBuffer(PIXELS, Discrete(2), capacity=30, frame_stack=3, storage="shared")
    play(PIXELS, 3, buffer, 25)
    buffer.save(tmp_path / "saved")
    loaded = ReplayBuffer.load(tmp_path / "saved")
    assert_same(loaded.sample(8, Transition()), buffer.sample(8, Transition()))


@pytest.mark.parametrize(
    ("frame_stack", "message"),
    [
        (0, "frame_stack is 0; expected an int >= 1"),
        (True, "frame_stack is True"),
        ({"camera": 0}, r"frame_stack\['camera'\] is 0"),
        ({"camra": 2}, "names 'camra'.* Did you mean 'camera'"),
    ],
)
def test_stacks_wrong_numbers_and_names_are_refused(frame_stack, message):
    with pytest.raises(ConfigError, match=message):
        ReplayBuffer(Dict(camera=PIXELS), Discrete(2), capacity=30, frame_stack=frame_stack, storage="private")


def test_stacks_lane_shorter_than_a_stack_is_refused():
    buffer = ReplayBuffer(PIXELS, Discrete(2), capacity=8, frame_stack=8, storage="private")
    with pytest.raises(ConfigError, match="touches 9 rows, but a lane has 8"):
        buffer.sample(1, Transition())
