"""What the benchmarks store, made so that a wrong sample shows: every value tells which step it belongs to."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlfeed.types import Step

FLOATS, ACTIONS, FRAME = 17, 6, (84, 84)
FINAL = -100.0  # stands in final observations only: what a reset shows has another number there


@dataclass(frozen=True)
class Stream:
    """Hold steps of one environment in columns: whole episodes, each terminated, the last one early.

    Args:
        observation: ``[n, floats]``; the first number is the step's.
        action: ``[n, actions]``; the first number is the step's.
        reward: ``[n]``.
        next_observation: ``[n, floats]``; the first number is the next step's, the second is `FINAL` at an end.
        terminated: ``[n]``.
    """

    observation: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_observation: np.ndarray
    terminated: np.ndarray

    def __len__(self) -> int:
        """Count the steps.

        Returns:
            n.
        """
        return len(self.reward)

    def episodes(self) -> list[tuple[int, int]]:
        """Find the episodes that ended.

        Returns:
            Begin and end of each.
        """
        ends = (np.flatnonzero(self.terminated) + 1).tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def steps(self, num_envs: int) -> list[Step]:
        """Cut the stream into equal parts and give one to each environment.

        Args:
            num_envs: How many; the rest of a division is left out.

        Returns:
            n // num_envs steps of all environments.
        """
        parts, count = {}, len(self) // num_envs
        for name in ("observation", "action", "reward", "next_observation", "terminated"):
            column = getattr(self, name)[: count * num_envs]
            parts[name] = np.ascontiguousarray(column.reshape(num_envs, -1, *column.shape[1:]).swapaxes(0, 1))
        steps, is_first, truncated = [], np.ones(num_envs, bool), np.zeros(num_envs, bool)
        for t in range(count):
            step = Step(**{name: part[t] for name, part in parts.items()}, truncated=truncated, is_first=is_first)
            is_first = step.terminated
            steps.append(step)
        return steps


def make_stream(
    length: int, seed: int = 0, *, floats: int = FLOATS, actions: int = ACTIONS, lengths: tuple[int, int] = (5, 200)
) -> Stream:
    """Make a stream.

    Args:
        length: Steps.
        seed: Of its numbers.
        floats: Numbers in an observation.
        actions: Numbers in an action.
        lengths: Steps of an episode, the least and the most.

    Returns:
        The stream.
    """
    generator = np.random.default_rng(seed)
    observation = generator.standard_normal((length + 1, floats), dtype=np.float32)
    action = generator.standard_normal((length, actions), dtype=np.float32)
    observation[:, 0], action[:, 0] = np.arange(length + 1), np.arange(length)
    ends = np.cumsum(generator.integers(lengths[0], lengths[1] + 1, length // lengths[0] + 1)) - 1
    terminated = np.zeros(length, bool)
    terminated[ends[ends < length]] = terminated[-1] = True
    following = observation[1:].copy()
    following[terminated, 1] = FINAL
    reward = generator.standard_normal(length, dtype=np.float32)
    return Stream(observation[:-1], action, reward, following, terminated)


def make_steps(count: int, num_envs: int) -> list[Step]:
    """Make steps of several environments; the last step ends all episodes, so that the list may be inserted repeatedly.

    Args:
        count: How many.
        num_envs: Rows of each.

    Returns:
        The steps.
    """
    steps = make_stream(count * num_envs).steps(num_envs)
    steps[-1].terminated[:], steps[-1].next_observation[:, 1] = True, FINAL
    return steps


@dataclass(frozen=True)
class Movie:
    """Hold episodes of frames.

    Args:
        frames: ``[episodes, length + 1, 84, 84]`` uint8; the first four bytes of each are its number.
        action: ``[episodes, length]``, 0 .. 5.
        reward: ``[episodes, length]``.
        terminated: ``[length]``, the same for every episode.
    """

    frames: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray

    @property
    def length(self) -> int:
        """Tell how many steps an episode has.

        Returns:
            Steps.
        """
        return len(self.terminated)

    @property
    def steps(self) -> int:
        """Count the steps.

        Returns:
            Those of all episodes.
        """
        return self.action.size

    def stacks(self, episode: int) -> np.ndarray:
        """Stack the frames of an episode by four; the first one stands for those before it.

        Args:
            episode: Which.

        Returns:
            ``[length + 1, 4, 84, 84]``.
        """
        return self.frames[episode, np.maximum(np.arange(self.length + 1)[:, None] + np.arange(-3, 1), 0)]


def make_movie(episodes: int, length: int, seed: int = 0) -> Movie:
    """Make episodes of frames.

    Args:
        episodes: How many.
        length: Steps of each.
        seed: Of its numbers.

    Returns:
        The movie.
    """
    generator = np.random.default_rng(seed)
    frames = generator.integers(0, 256, (episodes, length + 1, *FRAME), np.uint8)
    numbers = np.arange(episodes * (length + 1), dtype=np.int32)
    frames[:, :, 0, :4] = numbers.view(np.uint8).reshape(episodes, length + 1, 4)
    action = generator.integers(0, 6, (episodes, length))
    reward = generator.standard_normal((episodes, length), dtype=np.float32)
    terminated = np.zeros(length, bool)
    terminated[-1] = True
    return Movie(frames, action, reward, terminated)


class WrongSampleError(Exception):
    """A contestant gave something else than what was asked for: its time means nothing."""


def check_transitions(sample: dict[str, Tensor], count: int) -> None:
    """Check that transitions are dense tensors and each successor is the one of its step.

    Args:
        sample: What a contestant gave.
        count: B.

    Raises:
        WrongSampleError: If not.
    """
    observation, following, action = sample["observation"], sample["next_observation"], sample["action"]
    ended = sample["terminated"].reshape(-1) > 0
    _require(observation.shape == following.shape == (count, FLOATS) and action.shape == (count, ACTIONS), "shapes")
    _require(len(ended) == sample["reward"].numel() == count, "there are one reward and one flag each")
    _require({observation.dtype, following.dtype, action.dtype, sample["reward"].dtype} == {torch.float32}, "dtypes")
    _require((action[:, 0] == observation[:, 0]).all(), "actions are of their steps")
    _require((following[:, 0] == observation[:, 0] + 1).all(), "successors are of their steps")
    _require(((following[:, 1] == FINAL) == ended).all(), "final observations are where episodes end")


def check_pixels(sample: dict[str, Tensor], count: int) -> None:
    """Check that stacks are four frames in order and, inside an episode, the successor is one frame later.

    Args:
        sample: What a contestant gave.
        count: B.

    Raises:
        WrongSampleError: If not.
    """
    observation, following = sample["observation"], sample["next_observation"]
    _require(observation.shape == following.shape == (count, 4, *FRAME), "shapes")
    _require(observation.dtype == following.dtype == torch.uint8, "dtypes")
    before, now, after = _number(observation[:, 2]), _number(observation[:, 3]), _number(following[:, 3])
    ended = sample["terminated"].reshape(-1) > 0  # not every peer has the final frame
    _require(((now == before + 1) | (now == before)).all(), "frames are in order")
    _require(((after == now + 1) | ended).all(), "successors are one frame later")


def _number(frames: Tensor) -> Tensor:
    return frames[:, 0, :4].contiguous().view(torch.int32)[:, 0]


def check_padded(sample: dict[str, Tensor], count: int, most: int) -> None:
    """Check that padded parts of episodes are consecutive steps, none of them across an end.

    Args:
        sample: What a contestant gave.
        count: B.
        most: Steps of a part at most.

    Raises:
        WrongSampleError: If not.
    """
    mask, lengths = sample["mask"], sample["lengths"]
    number, inside = sample["observation"][:, : mask.shape[1], 0], mask[:, 1:]
    ended = sample["terminated"].reshape(mask.shape)
    _require(len(mask) == count and mask.shape[1] <= most, "shapes")
    _require((mask.sum(1) == lengths).all() and (lengths > 0).all(), "lengths are what the mask says")
    _require(((number[:, 1:] == number[:, :-1] + 1) | ~inside).all(), "steps are consecutive")
    _require(not (ended[:, :-1] & inside).any(), "nothing goes on after an end")


def _require(right: bool | Tensor, what: str) -> None:
    if not right:
        raise WrongSampleError(f"expected that {what}" if " " in what else f"expected other {what}")
