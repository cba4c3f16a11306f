"""Rows on a device, with streams that do their work as late as they may: the same batches as rows in host memory."""

import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple
from support.batches import assert_same
from support.replay_checks import CARRY, SPACE, check_unit, make_buffer
from support.replay_driver import Driver, row_files
from support.replay_twin import ReplayTwin, make_step
from support.slow_streams import SlowEngine, slow_device

from rlfeed.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    DeviceError,
    FieldError,
    LaneError,
    NotEnoughDataError,
    UnsupportedError,
)
from rlfeed.feed import ReplayDataset
from rlfeed.replay import (
    Episode,
    Hindsight,
    Prioritized,
    ReplayBuffer,
    Sequence,
    Transition,
    device_engine,
    device_rows,
)
from rlfeed.types import Batch, Step

LINE_FIELDS = ("observation", "next_observation", "action", "reward", "terminated", "truncated")
slow = pytest.fixture(slow_device)
LINE = Box(-np.inf, np.inf, (2,), np.float32)
UNITS = (
    Transition(),
    Transition(n_step=3, gamma=0.9),
    Sequence(3, burn_in=2),
    Sequence(2, burn_in=2, boundary="strict"),
    Sequence(3, burn_in=2, boundary="cross", gamma=0.6),
    Episode(gamma=0.8),
)


def units_for(every):
    """The units, with starts where a carry is stored."""
    return [replace(unit, stride=every) if isinstance(unit, Sequence) else unit for unit in UNITS]


def play(seed, buffer, twin, steps):
    """Random steps, ends, cuts and idle lanes, through the wrap of every lane."""
    generator, lanes = np.random.default_rng(seed), len(twin.lanes)
    for _ in range(steps):
        chosen = generator.permutation(lanes)[: generator.integers(1, lanes + 1)].tolist()
        ends = [(draw < 0.15, 0.1 < draw < 0.25) for draw in generator.random(len(chosen))]
        abandoned = set(chosen) if generator.random() < 0.1 else None
        rewards = generator.integers(0, 99, len(chosen)).tolist()
        buffer.add(make_step(twin, chosen, ends, rewards=rewards, first=abandoned))
        if generator.random() < 0.05:
            lane = int(generator.integers(lanes))
            twin.lanes[lane].cut()
            buffer.cut([lane])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("frames", [{}, {"vector": 2, "image": 3}], ids=["single", "stacked"])
@pytest.mark.parametrize("every", [1, 2])
def test_batches_equal_the_twin_for_every_unit(seed, frames, every, slow):
    twin = ReplayTwin(3, 20, carry_every=every, frames=frames)
    buffer = make_buffer(3, 20, storage="cuda", frame_stack=frames, carry_every=every)
    for part in range(4):  # the third wraps
        play(10 * seed + part, buffer, twin, 15)
        for unit in units_for(every):
            check_unit(buffer, twin, unit, 40)


def test_batches_equal_those_of_host_memory_bit_for_bit(slow):
    driver = Driver(storage="private", sampler=Prioritized())
    other = ReplayBuffer(SPACE, Discrete(11), capacity=90, num_envs=3, storage="cuda", sampler=Prioritized())
    for _ in range(4):
        driver.go_on(30, other)
        for unit in (*UNITS[:2], UNITS[-1]):
            batch, expected = other.sample(32, unit), driver.buffer.sample(32, unit)
            assert_same(batch, expected)
            values = np.random.default_rng(0).random(32)
            assert other.update_priorities(batch.ids.numpy(), values) == 32
            driver.buffer.update_priorities(expected.ids.numpy(), values)
    assert batch.weights.min() < 1.0


def test_every_kind_of_leaf_keeps_its_dtype_and_values(slow):
    """Rows of 1, 2, 3, 8 and 12 bytes move as whole words, whatever they mean; nothing is lost in between."""
    space = Dict(
        bits=MultiBinary(3), wide=Box(0, 2**16 - 1, (3, 2), np.uint16), pair=Tuple((LINE, Box(-1, 1, (), np.float64))),
        half=Box(-1, 1, (1,), np.float16),
    )  # fmt: skip
    extras = {"log_prob": Box(-9, 9, (), np.float32), "parts": Dict(a=Discrete(5), b=Box(0, 9, (5,), np.uint8))}
    buffer = ReplayBuffer(space, Discrete(4), capacity=20, extras=extras, storage="cuda")
    generator = np.random.default_rng(3)
    observations = [{key: _cast(part.sample(), part) for key, part in space.items()} for _ in range(6)]
    steps = []
    for t in range(5):
        more = {
            "log_prob": np.float32([t / 3]),
            "parts": {"a": np.array([t]), "b": generator.integers(0, 9, (1, 5), np.uint8)},
        }
        now, then = (_batched(observations[i]) for i in (t, t + 1))
        end, first = np.array([t == 4]), np.array([t == 0])
        steps.append(
            Step(now, np.array([t % 4]), np.zeros(1, np.float32), then, end, ~end & end, is_first=first, extras=more)
        )
        buffer.add(steps[-1])
    batch = buffer.sample(60, Transition())
    rows = batch.ids.numpy()
    assert set(rows) == set(range(5))
    for name, source in (
        ("observation", "observation"),
        ("next_observation", "next_observation"),
        ("extras", "extras"),
    ):
        nest = getattr(batch, name)
        for i, row in enumerate(rows):
            _assert_equal(nest, getattr(steps[row], source), i)
    assert batch.observation["wide"].dtype == torch.uint16
    assert batch.observation["pair"][1].dtype == torch.float64


