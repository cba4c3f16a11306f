"""Frame stacks for acting: a policy sees the last frames, steps hold single ones."""

from typing import Any

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from rlfeed.nest import Nest, build, leaves
from rlfeed.rollout.policy import adapt
from rlfeed.specs import FrameStack, frames_of, from_space
from rlfeed.types import PolicyContext, PolicyOutput


class StackFrames:
    """Show a policy the last frames of its observations, exactly as ``ReplayBuffer(frame_stack=...)`` samples them.

    A stack has an axis of frames after the rows, oldest first; before an episode's first frame there is that frame
    again. The frames before the last are the carry, beside the policy's own, so that the rollout resets them; a buffer
    that declares no carry stores single frames only.

    Args:
        policy: What sees the stacks: a `Policy`, a module or a function.
        frames: How many, at least 1; or their numbers by entry of a Dict observation, 1 for the others.
        observation_space: Of one environment: of single frames.

    Raises:
        ConfigError: If a number is no int of at least 1, or an entry is not there; all findings at once.
    """

    def __init__(self, policy: Any, frames: FrameStack, observation_space: Any) -> None:
        self._policy = adapt(policy)
        spec = from_space(observation_space, "observation_space")
        counts = frames_of(spec, frames, "StackFrames")
        self._stacked = {path: (count, leaf) for (path, leaf), count in zip(leaves(spec), counts.values(), strict=True)}
        self._stacked = {path: entry for path, entry in self._stacked.items() if entry[0] > 1}

    def initial_carry(self, num_envs: int) -> Nest:
        """Give what episodes begin with: no frames, and the policy's own state.

        Args:
            num_envs: Rows.

        Returns:
            A pair of the frames before, ``[num_envs, frames - 1, ...]`` for each part that is stacked, and the policy's
            carry.
        """
        before = tuple(leaf.zeros(num_envs, count - 1) for count, leaf in self._stacked.values())
        return before, self._policy.initial_carry(num_envs)

    def __call__(self, observation: Nest, carry: Nest, context: PolicyContext) -> PolicyOutput:
        """Decide for every row.

        Args:
            observation: Single frames, ``[k, ...]`` per leaf.
            carry: What `initial_carry` or the call before gave.
            context: Where episodes begin, and what the policy needs.

        Returns:
            The policy's output, with the frames in its carry.
        """
        before, own = carry
        frames = dict(leaves(observation))
        for (path, _), older in zip(self._stacked.items(), before, strict=True):
            frames[path] = _stack(older, frames[path], context.is_first)
        out = self._policy(build(list(frames.items())), own, context)
        return PolicyOutput(out.action, (tuple(frames[path][:, 1:] for path in self._stacked), out.carry), out.extras)


def _stack(older: ndarray, frame: ndarray, is_first: Bool[ndarray, " k"]) -> ndarray:
    stack = np.concatenate([older, frame[:, None]], axis=1)
    stack[is_first] = frame[is_first, None]
    return stack
