"""Draw and gather one unit from one buffer: what `ReplayBuffer.sample` and every loader stand on."""

import numpy as np

from rlfeed.errors import ConfigError, NotEnoughDataError, StaleReadError, UnsupportedError
from rlfeed.replay import kernels as k
from rlfeed.replay.device_rows import DeviceRows
from rlfeed.replay.draws import Draws, drawer_for
from rlfeed.replay.priorities import Priorities
from rlfeed.replay.readers import Allocate, allocate_private, reader_for
from rlfeed.replay.samplers import Sampler
from rlfeed.replay.storage import Storage
from rlfeed.replay.units import Episode, Sequence, Transition, Unit, need_of, resolved, span_of
from rlfeed.types import Batch

REDRAWS = 1000
LEAST_LONGEST = 256  # steps that a slot has room for where no longer episode was seen


class UnitSampler:
    """Draw numbered samples of a unit and gather them.

    Args:
        storage: What to read.
        sampler: Which starts.
        unit: What they become.
        priorities: Of the buffer, where its sampler needs them.

    Raises:
        ConfigError: If a lane is shorter than what one sample touches, or this is no unit.
    """

    def __init__(self, storage: Storage, sampler: Sampler, unit: Unit, priorities: Priorities | None = None) -> None:
        if not isinstance(unit, Transition | Sequence | Episode):
            raise ConfigError(f"unit: is {unit!r}; expected Transition(...), Sequence(...) or Episode(...).")
        unit = resolved(unit, storage, sampler)
        span = span_of(unit, storage)
        if span > storage.rows:
            raise ConfigError(
                f"{unit}: one sample touches {span} rows, but a lane has {storage.rows}; expected lanes that hold a "
                f"sample. Raise capacity to at least {span * storage.lanes} rows, or sample less."
            )
        self.unit, self._storage, self._sampler = unit, storage, sampler
        self.drawer, self.reader = drawer_for(storage, sampler, unit, priorities), reader_for(storage, unit)

    def draw(self, key: int, number: int, count: int, *, tick: bool = True) -> Draws:
        """Make draws ``number .. number + count - 1`` on what is stored now.

        Args:
            key: The stream of draws.
            number: The first draw.
            count: B.
            tick: Whether this process may fold new rows into the tree of priorities.

        Returns:
            The draws.

        Raises:
            NotEnoughDataError: If no stored step can start a sample.
        """
        draws = Draws.blank(key, number, count)
        self.fill(draws, tick=tick)
        return draws

    def fill(self, draws: Draws, *, tick: bool = True) -> None:
        """Make draws in place, on what is stored now.

        Args:
            draws: Their key and numbers; receives the rest.
            tick: Whether this process may fold new rows into the tree of priorities.

        Raises:
            NotEnoughDataError: If no stored step can start a sample.
        """
        if not self.drawer.draw(draws, tick=tick):
            raise self.nothing()

    def snapshot(self) -> np.ndarray | None:
        """Copy what draws depend on besides the rows.

        Returns:
            ``[3 * lanes]`` int64; None where they depend on priorities too.
        """
        return None if self.drawer.tree is not None else self._storage.snapshot().ravel()

    def redraw(self, snapshot: np.ndarray, key: int, number: int, count: int) -> Draws:
        """Make draws again that were made before, while their rows are still there.

        Args:
            snapshot: Taken before they were made.
            key: The stream of draws.
            number: The first draw.
            count: B.

        Returns:
            The draws.

        Raises:
            NotEnoughDataError: If no stored step could start a sample then.
        """
        if not self._storage.still_holds(snapshot.reshape(3, -1)):
            raise NotEnoughDataError(
                "ReplayBuffer: rows that draws were made on have been overwritten since; expected them to be stored "
                "still. Raise capacity: a lane keeps a 128th of its rows for that."
            )
        past, draws = self._storage.as_of(snapshot.reshape(3, -1)), Draws.blank(key, number, count)
        if not drawer_for(past, self._sampler, self.unit, None).draw(draws, tick=False):
            raise self.nothing()
        return draws

    def most_bytes(self, count: int) -> int:
        """Say how long the block of a batch can be.

        Args:
            count: B.

        Returns:
            Bytes: of the largest batch; of whole episodes of any length, for twice the longest of today.
        """
        unit, steps = self.unit, 1
        if isinstance(unit, Sequence):
            steps = unit.length + unit.burn_in
        elif isinstance(unit, Episode):
            longest = 2 * self._storage.longest_episode()
            steps = min(unit.max_length or max(longest, LEAST_LONGEST), self._storage.rows - 1)
        return self.reader.nbytes(count, steps)

    def check_lengths(self) -> None:
        """Refuse episodes that are longer than the unit allows, before one of them is drawn.

        Raises:
            ConfigError: If one is stored.
        """
        most = self.unit.max_length if isinstance(self.unit, Episode) else None
        if most is not None and (longest := self._storage.longest_episode()) > most:
            raise ConfigError(
                f"Episode: max_length is {most}, but an episode of {longest} steps is stored; expected none longer. "
                f"Raise max_length to at least {longest}, or sample windows with Sequence(length=...)."
            )

    def gather(self, draws: Draws, allocate: Allocate = allocate_private) -> Batch:
        """Gather draws; those that were overwritten before they could be copied are drawn again.

        Args:
            draws: What was drawn.
            allocate: Where the block comes from.

        Returns:
            The batch.

        Raises:
            NotEnoughDataError: If a draw cannot be repeated.
            StaleReadError: If writers overtake the reader again and again.
        """
        attempts = iter(range(1, REDRAWS))

        def again(rows: np.ndarray) -> None:
            attempt = next(attempts, 0)
            if attempt == 0:
                raise self._overtaken(len(rows), len(draws))
            for row in rows.tolist():
                if not self.drawer.draw(draws.one(row), attempt << 16, tick=False):
                    raise self.nothing()

        batch = self.reader.collect(draws, again, allocate)
        if self.drawer.weights != "ones" and batch.weights is not None:
            scale = 0.0 if self.drawer.weights == "batch" else 1.0
            k.store_weights(draws.weights, scale, len(draws), batch.weights.data_ptr())
        return batch

    def _overtaken(self, rows: int, count: int) -> StaleReadError:
        return StaleReadError(
            f"{self.unit}: {rows} of {count} samples were overwritten before they could be copied, {REDRAWS} times in "
            f"a row; expected lanes much longer than what is written meanwhile, they have {self._storage.rows} rows. "
            "Raise capacity."
        )

    def nothing(self) -> NotEnoughDataError:
        """Say that nothing can be drawn.

        Returns:
            The error, with what is stored and what is needed.
        """
        counts, lanes, rows = np.zeros(3, np.int64), self._storage.lanes, self._storage.rows
        steps = k.count_steps(self._storage.plan, counts)
        full = counts[1] == lanes * rows
        remedy = f"Its {lanes} lanes of {rows} rows are full: raise capacity." if full else "Collect more steps first."
        tree = self.drawer.tree
        if tree is not None and int(tree.words[0]) > 0 and tree.total() == 0.0:
            remedy = "Those that could all have priority 0: give some of them more."
        return NotEnoughDataError(
            f"ReplayBuffer: holds {steps} steps and {counts[0]} whole episodes, none of which can start "
            f"{self.unit}; expected {need_of(self.unit)}. {remedy}"
        )