def _cast(value, space):
    return (
        tuple(_cast(v, s) for v, s in zip(value, space, strict=True))
        if isinstance(space, Tuple)
        else np.asarray(value, space.dtype)
    )


def _batched(nest):
    if isinstance(nest, dict):
        return {key: _batched(part) for key, part in nest.items()}
    return tuple(map(_batched, nest)) if isinstance(nest, tuple) else nest[None]


def _assert_equal(nest, expected, i):
    if isinstance(expected, dict):
        for key, part in expected.items():
            _assert_equal(nest[key], part, i)
    elif isinstance(expected, tuple):
        for got, part in zip(nest, expected, strict=True):
            _assert_equal(got, part, i)
    else:
        assert np.array_equal(nest[i].numpy(), expected[0])


def line_step(t, *, ends=False, dtype=np.int64, lost=None):
    """Step t of one endless episode: the observation is (t, -t)."""
    now, then = np.float32([[t, -t]]), np.float32([[t + 1, -t - 1]])
    end, no = np.array([ends]), np.array([False])
    return Step(now, np.array([t % 5], dtype), np.float32([t]), then, end, no, is_first=np.array([t == 0]), lost=lost)


def test_step_of_other_dtypes_is_fitted_and_a_wrong_one_changes_nothing(slow):
    buffer = ReplayBuffer(LINE, Discrete(5), capacity=10, storage="cuda")
    buffer.add(line_step(0, dtype=np.int8))
    written = slow.transfers
    with pytest.raises(FieldError, match="action has dtype float64"):
        buffer.add(line_step(1, dtype=np.float64))
    with pytest.raises(LaneError, match="no episode is open"):
        ReplayBuffer(LINE, Discrete(5), capacity=10, storage="cuda").add(line_step(1))
    assert slow.transfers == written
    buffer.add(line_step(1))
    batch = buffer.sample(20, Transition())
    assert set(zip(batch.ids.tolist(), batch.action.tolist(), strict=True)) == {(0, 0), (1, 1)}


def test_lost_rows_are_not_written(slow):
    buffer = ReplayBuffer(LINE, Discrete(5), capacity=10, storage="cuda")
    buffer.add(line_step(0))
    assert buffer.add(line_step(1, lost=np.array([True]))).tolist() == [-1]
    assert slow.transfers == 1
    assert buffer.sample(4, Transition()).next_observation.tolist() == [[1.0, -1.0]] * 4


@pytest.mark.parametrize("every", [1, 4])
def test_extend_in_parts_gives_the_batches_of_host_memory(every, slow, monkeypatch):
    monkeypatch.setattr("rlfeed.replay.device_writing.EPISODE_ROWS", 7)
    options = {"capacity": 64, "num_envs": 2, "extras": CARRY, "carry_every": every}
    here = ReplayBuffer(LINE, Discrete(5), storage="private", **options)
    there = ReplayBuffer(LINE, Discrete(5), storage="cuda", **options)
    generator = np.random.default_rng(0)
    for lengths in ([13, 28], [1, 7], [30, 14], [6, 21]):
        longest = max(lengths)
        ends = torch.zeros(2, longest, dtype=torch.bool)
        ends[torch.arange(2), torch.tensor(lengths) - 1] = True
        episodes = Batch(
            observation=torch.from_numpy(generator.random((2, longest + 1, 2), np.float32)),
            action=torch.from_numpy(generator.integers(0, 5, (2, longest))),
            reward=torch.from_numpy(generator.random((2, longest), np.float32)),
            terminated=ends, truncated=torch.zeros_like(ends), lengths=torch.tensor(lengths),
            carry=torch.from_numpy(generator.random((2, longest, 1), np.float32)),
        )  # fmt: skip
        assert there.extend(episodes).tolist() == here.extend(episodes).tolist()
        for unit in (Transition(), Sequence(4, burn_in=4, stride=4), Episode()):
            assert_same(there.sample(30, unit), here.sample(30, unit))


