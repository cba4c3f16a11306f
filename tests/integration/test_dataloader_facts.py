"""What people say of torch's DataLoader, what torch really does, and what rlfeed does: executed.

`docs/dataloader-facts.md` tells the same to users, row by row, and names the test behind each row; facts are numbered
as there. Facts 1 to 13 are here: loops that shall not end, and whether everything arrives. The others are in
`test_dataloader_facts_generators.py` and `test_dataloader_facts_processes.py`.
"""

import itertools
import multiprocessing
import os
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.facts import Forked, Items, Rows, add_steps, ids_of, loader_of, make_buffer, take, values, wait_until
from torch.utils.data import DataLoader, get_worker_info

from rlfeed import errors
from rlfeed.feed import ReplayDataset, cycle, epoch, pad_collate
from rlfeed.replay import Transition

# ------------------------------------------------------------------------------------------------- going on for ever


def test_loader_itself_is_no_iterator_and_its_loop_ends_quietly():
    """Facts 1 and 2.

    said    the DataLoader is an iterator that raises StopIteration; a plain loop breaks off with StopIteration
    torch   its iterator is; `next(loader)` is a TypeError; only a bare `next` sees it; a `for` loop just ends
    rlfeed  an infinite feed; nothing ends
    """
    loader = DataLoader(Rows(3))
    with pytest.raises(TypeError, match="'DataLoader' object is not an iterator"):
        next(loader)
    iterator = iter(loader)
    assert [next(iterator).item() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(StopIteration):
        next(iterator)
    assert values(loader) == [0, 1, 2]  # and no error behind the loop

    assert take(loader_of(make_buffer(steps=6)), 100, len) == [10] * 100
    with pytest.raises(TypeError):  # no length, not an estimate: feed trap T38
        len(loader_of(make_buffer(steps=6)))


def test_new_iterator_draws_from_the_global_random_state_and_ours_does_not():
    """Fact 3, feed trap T6.

    said    catch StopIteration, call iter() again
    torch   works; each iter() takes a seed from the global random state, also without workers; over nothing it spins
    rlfeed  the state is untouched; over nothing it is an error
    """
    before = torch.get_rng_state()
    iter(DataLoader(Rows(3)))
    assert not torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(before)
    iter(DataLoader(Rows(3), generator=torch.Generator()))  # the way out that torch offers
    assert torch.equal(torch.get_rng_state(), before)
    nothing = DataLoader(Items(list))
    assert sum(1 for _ in range(100) for _ in nothing) == 0  # a loop that restarts it would never give anything

    torch.set_rng_state(before)
    for loader in (loader_of(make_buffer()), loader_of(make_buffer(), num_workers=1)):
        take(loader, 2)
        loader.close()
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(errors.ConfigError, match="gave nothing; expected at least one batch"):
        next(cycle(nothing))
    with pytest.raises(errors.NotEnoughDataError, match="holds 0 steps"):
        take(loader_of(make_buffer(steps=0)), 1)


def process_of(batch):
    return replace(batch, extras={"process": torch.full((len(batch),), os.getpid())})


def test_new_iterator_starts_new_workers_and_ours_keeps_them():
    """Fact 4.

    said    beginning anew costs little
    torch   every iter() starts every worker again, unless they are persistent
    rlfeed  they start once
    """
    loader = Forked(Rows(8, lambda i: os.getpid()), batch_size=1, num_workers=2)
    first, second = set(values(loader)), set(values(loader))
    assert len(first) == len(second) == 2
    assert not first & second
    loader = Forked(Rows(8, lambda i: os.getpid()), batch_size=1, num_workers=2, persistent_workers=True)
    assert set(values(loader)) == set(values(loader))
    del loader

    loader = loader_of(make_buffer(), num_workers=2, transform=process_of)
    first, second = (set(take(loader, 4, lambda batch: int(batch.extras["process"][0]))) for _ in range(2))
    assert len(first) == 2
    assert first == second
    assert os.getpid() not in first
    loader.close()


def shared_out():
    """Count, each worker only its share: 0, 2, 4, ... and 1, 3, 5, ..."""
    worker = get_worker_info()
    return itertools.count(worker.id, worker.num_workers)


def test_infinite_stream_is_loaded_by_workers_but_repeated_by_each():
    """Facts 5 and 6, feed traps T2 and T3.

    said    an infinite IterableDataset does not really use the DataLoader; it suits data that do not fit in memory
    torch   it does: batches, workers, collation, but each worker gives every item; yes: no more is made than asked for
    rlfeed  each draw once, whatever the number of workers; the same: a buffer may lie in a file
    """
    both = Forked(Items(itertools.count), batch_size=2, num_workers=2)
    assert [batch.tolist() for batch in take(both, 4)] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    split = Forked(Items(shared_out), batch_size=2, num_workers=2)
    assert [batch.tolist() for batch in take(split, 4)] == [[0, 2], [1, 3], [4, 6], [5, 7]]
    made = []
    take(DataLoader(Items(lambda: (made.append(i) or i for i in itertools.count())), batch_size=2), 3)
    assert made == [0, 1, 2, 3, 4, 5]

    buffer = make_buffer()
    seen = []
    for num_workers in (0, 1, 2):
        plain = DataLoader(
            ReplayDataset(buffer, Transition()), batch_size=10, collate_fn=pad_collate, num_workers=num_workers,
            multiprocessing_context="fork" if num_workers else None,
        )  # fmt: skip
        loader = loader_of(buffer, num_workers=num_workers)
        seen += [take(feed, 5, ids_of) for feed in (plain, loader)]
        loader.close()
    assert all(ids == seen[0] for ids in seen)


def test_memmapped_rows_lie_in_a_file(tmp_path):
    """Fact 6, beside it: the rows of `storage="memmap"` are the file's."""
    buffer = make_buffer(storage="memmap", path=tmp_path / "rows.bin")
    assert (tmp_path / "rows.bin").stat().st_size >= 4000 * 8
    assert 0 <= take(loader_of(buffer), 1)[0].reward.min() < 100


# ----------------------------------------------------------------------------------------------- everything arrives


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize(("num_workers", "prefetch"), [(2, 2), (2, 1), (1, 1), (4, 1)])
def test_every_row_arrives_however_little_is_prefetched(num_workers, prefetch):
    """Fact 7, feed trap T1.

    said    1000 rows, 2 workers, a small buffer: fewer than 1000 come
    torch   all 1000 come, in order; the loop waits for each
    rlfeed  a pass gives every stored step exactly once
    """
    loader = Forked(Rows(1000), batch_size=32, num_workers=num_workers, prefetch_factor=prefetch)
    assert values(loader) == list(range(1000))


def test_pass_over_the_replay_gives_every_stored_step_once():
    """Fact 7, ours; fact 10: the last batch is short and it is there."""
    passed = list(epoch(make_buffer(steps=100), Transition(), 32))
    assert [len(batch) for batch in passed] == [32, 32, 32, 4]
    assert sorted(reward for batch in passed for reward in batch.reward.tolist()) == list(range(100))
    whole = list(epoch(make_buffer(steps=100), Transition(), 32, drop_last=True))
    assert [len(batch) for batch in whole] == [32, 32, 32]


def test_prefetched_batches_are_as_many_as_workers_times_the_factor():
    """Fact 8.

    said    num_workers is the size of the buffer
    torch   prefetch_factor x num_workers batches are under way
    rlfeed  lookahead batches, and they are counted
    """
    made = multiprocessing.get_context("fork").Value("q", 0)

    def count(i):
        with made.get_lock():
            made.value += 1
        return i

    for num_workers, factor in ((1, 3), (2, 2)):
        made.value = 0
        batches = iter(Forked(Rows(400, count), batch_size=4, num_workers=num_workers, prefetch_factor=factor))
        for taken in range(3):
            wait_until(lambda owed=(taken + num_workers * factor) * 4: made.value >= owed)
            assert made.value == (taken + num_workers * factor) * 4
            next(batches)
        del batches

    loader = loader_of(make_buffer(), lookahead=3)
    take(loader, 5)
    stats = loader.stats()
    assert (stats.drawn, stats.delivered, stats.in_flight) == (80, 50, 30)


def test_default_loader_works_in_this_process_and_thread():
    """Fact 9.

    said    it loads in several processes or threads
    torch   by default in none: in this thread; processes from num_workers=1 on
    rlfeed  the same default
    """
    threads = threading.active_count()
    assert values(DataLoader(Rows(3, lambda i: os.getpid()))) == [os.getpid()] * 3
    assert values(DataLoader(Rows(3, lambda i: threading.get_ident()))) == [threading.get_ident()] * 3
    assert values(Forked(Rows(3, lambda i: os.getpid()), num_workers=1)) != [os.getpid()] * 3

    batch = take(loader_of(make_buffer(), transform=process_of), 1)[0]
    assert batch.extras["process"][0] == os.getpid()
    assert threading.active_count() <= threads  # those of earlier tests may end meanwhile


def uneven():
    return range(5 if get_worker_info().id == 0 else 11)


def test_drop_last_loses_the_tail_and_that_of_every_worker():
    """Fact 10, feed trap T3.

    said    drop_last drops what does not fill a batch
    torch   yes; and of an IterableDataset in every worker
    rlfeed  no tail in an infinite feed; a pass keeps it unless told not to
    """
    assert len(values(DataLoader(Rows(997), batch_size=32))) == 997
    assert len(values(DataLoader(Rows(997), batch_size=32, drop_last=True))) == 992
    for drop_last, sizes in ((False, [4, 4, 1, 4, 3]), (True, [4, 4, 4])):
        loader = Forked(Items(uneven), batch_size=4, num_workers=2, drop_last=drop_last)
        assert [len(batch) for batch in loader] == sizes

    loader = loader_of(make_buffer(steps=7), batch_size=32, num_workers=2)
    assert take(loader, 6, len) == [32] * 6
    loader.close()


def fails_at_five(i):
    if i == 5:
        raise KeyError("row 5 is broken")
    return i


def fails_at_the_third(learner):
    made = itertools.count(1)

    def transform(batch):
        if os.getpid() != learner and next(made) == 3:
            raise KeyError("the third is broken")
        return batch

    return transform


def test_worker_exception_reaches_the_loop_with_its_traceback():
    """Facts 11 and 12, feed traps T9 and T11.

    said    a worker's error may stop the loader without saying why; so exceptions need elaborate synchronisation
    torch   type and the worker's traceback come out of the loop; the other 31 batches still arrive; not for data that
            each worker has for itself
    rlfeed  `WorkerError` with worker, draws, traceback; the original is its cause; the shared rows have it, not the
            user
    """
    batches = iter(Forked(Rows(32, fails_at_five), batch_size=1, num_workers=2))
    got, raised = [], []
    while True:
        try:
            got.append(next(batches).item())
        except StopIteration:
            break
        except KeyError as error:
            raised.append(str(error))
    assert got == [i for i in range(32) if i != 5]
    assert len(raised) == 1
    assert "Caught KeyError in DataLoader worker process 1" in raised[0]
    assert "in fails_at_five" in raised[0]

    loader = loader_of(make_buffer(), num_workers=1, transform=fails_at_the_third(os.getpid()))
    batches = iter(loader)
    assert [len(next(batches)) for _ in range(2)] == [10, 10]
    expected = r"(?s)worker 0, batch 2 \(draws 20 .. 29\): KeyError.*the third is broken.*in transform"
    with pytest.raises(errors.WorkerError, match=expected) as caught:
        next(batches)
    assert type(caught.value.__cause__) is KeyError
    loader.close()


class WordedError(Exception):
    """Has an attribute of the name that torch takes for an argument of the constructor."""

    message = "what is said by default"


def fails_in_words(learner):
    def make(batch):
        if os.getpid() != learner:
            raise WordedError("in words")
        return batch

    return make


def test_exception_with_a_message_is_garbled_by_torch_and_kept_here():
    """Fact 11 once more, feed trap T10.

    said    a worker's error may stop the loader without saying why
    torch   an exception whose class has a `message` comes out as a TypeError about its own constructor
    rlfeed  it is the cause of the `WorkerError`
    """
    with pytest.raises(TypeError, match=r"WordedError.* takes no keyword arguments"):
        next(iter(Forked(Rows(1, fails_in_words(os.getpid())), num_workers=1)))

    loader = loader_of(make_buffer(), num_workers=1, transform=fails_in_words(os.getpid()))
    with pytest.raises(errors.WorkerError, match="WordedError: in words") as caught:
        take(loader, 1)
    assert type(caught.value.__cause__) is WordedError
    loader.close()


def unpicklable(batch):
    return lambda: batch


def test_batch_that_cannot_be_pickled_hangs_torch_and_is_an_error_here(capfd):
    """Fact 11, where it is true; feed trap T12.

    said    a worker's error may stop the loader without saying why
    torch   true of what fails behind the worker's back, in the thread that sends: the loop waits for ever, or for
            `timeout`
    rlfeed  an error that says what could not be sent
    """
    with pytest.raises(RuntimeError, match="DataLoader timed out after 1 seconds"):
        next(iter(Forked(Rows(1), num_workers=1, timeout=1, collate_fn=unpicklable)))
    assert "Can't pickle local object" in capfd.readouterr().err  # all that is ever said, and nobody raises it

    loader = loader_of(make_buffer(), num_workers=1, transform=unpicklable)
    with pytest.raises(errors.WorkerError, match="cannot be sent to the learner"):
        take(loader, 1)
    loader.close()


def test_workers_change_copies_of_their_own_unless_memory_is_shared():
    """Facts 13 and 30, feed trap T22.

    said    workers may spoil each other's data; a worker holds a copy of the dataset
    torch   each has its own copy; in shared tensors they can; forked ones the pages as they were: what is written later
            is never seen
    rlfeed  rows have one writer, and a reader sees torn ones and draws again (`test_torn_reads.py`); every row is seen,
            whenever it was added
    """

    def mark(row):
        def make(i):
            row[i] += 1
            return row.clone()

        return make

    row = torch.zeros(4)
    seen = list(Forked(Rows(4, mark(row)), batch_size=None, num_workers=2))
    assert row.sum() == 0
    assert seen[3].tolist() == [0, 1, 0, 1]  # worker 1 made rows 1 and 3, and knows of no other
    row = torch.zeros(4).share_memory_()
    list(Forked(Rows(4, mark(row)), batch_size=None, num_workers=2))
    assert row.sum() == 4

    live = torch.zeros(1)
    batches = iter(Forked(Items(lambda: (live.item() for _ in itertools.count())), batch_size=None, num_workers=1))
    next(batches)
    live += 7
    assert [next(batches) for _ in range(6)] == [0.0] * 6
    del batches

    buffer = make_buffer(steps=6)
    loader = loader_of(buffer, num_workers=2)
    batches = iter(loader)
    assert next(batches).reward.max() < 6
    add_steps(buffer, 6, 3000)
    assert max(next(batches).reward.max().item() for _ in range(6)) > 1000
    loader.close()


# ------------------------------------------------------------------------------------------------------- the page


def test_page_names_every_test_of_facts_and_every_fact_has_one():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "dataloader-facts.md").read_text()
    files = sorted(Path(__file__).parent.glob("test_dataloader_facts*.py"))
    tests = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}
    named = set(re.findall(r"`(test_\w+)`", page))
    everywhere = "\n".join(file.read_text() for file in (root / "tests").rglob("test_*.py"))
    assert tests - named == {"test_page_names_every_test_of_facts_and_every_fact_has_one"}
    assert [name for name in named if f"def {name}(" not in everywhere] == []
    rows = re.findall(r"^\| (\d+) \|.*\|$", page, re.MULTILINE)
    assert [int(row) for row in rows] == list(range(1, 42))
