"""Facts 28 to 41 about torch's DataLoader: processes, memory, devices; see `test_dataloader_facts.py`."""

import inspect
import multiprocessing
import pickle
import re
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from support.facts import Forked, Items, Rows, ids_of, loader_of, make_buffer, take, values
from torch.utils.data import DataLoader, get_worker_info

from rlfeed import errors
from rlfeed.feed import DeviceFeed, ReplayDataset, pad_collate, stream
from rlfeed.processes import choose_context
from rlfeed.replay import Episode

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# ------------------------------------------------------------------------------------------------------- collation


def test_items_of_different_lengths_need_a_collate_function():
    """Fact 28.

    said    the data set gives items, the loader batches them, collate_fn joins them: the default one fails on different
            lengths
    torch   right: "stack expects each tensor to be equal size"
    rlfeed  pad_collate pads what comes from a `ReplayDataset`, and any mappings of arrays
    """
    ragged = Rows(2, lambda i: torch.ones(i + 1))
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        next(iter(DataLoader(ragged, batch_size=2)))
    names = ("observation", "action", "reward")
    samples = Rows(2, lambda i: {name: np.ones(i + 1 + (name == "observation"), np.float32) for name in names})
    batch = next(iter(DataLoader(samples, batch_size=2, collate_fn=pad_collate)))
    assert batch.reward.tolist() == [[1, 0], [1, 1]]


def pad_by_hand(rows):
    """As it is often written."""
    lengths = [len(row) for row in rows]
    padded = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, : lengths[i]] = row
    return padded, torch.tensor(lengths)


def test_padding_by_hand_into_integers_cuts_fractions_off():
    """Fact 29.

    said    a loop that copies rows into zeros(dtype=long) pads
    torch   for whole numbers; fractions are cut off without a word, and there is no mask
    rlfeed  dtypes stay as they are, `mask` and `lengths`, no loop over steps
    """
    rows = [torch.tensor([0.5, 1.5]), torch.tensor([2.5])]
    padded, lengths = pad_by_hand(rows)
    assert (padded.tolist(), lengths.tolist()) == ([[0, 1], [2, 0]], [2, 1])

    samples = [{"observation": torch.zeros(len(row) + 1), "action": row.double(), "reward": row} for row in rows]
    batch = pad_collate(samples)
    assert (batch.reward.tolist(), batch.lengths.tolist()) == ([[0.5, 1.5], [2.5, 0]], [2, 1])
    assert batch.action.dtype == torch.float64
    assert batch.mask.tolist() == [[True, True], [True, False]]


# ------------------------------------------------------------------------------------------------------- processes


def test_pickled_tensors_move_to_shared_memory_and_leave_their_arrays_behind():
    """Fact 30, feed trap T23; what forked workers see, the test of fact 13 says.

    said    every worker holds a copy of the data set
    torch   spawned: pickled, but tensors move to shared memory, and NumPy arrays over them dangle
    rlfeed  rows lie in shared memory from birth and never move
    """
    tensor = torch.zeros(4)
    array, address = tensor.numpy(), tensor.data_ptr()
    ForkingPickler.dumps(tensor)  # what starting a spawned worker does with a data set
    assert tensor.is_shared()
    assert tensor.data_ptr() != address
    array[0] = 7
    assert tensor[0] == 0

    buffer = make_buffer(steps=6)
    rows = buffer._storage.memory.bytes
    address = rows.ctypes.data
    loader = loader_of(buffer, num_workers=1)
    take(loader, 1)
    loader.close()
    assert buffer._storage.memory.bytes.ctypes.data == address


def test_start_method_is_fork_on_linux_only_before_python_3_14(monkeypatch):
    """Fact 32, feed traps T21 and T31.

    said    Linux forks
    torch   until Python 3.13; forkserver from 3.14 on, so that everything must be picklable
    rlfeed  forkserver unless you chose one; what cannot be sent is named, with the way out
    """
    if sys.platform == "linux":
        assert multiprocessing.get_all_start_methods()[0] == ("forkserver" if sys.version_info >= (3, 14) else "fork")
    with pytest.raises((AttributeError, pickle.PicklingError), match=r"an't pickle local object"):
        ForkingPickler.dumps(Items(lambda: range(3)))

    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", None)  # as where nobody chose one
    for chosen, expected in ((None, "forkserver"), (multiprocessing.get_context("fork"), "fork")):
        if expected in multiprocessing.get_all_start_methods():
            assert choose_context(chosen).get_start_method() == expected

    def local(worker_id, num_workers, seed):
        yield worker_id

    with pytest.raises(errors.ConfigError, match=r"cannot be sent to another process; .*context='fork'"):
        ForkingPickler.dumps(stream(local))


