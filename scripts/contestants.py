"""Who takes part in a benchmark, and the two who always do: bare NumPy and rlfeed.

A contestant offers the work that its library serves and refuses the rest with `NotServedError`. Every sample is torch
tensors: turning what a library gives into tensors belongs to its work. How a buffer was filled is nobody's time.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Discrete
from torch import Tensor
from workloads import ACTIONS, FLOATS, FRAME, Movie, Stream

from rlfeed.replay import Episode, Prioritized, ReplayBuffer, Sequence, Transition, Uniform
from rlfeed.types import Batch, Step

Sample = dict[str, Any]  # of tensors
Draw = Callable[[int], Sample]
UNIFORM = Uniform()


class NotServedError(Exception):
    """A library has no such feature, or not in this installation."""


class Contestant:
    """Do the work of a benchmark; what a library cannot do stays refused.

    Its constructor imports the library.
    """

    name = "?"

    def uniform(self, stream: Stream) -> Draw:
        """Hold a stream and draw transitions with successors uniformly.

        Args:
            stream: What to hold.

        Returns:
            Gives B transitions: observation, action, reward, next_observation, terminated.
        """
        raise NotServedError("no replay of transitions")

    def prioritized(self, stream: Stream, priorities: Iterator[Tensor]) -> Draw:
        """Hold a stream and draw transitions by priority (alpha 0.6, beta 0.4); each call gives those drawn new ones.

        Args:
            stream: What to hold.
            priorities: ``[B]`` each.

        Returns:
            Gives B transitions, with weights.
        """
        raise NotServedError("no prioritized replay")

    def pixels(self, movie: Movie) -> Draw:
        """Hold frames and draw stacks of four with their successors.

        Args:
            movie: What to hold.

        Returns:
            Gives B transitions: observation and next_observation ``[B, 4, 84, 84]`` uint8, and the rest.
        """
        raise NotServedError("no frame stacks stored once")

    def episodes(self, stream: Stream) -> Draw:
        """Hold a stream and draw whole episodes.

        Args:
            stream: What to hold.

        Returns:
            Gives B padded episodes with mask and lengths.
        """
        raise NotServedError("no whole episodes with mask and lengths")

    def windows(self, stream: Stream, length: int, steps: list[Step]) -> tuple[Draw, Callable[[], object]]:
        """Hold a stream and draw parts of episodes.

        Args:
            stream: What to hold.
            length: Steps of a part at most.
            steps: Of one environment: what is written between samples, again and again.

        Returns:
            Gives B padded parts with mask and lengths; and writes one step.
        """
        raise NotServedError("no parts of episodes with mask and lengths")

    def insert(self, num_envs: int, capacity: int, steps: list[Step]) -> Callable[[], object]:
        """Insert steps of several environments.

        Args:
            num_envs: How many.
            capacity: Steps that the buffer holds.
            steps: To insert.

        Returns:
            Inserts all of them.
        """
        raise NotServedError("no insertion")


class Bare(Contestant):
    """Of NumPy: one `take` of packed rows and nothing else; the outputs are allocated once."""

    name = "bare NumPy"

    def __init__(self) -> None:
        self._generator = np.random.default_rng(0)

    def _take(self, rows: np.ndarray, offsets: np.ndarray) -> Draw:
        outputs: dict[int, np.ndarray] = {}

        def draw(count: int) -> Sample:
            if count not in outputs:
                outputs[count] = np.empty((count, len(offsets), rows.shape[1]), rows.dtype)
            at = self._generator.integers(0, len(rows) - len(offsets), (count, 1)) + offsets
            np.take(rows, at, axis=0, out=outputs[count], mode="clip")
            return {}

        return draw

    def _rows(self, stream: Stream) -> np.ndarray:
        """Pack rows of 104 bytes, as many as the records of rlfeed have."""
        return np.concatenate([stream.observation, stream.action, *[stream.reward[:, None]] * 3], 1)

    def hold(self, stream: Stream, capacity: int) -> Draw:
        """Hold a stream, as often as it takes; draw two neighbouring rows each.

        Args:
            stream: What to hold.
            capacity: Rows.

        Returns:
            Gives B pairs.
        """
        return self._take(np.resize(self._rows(stream), (capacity, FLOATS + ACTIONS + 3)), np.arange(2))

    def uniform(self, stream: Stream) -> Draw:
        """Hold a stream; see `Contestant.uniform`. Two neighbouring rows each."""
        return self.hold(stream, len(stream))

    def prioritized(self, stream: Stream, priorities: Iterator[Tensor]) -> Draw:
        """Hold a stream; see `Contestant.prioritized`. The gather alone: without priorities."""
        return self.uniform(stream)

    def pixels(self, movie: Movie) -> Draw:
        """Hold frames; see `Contestant.pixels`. Five neighbouring frames each."""
        return self._take(movie.frames.reshape(-1, FRAME[0] * FRAME[1]), np.arange(5))

    def episodes(self, stream: Stream) -> Draw:
        """Hold a stream; see `Contestant.episodes`. Rows of a fixed 200 steps each, none of them cleared."""
        return self._take(self._rows(stream), np.arange(200))

    def windows(self, stream: Stream, length: int, steps: list[Step]) -> tuple[Draw, Callable[[], object]]:
        """Hold a stream; see `Contestant.windows`. Rows of the full length each, none of them cleared."""
        return self._take(self._rows(stream), np.arange(length)), lambda: None

    def insert(self, num_envs: int, capacity: int, steps: list[Step]) -> Callable[[], object]:
        """Insert steps; see `Contestant.insert`. Four assignments to a table."""
        table = np.zeros((capacity // num_envs, num_envs, FLOATS + ACTIONS + 2), np.float32)
        cursor = itertools.cycle(range(len(table)))

        def run() -> None:
            for step in steps:
                row = table[next(cursor)]
                row[:, :FLOATS] = step.next_observation
                row[:, FLOATS : FLOATS + ACTIONS] = step.action
                row[:, -2] = step.reward
                row[:, -1] = step.terminated

        return run


class Rlfeed(Contestant):
    """Of rlfeed: a shared buffer of several lanes, everything switched on.

    Args:
        lanes: Environments whose steps the buffer holds.
        floats: Numbers in an observation.
        actions: Numbers in an action.
    """

    name = "rlfeed"

    def __init__(self, lanes: int = 8, floats: int = FLOATS, actions: int = ACTIONS) -> None:
        self._lanes = lanes
        self._spaces = Box(-np.inf, np.inf, (floats,), np.float32), Box(-1, 1, (actions,), np.float32)

    def empty(self, num_envs: int, capacity: int, sampler: Uniform | Prioritized = UNIFORM) -> ReplayBuffer:
        """Make a buffer.

        Args:
            num_envs: Its lanes.
            capacity: Its rows.
            sampler: How it draws.

        Returns:
            The buffer.
        """
        return ReplayBuffer(*self._spaces, capacity=capacity, num_envs=num_envs, sampler=sampler)

    def hold(self, stream: Stream, capacity: int, sampler: Uniform | Prioritized = UNIFORM) -> ReplayBuffer:
        """Fill a buffer with a stream, as often as it takes.

        Args:
            stream: What to hold.
            capacity: Rows of the buffer.
            sampler: How it draws.

        Returns:
            The buffer.
        """
        buffer = self.empty(self._lanes, capacity, sampler)
        steps = stream.steps(self._lanes)
        for step in itertools.islice(itertools.cycle(steps), -(-capacity // self._lanes)):
            buffer.add(step)
        return buffer

    def uniform(self, stream: Stream) -> Draw:
        """Hold a stream; see `Contestant.uniform`."""
        buffer, unit = self.hold(stream, len(stream)), Transition()
        return lambda count: transitions(buffer.sample(count, unit))

    def prioritized(self, stream: Stream, priorities: Iterator[Tensor]) -> Draw:
        """Hold a stream; see `Contestant.prioritized`."""
        buffer, unit = self.hold(stream, len(stream), Prioritized(alpha=0.6, beta=0.4)), Transition()

        def draw(count: int) -> Sample:
            batch: Any = buffer.sample(count, unit)
            buffer.update_priorities(batch.ids.numpy(), next(priorities).numpy())
            return {**transitions(batch), "weights": batch.weights}

        return draw

    def hold_movie(self, movie: Movie) -> ReplayBuffer:
        """Fill a buffer with frames, of one environment.

        Args:
            movie: What to hold.

        Returns:
            The buffer.
        """
        space, lane = Box(0, 255, FRAME, np.uint8), np.zeros(1, bool)
        rows = movie.steps + len(movie.frames)
        buffer = ReplayBuffer(space, Discrete(6), capacity=rows, frame_stack=4)
        for episode, t in itertools.product(range(len(movie.frames)), range(movie.length)):
            step = Step(
                movie.frames[episode, t : t + 1],
                movie.action[episode, t : t + 1],
                movie.reward[episode, t : t + 1],
                movie.frames[episode, t + 1 : t + 2],
                movie.terminated[t : t + 1],
                lane,
                is_first=np.array([t == 0]),
            )
            buffer.add(step)
        return buffer

    def pixels(self, movie: Movie) -> Draw:
        """Hold frames; see `Contestant.pixels`."""
        buffer, unit = self.hold_movie(movie), Transition()
        return lambda count: transitions(buffer.sample(count, unit))

    def episodes(self, stream: Stream) -> Draw:
        """Hold a stream; see `Contestant.episodes`."""
        buffer, unit = self.hold(stream, len(stream)), Episode()
        return lambda count: padded(buffer.sample(count, unit))

    def windows(self, stream: Stream, length: int, steps: list[Step]) -> tuple[Draw, Callable[[], object]]:
        """Hold a stream; see `Contestant.windows`."""
        buffer, unit, written = self.hold(stream, len(stream)), Sequence(length), itertools.cycle(steps)
        return lambda count: padded(buffer.sample(count, unit)), lambda: buffer.add(next(written))

    def insert(self, num_envs: int, capacity: int, steps: list[Step]) -> Callable[[], object]:
        """Insert steps; see `Contestant.insert`."""
        add = self.empty(num_envs, capacity).add

        def run() -> None:
            for step in steps:
                add(step)

        return run


def transitions(batch: Batch) -> Sample:
    """Name the fields of transitions as every contestant does.

    Args:
        batch: From a buffer.

    Returns:
        The fields.
    """
    return {
        "observation": batch.observation,
        "action": batch.action,
        "reward": batch.reward,
        "next_observation": batch.next_observation,
        "terminated": batch.terminated,
    }


def padded(batch: Batch) -> Sample:
    """Name the fields of a padded batch as every contestant does.

    Args:
        batch: From a buffer.

    Returns:
        The fields; the observations are one more than the steps.
    """
    return {
        "observation": batch.observation,
        "action": batch.action,
        "reward": batch.reward,
        "terminated": batch.terminated,
        "mask": batch.mask,
        "lengths": batch.lengths,
    }
