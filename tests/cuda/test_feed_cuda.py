"""The device feed on a real GPU. Needs no Gymnasium: spaces are given as array specs."""

import itertools
import mmap
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from rlfeed import (
    DeviceFeed,
    Episode,
    Prioritized,
    ReplayBuffer,
    ReplayDataset,
    Step,
    Transition,
    Uniform,
    make_loader,
    pad_collate,
)
from rlfeed.feed.engines import StreamEngine
from rlfeed.specs import ArraySpec

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CYCLES = 200_000  # about 0.1 ms


def make_buffer(steps=2000, length=9, **options):
    """Step n: vector and reward are n, the image n modulo 251; so is what comes after it, of n + 1."""
    spec = {
        "vector": ArraySpec((17,), np.dtype(np.float32)),
        "image": ArraySpec((64, 64), np.dtype(np.uint8)),
    }
    buffer = ReplayBuffer(spec, ArraySpec((), np.dtype(np.int64)), capacity=4000, **options)

    def observation(n):
        return {"vector": np.full((1, 17), n, np.float32), "image": np.full((1, 64, 64), n % 251, np.uint8)}

    for i in range(steps):
        now, then = observation(i), observation(i + 1)
        last, no, first = np.array([i % length == length - 1]), np.array([False]), np.array([i % length == 0])
        buffer.add(Step(now, np.array([i % 4]), np.array([i], np.float32), then, last, no, is_first=first))
    return buffer


def loader_of(buffer, unit, **options):
    return DataLoader(ReplayDataset(buffer, unit, seed=1), batch_size=64, collate_fn=pad_collate, **options)


def ring_of(buffer, **options):
    return make_loader(buffer, Transition(), batch_size=64, num_workers=2, seed=1, **options)


def wrong_in(batch):
    """Count on the device what is not of the step that the reward names; nothing waits for it."""
    rewards = batch.reward
    wrong = (batch.observation["vector"] != rewards[:, None]).sum()
    wrong += (batch.next_observation["vector"] != rewards[:, None] + 1).sum()
    for image, offset in ((batch.observation["image"], 0), (batch.next_observation["image"], 1)):
        wrong += (image != ((rewards + offset).long() % 251)[:, None, None]).sum()
    return wrong


def delay(stream, cycles):
    """Have a stream do nothing for a while."""
    before = torch.accelerator.current_stream()
    torch.accelerator.set_stream(stream)
    torch.cuda._sleep(cycles)
    torch.accelerator.set_stream(before)


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


@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_ring_that_is_page_locked_serves_workers_of_any_start_method(context):
    """Workers that are forked afterwards inherit the mapping, not the device."""
    loader = ring_of(make_buffer())
    loader.multiprocessing_context = context
    with DeviceFeed(loader, "cuda") as feed:
        assert sum(wrong_in(batch) for batch in itertools.islice(feed, 200)).item() == 0


@pytest.mark.parametrize("batches", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("late", ["copies", "consumer"])
@pytest.mark.parametrize("static_buffers", [False, True])
def test_ring_whose_slots_are_used_again_at_once_gives_right_values(batches, late, static_buffers):
    """Feed traps T35 and T36: workers refill a slot as soon as it is let go of, and blocks find new owners."""
    feed = DeviceFeed(ring_of(make_buffer()), "cuda", depth=3, static_buffers=static_buffers)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    with feed:
        for n, batch in enumerate(itertools.islice(feed, batches)):
            if n % 5 == 0:
                delay(feed._engine.side if late == "copies" else torch.accelerator.current_stream(), CYCLES)
            wrong += wrong_in(batch)
            del batch  # its memory goes to the next line
            torch.empty(64 * 64 * 64, dtype=torch.uint8, device="cuda").fill_(255)
        assert feed._loader.stats().copies == 0
    assert wrong.item() == 0


def test_slow_consumer_that_drops_its_batches_at_once_never_reads_wrong_values():
    """Blocks are freed while copies run and the allocator is under pressure: order alone must keep values right."""
    buffer = make_buffer()
    expected = [b.observation["image"].long().sum() for b in itertools.islice(loader_of(buffer, Transition()), 300)]
    sums = []
    for batch in itertools.islice(DeviceFeed(loader_of(buffer, Transition()), "cuda", depth=3), 300):
        torch.cuda._sleep(CYCLES)
        sums.append(batch.observation["image"].long().sum())
        del batch
        torch.empty(64 * 64 * 64, dtype=torch.uint8, device="cuda").fill_(255)
    assert [s.item() for s in sums] == [s.item() for s in expected]


@pytest.mark.parametrize("loader", [lambda: loader_of(make_buffer(), Transition()), lambda: ring_of(make_buffer())])
def test_one_transfer_moves_a_batch(loader):
    with DeviceFeed(loader(), "cuda") as feed:
        next(feed)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(10):
                next(feed)
            torch.cuda.synchronize()
        copies = sum(event.count for event in profile.key_averages() if "Memcpy HtoD" in event.key)
        assert copies == 10
        assert feed.stats().transfers == 13
        assert feed.stats().bytes_per_transfer == next(feed).block_and_layout()[1].nbytes


def test_copies_run_beside_the_learners_kernels():
    matrix = torch.randn(4096, 4096, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    with DeviceFeed(ring_of(make_buffer()), "cuda", depth=2) as feed:
        for _ in range(3):
            next(feed)
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(20):
                next(feed)
                for _ in range(4):
                    matrix @ matrix
            torch.cuda.synchronize()
    spans = [(event.name, event.time_range.start, event.time_range.end) for event in profile.events()]
    copies = [span for span in spans if "Memcpy HtoD" in span[0]]
    kernels = [span for span in spans if not span[0].startswith("Mem")]
    assert len(copies) >= 20
    beside = [any(begin < end and start < finish for _, begin, finish in kernels) for _, start, end in copies]
    assert sum(beside) > len(copies) / 2


def test_ring_is_page_locked_once_and_torch_pins_nothing_beside_it(monkeypatch):
    """Feed trap T34: what is pinned is the slots, to the byte; torch would round each batch up to a power of two."""
    registered, runtime = [], torch.cuda.cudart()

    class Runtime:
        @staticmethod
        def cudaHostRegister(address, nbytes, flags):  # noqa: N802
            registered.append((address, nbytes))
            return runtime.cudaHostRegister(address, nbytes, flags)

        @staticmethod
        def cudaHostUnregister(address):  # noqa: N802
            registered.remove(next(entry for entry in registered if entry[0] == address))
            return runtime.cudaHostUnregister(address)

    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime)
    loader = ring_of(make_buffer())
    torch.cuda.synchronize()
    before = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
    with DeviceFeed(loader, "cuda") as feed:
        for _ in range(50):
            next(feed)
        assert [nbytes for _, nbytes in registered] == [loader.stats().ring_bytes]
        assert torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) == before
        assert loader.stats().copies == 0
    assert registered == []


