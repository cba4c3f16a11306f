"""The same work done by other replay buffers, each used as its own documents say."""
# The peers are an extra; where they are not installed there is nothing to check their use against:
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from contestants import Contestant, Draw, NotServedError, Sample
from gymnasium.spaces import Box, Discrete
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset
from workloads import ACTIONS, FLOATS, FRAME, Movie, Stream

from rlfeed.types import Step


def _tensors(observation: Any, action: Any, reward: Any, next_observation: Any, terminated: Any) -> Sample:
    return {
        "observation": torch.as_tensor(observation),
        "action": torch.as_tensor(action),
        "reward": torch.as_tensor(reward),
        "next_observation": torch.as_tensor(next_observation),
        "terminated": torch.as_tensor(terminated),
    }


class Cpprb(Contestant):
    """Of cpprb: C++ segment trees and gathers, NumPy batches; stacks compressed along the last axis."""

    name = "cpprb"

    def __init__(self) -> None:
        import cpprb

        self._library = cpprb
        self._fields = {
            "obs": {"shape": FLOATS, "dtype": np.float32},
            "act": {"shape": ACTIONS, "dtype": np.float32},
            "rew": {"dtype": np.float32},
            "done": {"dtype": bool},
            "next_obs": {"shape": FLOATS, "dtype": np.float32},
        }

    def _fill(self, buffer: Any, stream: Stream) -> None:
        for begin in range(0, len(stream), 50_000):
            at = slice(begin, begin + 50_000)
            buffer.add(
                obs=stream.observation[at],
                act=stream.action[at],
                rew=stream.reward[at],
                done=stream.terminated[at],
                next_obs=stream.next_observation[at],
            )

    def _sample(self, drawn: dict[str, np.ndarray]) -> Sample:
        return _tensors(drawn["obs"], drawn["act"], drawn["rew"], drawn["next_obs"], drawn["done"])

    def uniform(self, stream: Stream) -> Draw:
        """Hold a stream; see `Contestant.uniform`."""
        buffer = self._library.ReplayBuffer(len(stream), self._fields)
        self._fill(buffer, stream)
        return lambda count: self._sample(buffer.sample(count))

    def prioritized(self, stream: Stream, priorities: Iterator[Tensor]) -> Draw:
        """Hold a stream; see `Contestant.prioritized`."""
        buffer = self._library.PrioritizedReplayBuffer(len(stream), self._fields, alpha=0.6)
        self._fill(buffer, stream)

        def draw(count: int) -> Sample:
            drawn = buffer.sample(count, 0.4)
            sample = {**self._sample(drawn), "weights": torch.as_tensor(drawn["weights"])}
            buffer.update_priorities(drawn["indexes"], next(priorities).numpy())
            return sample

        return draw

    def pixels(self, movie: Movie) -> Draw:
        """Hold frames; see `Contestant.pixels`."""
        fields = {
            "obs": {"shape": (*FRAME, 4), "dtype": np.uint8},
            "act": {"dtype": np.int64},
            "rew": {"dtype": np.float32},
            "done": {"dtype": bool},
        }
        buffer = self._library.ReplayBuffer(movie.steps, fields, next_of="obs", stack_compress="obs")
        for episode in range(len(movie.frames)):
            stacks = np.ascontiguousarray(movie.stacks(episode).transpose(0, 2, 3, 1))
            for t in range(movie.length):
                buffer.add(
                    obs=stacks[t],
                    next_obs=stacks[t + 1],
                    act=movie.action[episode, t],
                    rew=movie.reward[episode, t],
                    done=movie.terminated[t],
                )
            buffer.on_episode_end()

        def draw(count: int) -> Sample:
            sample = self._sample(buffer.sample(count))
            for key in ("observation", "next_observation"):
                sample[key] = sample[key].permute(0, 3, 1, 2)
            return sample

        return draw

    def insert(self, num_envs: int, capacity: int, steps: list[Step]) -> Callable[[], object]:
        """Insert steps; see `Contestant.insert`."""
        buffer = self._library.ReplayBuffer(capacity, {**self._fields, "trunc": {"dtype": bool}})
        rows = [
            {
                "obs": step.observation,
                "act": step.action,
                "rew": step.reward,
                "done": step.terminated,
                "next_obs": step.next_observation,
                "trunc": step.truncated,
            }
            for step in steps
        ]

        def run() -> None:
            for row in rows:
                buffer.add(**row)

        return run


