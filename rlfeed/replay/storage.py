"""Where rows lie: one segment of memory, its heads, its episode directory, its records and its large columns.

    segment = words | heads | directory | records [lane, row, stride] | one column [lane, row, bytes] per large field
            | one ring [lane, entry, bytes] per carry that is stored every so many steps | overlay [lane, entry, pitch]

The small fields of a row lie side by side in one record (one memory access a row); a field of `LARGE_BYTES` and up has
a column of its own. The overlay holds carries that the learner has written back; it is a hole until the first of them.
See docs/adr/0001-lanes-with-closing-rows.md. With ``cuda`` storage most fields lie on a device, and a row's place there
lies in the segment in their stead: see `rlfeed.replay.device_rows`.
"""

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import Any

import numpy as np

from rlfeed.errors import ConfigError
from rlfeed.memory import Kind, Memory, check_fits
from rlfeed.nest import Nest, leaves
from rlfeed.nest import Path as LeafPath
from rlfeed.replay import kernels as k
from rlfeed.replay.device_rows import MOST_PLACES, PLACE, DeviceRows, Leaf, lies_there
from rlfeed.specs import ArraySpec, FrameStack, frames_of

LARGE_BYTES = 1024
LEAST_ROWS = 4
SLACK = 128  # one row more for so many: what is drawn stays readable while those are written
WORDS = 256  # shared counters and settings of the whole buffer; who owns which: `Storage.words`
HEADS = 5  # lines of one word per lane: committed, reserved, episodes, steps, owner
MOST_LANES, MOST_ROWS = 1 << 19, 1 << 32  # an id has 19 bits for the lane, a directory entry 32 for the row
REWARD = PRIORITY = ArraySpec((), np.dtype(np.float32))


@dataclass(frozen=True, slots=True)
class Column:
    """Say where the rows of one leaf lie in the segment.

    Args:
        name: The `Step` field.
        path: The leaf's path in it.
        spec: Shape and dtype.
        offset: Bytes from the start of the segment to the first row, or to that row's place on the device.
        pitch: Bytes from one row to the next.
        every: Steps of an episode between two stored rows: 1, or ``carry_every``, and then rows lie in a ring.
        inside: Bytes from the start of an overlay entry to this leaf, 0 where there is none.
        on_device: Whether the rows lie on a device, and the segment has their places there.
    """

    name: str
    path: LeafPath
    spec: ArraySpec
    offset: int
    pitch: int
    every: int = 1
    inside: int = 0
    on_device: bool = False

    @property
    def held(self) -> ArraySpec:
        """Tell what the segment holds of a row: its value, or its place on the device."""
        return PLACE if self.on_device else self.spec


@dataclass(frozen=True, slots=True)
class Section:
    """Say where what belongs to rows lies, lane after lane: what a checkpoint saves of new rows.

    Args:
        offset: Bytes from the start of the segment to the first lane.
        pitch: Bytes of one place.
        places: Places of a lane, a ring.
        every: Absolute rows to a place.
        column: Whose rows, where they lie on a device.
    """

    offset: int
    pitch: int
    places: int
    every: int = 1
    column: Column | None = None


