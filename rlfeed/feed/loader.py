"""`make_loader`: a `DataLoader` over a live buffer that counts its batches and can be resumed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader

from rlfeed.errors import ConfigError, UnsupportedError
from rlfeed.feed.dataset import ReplayDataset, Transform
from rlfeed.replay.buffer import ReplayBuffer
from rlfeed.replay.limiter import Limiter
from rlfeed.replay.units import Unit
from rlfeed.types import Batch


@dataclass(frozen=True, slots=True)
class LoaderStats:
    """Count a loader's samples.

    Args:
        delivered: Samples handed to the consumer.
    """

    delivered: int


class ReplayLoader(DataLoader[Any]):
    """Load whole batches from a live buffer; made by `make_loader`.

    Args:
        dataset: The draws, with a batch size.
        num_workers: Worker processes; 0 gathers in this one.
        timeout_s: Seconds to wait for a worker's batch.
    """

    def __init__(self, dataset: ReplayDataset, num_workers: int, timeout_s: float) -> None:
        super().__init__(
            dataset, batch_size=None, num_workers=num_workers, timeout=timeout_s if num_workers else 0
        )
        self._draws = dataset
        self._first_draw = dataset.state_dict()["draw"]
        self._delivered = 0
        self.batches_ahead = 0  # taken by a `DeviceFeed`, not handed to the consumer yet

    def __iter__(self) -> Iterator[Batch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._draws.load_state_dict(self.state_dict())  # one stream of draws, however many iterators
        size = self._draws.batch_size or 0
        for batch in super().__iter__():
            self._delivered += size  # draws, whatever the transform made of them
            yield batch

    def update_priorities(self, batch: Batch, values: Tensor | np.ndarray) -> int:
        """Give the samples of a batch new priorities.

        Args:
            batch: From this loader.
            values: ``[B]``, >= 0.

        Returns:
            How many were applied.

        Raises:
            UnsupportedError: If the buffer's sampler keeps no priorities.
        """
        ids = np.empty(0, np.int64) if batch.ids is None else batch.ids.cpu().numpy()
        return self._draws.buffer.update_priorities(ids, np.asarray(values))

    def stats(self) -> LoaderStats:
        """Count the samples delivered.

        Returns:
            The counters so far.
        """
        return LoaderStats(self._delivered)

    def state_dict(self) -> dict[str, int]:
        """Give the number of the next draw to deliver.

        Returns:
            ``{"draw": n}``; what was made ahead of it is made again after a resume.
        """
        ahead = self.batches_ahead * (self._draws.batch_size or 0)
        return {"draw": self._first_draw + self._delivered - ahead}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from another draw, with the next iterator.

        Args:
            state: From `state_dict`.
        """
        self._first_draw, self._delivered = int(state["draw"]), 0

    def close(self) -> None:
        """Let the workers go."""
        self._iterator = None


def make_loader(
    buffer: ReplayBuffer,
    unit: Unit,
    *,
    batch_size: int,
    num_workers: int | Literal["auto"] = 0,
    lookahead: int = 4,
    limiter: Limiter | None = None,
    transform: Transform | None = None,
    on_worker_death: Literal["raise", "restart"] = "raise",
    timeout_s: float = 60.0,
    seed: int = 0,
    rank: int = 0,
) -> ReplayLoader:
    """Make a loader of whole batches.

    Args:
        buffer: What to draw from.
        unit: What a draw becomes.
        batch_size: B >= 1.
        num_workers: Worker processes; 0 gathers in this one.
        lookahead: Batches drawn ahead of delivery.
        limiter: Bounds samples per inserted step.
        transform: Applied to each `Batch`.
        on_worker_death: What to do when a worker dies.
        timeout_s: Seconds to wait for a batch.
        seed: Of the draws, >= 0.
        rank: Which of several learners.

    Returns:
        The loader.

    Raises:
        ConfigError: If an argument is wrong.
        UnsupportedError: If this version does not serve it.
    """
    if isinstance(num_workers, int) and num_workers < 0:
        raise ConfigError(f"make_loader: num_workers is {num_workers}; expected at least 0.")
    asked = {"num_workers": (num_workers, "auto"), "on_worker_death": (on_worker_death, "restart")}
    wrong = [f"{name} is {value!r}" for name, (value, refused) in asked.items() if value == refused]
    wrong += [f"rank is {rank}"] if rank != 0 else []
    if wrong or not isinstance(num_workers, int):
        raise UnsupportedError(f"make_loader: {', '.join(wrong)}; expected an int, 'raise' and 0 in this version.")
    dataset = ReplayDataset(buffer, unit, batch_size=batch_size, transform=transform, limiter=limiter, seed=seed)
    return ReplayLoader(dataset, num_workers, timeout_s)