class Tianshou(Contestant):
    """Of Tianshou: NumPy in its `Batch`; sum tree in numba; stacks rebuilt from single frames."""

    name = "tianshou"

    def __init__(self) -> None:
        import tianshou.data

        self._library = tianshou.data

    def _columns(self, stream: Stream) -> dict[str, np.ndarray]:
        return {
            "obs": stream.observation.copy(),
            "act": stream.action.copy(),
            "rew": stream.reward.copy(),
            "terminated": stream.terminated.copy(),
            "truncated": np.zeros(len(stream), bool),
            "done": stream.terminated.copy(),
            "obs_next": stream.next_observation.copy(),
        }

    def _sample(self, drawn: Any) -> Sample:
        return _tensors(drawn.obs, drawn.act, drawn.rew, drawn.obs_next, drawn.terminated)

    def uniform(self, stream: Stream) -> Draw:
        """Hold a stream; see `Contestant.uniform`."""
        buffer = self._library.ReplayBuffer.from_data(**self._columns(stream))
        return lambda count: self._sample(buffer.sample(count)[0])

    def prioritized(self, stream: Stream, priorities: Iterator[Tensor]) -> Draw:
        """Hold a stream; see `Contestant.prioritized`."""
        buffer = self._library.PrioritizedReplayBuffer(len(stream), 0.6, 0.4)
        buffer.set_batch(self._library.Batch(**self._columns(stream)))
        buffer._size = len(stream)  # as its own from_data does for the plain buffer
        buffer.init_weight(np.arange(len(stream)))

        def draw(count: int) -> Sample:
            drawn, indices = buffer.sample(count)
            sample = {**self._sample(drawn), "weights": torch.as_tensor(drawn.weight)}
            buffer.update_weight(indices, next(priorities))
            return sample

        return draw

    def pixels(self, movie: Movie) -> Draw:
        """Hold frames; see `Contestant.pixels`."""
        buffer = self._library.ReplayBuffer(movie.steps, stack_num=4, ignore_obs_next=True, save_only_last_obs=True)
        for episode, t in itertools.product(range(len(movie.frames)), range(movie.length)):
            row = self._library.Batch(
                obs=movie.frames[episode, t][None],
                act=movie.action[episode, t],
                rew=movie.reward[episode, t],
                terminated=movie.terminated[t],
                truncated=False,
                obs_next=movie.frames[episode, t + 1][None],
                info={},
            )
            buffer.add(row)
        return lambda count: self._sample(buffer.sample(count)[0])

    def insert(self, num_envs: int, capacity: int, steps: list[Step]) -> Callable[[], object]:
        """Insert steps; see `Contestant.insert`."""
        several = num_envs > 1
        library, lanes = self._library, np.arange(num_envs)
        buffer = library.VectorReplayBuffer(capacity, num_envs) if several else library.ReplayBuffer(capacity)
        rows = []
        for step in steps:
            fields = [step.observation, step.action, step.reward, step.terminated, step.truncated]
            fields.append(step.next_observation)
            names = ("obs", "act", "rew", "terminated", "truncated", "obs_next")
            rows.append(dict(zip(names, fields if several else [field[0] for field in fields], strict=True)))

        def run() -> None:
            for row in rows:
                if several:
                    buffer.add(library.Batch(**row, info={}), buffer_ids=lanes)
                else:
                    buffer.add(library.Batch(**row, info={}))

        return run


class StableBaselines3(Contestant):
    """Of Stable-Baselines3 (and CleanRL, which copies it): plain NumPy; `optimize_memory_usage` stores stacks once."""

    name = "stable-baselines3"

    def __init__(self) -> None:
        from stable_baselines3.common import buffers

        self._library = buffers
        self._spaces = Box(-np.inf, np.inf, (FLOATS,), np.float32), Box(-1, 1, (ACTIONS,), np.float32)

    def _sample(self, drawn: Any) -> Sample:
        return _tensors(drawn.observations, drawn.actions, drawn.rewards, drawn.next_observations, drawn.dones)

    def uniform(self, stream: Stream) -> Draw:
        """Hold a stream; see `Contestant.uniform`."""
        buffer = self._library.ReplayBuffer(len(stream), *self._spaces, device="cpu")
        buffer.observations[:, 0], buffer.next_observations[:, 0] = stream.observation, stream.next_observation
        buffer.actions[:, 0], buffer.rewards[:, 0] = stream.action, stream.reward
        buffer.dones[:, 0], buffer.full = stream.terminated, True
        return lambda count: self._sample(buffer.sample(count))

    def pixels(self, movie: Movie) -> Draw:
        """Hold frames; see `Contestant.pixels`."""
        buffer = self._library.ReplayBuffer(
            movie.steps,
            Box(0, 255, (4, *FRAME), np.uint8),
            Discrete(6),
            device="cpu",
            optimize_memory_usage=True,
            handle_timeout_termination=False,
        )
        for episode in range(len(movie.frames)):
            at = slice(episode * movie.length, (episode + 1) * movie.length)
            buffer.observations[at, 0] = movie.stacks(episode)[:-1]
            buffer.actions[at, 0, 0], buffer.rewards[at, 0] = movie.action[episode], movie.reward[episode]
            buffer.dones[at, 0] = movie.terminated
        buffer.full = True
        return lambda count: self._sample(buffer.sample(count))

    def insert(self, num_envs: int, capacity: int, steps: list[Step]) -> Callable[[], object]:
        """Insert steps; see `Contestant.insert`."""
        buffer = self._library.ReplayBuffer(capacity, *self._spaces, device="cpu", n_envs=num_envs)
        infos = [{"TimeLimit.truncated": False} for _ in range(num_envs)]
        rows = [(s.observation, s.next_observation, s.action, s.reward, s.terminated, infos) for s in steps]

        def run() -> None:
            for row in rows:
                buffer.add(*row)

        return run