def check_line(batch):
    """Every sample is one that was stored: no row is torn, none is another's."""
    start = batch.observation[:, 0]
    assert torch.equal(batch.observation, torch.stack([start, -start], 1))
    assert torch.equal(batch.next_observation, torch.stack([start + 1, -start - 1], 1))
    assert torch.equal(batch.reward, start)
    assert torch.equal(batch.action, (start % 5).long())


def overtaken_reads(engine):
    """Gathers that a stream does late, while writes of whole laps of the lane follow at once."""
    engine.eager = False
    buffer = ReplayBuffer(LINE, Discrete(5), capacity=8, storage="cuda")
    batches, t = [], 0
    for _ in range(6):
        for _ in range(9):
            buffer.add(line_step(t))
            t += 1
        engine.current = type(engine.current)()  # each learner reads on a stream of its own
        batches.append((buffer.sample(16, Transition()), engine.record(engine.current)))
        if len(batches) % 2:
            engine.finish(engine.record(engine.writer))
    for _, event in batches:
        engine.finish(event)
    return [batch for batch, _ in batches]


def test_streams_of_writer_and_readers_wait_for_each_other(slow):
    """Trap 29: reads before the writes they need, and writes over rows that are yet to be read."""
    for batch in overtaken_reads(slow):
        check_line(batch)


class ForgetfulEngine(SlowEngine):
    """An engine that forgets one kind of wait."""

    def __init__(self, forgets):
        super().__init__()
        self.forgets = forgets

    def wait(self, stream, event):
        if self.forgets != ("writer" if stream is self.writer else "reader"):
            super().wait(stream, event)

    def finish(self, event):
        if self.forgets != "stage" or event[0] is not self.writer or self.is_last(event):
            super().finish(event)

    def is_last(self, event):
        return event[1] == len(self.writer.queue)


@pytest.mark.parametrize("forgets", ["writer", "reader", "stage"])
def test_streams_where_a_wait_is_forgotten_give_wrong_rows(forgets, monkeypatch):
    """That the test above can fail."""
    engine = ForgetfulEngine(forgets)
    monkeypatch.setattr(device_engine, "choose_engine", lambda: engine)
    batches = overtaken_reads(engine)
    with pytest.raises(AssertionError):
        check_line(Batch(**{name: torch.cat([getattr(batch, name) for batch in batches]) for name in LINE_FIELDS}))


def test_writer_thread_beside_a_reader_tears_no_row(slow):
    """Trap 29, with threads: a row that the reader can draw is one whose values are on their way."""
    buffer = ReplayBuffer(LINE, Discrete(5), capacity=12, storage="cuda")
    buffer.add(line_step(0))
    stop, failures = threading.Event(), []

    def write():
        try:
            t = 1
            while not stop.is_set():
                buffer.add(line_step(t))
                t += 1
        except Exception as error:
            failures.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            check_line(buffer.sample(8, Transition()))
    finally:
        stop.set()
        writer.join(timeout=60)
    assert failures == []
    assert buffer.stats().inserted > 12


def test_writer_of_own_lanes_writes_to_the_device(slow):
    buffer = ReplayBuffer(LINE, Discrete(5), capacity=40, num_envs=2, storage="cuda")
    writer = buffer.writer([1])
    for t in range(30):
        writer.add(line_step(t))
    batch = buffer.sample(50, Transition())
    assert set((batch.ids >> 44).tolist()) == {1}
    check_line(batch)


def test_one_transfer_a_step_however_many_fields(slow):
    driver = Driver(storage="cuda")
    before = slow.transfers
    driver.go_on(1)
    assert slow.transfers == before + 1


def test_memory_of_a_row_is_its_fields_there_and_sixteen_bytes_here(slow):
    buffer = ReplayBuffer(Box(0, 255, (84, 84), np.uint8), Discrete(5), capacity=10_000, storage="cuda")
    rows = 10_000 + 78  # with those that a lane has beside what it shows
    there = (7056 + 8) * (rows + 1)  # one row of zeros for padding
    assert buffer._storage.device.nbytes == there
    here = buffer.stats().nbytes - there
    assert here <= rows * (16 + 2) + 3 * 4096  # and two bytes of directory


def test_without_a_device_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with pytest.raises(DeviceError, match=r"finds no CUDA device here.*Use storage='shared', and DeviceFeed"):
        ReplayBuffer(LINE, Discrete(2), capacity=10, storage="cuda")


