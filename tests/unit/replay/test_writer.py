"""Writing: what a step must be, who may write where, and what is left where a writer was killed."""

import copy
import multiprocessing
import pickle
import time

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from support.replay_checks import check_transitions
from support.replay_twin import ReplayTwin, make_step

from rlfeed.errors import ConfigError, FieldError, LaneError
from rlfeed.replay import Episode, ReplayBuffer, Transition
from rlfeed.replay import kernels as k
from rlfeed.types import Step

SPACE = Dict(vector=Box(-np.inf, np.inf, (3,), np.float32), image=Box(0, 255, (40, 40), np.uint8))
PLAIN = Box(-np.inf, np.inf, (3,), np.float32)


def make_buffer(lanes=2, rows=12, **options):
    return ReplayBuffer(SPACE, Discrete(11), capacity=lanes * rows, num_envs=lanes, storage="private", **options)


def plain_step(number, rows=1, **changes):
    fields = {
        "observation": np.full((rows, 3), number, np.float32),
        "action": np.full(rows, number % 5),
        "reward": np.full(rows, number, np.float32),
        "next_observation": np.full((rows, 3), number + 1, np.float32),
        "terminated": np.zeros(rows, bool),
        "truncated": np.zeros(rows, bool),
        "is_first": np.full(rows, number == 0),
    }
    return Step(**(fields | changes))


def as_it_is(array):
    return array


def strided(array):
    return np.repeat(array, 2, axis=0)[::2]


def unpickled(array):
    return pickle.loads(pickle.dumps(array))


def big_endian(array):
    return array.astype(array.dtype.newbyteorder(">"))


def read_only(array):
    array.flags.writeable = False
    return array


class Subclass(np.ndarray):
    """Not exactly an ndarray."""


LOOKS = [as_it_is, strided, np.asfortranarray, unpickled, big_endian, read_only, lambda a: a.view(Subclass), list]


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("name", ["observation", "next_observation", "action", "reward", "terminated", "env_ids"])
def test_add_array_however_it_lies_in_memory_is_stored_right(name, look):
    buffer = ReplayBuffer(PLAIN, Discrete(5), capacity=60, num_envs=3, storage="private")
    for number in range(4):
        values = np.arange(9, dtype=np.float32).reshape(3, 3) + number
        rows = {"observation": values, "next_observation": values + 1, "action": np.array([1, 2, 3])}
        rows |= {"reward": np.array([0.5, 1.5, 2.5], np.float32), "env_ids": np.array([2, 0, 1])}
        step = plain_step(number, 3, **rows)
        setattr(step, name, look(getattr(step, name)))
        buffer.add(step)
    batch = buffer.sample(200, Transition())
    lanes, row = batch.ids.numpy() >> 44, batch.ids.numpy() & ((1 << 44) - 1)
    at = np.array([1, 2, 0])[lanes]  # which row of the step a lane was given
    expected = (at * 3)[:, None] + np.arange(3) + row[:, None]
    assert np.array_equal(batch.observation, expected)
    assert np.array_equal(batch.next_observation, expected + 1)
    assert np.array_equal(batch.action, at + 1)
    assert np.array_equal(batch.reward, at + 0.5)
    assert len(buffer) == 12


def fits(array, shape, dtype):
    """What the kernel must find out about an array, as NumPy says it."""
    return type(array) is np.ndarray and array.shape == shape and array.dtype == dtype and array.flags.c_contiguous