class TorchRL(Contestant):
    """Of TorchRL: tensors in a TensorDict. Frames, windows and episodes by the fastest of the ways that it offers.

    Args:
        prefetch: Batches that a thread makes ahead of transitions and episodes.
    """

    name = "torchrl"

    def __init__(self, prefetch: int | None = None) -> None:
        import tensordict
        import torchrl.data
        from torchrl.data import replay_buffers

        self._dict, self._pad = tensordict.TensorDict, tensordict.pad_sequence
        self._library, self._buffers, self._prefetch = torchrl.data, replay_buffers, prefetch
        logging.getLogger("torchrl").setLevel(logging.WARNING)  # else it tells of every storage

    def _rows(self, stream: Stream, at: slice = slice(None)) -> Any:
        following = {
            "obs": torch.as_tensor(stream.next_observation[at]),
            "reward": torch.as_tensor(stream.reward[at])[:, None],
            "terminated": torch.as_tensor(stream.terminated[at])[:, None],
        }
        observation, action = torch.as_tensor(stream.observation[at]), torch.as_tensor(stream.action[at])
        return self._dict({"obs": observation, "action": action, "next": following}, [len(observation)])

    def _sample(self, drawn: Any) -> Sample:
        following = drawn["next"]
        return {
            "observation": drawn["obs"],
            "action": drawn["action"],
            "reward": following["reward"],
            "next_observation": following["obs"],
            "terminated": following["terminated"],
        }

    def _fill(self, buffer: Any, stream: Stream) -> None:
        for begin in range(0, len(stream), 50_000):
            buffer.extend(self._rows(stream, slice(begin, begin + 50_000)))

    def uniform(self, stream: Stream) -> Draw:
        """Hold a stream; see `Contestant.uniform`."""
        storage = self._library.LazyTensorStorage(len(stream))
        buffer = self._library.TensorDictReplayBuffer(storage=storage, batch_size=256, prefetch=self._prefetch)
        self._fill(buffer, stream)
        return lambda count: self._sample(buffer.sample(count))

    def prioritized(self, stream: Stream, priorities: Iterator[Tensor]) -> Draw:
        """Hold a stream; see `Contestant.prioritized`."""
        storage = self._library.LazyTensorStorage(len(stream))
        try:
            buffer = self._library.TensorDictPrioritizedReplayBuffer(
                alpha=0.6, beta=0.4, storage=storage, batch_size=256
            )
        except RuntimeError as error:  # its compiled part must have been built for this very torch
            raise NotServedError(str(error)) from error
        self._fill(buffer, stream)

        def draw(count: int) -> Sample:
            drawn = buffer.sample(count)
            sample = {**self._sample(drawn), "weights": drawn["priority_weight"]}
            buffer.update_priority(drawn["index"], next(priorities))
            return sample

        return draw

    def pixels(self, movie: Movie) -> Draw:
        """Hold frames; see `Contestant.pixels`. A slice of five frames serves both stacks."""
        buffer = self._library.TensorDictReplayBuffer(
            storage=self._library.LazyTensorStorage(movie.steps),
            sampler=self._buffers.SliceSampler(slice_len=5, traj_key="episode", strict_length=True),
            batch_size=160,
        )
        for episode in range(len(movie.frames)):
            following = {
                "reward": torch.as_tensor(movie.reward[episode]),
                "terminated": torch.as_tensor(movie.terminated),
            }
            rows = {
                "pixels": torch.as_tensor(movie.frames[episode, :-1]),
                "action": torch.as_tensor(movie.action[episode]),
                "episode": torch.full((movie.length,), episode),
                "next": following,
            }
            buffer.extend(self._dict(rows, [movie.length]))

        def draw(count: int) -> Sample:
            drawn = buffer.sample(count * 5)
            frames = drawn["pixels"].view(count, 5, *FRAME)
            action, reward, ended = drawn["action"], drawn["next", "reward"], drawn["next", "terminated"]
            return {
                "observation": frames[:, :4],
                "next_observation": frames[:, 1:],
                "action": action.view(count, 5)[:, 3],
                "reward": reward.view(count, 5)[:, 3],
                "terminated": ended.view(count, 5)[:, 3],
            }

        return draw

    def episodes(self, stream: Stream) -> Draw:
        """Hold a stream; see `Contestant.episodes`."""
        spans = stream.episodes()
        buffer = self._library.ReplayBuffer(
            storage=self._library.ListStorage(len(spans)),
            batch_size=64,
            prefetch=self._prefetch,
            collate_fn=lambda episodes: self._pad(episodes, return_mask=True),
        )
        for begin, end in spans:
            buffer.add(self._rows(stream, slice(begin, end)))

        def draw(count: int) -> Sample:
            drawn = buffer.sample(count)
            mask = drawn["masks"]["obs"]
            return {**self._sample(drawn), "mask": mask, "lengths": mask.sum(1)}

        return draw

    def windows(self, stream: Stream, length: int, steps: list[Step]) -> tuple[Draw, Callable[[], object]]:
        """Hold a stream; see `Contestant.windows`."""
        unit = self._buffers.Sequence(length=length, done_key=("next", "terminated"))
        storage = self._library.LazyTensorStorage(len(stream) + 20_000)
        buffer = self._library.TensorDictReplayBuffer(storage=storage, batch_size=64, sample_unit=unit)
        self._fill(buffer, stream)

        def draw(count: int) -> Sample:
            drawn = buffer.sample(count)
            flat = self._sample(drawn)
            sample = {key: field.view(count, length, *field.shape[1:]) for key, field in flat.items()}
            sample["mask"] = drawn["validity_mask"].view(count, length)
            sample["lengths"] = sample["mask"].sum(1)
            sample["terminated"] = sample["terminated"].squeeze(-1) & sample["mask"]  # the padding repeats the last row
            return sample

        written = itertools.cycle([self._step(step) for step in steps])
        return draw, lambda: buffer.extend(next(written))

    def _step(self, step: Step) -> Any:
        tensor = torch.from_numpy
        following = {
            "obs": tensor(step.next_observation),
            "reward": tensor(step.reward)[:, None],
            "terminated": tensor(step.terminated)[:, None],
        }
        rows = {"obs": tensor(step.observation), "action": tensor(step.action), "next": following}
        return self._dict(rows, [len(step)])

    def _row(self, step: Step) -> Any:
        tensor = torch.from_numpy
        following = {
            "obs": tensor(step.next_observation[0]),
            "reward": tensor(step.reward),
            "terminated": tensor(step.terminated),
        }
        row = {"obs": tensor(step.observation[0]), "action": tensor(step.action[0]), "next": following}
        return self._dict(row, [])

    def insert(self, num_envs: int, capacity: int, steps: list[Step]) -> Callable[[], object]:
        """Insert steps; see `Contestant.insert`."""
        storage = self._library.LazyTensorStorage(capacity)
        buffer = self._library.TensorDictReplayBuffer(storage=storage, batch_size=256)

        def run() -> None:
            for step in steps:
                if num_envs > 1:
                    buffer.extend(self._step(step))
                else:
                    buffer.add(self._row(step))

        return run