SCRIPT = """
import multiprocessing

if GUARD:
    process = multiprocessing.get_context("spawn").Process(target=print)
    process.start()
    process.join()
    raise SystemExit(process.exitcode)
"""


def test_spawned_workers_run_the_script_again_where_it_has_no_guard(tmp_path):
    """Fact 33.

    said    Windows spawns, so scripts need `if __name__ == "__main__"`
    torch   right, and so do macOS, and forkserver: Python itself refuses
    rlfeed  the same rule; every script in the documents has the guard
    """
    script = tmp_path / "script.py"
    for guard, code in (("True", 1), ("__name__ == '__main__'", 0)):
        script.write_text(SCRIPT.replace("GUARD", guard))
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, done.stderr
        assert ("has finished its bootstrapping phase" in " ".join(done.stderr.split())) is bool(code)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert 'if __name__ == "__main__":' in readme


def seed_of_worker():
    yield get_worker_info().seed


def test_persistent_workers_keep_their_seed_and_need_workers():
    """Fact 34, feed trap T5.

    said    persistent_workers matters only with workers
    torch   without any it is an error; iter(dataset) is called anew for each pass, and the seed is that of the first
            one for ever
    rlfeed  no passes and no seeds of workers: draws have numbers
    """
    with pytest.raises(ValueError, match="persistent_workers option needs num_workers > 0"):
        DataLoader(Rows(1), persistent_workers=True)
    loader = Forked(Items(seed_of_worker), batch_size=None, num_workers=1, persistent_workers=True)
    assert len({seed for _ in range(3) for seed in loader}) == 1
    del loader
    loader = Forked(Items(seed_of_worker), batch_size=None, num_workers=1)
    assert len({seed for _ in range(3) for seed in loader}) == 3

    loader = loader_of(make_buffer(), num_workers=1)
    ids = [ids for _ in range(3) for ids in take(loader, 2, ids_of)]  # three iterators of one loader
    loader.close()
    assert ids == take(loader_of(make_buffer()), 6, ids_of)


def is_shared(rows):
    """Join rows into memory of one's own, as padding must, and say where they were in the worker."""
    batch = torch.cat(rows)
    return batch, batch.is_shared()


def test_padded_batches_of_workers_are_copied_once_more():
    """Fact 35: why workers may be slower where data are in memory (`scripts/benchmark.py feed` measures it).

    said    with data in memory, many workers may be slower
    torch   right: a batch joined by your own function is copied to shared memory, tensor by tensor, and a descriptor
            sent for each
    rlfeed  a worker gathers straight into shared memory: one block
    """
    loader = Forked(Rows(4, lambda i: torch.ones(3)), batch_size=4, collate_fn=is_shared, num_workers=1)
    batch, was_shared = next(iter(loader))
    assert not was_shared
    assert batch.is_shared()  # here it is: torch has copied it

    def where(batch):
        return {"shared": batch.reward.is_shared()}

    dataset = ReplayDataset(make_buffer(), Episode(), batch_size=8, transform=where)
    assert next(iter(Forked(dataset, batch_size=None, num_workers=1))) == {"shared": True}
    loader = loader_of(make_buffer(), Episode(), num_workers=1)
    batch = take(loader, 1)[0]
    block, _ = batch.block_and_layout()
    places = [
        getattr(batch, name).data_ptr() - block.data_ptr() for name in ("observation", "reward", "mask", "lengths")
    ]
    assert all(0 <= place < block.nbytes for place in places)
    loader.close()


# --------------------------------------------------------------------------------------------------------- devices


@pytest.mark.skipif(torch.accelerator.is_available(), reason="says what happens without an accelerator")
def test_pin_memory_without_an_accelerator_warns_and_does_nothing():
    """Facts 36 and 37.

    said    pin_memory is for CUDA; pin_memory with non_blocking only makes it faster
    torch   for whichever accelerator there is; MPS is refused; without one it warns; pin_memory_device is deprecated;
            also wrong, where the source changes before the copy is over: see the test on CUDA
    rlfeed  `DeviceFeed` takes the accelerator that is there, or none; a source is let go only when its copy is over
    """
    with pytest.warns(UserWarning, match="no accelerator is found"):
        batch = next(iter(DataLoader(Rows(2, torch.ones), batch_size=1, pin_memory=True)))
    assert not batch.is_pinned()
    with (
        pytest.warns(UserWarning, match="no accelerator"),
        pytest.warns(UserWarning, match="pin_memory_device is depr"),
    ):
        iter(DataLoader(Rows(2), pin_memory=True, pin_memory_device="cuda"))

    feed = DeviceFeed(loader_of(make_buffer()))
    assert next(feed).reward.device.type == "cpu"