def test_too_much_for_the_device_is_refused_with_the_numbers(slow):
    slow.free = 16 * 101
    ReplayBuffer(LINE, Discrete(2), capacity=10, storage="cuda")
    with pytest.raises(CapacityError, match=r"needs 1\.6 KB on cpu, but 1\.6 KB are free there; .* about 90\.00%"):
        ReplayBuffer(LINE, Discrete(2), capacity=100, storage="cuda")


def test_more_rows_than_places_is_refused(slow, monkeypatch):
    monkeypatch.setattr("rlfeed.replay.storage.MOST_PLACES", 100)
    with pytest.raises(ConfigError, match="gives 101 rows; expected at most 100"):
        ReplayBuffer(LINE, Discrete(2), capacity=101, storage="cuda")


def test_what_is_not_served_is_refused(slow):
    buffer = ReplayBuffer(LINE, Discrete(5), capacity=10, extras=CARRY, storage="cuda")
    with pytest.raises(UnsupportedError, match=r"ReplayBuffer.update: the buffer has storage='cuda'"):
        buffer.update(np.array([0]), carry=np.zeros((1, 1), np.float32))
    with pytest.raises(UnsupportedError, match=r"storage='cuda' cannot be sent to another process.*DeviceFeed"):
        pickle.dumps(buffer)
    hindsight = Hindsight("final", 0.5, lambda achieved, desired: np.zeros(len(achieved)))
    with pytest.raises(UnsupportedError, match="relabels goals, which is done on the host"):
        buffer.sample(1, Transition(relabel=hindsight))
    with pytest.raises(NotEnoughDataError):
        buffer.sample(1, Transition())


def test_lag_of_policy_versions_is_counted(slow):
    version = {"policy_version": Box(0, 9, (), np.int64)}
    buffer = ReplayBuffer(LINE, Discrete(5), capacity=10, extras=version, storage="cuda")
    for t in range(4):
        buffer.add(replace(line_step(t), extras={"policy_version": np.array([7 if t == 3 else 2])}))
    batch = buffer.sample(50, Transition())
    assert batch.extras["policy_version"].tolist() == [7 if row == 3 else 2 for row in batch.ids.tolist()]
    assert buffer.stats().sample_lag == pytest.approx(5 * (batch.ids != 3).float().mean().item())


def test_forked_child_is_refused(slow, monkeypatch):
    buffer = ReplayBuffer(LINE, Discrete(5), capacity=10, storage="cuda")
    buffer.add(line_step(0))
    monkeypatch.setattr("os.getpid", lambda: -1)
    for act in (lambda: buffer.add(line_step(1)), lambda: buffer.sample(1, Transition())):
        with pytest.raises(UnsupportedError, match="was carried into another process"):
            act()


def test_data_loader_without_workers_gives_the_batches_and_with_workers_is_refused(slow):
    buffer = ReplayBuffer(LINE, Discrete(5), capacity=30, storage="cuda")
    for t in range(20):
        buffer.add(line_step(t))
    check_line(next(iter(ReplayDataset(buffer, Transition(), batch_size=8))))
    loader = torch.utils.data.DataLoader(
        ReplayDataset(buffer, Transition(), batch_size=8), batch_size=None, num_workers=1
    )
    with pytest.raises(UnsupportedError, match="storage='cuda'"):
        next(iter(loader))


def test_save_and_load_give_the_same_next_batches(slow, tmp_path, monkeypatch):
    """Trap 32: what was loaded is saved and loaded again."""
    monkeypatch.setattr(device_rows, "PIECE_BYTES", 5000)  # three images
    driver = Driver(storage="cuda", extras=CARRY, carry_every=2)
    copies = []
    for number, steps in enumerate((7, 3, 40, 90)):  # from one row to three wraps
        driver.go_on(steps, *copies)
        (copies[-1] if copies else driver.buffer).save(tmp_path / str(number))
        copies.append(ReplayBuffer.load(tmp_path / str(number)))
    assert len(row_files(tmp_path / "1")) == 2  # what was saved before is linked
    for unit in units_for(2):
        expected = driver.buffer.sample(40, unit)
        for copy in copies:
            assert_same(copy.sample(40, unit), expected)


def test_load_of_damaged_rows_is_refused(slow, tmp_path):
    driver = Driver(storage="cuda")
    driver.go_on(20)
    driver.buffer.save(tmp_path / "saved")
    file = tmp_path / "saved" / row_files(tmp_path / "saved")[0]
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=file.name):
        ReplayBuffer.load(tmp_path / "saved")


def test_recarve_of_loose_fields_is_refused():
    loose = torch.zeros(2)
    batch = Batch(observation=loose, action=loose, reward=loose, terminated=loose > 0, truncated=loose > 0)
    with pytest.raises(FieldError, match="do not lie in one block"):
        batch.recarve(lambda block, layout: (block, layout))
