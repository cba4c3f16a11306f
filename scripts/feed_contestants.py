"""Who brings batches to a learner: PyTorch's own DataLoader by samples and by whole batches, and rlfeed's.

TorchRL's thread is `peers.TorchRL(prefetch=1)`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from contestants import Contestant, Draw, Sample
from peers import pad_episodes
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from workloads import Movie, Stream

from rlfeed.feed import ReplayLoader, make_loader
from rlfeed.replay import ReplayBuffer
from rlfeed.replay.units import Unit
from rlfeed.types import Batch

COLUMNS = ("observation", "action", "reward", "next_observation", "terminated")
Make = Callable[[np.random.Generator], Any]


class Endless(IterableDataset[Any]):
    """Give what a function makes, for ever.

    Args:
        make: Called with the worker's own random generator.
    """

    def __init__(self, make: Make) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        generator = np.random.default_rng(worker.id if worker else 0)
        while True:
            yield self._make(generator)


class Loading(Contestant):
    """Bring batches through worker processes, which `close` ends.

    Args:
        workers: How many; 0 works in the learner's process.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.name = f"{self.name}, {workers} worker{'' if workers == 1 else 's'}"
        self._open: list[Any] = []

    def _keep(self, loader: Iterable[Any]) -> Iterator[Any]:
        batches = iter(loader)
        self._open += [loader, batches]
        return batches

    def close(self) -> None:
        """End the workers: torch's with their iterator."""
        loaders, self._open = self._open, []
        for loader in loaders:
            if isinstance(loader, ReplayLoader):
                loader.close()


class StockItems(Loading):
    """Of PyTorch, as most people write it: one sample per item, collated in the worker."""

    name = "DataLoader, samples"

    def _load(self, make: Make, collate: Callable[[list[Any]], Any] | None = None) -> Draw:
        opened: dict[int, Iterator[Any]] = {}

        def draw(count: int) -> Sample:
            if count not in opened:
                context = "fork" if self.workers else None
                loader = DataLoader(
                    Endless(make),
                    batch_size=count,
                    num_workers=self.workers,
                    collate_fn=collate,
                    multiprocessing_context=context,
                )
                opened[count] = self._keep(loader)
            return next(opened[count])

        return draw

    def uniform(self, stream: Stream) -> Draw:
        """Hold a stream; see `Contestant.uniform`."""
        columns, length = _tensors(stream), len(stream)

        def make(generator: np.random.Generator) -> Sample:
            at = int(generator.integers(length))
            return {name: column[at] for name, column in columns.items()}

        return self._load(make)

    def pixels(self, movie: Movie) -> Draw:
        """Hold frames; see `Contestant.pixels`."""

        def make(generator: np.random.Generator) -> Sample:
            episode, t = int(generator.integers(len(movie.frames))), int(generator.integers(movie.length))
            stacks = torch.from_numpy(movie.frames[episode, np.maximum(np.arange(t - 3, t + 2), 0)])
            return {
                "observation": stacks[:4],
                "next_observation": stacks[1:],
                "action": int(movie.action[episode, t]),
                "reward": float(movie.reward[episode, t]),
                "terminated": bool(movie.terminated[t]),
            }

        return self._load(make)

    def episodes(self, stream: Stream) -> Draw:
        """Hold a stream; see `Contestant.episodes`. Padded by `pad_sequence`."""
        columns, spans = _tensors(stream), stream.episodes()

        def make(generator: np.random.Generator) -> Sample:
            begin, end = spans[generator.integers(len(spans))]
            return {name: column[begin:end] for name, column in columns.items()}

        return self._load(make, pad_episodes)


class StockBatches(Loading):
    """Of PyTorch, as an expert writes it: the dataset makes whole batches, by NumPy's indexing."""

    name = "DataLoader, whole batches"

    def load(self, make: Callable[[np.random.Generator, int], Sample]) -> Draw:
        """Bring whole batches to this process.

        Args:
            make: Called in the worker, with its random generator and B.

        Returns:
            Gives them.
        """
        opened: dict[int, Iterator[Any]] = {}

        def draw(count: int) -> Sample:
            if count not in opened:
                dataset, context = Endless(lambda generator: make(generator, count)), "fork" if self.workers else None
                loader = DataLoader(dataset, batch_size=None, num_workers=self.workers, multiprocessing_context=context)
                opened[count] = self._keep(loader)
            return next(opened[count])

        return draw

    def uniform(self, stream: Stream) -> Draw:
        """Hold a stream; see `Contestant.uniform`."""

        def make(generator: np.random.Generator, count: int) -> Sample:
            at = generator.integers(0, len(stream), count)
            return {name: torch.from_numpy(getattr(stream, name)[at]) for name in COLUMNS}

        return self.load(make)

    def pixels(self, movie: Movie) -> Draw:
        """Hold frames; see `Contestant.pixels`."""

        def make(generator: np.random.Generator, count: int) -> Sample:
            episode, t = generator.integers(0, len(movie.frames), count), generator.integers(0, movie.length, count)
            at = np.maximum(t[:, None] + np.arange(-3, 2), 0)
            return {
                "observation": torch.from_numpy(movie.frames[episode[:, None], at[:, :4]]),
                "next_observation": torch.from_numpy(movie.frames[episode[:, None], at[:, 1:]]),
                "action": torch.from_numpy(movie.action[episode, t]),
                "reward": torch.from_numpy(movie.reward[episode, t]),
                "terminated": torch.from_numpy(movie.terminated[t]),
            }

        return self.load(make)

    def episodes(self, stream: Stream) -> Draw:
        """Hold a stream; see `Contestant.episodes`. One index matrix, the padding cleared."""
        begins, ends = np.array(stream.episodes()).T

        def make(generator: np.random.Generator, count: int) -> Sample:
            drawn = generator.integers(0, len(begins), count)
            begin, lengths = begins[drawn], (ends - begins)[drawn]
            steps = np.arange(lengths.max())
            mask = steps < lengths[:, None]
            at = np.where(mask, begin[:, None] + steps, 0)
            sample = {"mask": torch.from_numpy(mask), "lengths": torch.from_numpy(lengths)}
            for name in COLUMNS:
                field = getattr(stream, name)[at]
                field[~mask] = 0
                sample[name] = torch.from_numpy(field)
            return sample

        return self.load(make)


class RlfeedLoader(Loading):
    """Of rlfeed: `make_loader` over a live buffer."""

    name = "rlfeed"

    def load(self, buffer: ReplayBuffer, unit: Unit, show: Callable[[Batch], Sample]) -> Draw:
        """Bring batches of a buffer to this process.

        Args:
            buffer: What to draw from.
            unit: What a draw becomes.
            show: Names the fields.

        Returns:
            Gives them.
        """
        opened: dict[int, Iterator[Batch]] = {}

        def draw(count: int) -> Sample:
            if count not in opened:
                opened[count] = self._keep(make_loader(buffer, unit, batch_size=count, num_workers=self.workers))
            return show(next(opened[count]))

        return draw


def touch(sample: Sample) -> None:
    """Read one number of each tensor: a consumer that does nothing else.

    Args:
        sample: A batch.
    """
    for tensor in sample.values():
        tensor.numpy().item(0)


def _tensors(stream: Stream) -> dict[str, Tensor]:
    return {name: torch.from_numpy(getattr(stream, name)) for name in COLUMNS}