class DeviceUnitSampler(UnitSampler):
    """Draw on the host, as ever, and gather on the device that has the rows.

    Args:
        storage: What to read.
        device: Its rows.
        sampler: Which starts.
        unit: What they become.
        priorities: Of the buffer, where its sampler needs them.

    Raises:
        ConfigError: If a lane is shorter than what one sample touches, or this is no unit.
        UnsupportedError: If the unit relabels goals.
    """

    def __init__(
        self, storage: Storage, device: DeviceRows, sampler: Sampler, unit: Unit, priorities: Priorities | None
    ) -> None:
        if isinstance(unit, Transition) and unit.relabel is not None:
            raise UnsupportedError(
                f"{unit}: relabels goals, which is done on the host, but the buffer has storage='cuda'; expected "
                "relabel=None. Use storage='shared' with DeviceFeed."
            )
        super().__init__(storage, sampler, unit, priorities)
        self._device = device

    def gather(self, draws: Draws, allocate: Allocate = allocate_private) -> Batch:
        """Gather draws on the device, whatever the memory offered; see `UnitSampler.gather`."""
        device = self._device
        device.check_process()
        with device.lock:
            return device.fetch(super().gather(draws, device.engine.stage))


def unit_sampler_for(
    storage: Storage, sampler: Sampler, unit: Unit, priorities: Priorities | None = None
) -> UnitSampler:
    """Bind a unit to a storage, wherever its rows lie.

    Args:
        storage: What to read.
        sampler: Which starts.
        unit: What they become.
        priorities: Of the buffer, where its sampler needs them.

    Returns:
        What draws and gathers it.
    """
    if storage.device is not None:
        return DeviceUnitSampler(storage, storage.device, sampler, unit, priorities)
    return UnitSampler(storage, sampler, unit, priorities)
