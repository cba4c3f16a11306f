"""The device feed on a real GPU. Needs no Gymnasium: spaces are given as array specs."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from rlfeed import DeviceFeed, Episode, ReplayBuffer, ReplayDataset, Step, Transition, pad_collate
from rlfeed.specs import ArraySpec

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_buffer(steps=2000, length=9):
    spec = {
        "vector": ArraySpec((17,), np.dtype(np.float32)),
        "image": ArraySpec((64, 64), np.dtype(np.uint8)),
    }
    buffer = ReplayBuffer(spec, ArraySpec((), np.dtype(np.int64)), capacity=4000)

    def observation(n):
        return {"vector": np.full((1, 17), n, np.float32), "image": np.full((1, 64, 64), n % 251, np.uint8)}

    for i in range(steps):
        now, then = observation(i), observation(i + 1)
        last, no, first = np.array([i % length == length - 1]), np.array([False]), np.array([i % length == 0])
        buffer.add(Step(now, np.array([i % 4]), np.array([i], np.float32), then, last, no, is_first=first))
    return buffer


def loader_of(buffer, unit, **options):
    return DataLoader(ReplayDataset(buffer, unit, seed=1), batch_size=64, collate_fn=pad_collate, **options)


@pytest.mark.parametrize("unit", [Transition(n_step=2), Episode()], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"pin_memory": True}], ids=str)
def test_batches_on_the_device_equal_those_on_the_cpu(unit, options):
    buffer = make_buffer()
    expected = itertools.islice(loader_of(buffer, unit), 40)
    feed = DeviceFeed(loader_of(buffer, unit, **options), "cuda")
    for batch, wanted in zip(itertools.islice(feed, 40), expected, strict=True):
        assert batch.reward.device.type == "cuda"
        assert batch.ids.device.type == "cpu"
        assert torch.equal(batch.ids, wanted.ids)
        for name in ("reward", "action", "terminated", "discount"):
            assert torch.equal(getattr(batch, name).cpu(), getattr(wanted, name)), name
        for key in ("vector", "image"):
            assert torch.equal(batch.observation[key].cpu(), wanted.observation[key]), key


def test_slow_consumer_that_drops_its_batches_at_once_never_reads_wrong_values():
    """Blocks are freed while copies run and the allocator is under pressure: order alone must keep values right."""
    buffer = make_buffer()
    expected = [b.observation["image"].long().sum() for b in itertools.islice(loader_of(buffer, Transition()), 300)]
    sums = []
    for batch in itertools.islice(DeviceFeed(loader_of(buffer, Transition()), "cuda", depth=3), 300):
        torch.cuda._sleep(200_000)
        sums.append(batch.observation["image"].long().sum())
        del batch
        torch.empty(64 * 64 * 64, dtype=torch.uint8, device="cuda").fill_(255)
    assert [s.item() for s in sums] == [s.item() for s in expected]


def test_one_transfer_moves_a_batch():
    feed = DeviceFeed(loader_of(make_buffer(), Transition()), "cuda")
    next(feed)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(10):
            next(feed)
        torch.cuda.synchronize()
    copies = sum(event.count for event in profile.key_averages() if "Memcpy HtoD" in event.key)
    assert copies == 10
