"""The replay buffer: lanes of steps that any number of processes read while they grow."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rlfeed.errors import CheckpointError, ConfigError, RlfeedError, UnsupportedError
from rlfeed.memory import Kind
from rlfeed.nest import Nest
from rlfeed.replay import checkpoint
from rlfeed.replay import kernels as k
from rlfeed.replay.draws import Draws, beta_of, prioritized_in
from rlfeed.replay.limiter import Gate
from rlfeed.replay.priorities import Priorities
from rlfeed.replay.samplers import (
    Mixture,
    Prioritized,
    Recent,
    Sampler,
    Uniform,
    sampler_from_json,
    sampler_to_json,
    stream_key,
)
from rlfeed.replay.snapshot import Snapshot
from rlfeed.replay.stats import DRAWERS, ReplayStats, count_stats
from rlfeed.replay.storage import Storage
from rlfeed.replay.unit_sampler import UnitSampler, unit_sampler_for
from rlfeed.replay.units import Unit
from rlfeed.replay.unread import Unread
from rlfeed.replay.writeback import write_back
from rlfeed.replay.writer import NOBODY, Writer, claim_lanes, cut_lanes, release_lanes, writer_for
from rlfeed.specs import ArraySpec, from_space
from rlfeed.types import Batch, Stateful, Step

Lanes = Sequence[int] | np.ndarray


class ReplayBuffer:
    """Store steps of ``num_envs`` lanes and sample transitions, sequences or episodes from them.

    An episode of n steps takes n + 1 rows: the closing row holds only its final observation, so the successor of a
    step is always the next row and observations are stored once. When a lane is full its oldest rows make room.

    Args:
        observation_space: Of one environment: Box, Discrete, MultiDiscrete, MultiBinary, Dict, Tuple, nested.
        action_space: Of one environment; the same kinds.
        capacity: Rows over all lanes, closing rows included; rounded up per lane (see `stats`).
        num_envs: Lanes.
        sampler: Which steps are drawn.
        extras: Spaces of what the policy stores beside, by name; ``"carry"`` is the recurrent state before each
            observation; ``"priority"`` is reserved; ``"env_action"`` is what the environments got for the action, where
            the rollout clips or rescales (not stored unless declared).
        frame_stack: Frames that the policy sees at once, or their numbers by entry of a Dict observation. The space
            and `add` are about single frames; batches have an axis of frames after the batch axes, oldest first, and
            before an episode's first frame that frame again, as Gymnasium's ``FrameStackObservation`` with
            ``padding_type="reset"`` has it.
        carry_every: Steps between two stored carries.
        storage: ``"shared"`` (other processes see it grow), ``"private"``, ``"memmap"`` (a file) or ``"cuda"``: rows on
            torch's current device, whose batches come out there; written and read by threads of this process alone.
        path: The file, for ``"memmap"``.
        seed: Of the draws of `sample`, >= 0.

    Raises:
        ConfigError: If an argument is wrong; all findings at once.
        SpaceError: If a space cannot be stored; the message names the part.
        CapacityError: If it does not fit, with the numbers.
        DeviceError: If there is no device for ``"cuda"``.
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        *,
        capacity: int,
        num_envs: int = 1,
        sampler: Sampler = Uniform(),  # noqa: B008 - frozen
        extras: Mapping[str, Any] = {},
        frame_stack: int | Mapping[str, int] = 1,
        carry_every: int = 1,
        storage: Kind = "shared",
        path: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        _check_config(sampler, capacity, num_envs, carry_every, storage, path, seed)
        fields: dict[str, Nest] = {
            "observation": from_space(observation_space, "observation_space"),
            "action": from_space(action_space, "action_space"),
            "extras": {name: from_space(space, f"extras[{name!r}]") for name, space in extras.items()},
        }
        for name in ("carry", "priority"):  # fields of their own: one of a step, one of nobody but the sampler
            if name in fields["extras"]:
                fields[name] = fields["extras"].pop(name)
        self.num_envs, self.seed, self.sampler = int(num_envs), int(seed), sampler
        rows = -(-int(capacity) // int(num_envs))
        place = None if path is None else Path(path)
        self._storage = Storage(
            fields, self.num_envs, rows, storage, place, carry_every=int(carry_every), frame_stack=frame_stack
        )
        self._start()
        if (prioritized := prioritized_in(sampler)) is not None:
            self.set_beta(prioritized.beta)

    def _start(self) -> None:
        prioritized = prioritized_in(self.sampler)
        self._priorities = None
        if prioritized is not None:
            lows = prioritized.scale == "buffer"
            self._priorities = Priorities(self._storage, prioritized.alpha, lows=lows)
        self._drawn = 0
        self._bind(copy=0)

    def _bind(self, copy: int) -> None:
        self._writer = writer_for(self._storage, range(self.num_envs))
        self._unit_samplers: dict[Unit, UnitSampler] = {}
        self._parts: dict[str, Stateful] = {}  # what is saved beside the rows
        self._unclaimed: dict[str, Any] = {}  # and what was loaded of parts that nobody has asked for yet
        self._saved: checkpoint.Saved | None = None
        self._last: Draws | None = None  # drawn last, for its age
        self.unread = Unread(self._storage)
        self.gate, self._counters = Gate(self._storage), self._storage.words(0, DRAWERS)
        self._key, self._pid = stream_key(self.seed, "sample", turn=copy), os.getpid()
        if self._priorities is not None:
            self.keep("priorities", self._priorities)

    def __getstate__(self) -> dict[str, Any]:
        names = ("num_envs", "seed", "sampler", "_storage", "_priorities")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._drawn = 0
        self._bind(copy=self._storage.next_copy())

    def __len__(self) -> int:
        """Count the steps stored.

        Returns:
            Steps that can be sampled as one-step transitions.
        """
        return int(k.count_steps(self._storage.plan, np.empty(3, np.int64)))

    def __repr__(self) -> str:
        stats = self.stats()
        return (
            f"ReplayBuffer({stats.steps} steps in {stats.rows} of {stats.capacity_rows} rows, {self.num_envs} lanes of "
            f"{self._storage.rows} rows, room for about {stats.capacity_steps} steps, {stats.nbytes / 1e6:.1f} MB "
            f"{self._storage.memory.kind})"
        )

    @property
    def storage_kind(self) -> Kind:
        """Tell where the rows lie.

        Returns:
            ``"shared"``, ``"private"``, ``"memmap"`` or ``"cuda"``.
        """
        return self._storage.memory.kind

    def add(self, step: Step) -> np.ndarray:
        """Store one step of up to ``num_envs`` environments.

        The observation is written only where ``is_first``: elsewhere it is the ``next_observation`` of the step
        before, which the lane already holds. The carry is stored only where ``extras`` declares it. Where ``is_first``
        comes while an episode is open, that one is cut.

        Args:
            step: k <= num_envs rows; row i goes to lane ``env_ids[i]``.

        Returns:
            ``[k]`` int64 ids, -1 where a row was lost.

        Raises:
            FieldError: If a field's name, shape or dtype is not the declared one; all findings at once.
            LaneError: If a row does not continue its lane. Nothing has been written then.
            FeedTimeoutError: If it would overwrite what a loader's worker does not gather in time, or a limiter waits.
        """
        if self.unread.settlers:
            self.unread.before_rows(2)  # a first step, and its successor
        return self._writer.add(step)

    def extend(self, batch: Batch) -> np.ndarray:
        """Store whole episodes that were recorded elsewhere, such as those of ``Rollout.episodes``.

        Each goes into the lane with the fewest rows written so far, of those that no writer has claimed and where no
        episode is open. It is closed by the flags of its last step; where both are False it counts as cut.

        Args:
            batch: Padded episodes: ``observation`` ``[B, T + 1, ...]``, the rest ``[B, T, ...]``, with ``lengths`` or
                ``mask`` unless all have T steps. Where ``extras`` declares a carry, the state before every step.

        Returns:
            ``[B]`` int64 ids of their first steps.

        Raises:
            FieldError: If a field is not the declared one, or an episode is not whole; all findings at once.
            CapacityError: If an episode is longer than a lane.
            LaneError: If no lane is free. Nothing has been written in any of these cases.
        """
        if self.unread.settlers:
            self.unread.before_rows(2 * batch.reward.numel())  # all in one lane, with their closing rows
        return self._writer.extend(batch)

    def cut(self, env_ids: Lanes | None = None) -> int:
        """End open episodes without an end: their environments crashed, stopped or were restarted.

        Args:
            env_ids: Which lanes; None is all that no writer has claimed.

        Returns:
            How many episodes were open.

        Raises:
            LaneError: If there is no such lane, or a writer has claimed it.
        """
        owners = self._storage.heads()[-1]
        lanes = np.flatnonzero(owners == NOBODY) if env_ids is None else env_ids
        return cut_lanes(self._storage, [int(i) for i in lanes], NOBODY, "ReplayBuffer.cut")

    def writer(self, env_ids: Lanes) -> Writer:
        """Claim lanes for a writer of their own, which may be sent to another process.

        Args:
            env_ids: Its lanes.

        Returns:
            The writer; nobody else can write to these lanes before they are released.

        Raises:
            LaneError: If there is no such lane, or another writer has it.
        """
        return claim_lanes(self._storage, [int(i) for i in env_ids])

    def release(self, env_ids: Lanes) -> int:
        """Let lanes go whose writer has left or died: what is open is cut, what was half written is dropped.

        Args:
            env_ids: Which lanes. Should the writer live after all, its next `add` is refused.

        Returns:
            How many episodes were open.

        Raises:
            LaneError: If there is no such lane.
        """
        return release_lanes(self._storage, [int(i) for i in env_ids])

    def unit_sampler(self, unit: Unit) -> UnitSampler:
        """Bind a unit to this buffer and its sampler; what is bound is kept.

        Args:
            unit: Transition, Sequence or Episode.

        Returns:
            What draws and gathers it by number.

        Raises:
            ConfigError: If a lane is shorter than what one sample touches, or this is no unit.
        """
        found = self._unit_samplers.get(unit)
        if found is None:
            found = unit_sampler_for(self._storage, self.sampler, unit, self._priorities)
            self._unit_samplers[unit] = found
        return found

    def snapshot(self, unit: Unit) -> Snapshot:
        """List what is stored now as samples of a unit that hold each step once: what `rlfeed.feed.epoch` gives.

        Args:
            unit: Transition, Sequence or Episode.

        Returns:
            The samples; see `Snapshot`.
        """
        return Snapshot(self._storage, unit)

    def sample(self, batch_size: int, unit: Unit) -> Batch:
        """Draw samples now, in this process.

        Args:
            batch_size: B >= 1.
            unit: Transition, Sequence or Episode.

        Returns:
            The batch, in memory of its own.

        Raises:
            NotEnoughDataError: If no stored step can start a sample.
        """
        if batch_size < 1:
            raise ConfigError(f"ReplayBuffer.sample: batch_size is {batch_size}; expected at least 1.")
        if self._pid != os.getpid():  # a forked child: draws of its own, as a copy sent to a process has
            self._drawn = 0
            self._bind(copy=self._storage.next_copy())
        sampler = self.unit_sampler(unit)
        draws = sampler.draw(self._key, self._drawn, batch_size)
        batch = sampler.gather(draws)
        self._drawn += batch_size
        self.count_drawn(draws)
        self.gate.take(batch_size)
        return batch

    def update_priorities(self, ids: np.ndarray, values: np.ndarray) -> int:
        """Give steps new priorities, from the next draw on.

        Args:
            ids: ``[B]`` int64, of a batch or from `add`; where one comes twice the last value counts.
            values: ``[B]``, finite, >= 0.

        Returns:
            How many were applied: those whose step is still stored. The others are counted in `stats`.

        Raises:
            UnsupportedError: If the sampler keeps no priorities.
            FieldError: If an id was never given out, or a value is no priority. Nothing has changed then.
        """
        if self._priorities is None:
            raise UnsupportedError(
                f"ReplayBuffer.update_priorities: the sampler is {self.sampler}, which keeps none; expected "
                "Prioritized."
            )
        applied, stale = self._priorities.update(ids, values)
        self._storage.words(k.STALE_UPDATES, k.STALE_UPDATES + 1)[0] += stale
        return applied

    def set_beta(self, beta: float) -> None:
        """Change the exponent of the importance weights, in every process that draws.

        Args:
            beta: 0 .. 1.

        Raises:
            ConfigError: If it is outside.
            UnsupportedError: If the sampler keeps no priorities.
        """
        if self._priorities is None:
            raise UnsupportedError(f"ReplayBuffer.set_beta: the sampler is {self.sampler}; expected Prioritized.")
        if not 0.0 <= beta <= 1.0:
            raise ConfigError(f"ReplayBuffer.set_beta: beta is {beta!r}; expected 0 .. 1.")
        beta_of(self._storage)[0] = beta

    def update(self, ids: Any, **columns: Any) -> int:
        """Write the learner's recurrent state back: samples that begin at these steps have it from now on.

        Args:
            ids: ``[B]`` int64, such as ``batch.ids``.
            **columns: ``carry``, ``[B, ...]`` per leaf: the state *before* the step's observation.

        Returns:
            How many were applied. Steps that have been overwritten are dropped and counted (see `stats`), first steps
            of episodes keep their zeros, and the last value of a step named twice stays.

        Raises:
            UnsupportedError: If the rows lie on a device.
            FieldError: If a column is not ``carry`` as declared, or an id has none. Nothing has been written then.
            CapacityError: If there is no memory for it; it is reserved at the first call.
        """
        self.unread.settle()  # what was drawn before has the state of then, whoever gathers it
        return write_back(self._storage, ids, columns)

    def stats(self) -> ReplayStats:
        """Count what is stored and what happened.

        Returns:
            The counters, read without stopping anybody.
        """
        return count_stats(self._storage, self.gate, self._last)

    @property
    def has_writers(self) -> bool:
        """Tell whether writers have claimed lanes: somebody else may add while this process waits.

        Returns:
            True where one has.
        """
        return bool(self._storage.heads()[4].any())

    @property
    def columns(self) -> list[tuple[str, Any, ArraySpec]]:
        """List what is stored in a row.

        Returns:
            Field, path in it, shape and dtype.
        """
        return [(column.name, column.path, column.spec) for column in self._storage.columns]

    def count_drawn(self, draws: Draws, counter: int = 0) -> None:
        """Count samples that were drawn, here or by a loader.

        Args:
            draws: From a `UnitSampler` of this buffer.
            counter: Which process, 0 .. 63.
        """
        self._counters[counter % DRAWERS] += len(draws)
        self._last = draws

    @contextmanager
    def bypass_limiter(self) -> Iterator[None]:
        """Let writers pass the limiter, and leave what they insert meanwhile out of the proportion: for prefilling."""
        with self.gate.bypassed():
            yield

    def save(self, directory: str | Path) -> None:
        """Save everything: rows, heads, counters and draw numbers; other processes may go on writing meanwhile.

        Only rows that are new since the last `save` or `load` are written, where that one's directory (which may have
        been moved) is still there and on the same disk: the others are hard links. Every directory stands alone.

        Args:
            directory: Must not exist; it is there whole afterwards, or not at all.

        Raises:
            RunDirectoryError: If it exists.
            CheckpointError: If it cannot be written; what was saved before is untouched, and the buffer goes on.
        """
        state = {
            "num_envs": self.num_envs,
            "seed": self.seed,
            "drawn": self._drawn,
            "sampler": sampler_to_json(self.sampler),
            "parts": self._unclaimed | {name: part.state_dict() for name, part in self._parts.items()},
        }
        try:
            self._saved = checkpoint.save(Path(directory), self._storage, state, self._saved)
        except RlfeedError:
            raise
        except OSError as error:
            raise CheckpointError(
                f"ReplayBuffer.save: {directory} could not be written ({error}); expected a disk with room for what "
                "is new. Nothing was lost: make room and save again."
            ) from error

    @classmethod
    def load(cls, directory: str | Path, *, observation_space: Any = None, action_space: Any = None) -> "ReplayBuffer":
        """Restore what `save` wrote; open episodes stay open, lanes belong to nobody.

        Args:
            directory: What `save` wrote.
            observation_space: What will be stored; None takes what was saved.
            action_space: What will be stored; None takes what was saved.

        Returns:
            The buffer; its next batches are those that the saved one would have given.

        Raises:
            CheckpointError: If it is missing, damaged, of another version or of other spaces.
            CapacityError: If it does not fit here.
        """
        spaces = {"observation": observation_space, "action": action_space}
        expected = {name: from_space(space, name) for name, space in spaces.items() if space is not None}
        storage, state, saved = checkpoint.load(Path(directory), expected)
        buffer = cls.__new__(cls)
        try:
            buffer.num_envs, buffer.seed, buffer._storage = state["num_envs"], state["seed"], storage
            buffer.sampler, parts = sampler_from_json(state["sampler"]), dict(state["parts"])
            buffer._start()
            buffer._drawn, buffer._unclaimed, buffer._saved = state["drawn"], parts, saved
            buffer.gate.open()
            for name, part in list(buffer._parts.items()):
                buffer.keep(name, part)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{directory}: is not the state of a buffer, {error!r}.") from error
        return buffer

    def keep(self, name: str, part: Stateful) -> None:
        """Save a part's state with the buffer from now on; in a loaded buffer it takes back what was saved.

        Args:
            name: Its name; a part of the same name is replaced.
            part: What has the state.
        """
        if name in self._unclaimed:
            part.load_state_dict(self._unclaimed.pop(name))
        self._parts[name] = part


def _check_config(
    sampler: Sampler, capacity: int, num_envs: int, carry_every: int, storage: str, path: str | Path | None, seed: int
) -> None:
    wrong = []
    if not isinstance(sampler, Uniform | Prioritized | Recent | Mixture):
        wrong.append(f"sampler is {sampler!r}; expected Uniform(), Prioritized(), Recent(...) or Mixture(...)")
    least = {"capacity": (capacity, 1), "num_envs": (num_envs, 1), "carry_every": (carry_every, 1), "seed": (seed, 0)}
    for name, (value, low) in least.items():
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < low:
            wrong.append(f"{name} is {value!r}; expected an int >= {low}")
    if storage not in ("private", "shared", "memmap", "cuda"):
        wrong.append(f"storage is {storage!r}; expected 'shared', 'private', 'memmap' or 'cuda'")
    if (storage == "memmap") != (path is not None):
        wrong.append(f"storage is {storage!r} and path is {path!r}; expected a path exactly where storage='memmap'")
    if wrong:
        raise ConfigError("ReplayBuffer: " + "; ".join(wrong) + ".")
