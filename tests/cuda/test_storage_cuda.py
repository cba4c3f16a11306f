"""Replay rows on a real GPU: the batches of host memory, in any order of streams. Needs no Gymnasium."""

import threading

import numpy as np
import pytest
import torch

from rlfeed import Episode, ReplayBuffer, Sequence, Step, Transition
from rlfeed.errors import CapacityError
from rlfeed.feed import DeviceFeed, ReplayDataset
from rlfeed.nest import leaves
from rlfeed.specs import ArraySpec

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OBSERVATION = {"vector": ArraySpec((17,), np.dtype(np.float32)), "image": ArraySpec((84, 84), np.dtype(np.uint8))}
CARRY = {"carry": ArraySpec((8,), np.dtype(np.float32)), "log_prob": ArraySpec((), np.dtype(np.float32))}
FIELDS = ("observation", "next_observation", "action", "reward", "terminated", "truncated", "discount", "mask")
FIELDS += ("loss_mask", "lengths", "is_first", "burn_in", "carry", "prev_action", "prev_reward", "weights", "extras")
UNITS = [
    Transition(),
    Transition(n_step=3),
    Sequence(5, burn_in=2),
    Sequence(4, burn_in=2, boundary="cross"),
    Episode(),
]
LENGTH = 9  # steps of an episode


def make_buffer(storage, capacity=1200, lanes=4, **options):
    return ReplayBuffer(
        OBSERVATION, ArraySpec((), np.dtype(np.int64)), capacity=capacity, num_envs=lanes, storage=storage,
        extras=CARRY, **options,
    )  # fmt: skip


def make_step(t, lanes=4):
    """Step t of every lane: what it holds names the lane and the step."""
    number = np.arange(lanes) * 1000.0 + t

    def observation(value):
        vector = np.repeat(value[:, None], 17, axis=1).astype(np.float32)
        return {
            "vector": vector,
            "image": np.broadcast_to((value % 251)[:, None, None], (lanes, 84, 84)).astype(np.uint8),
        }

    last, no = np.full(lanes, t % LENGTH == LENGTH - 1), np.zeros(lanes, bool)
    return Step(
        observation(number), number.astype(np.int64) % 7, number.astype(np.float32), observation(number + 1), last, no,
        is_first=np.full(lanes, t % LENGTH == 0), carry=np.repeat(number[:, None], 8, axis=1).astype(np.float32),
        extras={"log_prob": number.astype(np.float32) / 3},
    )  # fmt: skip


def assert_same(batch, expected):
    """Both hold the same, one on the device."""
    assert torch.equal(batch.ids, expected.ids)
    for name in FIELDS:
        left, right = getattr(batch, name), getattr(expected, name)
        assert (left is None) == (right is None), name
        for (path, there), (_, here) in zip(*(leaves(() if n is None else n) for n in (left, right)), strict=True):
            assert there.device.type == "cuda", (name, path)
            assert there.dtype == here.dtype, (name, path)
            assert torch.equal(there.cpu(), here), (name, path)


@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("frames", [1, {"image": 3}], ids=["single", "stacked"])
def test_batches_equal_those_of_host_memory(unit, frames):
    here, there = make_buffer("private", frame_stack=frames), make_buffer("cuda", frame_stack=frames)
    for t in range(900):  # three laps
        assert np.array_equal(there.add(make_step(t)), here.add(make_step(t)))
        if t % 90 == 89:
            assert_same(there.sample(64, unit), here.sample(64, unit))


def test_ids_stay_on_the_host():
    buffer = make_buffer("cuda")
    buffer.add(make_step(0))
    batch = buffer.sample(8, Transition())
    assert (batch.ids.device.type, batch.reward.device.type) == ("cpu", "cuda")


def check(batch):
    """Every sample is whole: all its fields are those of one step."""
    number = batch.reward
    assert torch.equal(batch.observation["vector"], number[:, None].expand(-1, 17))
    assert torch.equal(batch.next_observation["vector"], number[:, None].expand(-1, 17) + 1)
    assert torch.equal(batch.observation["image"][:, 83, 83], (number % 251).to(torch.uint8))
    assert torch.equal(batch.next_observation["image"][:, 40, 0], ((number + 1) % 251).to(torch.uint8))
    assert torch.equal(batch.action, number.long() % 7)


def test_busy_streams_and_a_writer_thread_tear_no_row():
    """Trap 29: readers on streams that are behind, in short lanes that a thread overwrites all the while."""
    buffer = make_buffer("cuda", capacity=4 * 24)
    for t in range(24):
        buffer.add(make_step(t))
    stop, failures = threading.Event(), []

    def write():
        try:
            t = 24
            while not stop.is_set():
                buffer.add(make_step(t))
                t += 1
        except Exception as error:
            failures.append(error)

    writer, streams = threading.Thread(target=write), [torch.cuda.Stream() for _ in range(3)]
    writer.start()
    try:
        for number in range(400):
            with torch.cuda.stream(streams[number % 3]):
                torch.cuda._sleep(500_000)  # the gather lies behind it, while the writer goes on
                check(buffer.sample(64, Transition()))
    finally:
        stop.set()
        writer.join(timeout=60)
    assert failures == []
    assert buffer.stats().inserted > 4 * 24 * 2


def test_one_transfer_moves_a_step_and_one_a_batch():
    buffer = make_buffer("cuda")
    for t in range(20):
        buffer.add(make_step(t))
    buffer.sample(64, Transition())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for t in range(20, 30):
            buffer.add(make_step(t))
            buffer.sample(64, Transition())
        torch.cuda.synchronize()
    copies = sum(event.count for event in profile.key_averages() if "Memcpy HtoD" in event.key)
    assert copies == 20


def test_memory_on_the_device_is_what_stats_says():
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    buffer = make_buffer("cuda", capacity=20_000)
    taken = torch.cuda.memory_allocated() - before
    assert buffer._storage.device.nbytes <= taken <= 1.01 * buffer._storage.device.nbytes + 16 * 512
    with pytest.raises(CapacityError, match="are free there"):
        make_buffer("cuda", capacity=10**8)


def test_save_and_load_give_the_same_next_batches(tmp_path):
    buffer = make_buffer("cuda")
    for t in range(700):
        buffer.add(make_step(t))
    buffer.save(tmp_path / "saved")
    loaded = ReplayBuffer.load(tmp_path / "saved")
    for unit in UNITS:
        expected = buffer.sample(64, unit).to("cpu")
        assert_same(loaded.sample(64, unit), expected)


def test_device_feed_passes_batches_on():
    buffer = make_buffer("cuda")
    for t in range(50):
        buffer.add(make_step(t))
    feed = DeviceFeed(ReplayDataset(buffer, Transition(), batch_size=32), "cuda")
    for _ in range(20):
        check(next(feed))