class Storage:
    """Lay out lanes of rows in a segment and give kernels their plan.

    Args:
        fields: Nests of `ArraySpec` by `Step` field; the reward is added.
        lanes: Lanes.
        rows: Rows per lane, closing rows included.
        kind: Private, shared, memory-mapped, or on a device.
        path: The file, for ``memmap``.
        replace: Whether the file may exist already.
        carry_every: Steps of an episode between two stored carries.
        frame_stack: Frames that a sample shows at once; see `frames_of`.

    Raises:
        ConfigError: If a lane is too short to hold anything, or the file exists.
        CapacityError: If it does not fit.
        DeviceError: If there is no device.
    """

    device: DeviceRows | None = None
    heads_then: np.ndarray | None = None  # of a view of the past: its plan points there

    def __init__(
        self,
        fields: dict[str, Nest],
        lanes: int,
        rows: int,
        kind: Kind,
        path: Path | None,
        *,
        replace: bool = False,
        carry_every: int = 1,
        frame_stack: FrameStack = 1,
    ) -> None:
        if rows < LEAST_ROWS:
            raise ConfigError(
                f"ReplayBuffer: capacity gives {rows} rows to each of {lanes} lanes; expected at least {LEAST_ROWS} "
                "(an episode of n steps takes n + 1 rows). Raise capacity, or lower num_envs."
            )
        self.lanes, self.rows, self.carry_every = lanes, rows, carry_every
        self.fields = {**fields, "reward": REWARD}
        self.frame_stack = dict(frame_stack) if isinstance(frame_stack, Mapping) else frame_stack
        self._place(kind)
        check_fits(kind, self.nbytes, path)
        if lanes >= MOST_LANES or rows >= MOST_ROWS:
            raise ConfigError(
                f"ReplayBuffer: capacity gives {lanes} lanes of {rows} rows; expected fewer than {MOST_LANES} lanes of "
                f"fewer than {MOST_ROWS} rows. Lower num_envs or capacity."
            )
        self.memory = Memory(kind, self.nbytes, self.overlay_bytes, path, replace=replace)
        self._bind()
        if kind == "cuda":
            self._put_on_device()

    def _put_on_device(self) -> None:
        if self.lanes * self.ring > MOST_PLACES:
            raise ConfigError(
                f"ReplayBuffer: capacity gives {self.lanes * self.ring} rows; expected at most {MOST_PLACES} with "
                "storage='cuda'. Lower capacity."
            )
        columns = [column for column in self.columns if column.on_device]
        self.device = DeviceRows([Leaf((c.name, c.path), c.spec, self.lanes * self.places_of(c)) for c in columns])
        for column in columns:
            count = self.lanes * self.places_of(column)
            places = np.ndarray(count, PLACE.dtype, self.memory.bytes, column.offset, column.pitch)
            places[:] = np.arange(1, count + 1)

    def _place(self, kind: Kind) -> None:
        every = self.carry_every
        self.frames = frames_of(self.fields.get("observation", ()), self.frame_stack, "ReplayBuffer")
        self.ring = ring_of(self.rows)
        self.entries = self.ring // 2 + 2
        self.carry_entries = self.ring if every == 1 else (self.ring - 1) // every + 2
        small, large, sparse = [], [], []
        here = [(name, path, spec) for name, nest in self.fields.items() for path, spec in leaves(nest)]
        if kind == "cuda":  # one place serves all fields of a row, but carries that are not stored with every row
            shared = ["place", *(["carry"] if "carry" in self.fields and every > 1 else [])]
            here = [field for field in here if not lies_there(*field[:2])] + [(name, (), PLACE) for name in shared]
        for name, path, spec in here:
            group = sparse if name == "carry" and every > 1 else large if spec.nbytes >= LARGE_BYTES else small
            group.append((name, path, spec))
        small.sort(key=lambda field: -field[2].dtype.itemsize)  # largest alignment first: no holes
        head_bytes = _aligned(self.lanes * 8, 128)
        self.heads_offset = WORDS * 8
        self.directory_offset = self.heads_offset + HEADS * head_bytes
        self.records_offset = _aligned(self.directory_offset + self.lanes * self.entries * 4, 4096)
        offset, inside = self.records_offset, k.HEAD_BYTES
        placed = []
        for name, path, spec in small:
            inside = _aligned(inside, spec.dtype.itemsize)
            placed.append((name, path, spec, inside))
            inside += spec.nbytes
        self.stride = _aligned(inside, 8)
        columns = [Column(name, path, spec, offset + at, self.stride) for name, path, spec, at in placed]
        sections = [Section(offset, self.stride, self.ring)]
        offset += self.lanes * self.ring * self.stride
        for name, path, spec in (*large, *sparse):
            offset = _aligned(offset, 4096)
            step = every if name == "carry" else 1
            places = self.carry_entries if step > 1 else self.ring
            columns.append(Column(name, path, spec, offset, spec.nbytes, step))
            sections.append(Section(offset, spec.nbytes, places, step))
            offset += self.lanes * places * spec.nbytes
        if kind == "cuda":
            columns = list(self._stand_in({(column.name, column.path): column for column in columns}))
            sections += [Section(0, c.spec.nbytes, self.places_of(c), c.every, c) for c in columns if c.on_device]
        self.sections = tuple(sections)
        self.head_bytes = head_bytes
        self.nbytes = _aligned(offset, 4096)
        self.columns = tuple(self._overlay(columns))

    def _stand_in(self, here: dict[tuple[str, LeafPath], Column]) -> Iterator[Column]:
        """Give every field that lies on a device the column of its places."""
        for name, nest in self.fields.items():
            places = here["carry" if name == "carry" and self.carry_every > 1 else "place", ()]
            for path, spec in leaves(nest):
                if lies_there(name, path):
                    yield replace_fields(places, name=name, path=path, spec=spec, on_device=True)
                else:
                    yield here[name, path]

    def places_of(self, column: Column) -> int:
        """Count the places of a column.

        Args:
            column: Which.

        Returns:
            Those of one lane.
        """
        return self.ring if column.every == 1 else self.carry_entries

    def _overlay(self, columns: list[Column]) -> Iterator[Column]:
        inside = 16  # behind the version and the row
        for column in columns:
            if column.name == "carry" and not column.on_device:
                column = replace_fields(column, inside=inside)
                inside += _aligned(column.spec.nbytes, 8)
            yield column
        self.overlay_pitch = inside
        self.overlay_bytes = _aligned(self.lanes * self.carry_entries * inside, 4096) if inside > 16 else 0

    def _bind(self) -> None:
        base = self.memory.address
        plan = np.zeros(k.PLAN_SIZE, np.int64)
        for index, word in enumerate((k.COMMITTED, k.RESERVED, k.EPISODES, k.STEPS, k.OWNERS)):
            plan[word] = base + self.heads_offset + index * self.head_bytes
        plan[k.SHARED] = base
        plan[k.DIRECTORY], plan[k.RECORDS] = base + self.directory_offset, base + self.records_offset
        plan[k.LANES], plan[k.ROWS], plan[k.LIVE] = self.lanes, self.ring, self.rows
        plan[k.ENTRIES] = self.entries
        plan[k.STRIDE] = self.stride
        plan[k.REWARD] = self.column("reward").offset - self.records_offset
        has_priority = "priority" in self.fields
        plan[k.PRIORITY] = self.column("priority").offset - self.records_offset if has_priority else -1
        plan[k.CARRY_EVERY], plan[k.CARRY_ENTRIES] = self.carry_every, self.carry_entries
        plan[k.OVERLAY] = base + self.nbytes if self.overlay_bytes else -1
        plan[k.OVERLAY_PITCH] = self.overlay_pitch
        self.plan = plan
        words = self.memory.bytes[self.heads_offset : self.directory_offset].view(np.int64)
        self._heads = words.reshape(HEADS, self.head_bytes // 8)[:, : self.lanes]

    def reserve_overlay(self) -> None:
        """Make room for carries that are written back; done once, at the first of them.

        Raises:
            CapacityError: If it does not fit.
        """
        flag = self.words(k.WRITTEN_BACK, k.WRITTEN_BACK + 1)
        if not flag[0]:
            self.memory.reserve(self.nbytes, self.overlay_bytes, "carries that are written back")
            flag[0] = 1

    def __getstate__(self) -> dict[str, Any]:
        names = ("lanes", "rows", "carry_every", "frame_stack", "fields", "memory")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._place(self.memory.kind)
        self._bind()

    def column(self, name: str, path: LeafPath = ()) -> Column:
        """Find a column.

        Args:
            name: The `Step` field.
            path: The leaf's path in it.

        Returns:
            The column.
        """
        return next(c for c in self.columns if c.name == name and c.path == path)

    def columns_of(self, name: str) -> list[Column]:
        """Find the columns of a field.

        Args:
            name: The `Step` field.

        Returns:
            One column per leaf, in the nest's order.
        """
        found = {c.path: c for c in self.columns if c.name == name}
        return [found[path] for path, _ in leaves(self.fields[name])] if name in self.fields else []

    def view(self, column: Column) -> np.ndarray:
        """View a column on the live memory, by lane and physical row: for counting and for people.

        Args:
            column: One that every row has.

        Returns:
            ``[lanes, rows, ...]`` of the column's dtype.
        """
        spec = column.spec
        strides = (self.ring * column.pitch, column.pitch, *np.empty(spec.shape, spec.dtype).strides)
        return np.ndarray((self.lanes, self.ring, *spec.shape), spec.dtype, self.memory.bytes, column.offset, strides)

    def table(self, columns: list[tuple[Column, int]]) -> np.ndarray:
        """Describe columns to a kernel.

        Args:
            columns: Pairs of a column and its role.

        Returns:
            ``[F, FIELD_SIZE]`` int64; OTHER is left 0.
        """
        table = np.zeros((len(columns), k.FIELD_SIZE), np.int64)
        for line, (column, role) in zip(table, columns, strict=True):
            line[k.BASE] = self.memory.address + column.offset
            line[k.PITCH], line[k.NBYTES], line[k.ROLE] = column.pitch, column.held.nbytes, role
            line[k.INSIDE] = column.inside
            line[k.FRAMES] = self.frames[column.path] if column.name == "observation" else 1
        return table

    def heads(self) -> np.ndarray:
        """View the heads: committed, reserved, episodes, steps and owner of every lane.

        Returns:
            ``[HEADS, lanes]`` int64 on the live memory: for saving and for people, not for synchronisation.
        """
        return self._heads

    def snapshot(self) -> np.ndarray:
        """Copy what draws depend on besides the rows: see `as_of`.

        Returns:
            ``[3, lanes]`` int64: committed, reserved and episodes of every lane.
        """
        return self._heads[:3].copy()

    def still_holds(self, snapshot: np.ndarray) -> bool:
        """Tell whether all rows that could be drawn at a time are stored still.

        Args:
            snapshot: From `snapshot`, at that time.

        Returns:
            False where one has been overwritten, or may be at any moment.
        """
        oldest_then, reserved = np.maximum(snapshot[0] - self.rows, 0), self._heads[1]
        return bool((oldest_then >= reserved - self.ring).all())

    def as_of(self, snapshot: np.ndarray) -> "Storage":
        """View the storage as it was: draws made on it are those made then, while the rows are still there.

        Args:
            snapshot: From `snapshot`.

        Returns:
            A storage to draw from.
        """
        past = copy(self)
        past.heads_then = np.ascontiguousarray(snapshot, np.int64)
        past.plan = self.plan.copy()
        for line, word in zip(past.heads_then, (k.COMMITTED, k.RESERVED, k.EPISODES), strict=True):
            past.plan[word] = line.ctypes.data
        return past

    def longest_episode(self) -> int:
        """Measure the longest episode that has ended and whose end is stored.

        Returns:
            Steps; 0 where none has ended.
        """
        count, offset = self.lanes * self.ring, self.records_offset + k.FLAGS
        words = np.ndarray(count, np.uint32, self.memory.bytes, offset, self.stride)
        ends = words[words & k.CLOSING != 0]
        return int(ends.max() >> k.INDEX_SHIFT) if len(ends) else 0

    def indices(self, lanes: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Look up the numbers that live rows have in their episodes.

        Args:
            lanes: ``[n]`` int64.
            rows: ``[n]`` int64, absolute.

        Returns:
            ``[n]``.
        """
        offset, count = self.records_offset + k.FLAGS, self.lanes * self.ring
        words = np.ndarray(count, np.uint32, self.memory.bytes, offset, self.stride)
        return words[lanes * self.ring + rows % self.ring] >> k.INDEX_SHIFT

    def words(self, begin: int, end: int) -> np.ndarray:
        """View shared words of the whole buffer.

        Words 0 .. 127 count draws, one word per process that draws; 128 .. 159 are the limiter's; 160 .. 191 the
        sampler's; 192 .. 199 those of writers and write-backs.

        Args:
            begin: The first.
            end: Behind the last, <= WORDS.

        Returns:
            ``[end - begin]`` int64 on the live memory.
        """
        return self.memory.bytes[begin * 8 : end * 8].view(np.int64)

    def next_copy(self) -> int:
        """Number the copies of a buffer in other processes, so that each has draws of its own.

        Returns:
            1 for the first, and so on.
        """
        copies = self.words(191, 192)
        with self.memory.locked():
            copies[0] += 1
            return int(copies[0])

    def pieces(self, section: Section, lane: int, begin: int, end: int, *, fill: bool = False) -> Iterator[np.ndarray]:
        """View what a section holds of some rows of a lane.

        Args:
            section: Which.
            lane: Which.
            begin: The first absolute row.
            end: Behind the last, <= begin + rows.
            fill: Whether the caller puts rows into the pieces.

        Yields:
            uint8 arrays on the live memory, oldest row first: two where the lane's end lies between. What lies on a
            device passes through more and smaller ones, each valid until the next is asked for.
        """
        first = begin // section.every
        count = -(-end // section.every) - first if end > begin else 0
        start, base = first % section.places, lane * section.places
        before = min(count, section.places - start)
        spans = ((base + start, base + start + before), (base, base + count - before))
        data = self.memory.bytes[section.offset :]
        for a, b in spans:
            if self.device is not None and section.column is not None:
                yield from self.device.pieces((section.column.name, section.column.path), a, b, fill=fill)
            elif b > a:
                yield data[a * section.pitch : b * section.pitch]

    def overlay(self) -> np.ndarray | None:
        """View the carries that were written back.

        Returns:
            ``[lanes * carry_entries, overlay_pitch // 8]`` int64 on the live memory: the version, the row plus 1, the
            leaves; None where none was.
        """
        if not self.words(k.WRITTEN_BACK, k.WRITTEN_BACK + 1)[0]:
            return None
        nbytes = self.lanes * self.carry_entries * self.overlay_pitch
        return self.memory.bytes[self.nbytes :][:nbytes].view(np.int64).reshape(-1, self.overlay_pitch // 8)


def ring_of(rows: int) -> int:
    """Say how many rows a lane really has, with those that keep what is drawn readable a little longer.

    Args:
        rows: Rows that can be drawn.

    Returns:
        Rows.
    """
    return rows + rows // SLACK


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