def test_kernel_looks_at_an_array_as_numpy_does():
    generator, seen = np.random.default_rng(0), set()
    names = ["?", "u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ">f4", ">i8"]
    about = np.array(k.runtime(), np.int64)
    for _ in range(2000):
        shape, other = (tuple(generator.integers(1, 3, generator.integers(1, 4)).tolist()) for _ in range(2))
        dtype, wanted = (np.dtype(str(generator.choice(names[:2] + names[-3:]))) for _ in range(2))
        array = np.zeros(shape, dtype)
        array = (array, np.asfortranarray(array), array[..., ::2])[generator.integers(3)]
        expect = np.array([k.kind_word(wanted), len(other) - 1, 0], np.int64)
        found = k.data_of(about, expect, np.array(other[1:], np.int64), id(array), other[0])
        assert found == (array.ctypes.data if fits(array, other, wanted) else 0)
        seen.add(bool(found))
    assert seen == {True, False}
    dtypes = [np.dtype(name) for name in names]
    assert [[k.kind_word(a) == k.kind_word(b) for a in dtypes] for b in dtypes] == np.eye(len(names)).tolist()


@pytest.mark.parametrize("reward", [np.nan, np.inf, -np.inf])
def test_add_reward_that_is_not_finite_is_refused(reward):
    buffer = ReplayBuffer(PLAIN, Discrete(5), capacity=60, num_envs=2, storage="private")
    with pytest.raises(FieldError, match=r"row 1: reward is .*expected a finite number"):
        buffer.add(plain_step(0, 2, reward=np.array([1.0, reward], np.float32)))
    assert buffer.stats().rows == 0


def test_add_priority_is_stored_beside_and_in_no_batch():
    buffer = ReplayBuffer(PLAIN, Discrete(5), capacity=20, extras={"priority": Box(0, 9, (), np.float32)})
    for number in range(3):
        buffer.add(plain_step(number, extras={"priority": np.array([number + 0.5], np.float32)}))
    plan, read = buffer._storage.plan, buffer._storage.memory.bytes
    begin = plan[k.RECORDS] - plan[k.SHARED] + plan[k.PRIORITY]
    stored = [read[begin + row * plan[k.STRIDE] :][:4].view(np.float32)[0] for row in range(3)]
    assert stored == [0.5, 1.5, 2.5]
    assert buffer.sample(4, Transition()).extras == {}


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, -np.inf])
def test_add_priority_that_is_none_is_refused(value):
    buffer = ReplayBuffer(PLAIN, Discrete(5), capacity=20, extras={"priority": Box(0, 9, (), np.float32)})
    buffer.add(plain_step(0, extras={"priority": np.array([-0.0], np.float32)}))
    with pytest.raises(FieldError, match=r"row 0: extras\['priority'\] is .*at least 0"):
        buffer.add(plain_step(1, extras={"priority": np.array([value], np.float32)}))
    with pytest.raises(FieldError, match=r'extras\["priority"\] is missing'):
        buffer.add(plain_step(1))


def test_writer_claimed_lanes_take_no_other_writer():
    buffer = make_buffer(lanes=3)
    twin = ReplayTwin(3, 12)
    writer = buffer.writer([2, 0])
    with pytest.raises(LaneError, match=r"has 0, which a writer has claimed.*release\(\[0\]\)"):
        buffer.add(make_step(twin, [0], [(False, False)], rewards=[0.0]))
    with pytest.raises(LaneError, match=r"lane 2 has a writer.*release\(\[2\]\)"):
        buffer.writer([1, 2])
    with pytest.raises(LaneError, match="has 1, which is not this writer's"):
        writer.add(make_step(twin, [1], [(False, False)], rewards=[0.0]))
    with pytest.raises(LaneError, match=r"has \[0\], which a writer has claimed"):
        buffer.cut([0])
    assert len(buffer) == 0
    twin = ReplayTwin(3, 12)
    buffer.add(make_step(twin, [1], [(False, False)], rewards=[0.0]))  # a claim that failed claimed nothing
    assert writer.add(make_step(twin, [2, 0], [(False, False)] * 2, rewards=[0.0, 1.0])).tolist() == [2 << 44, 0]


def test_writer_step_without_env_ids_goes_to_its_lanes_in_their_order():
    buffer = make_buffer(lanes=3)
    twin = ReplayTwin(3, 12)
    writer = buffer.writer([2, 0])
    step = make_step(twin, [2, 0], [(False, False)] * 2, rewards=[0.0, 1.0])
    step.env_ids = None
    assert writer.add(step).tolist() == [2 << 44, 0]
    step = make_step(twin, [2], [(False, False)], rewards=[0.0])
    step.env_ids = None
    with pytest.raises(LaneError, match="has 1 rows and no env_ids; expected one row for each of the 2 lanes"):
        writer.add(step)


def test_add_more_rows_than_lanes_without_env_ids_is_refused():
    buffer = ReplayBuffer(PLAIN, Discrete(5), capacity=60, num_envs=2, storage="private")
    with pytest.raises(LaneError, match=r"row 2: env_ids has 2; expected 0 \.\. 1"):
        buffer.add(plain_step(0, 3))


def test_release_cuts_what_is_open_and_refuses_the_old_writer():
    buffer, twin = make_buffer(), ReplayTwin(2, 12)
    writer = buffer.writer([1])
    writer.add(make_step(twin, [1], [(False, False)], rewards=[0.0]))
    assert buffer.release([1]) == 1
    assert buffer.sample(1, Episode()).lengths.tolist() == [1]
    late = make_step(copy.deepcopy(twin), [1], [(False, False)], rewards=[0.0])
    with pytest.raises(LaneError, match=r"has 1, which was released.*Ask the buffer"):
        writer.add(late)
    with pytest.raises(LaneError, match="were released"):
        writer.cut()
    second = buffer.writer([1])
    writer.close()  # the old one lets go of nothing that is not its own
    twin.lanes[1].cut()
    assert second.add(make_step(twin, [1], [(False, False)], rewards=[0.0])).tolist() == [(1 << 44) | 2]
    assert second.cut() == 1
    second.close()
    twin.lanes[1].cut()
    buffer.add(make_step(twin, [1], [(False, False)], rewards=[0.0]))