def test_current_accelerator_takes_check_available_from_the_oldest_torch_that_is_allowed():
    """Fact 38.

    said    torch.accelerator.current_accelerator(check_available=True) came with 2.6
    torch   the function did, the argument with 2.7
    rlfeed  needs torch >= 2.7
    """
    assert "check_available" in inspect.signature(torch.accelerator.current_accelerator).parameters
    required = re.search(r'"torch>=(\d+)\.(\d+)"', (Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert (int(required[1]), int(required[2])) >= (2, 7)


def busy(seconds=0.5):
    torch.cuda._sleep(int(seconds * 1.8e9))


@cuda
@pytest.mark.cuda
def test_copy_from_pinned_memory_reads_what_is_there_when_it_comes_to_it():
    """Fact 36 on CUDA, feed trap T35."""
    source = torch.ones(1 << 20).pin_memory()
    source.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    busy()
    there = source.to("cuda", non_blocking=True)
    source.zero_()
    assert there.sum().item() == 0  # ones were asked for


@cuda
@pytest.mark.cuda
def test_copy_on_the_consumers_stream_waits_for_its_kernels():
    """Fact 39.

    said    .to(device, non_blocking=True) in the loop overlaps the copy with the computation
    torch   it frees the host; on one stream the copy waits for the kernels before it
    rlfeed  `DeviceFeed` copies on a stream of its own, ahead
    """
    source, side = torch.ones(1 << 20).pin_memory(), torch.cuda.Stream()
    here, beside = torch.cuda.Event(), torch.cuda.Event()
    there, other = torch.empty(2, 1 << 20, device="cuda")
    torch.cuda.synchronize()
    busy()
    there.copy_(source, non_blocking=True)
    here.record()
    with torch.cuda.stream(side):
        other.copy_(source, non_blocking=True)
        beside.record()
    beside.synchronize()
    assert not here.query()


# ------------------------------------------------------------------------------------- shuffling, sharding, resuming


def test_iterable_dataset_takes_no_shuffle_and_shards_itself():
    """Fact 40, feed trap T2.

    said    an IterableDataset is not shuffled, and its workers repeat it unless it asks get_worker_info
    torch   right: shuffle=True is a ValueError
    rlfeed  draws are random and numbered; `stream` shuffles in a buffer and tells the factory its worker
    """
    with pytest.raises(ValueError, match="expected unspecified shuffle option, but got shuffle=True"):
        DataLoader(Items(lambda: range(3)), shuffle=True)
    ids = Forked(Items(lambda: [get_worker_info().id]), batch_size=None, num_workers=2)
    assert sorted(ids) == [0, 1]
    assert get_worker_info() is None

    def share(worker_id, num_workers, seed):
        yield from range(worker_id, 40, num_workers)

    shuffled = values(Forked(stream(share, shuffle_buffer=10), batch_size=None, num_workers=2))
    assert sorted(shuffled) == list(range(40))
    assert shuffled != values(Forked(stream(share), batch_size=None, num_workers=2))


def test_stock_loader_has_no_state_and_ours_goes_on_with_the_next_batch():
    """Fact 41, feed trap T39.

    said    StatefulDataLoader resumes in the middle
    torch   that is torchdata's; the DataLoader itself has no state
    rlfeed  state_dict and load_state_dict: the very next batch, with any number of workers
    """
    assert not hasattr(DataLoader, "state_dict")
    assert not hasattr(iter(DataLoader(Rows(1))), "state_dict")

    buffer = make_buffer()
    straight = take(loader_of(buffer), 6, ids_of)
    for before, after in ((0, 2), (2, 0)):
        loader = loader_of(buffer, num_workers=before)
        assert take(loader, 2, ids_of) == straight[:2]
        other = loader_of(buffer, num_workers=after)
        other.load_state_dict(loader.state_dict())
        assert take(other, 4, ids_of) == straight[2:]
        for each in (loader, other):
            each.close()