def test_page_locked_memory_is_pinned_until_it_is_let_go_of():
    engine, memory = StreamEngine(torch.device("cuda")), mmap.mmap(-1, 1 << 20)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    release = engine.register(tensor.data_ptr(), tensor.nbytes)
    assert tensor.is_pinned()
    assert engine.stage(tensor) is tensor
    release()
    assert not tensor.is_pinned()


def test_page_lock_that_is_refused_leaves_no_error_for_the_next_kernel():
    """Feed trap T40."""
    engine, memory = StreamEngine(torch.device("cuda")), mmap.mmap(-1, 1 << 20)
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    release = engine.register(address, 1 << 20)
    with pytest.warns(RuntimeWarning, match="could not be page-locked"):
        assert engine.register(address, 1 << 20) is None  # it is already
    assert torch.ones(3, device="cuda").sum().item() == 3.0
    release()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_priorities_and_batches_synchronise_nothing():
    buffer = make_buffer(sampler=Prioritized())
    with DeviceFeed(ring_of(buffer), "cuda", depth=2) as feed:
        for _ in range(3):
            next(feed)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(30):
                batch = next(feed)
                feed.update_priorities(batch, (batch.reward % 7) + 1)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_priorities_from_the_device_draw_the_same_batches_however_slow_it_is():
    def ids(cycles):
        buffer, found = make_buffer(sampler=Prioritized()), []
        with DeviceFeed(make_loader(buffer, Transition(), batch_size=32, seed=3), "cuda", depth=2) as feed:
            for batch in itertools.islice(feed, 60):
                torch.cuda._sleep(cycles)
                feed.update_priorities(batch, (batch.reward % 7) + 1)
                found.append(batch.ids.tolist())
        return found

    assert ids(0) == ids(20 * CYCLES)


def test_static_buffers_serve_graphs():
    buffer, graphs, sums = make_buffer(sampler=Uniform()), {}, []
    expected = [batch.reward.sum().item() for batch in itertools.islice(loader_of(buffer, Transition()), 50)]
    feed = DeviceFeed(loader_of(buffer, Transition()), "cuda", depth=1, static_buffers=True)
    for batch in itertools.islice(feed, 50):
        place = batch.reward.data_ptr()
        if place not in graphs:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = batch.reward.sum()
            graphs[place] = graph, result
        graph, result = graphs[place]
        graph.replay()
        sums.append(result.clone())
    assert len(graphs) == 2
    assert [s.item() for s in sums] == expected


def test_feed_on_another_stream_than_the_default_is_in_order():
    stream = torch.cuda.Stream()
    feed = DeviceFeed(loader_of(make_buffer(), Transition()), "cuda", depth=2)
    with torch.cuda.stream(stream):
        wrong = sum(wrong_in(batch) for batch in itertools.islice(feed, 200))
        assert torch.cuda.current_stream() == stream
    stream.synchronize()
    assert wrong.item() == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_only_the_learners_device_gets_a_context():
    """Feed trap T32: some hundred megabytes of a device that nobody asked for."""
    code = """
        import torch
        from rlfeed import DeviceFeed
        with DeviceFeed([torch.ones(1000) for _ in range(9)], "cuda:1", depth=2) as feed:
            for batch in feed:
                assert batch.device == torch.device("cuda", 1)
                batch.sum()
        has = torch._C._cuda_hasPrimaryContext
        print(has(0), has(1))
    """
    shown = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300, check=True
    )
    assert shown.stdout.split() == ["False", "True"]
