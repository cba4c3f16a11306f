"""Frame stacks for acting are, bit for bit, those that the buffer samples."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.known_streams import AUTORESETS, identifiable_envs

from rlfeed.envs import Outcome, Ready, SerialEnvs
from rlfeed.errors import ConfigError
from rlfeed.nest import leaves, map_nest
from rlfeed.replay import Episode, ReplayBuffer, Transition
from rlfeed.rollout import Rollout, StackFrames
from rlfeed.testing import IdentifiableEnv
from rlfeed.types import PolicyOutput


class Notes:
    """Notes the stacks it is shown, and counts its calls in the episode in a carry of its own."""

    def initial_carry(self, num_envs):
        return np.zeros((num_envs, 1))

    def __call__(self, observation, carry, context):
        self.shown = map_nest(np.copy, observation)
        np.testing.assert_array_equal(carry[:, 0] == 0, context.is_first)
        return PolicyOutput(np.zeros(len(carry), np.int64), carry + 1)


class LosesRows(SerialEnvs):
    """Loses row 0 in every sixth step, and cuts row 1 there: new episodes begin."""

    calls = 0

    def step(self, action):
        self.calls += 1
        out = super().step(action)
        if self.calls % 6:
            return out
        firsts = self.reset(0, [self.calls] * self.num_envs).observation
        flags = np.zeros(2, bool)
        lost, ready = np.array([True, False]), Ready(out.ready.env_ids, firsts)
        return Outcome(out.next_observation, out.reward, flags, flags, ready, lost=lost, cut=~lost)


def compare(envs, frames, steps):
    """Store single frames and compare every sample's stacks with those the policy saw at that step."""
    notes = Notes()
    space = envs.observation_space
    rollout = Rollout(envs, StackFrames(notes, frames, space))
    buffer = ReplayBuffer(space, envs.action_space, capacity=400, num_envs=2, frame_stack=frames, storage="private")
    shown = {}
    for _ in range(steps):
        step = next(rollout)
        for row, identity in enumerate(buffer.add(step).tolist()):
            if identity >= 0:
                shown[identity] = map_nest(lambda leaf, row=row: leaf[row], notes.shown)
    batch = buffer.sample(300, Transition())
    for row, identity in enumerate(batch.ids.tolist()):
        for (path, sampled), (_, acted) in zip(leaves(batch.observation), leaves(shown[identity]), strict=True):
            np.testing.assert_array_equal(sampled[row].numpy(), acted, err_msg=str(path), strict=True)
    return len(set(batch.ids.tolist()))


@settings(max_examples=15, deadline=None)
@given(
    layout=st.sampled_from(AUTORESETS),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    frames=st.sampled_from([2, 4, {"image": 4}, {"image": 3, "vector": 2}]),
)
def test_stack_frames_any_episodes_act_on_what_is_sampled(layout, lengths, frames):
    """(f)."""
    assert compare(identifiable_envs(layout, 2, lengths=lengths, observation="dict"), frames, 30) > 20


def test_stack_frames_of_lost_and_cut_episodes_act_on_what_is_sampled():
    envs = LosesRows([IdentifiableEnv(env, lengths=(50,), observation="dict") for env in range(2)])
    assert compare(envs, 4, 40) > 40


def test_stack_frames_pads_with_the_first_frame_oldest_first():
    notes = Notes()
    envs = identifiable_envs("serial", 1, lengths=(3,))
    rollout = Rollout(envs, StackFrames(notes, 3, envs.observation_space))
    steps = []
    for _ in range(4):
        next(rollout)
        steps.append(notes.shown[0, :, 2].tolist())
    assert steps == [[0, 0, 0], [0, 0, 1], [0, 1, 2], [0, 0, 0]]
    assert notes.shown[0, :, 1].tolist() == [1, 1, 1]


def test_stack_frames_module_gets_tensors_of_stacks():
    class Module(torch.nn.Module):
        def forward(self, observation):
            assert observation.shape == (2, 4, 4)
            return torch.zeros(2, dtype=torch.int64)

    envs = identifiable_envs("serial", 2)
    rollout = Rollout(envs, StackFrames(Module(), 4, envs.observation_space))
    step = next(rollout)
    assert step.observation.shape == (2, 4)
    block = next(rollout.blocks(3))
    assert block.observation.shape == (2, 4, 4)


def test_stack_frames_wrong_numbers_and_names_are_refused():
    space = identifiable_envs("serial", 1, observation="dict").observation_space
    with pytest.raises(ConfigError, match=r"StackFrames: .*'imge'.*Did you mean 'image'.*\['vector'\] is 0"):
        StackFrames(Notes(), {"imge": 4, "vector": 0}, space)


def test_stack_frames_episode_and_previous_stack_overlap():
    """What follows a step's stack is the next step's: a learner's `next_observation` is what was acted on next."""
    notes = Notes()
    envs = identifiable_envs("serial", 2, lengths=(6,), ends=("truncated",))
    rollout = Rollout(envs, StackFrames(notes, 4, envs.observation_space))
    buffer = ReplayBuffer(
        envs.observation_space, envs.action_space, capacity=64, num_envs=2, frame_stack=4, storage="private"
    )
    acted = []
    for _ in range(6):
        buffer.add(next(rollout))
        acted.append(notes.shown)
    batch = buffer.sample(2, Episode())
    for row, env in enumerate((batch.ids >> 44).tolist()):
        np.testing.assert_array_equal(batch.observation[row, :6].numpy(), np.stack(acted)[:, env])