@pytest.mark.parametrize(("lanes", "error"), [([], ConfigError), ([0, 0], ConfigError), ([5], LaneError)])
def test_writer_wrong_lanes_are_refused(lanes, error):
    with pytest.raises(error, match=r"ReplayBuffer\.writer: env_ids"):
        make_buffer().writer(lanes)


def heads_of(buffer):
    return buffer._storage.heads()


@pytest.mark.parametrize("ends", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("abandon", [False, True])
def test_release_after_any_part_of_a_write_leaves_the_lane_consistent(ends, abandon):
    """Any subset of a step's stores but the last one, which commits: a superset of what a kill can leave behind."""
    generator = np.random.default_rng(1)
    for trial in range(3, 63, 5):
        buffer, twin = make_buffer(lanes=1), ReplayTwin(1, 12)
        for number in range(trial % 32):
            over = [(number % 4 == 3, False)]
            buffer.add(make_step(twin, [0], over, rewards=[float(number)]))
        memory, storage = buffer._storage.memory.bytes, buffer._storage
        before, writer, old = memory.copy(), buffer.writer([0]), copy.deepcopy(twin)
        first = {0} if abandon else None
        writer.add(make_step(twin, [0], [ends], rewards=[99.0], first=first))
        after = memory.copy()
        changed = before != after
        chosen = changed & (generator.random(len(changed)) < generator.random())
        counters = slice(0, storage.directory_offset)  # stored as whole words
        chosen[counters] = np.repeat(generator.random(storage.directory_offset // 8) < 0.5, 8)
        committed, reserved = (storage.heads_offset + i * storage.head_bytes for i in (0, 1))
        chosen[committed : committed + 8], chosen[reserved : reserved + 8] = False, True
        memory[:] = np.where(chosen, after, before)
        heads_of(buffer)[-1, 0] = 1
        twin, lane = old, old.lanes[0]
        buffer.release([0])
        lane.cut()
        head, _, episodes, steps, owner = heads_of(buffer)[:, 0].tolist()
        assert (head, episodes, steps, owner) == (len(lane.rows), lane.episodes, len(lane.rows) - lane.episodes, 0)
        for number in range(4):
            buffer.add(make_step(twin, [0], [(False, False)], rewards=[float(number)]))
        assert len(buffer) == len(twin)
        assert buffer.stats().inserted == len(twin.lanes[0].rows) - twin.lanes[0].episodes
        starts = twin.starts(Transition())
        batch = buffer.sample(300, Transition())
        assert set(batch.ids.tolist()) == starts
        check_transitions(batch, twin, Transition())


def write_for_ever(writer, lanes):
    number = 0
    while True:
        t = number % 7
        rows = len(lanes)
        values = np.stack([np.array([lane, number, t], np.float32) for lane in lanes])
        writer.add(
            Step(
                values, np.full(rows, number % 5), np.full(rows, number, np.float32),
                values + np.array([0, 1, 1], np.float32), np.full(rows, t == 6), np.zeros(rows, bool),
                is_first=np.full(rows, t == 0),
            )
        )  # fmt: skip
        number += 1


def test_release_after_kill_of_a_writer_process_leaves_whole_steps():
    buffer = ReplayBuffer(PLAIN, Discrete(5), capacity=3 * 40, num_envs=3)
    generator = np.random.default_rng(2)
    for _ in range(12):
        writer = buffer.writer([0, 2])
        inserted = buffer.stats().inserted
        child = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(writer, [0, 2]), daemon=True)
        child.start()
        deadline = time.monotonic() + 60
        while buffer.stats().inserted < inserted + 200:
            assert time.monotonic() < deadline
        time.sleep(generator.random() * 0.002)
        child.kill()
        child.join()
        assert buffer.release([0, 2]) in (0, 1, 2)
        heads = heads_of(buffer)
        assert np.array_equal(heads[3], heads[0] - heads[2])
        stats = buffer.stats()
        assert stats.steps + stats.episodes >= stats.rows - 4  # the oldest episode of a lane is not whole
        batch = buffer.sample(200, Transition())
        assert np.array_equal(batch.next_observation, batch.observation.numpy() + np.array([0, 1, 1]))
        assert np.array_equal(batch.reward, batch.observation[:, 1])
        assert np.array_equal(batch.terminated, batch.observation[:, 2] == 6)
        assert np.array_equal(batch.ids.numpy() >> 44, batch.observation[:, 0])
        episodes = buffer.sample(20, Episode())
        assert not episodes.observation[:, 0, 2].any()
        assert np.array_equal(episodes.lengths == 7, episodes.terminated.any(dim=1))
