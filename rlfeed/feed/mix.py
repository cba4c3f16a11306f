"""One buffer, or several in exact proportion: what a loader draws from."""

import time
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlfeed.errors import ConfigError, FeedTimeoutError, FieldError, NotEnoughDataError, UnsupportedError
from rlfeed.nest import Nest, build, leaves
from rlfeed.replay.buffer import ReplayBuffer
from rlfeed.replay.draws import Draws, prioritized_in
from rlfeed.replay.limiter import Limiter
from rlfeed.replay.readers import Allocate, allocate_private
from rlfeed.replay.samplers import check_fractions, shares, subkey
from rlfeed.replay.table import DrawTable
from rlfeed.replay.units import Unit
from rlfeed.types import Batch

_POLL_S = 0.002


class Mix:
    """Draw from buffers in exact proportion and gather, as one source.

    Args:
        parts: Buffers of the same spaces, with their fractions.
        unit: What a draw becomes.
        with_workers: Whether other processes gather.

    Raises:
        ConfigError: If the fractions do not sum to 1, or the buffers do not fit together.
        UnsupportedError: If other processes cannot see a buffer.
    """

    def __init__(self, parts: list[tuple[ReplayBuffer, float]], unit: Unit, *, with_workers: bool) -> None:
        self.buffers, self._fractions = [buffer for buffer, _ in parts], [float(share) for _, share in parts]
        strangers = [type(buffer).__name__ for buffer in self.buffers if not isinstance(buffer, ReplayBuffer)]
        if strangers or not parts:
            raise ConfigError(f"make_loader: buffer has {strangers or 'nothing'}; expected ReplayBuffer.")
        if finding := check_fractions(self._fractions):
            raise ConfigError(f"make_loader: {finding}; expected fractions of several buffers to sum to 1.")
        if with_workers and any(buffer.storage_kind == "private" for buffer in self.buffers):
            raise UnsupportedError(
                "make_loader: a buffer has storage='private' and num_workers is above 0; expected storage that workers "
                "see grow. Use storage='shared', or num_workers=0."
            )
        kinds = {buffer.storage_kind for buffer in self.buffers}
        if "cuda" in kinds and (with_workers or len(self.buffers) > 1):
            raise UnsupportedError(
                "make_loader: a buffer has storage='cuda'; expected no workers and no other buffer beside it. Use "
                "storage='shared', and DeviceFeed."
            )
        if any(buffer.columns != self.buffers[0].columns for buffer in self.buffers):
            raise ConfigError("make_loader: the buffers store different fields; expected the same spaces and extras.")
        self.unit = unit
        self._samplers = [buffer.unit_sampler(unit) for buffer in self.buffers]
        for sampler in self._samplers:
            sampler.check_lengths()

    def __getstate__(self) -> dict[str, Any]:
        return {"buffers": self.buffers, "_fractions": self._fractions, "unit": self.unit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._samplers = [buffer.unit_sampler(self.unit) for buffer in self.buffers]

    @property
    def eta(self) -> float:
        """Give the share of the maximum in the priority of a sequence.

        Returns:
            Of the first buffer that keeps priorities; 0.9 where none does.
        """
        found = [sampler for buffer in self.buffers if (sampler := prioritized_in(buffer.sampler))]
        return found[0].eta if found else 0.9

    def fill(self, draws: Draws) -> None:
        """Make draws in place, on what the buffers hold now; see `UnitSampler.fill`.

        Args:
            draws: Their key and numbers; receives the rest.
        """
        if len(self._samplers) == 1:
            self._samplers[0].fill(draws)
            return
        for part, mine, before in self._shares(draws.number, len(draws)):
            made = self._samplers[part].draw(subkey(draws.key, part), before, len(mine))
            draws.ids[mine], draws.limits[mine], draws.weights[mine] = made.ids, made.limits, made.weights

    def snapshot(self) -> np.ndarray | None:
        """Copy what draws depend on besides the rows; see `UnitSampler.snapshot`.

        Returns:
            int64, one buffer after the other; None where they depend on priorities too.
        """
        if len(self._samplers) == 1:
            return self._samplers[0].snapshot()
        parts = [sampler.snapshot() for sampler in self._samplers]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if len(known) == len(parts) else None

    def redraw(self, snapshot: np.ndarray, key: int, number: int, count: int) -> Draws:
        """Make draws again that were made before; see `UnitSampler.redraw`.

        Args:
            snapshot: From `snapshot`, taken before they were made.
            key: The stream of draws.
            number: The first draw.
            count: B.

        Returns:
            The draws.
        """
        ends = np.cumsum([3 * buffer.num_envs for buffer in self.buffers])
        pieces = np.split(snapshot, ends[:-1])
        if len(self._samplers) == 1:
            return self._samplers[0].redraw(pieces[0], key, number, count)
        draws = Draws.blank(key, number, count)
        for part, mine, before in self._shares(number, count):
            made = self._samplers[part].redraw(pieces[part], subkey(key, part), before, len(mine))
            draws.ids[mine], draws.limits[mine], draws.weights[mine] = made.ids, made.limits, made.weights
        return draws

    def most_bytes(self, count: int) -> int:
        """Say how long the block of a batch can be; see `UnitSampler.most_bytes`.

        Args:
            count: B.

        Returns:
            Bytes.
        """
        most = max(sampler.most_bytes(count) for sampler in self._samplers)
        return most + (count * 8 + 64 if len(self._samplers) > 1 else 0)  # and where each sample came from

    def gather(self, draws: Draws, allocate: Allocate = allocate_private) -> Batch:
        """Gather draws; of several buffers each with one gather, then one copy that puts the rows in their order.

        Args:
            draws: What was drawn.
            allocate: Where the block of a single buffer comes from.

        Returns:
            The batch.
        """
        if len(self._samplers) == 1:
            return self._samplers[0].gather(draws, allocate)
        batches, places = [], []
        for part, mine, before in self._shares(draws.number, len(draws)):
            batches.append(self._samplers[part].gather(self._own(draws, part, mine, before)))
            places.append((part, mine))
        return _merge(batches, places, len(draws))

    def _own(self, draws: Draws, part: int, mine: np.ndarray, before: int) -> Draws:
        return Draws(subkey(draws.key, part), before, draws.ids[mine], draws.limits[mine], draws.weights[mine])

    def _shares(self, number: int, count: int) -> list[tuple[int, np.ndarray, int]]:
        """Give each buffer's rows of a batch, and how many of its draws came before them."""
        part_of, before = shares(number, count, self._fractions)
        rows = [np.flatnonzero(part_of == part) for part in range(len(self._samplers))]
        return [(part, mine, before[part]) for part, mine in enumerate(rows) if len(mine)]

    def tick(self, table: DrawTable, timeout_s: float) -> int:
        """Make the next draws of a table, waiting for data where others write.

        Args:
            table: Whose.
            timeout_s: Seconds to wait.

        Returns:
            The batch drawn.

        Raises:
            NotEnoughDataError: If nobody else writes.
            FeedTimeoutError: If the others do not write enough in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self.wait_to_take(0, timeout_s)
            try:
                drawn = table.tick()
            except NotEnoughDataError as error:
                if not self._others_write:
                    raise
                if time.monotonic() > deadline:
                    raise FeedTimeoutError(f"sampling: waited {timeout_s:g} s for writers. {error}") from error
                time.sleep(_POLL_S)
            else:
                self._count_drawn(table.entry(drawn))
                return drawn

    def _count_drawn(self, draws: Draws) -> None:
        if len(self.buffers) == 1:
            self.buffers[0].count_drawn(draws)
            return
        for part, mine, before in self._shares(draws.number, len(draws)):
            self.buffers[part].count_drawn(self._own(draws, part, mine, before))

    @property
    def _others_write(self) -> bool:
        return any(buffer.has_writers for buffer in self.buffers)

    def limit(self, limiter: Limiter | None, timeout_s: float) -> None:
        """Set the limiter of the first buffer.

        Args:
            limiter: The bound, or None.
            timeout_s: Seconds that a writer waits.
        """
        self.buffers[0].gate.limit(limiter, timeout_s)

    def wait_to_take(self, count: int, timeout_s: float) -> None:
        """Wait until the limiter lets samples through; see `Gate.wait_to_take`."""
        gate = self.buffers[0].gate
        if gate.active[0]:
            gate.wait_to_take(count, timeout_s, self._others_write)

    def take(self, number: int, count: int, sign: int = 1) -> None:
        """Count samples as delivered.

        Args:
            number: The first one's draw.
            count: How many.
            sign: -1 counts them as not delivered again.
        """
        if len(self.buffers) == 1:
            self.buffers[0].gate.take(sign * count)
            return
        for part, mine, _ in self._shares(number, count):
            self.buffers[part].gate.take(sign * len(mine))

    def update_priorities(self, ids: np.ndarray, source: np.ndarray | None, values: np.ndarray) -> int:
        """Give samples new priorities, each in its buffer.

        Args:
            ids: ``[B]`` int64.
            source: ``[B]``, the buffers they are of; None where there is one.
            values: ``[B]``.

        Returns:
            How many were applied.

        Raises:
            FieldError: If the shapes differ.
            UnsupportedError: If no buffer keeps priorities.
        """
        if values.shape != ids.shape:
            raise FieldError(
                f"update_priorities: values has shape {values.shape}, ids {ids.shape}; expected one per sample."
            )
        if source is None:
            return self.buffers[0].update_priorities(ids, values)
        keeping = [part for part, buffer in enumerate(self.buffers) if prioritized_in(buffer.sampler)]
        return sum(
            self.buffers[part].update_priorities(ids[source == part], values[source == part])
            for part in keeping or range(len(self.buffers))
        )


def _merge(batches: list[Batch], places: list[tuple[int, np.ndarray]], count: int) -> Batch:
    """Put rows that were gathered apart in their order; shorter windows are padded with zeros."""
    order = torch.from_numpy(np.argsort(np.concatenate([rows for _, rows in places])))
    names = [f.name for f in fields(Batch) if f.init and f.name != "source"]
    merged: dict[str, Nest] = {}
    for name in names:
        nests = [getattr(batch, name) for batch in batches]
        if nests[0] is None or nests[0] in ((), {}):
            continue
        by_path = [dict(leaves(nest)) for nest in nests]
        merged[name] = build([(path, _stack([leaf[path] for leaf in by_path])[order]) for path in by_path[0]])
    source = np.empty(count, np.int64)
    for part, rows in places:
        source[rows] = part
    return Batch(**merged, source=torch.from_numpy(source))  # pyright: ignore[reportArgumentType]


def _stack(parts: list[Tensor]) -> Tensor:
    if parts[0].ndim > 1 and len({part.shape[1] for part in parts}) > 1:
        longest = max(part.shape[1] for part in parts)
        parts = [_padded(part, longest) for part in parts]
    return torch.cat(parts)


def _padded(part: Tensor, length: int) -> Tensor:
    out = part.new_zeros((part.shape[0], length, *part.shape[2:]))
    out[:, : part.shape[1]] = part
    return out