class _Episodes(IterableDataset):
    def __init__(self, stream: Stream) -> None:
        self._spans = stream.episodes()
        fields = ("observation", "action", "reward", "next_observation", "terminated")
        self._fields = {name: torch.as_tensor(getattr(stream, name)) for name in fields}

    def __iter__(self) -> Iterator[Sample]:
        generator = np.random.default_rng(0)
        while True:
            begin, end = self._spans[generator.integers(len(self._spans))]
            yield {name: field[begin:end] for name, field in self._fields.items()}


def pad_episodes(episodes: list[Sample]) -> Sample:
    """Collate episodes as anybody would by hand: `pad_sequence` field by field.

    Args:
        episodes: Fields ``[T, ...]`` each.

    Returns:
        Fields ``[B, T, ...]``, with lengths and mask.
    """
    batch = {name: pad_sequence([one[name] for one in episodes], batch_first=True) for name in episodes[0]}
    lengths = torch.tensor([len(one["reward"]) for one in episodes])
    return {**batch, "lengths": lengths, "mask": torch.arange(batch["reward"].shape[1]) < lengths[:, None]}


class StockLoader(Contestant):
    """PyTorch alone: an IterableDataset of episodes behind the stock DataLoader, padded by `pad_sequence`."""

    name = "torch's DataLoader"

    def episodes(self, stream: Stream) -> Draw:
        """Hold a stream; see `Contestant.episodes`."""
        loaders: dict[int, Iterator[Sample]] = {}

        def draw(count: int) -> Sample:
            if count not in loaders:
                loaders[count] = iter(DataLoader(_Episodes(stream), batch_size=count, collate_fn=pad_episodes))
            return next(loaders[count])

        return draw


PEERS: tuple[type[Contestant], ...] = (Cpprb, Tianshou, StableBaselines3, TorchRL, StockLoader)
