"""A user's own generator function in a DataLoader: shares, seeds, shuffling, and what is refused."""

import functools
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import rlfeed
from rlfeed.errors import ConfigError, WorkerError
from rlfeed.feed import cycle, stream

COUNT = 23


def share(worker_id, num_workers, seed):
    """This worker's share of 0 .. COUNT - 1."""
    yield from range(worker_id, COUNT, num_workers)


def endless(worker_id, num_workers, seed):
    yield from itertools.count(worker_id, num_workers)


def noise(worker_id, num_workers, seed):
    generator = np.random.default_rng(seed)
    yield from generator.integers(1 << 62, size=3).tolist()


def batches(worker_id, num_workers, seed):
    for i in range(worker_id, 4, num_workers):
        yield {"x": np.full((2, 3), i, np.float32)}


def careless(worker_id, num_workers, seed):
    yield 1
    yield next(iter([]))  # feed trap T28: a StopIteration by mistake
    yield 2


class OnlyIter:
    def __iter__(self):
        return iter(range(3))


class Counter:
    """An iterator that is no generator."""

    def __init__(self, worker_id, num_workers, seed):
        self.left = 3

    def __iter__(self):
        return self

    def __next__(self):
        self.left -= 1
        return self.left


def double(item):
    return item * 2


def as_tensor(item):
    return torch.as_tensor(item["x"]).sum()


def fork(dataset, num_workers, **options):
    context = {"multiprocessing_context": "fork"} if num_workers else {}
    return DataLoader(dataset, num_workers=num_workers, **context, **({"batch_size": None} | options))


def test_stream_is_public_and_an_iterable_dataset():
    assert rlfeed.stream is stream
    assert isinstance(stream(share), IterableDataset)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream_finite_each_item_once_in_every_pass(num_workers):
    """Feed trap T2: a stock IterableDataset repeats every item in every worker; a generator is used up in one pass."""
    loader = fork(stream(share), num_workers)
    for _ in range(2):
        assert sorted(loader) == list(range(COUNT))


def test_stream_infinite_goes_on():
    loader = fork(stream(endless), 2, batch_size=5)
    first = list(itertools.islice(loader, 4))
    assert [len(batch) for batch in first] == [5] * 4
    assert sorted(torch.cat(first).tolist()) == list(range(20))


def test_stream_of_whole_batches_keeps_their_shape():
    """Feed.md 1.3: (2, 3), not a batch of batches."""
    given = list(fork(stream(batches), 0))
    assert [tuple(batch["x"].shape) for batch in given] == [(2, 3)] * 4


def test_stream_seeds_differ_by_worker_and_pass_whatever_the_global_state_is():
    """Feed traps T4, T5 and T6: equal NumPy states in workers; one seed in all epochs; the global state consumed."""
    draws = {}
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)  # noqa: NPY002 - that is the point
        loader = fork(stream(noise, seed=7), 2, persistent_workers=True)
        draws[global_seed] = [sorted(loader) for _ in range(3)]
    assert draws[0] == draws[1]
    flat = [value for turn in draws[0] for value in turn]
    assert len(flat) == len(set(flat)) == 3 * 2 * 3
    assert not set(flat) & set(fork(stream(noise, seed=8), 0))
    before = torch.get_rng_state()
    list(stream(noise))
    assert torch.equal(torch.get_rng_state(), before)


def test_stream_transform_is_applied_to_each_item_in_the_worker():
    assert list(stream(share, transform=double)) == [2 * i for i in range(COUNT)]
    assert [float(x) for x in fork(stream(batches, transform=as_tensor), 1)] == [0.0, 6.0, 12.0, 18.0]


@pytest.mark.parametrize("size", [1, 4, COUNT, 100])
def test_stream_shuffle_buffer_each_item_once_and_none_earlier_than_the_buffer_allows(size):
    given = list(stream(share, shuffle_buffer=size, seed=3))
    assert sorted(given) == list(range(COUNT))
    assert given == list(stream(share, shuffle_buffer=size, seed=3))
    assert (given == list(range(COUNT))) == (size == 1)
    assert all(item <= place + size for place, item in enumerate(given))
    assert given != list(stream(share, shuffle_buffer=size, seed=4)) or size == 1


def test_stream_shuffle_buffer_as_large_as_the_stream_is_uniform():
    """Which of four items comes first: 400 passes, 100 times each."""
    dataset = stream(functools.partial(limited, 4), shuffle_buffer=4)
    first = np.bincount([next(iter(dataset)) for _ in range(400)], minlength=4)
    assert ((first - 100) ** 2 / 100).sum() < 3 + 5 * np.sqrt(6) + 5  # chi-square, 5 standard deviations


def limited(count, worker_id, num_workers, seed):
    yield from range(count)


def test_stream_shuffle_buffer_order_differs_between_passes():
    dataset = stream(share, shuffle_buffer=8)
    assert list(dataset) != list(dataset)


def test_stream_stop_iteration_by_mistake_is_an_error():
    """Feed trap T28: in an iterator that is no generator it silently ends that worker's stream."""
    for dataset in (stream(careless), stream(careless, shuffle_buffer=2)):
        with pytest.raises(WorkerError, match=r"raised StopIteration in worker 0; .* give it a default"):
            list(fork(dataset, 0))


def test_stream_other_errors_come_as_they_are():
    def transform(item):
        raise RuntimeError(f"item {item}")

    with pytest.raises(RuntimeError, match="item 0") as caught:
        list(stream(share, transform=transform))
    assert type(caught.value) is RuntimeError


def test_stream_stop_iteration_in_the_transform_is_an_error():
    def transform(item):
        raise StopIteration

    with pytest.raises(WorkerError, match="raised StopIteration in worker 0"):
        list(stream(share, transform=transform))


@pytest.mark.parametrize(
    ("factory", "match"),
    [
        (share(0, 1, 0), "factory is a generator, .* expected a generator function, .* Give the function itself"),
        (OnlyIter(), "factory is OnlyIter, which has __iter__; .* Give a function that yields from it"),
        (OnlyIter, "factory is OnlyIter, which has __iter__; .* Give a function that yields from it"),
        (Counter, "factory is Counter, which has __iter__; .* Give a function that yields from it"),
        ([1, 2], "factory is list, which has __iter__"),
        (7, "factory is a int; expected a generator function"),
        (lambda: iter(()), "does not take three arguments"),
        (lambda worker_id: iter(()), "does not take three arguments"),
    ],
)
def test_stream_what_is_no_generator_function_is_refused_with_the_fix(factory, match):
    """Feed.md 1.3: each of these fails in a stock DataLoader late, or gives wrong data."""
    with pytest.raises(ConfigError, match=match):
        stream(factory)


def test_stream_wrong_arguments_are_all_named():
    with pytest.raises(ConfigError, match=r"transform is a int; .* shuffle_buffer is -1; .* seed is 0.5; expected"):
        stream(share, transform=3, shuffle_buffer=-1, seed=0.5)


@pytest.mark.parametrize("returned", [lambda *_: iter([1]), lambda *_: map(double, [1]), lambda *_: None])
def test_stream_factory_that_returns_no_generator_is_refused(returned):
    with pytest.raises(ConfigError, match=r"factory returned a .*; expected a generator"):
        next(iter(stream(returned)))


@pytest.mark.parametrize("options", [{"factory": lambda *_: share(*_)}, {"factory": share, "transform": lambda x: x}])
def test_stream_lambda_is_refused_where_it_would_have_to_be_pickled(options):
    """Feed trap T21."""
    loader = DataLoader(stream(**options), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    with pytest.raises(ConfigError, match=r"cannot be sent to another process; .* multiprocessing_context=.fork."):
        iter(loader)
    assert list(fork(stream(**options), 1)) == list(range(COUNT))  # a forked worker has it already


def test_stream_functions_of_a_module_can_be_sent_to_another_process():
    dataset = stream(functools.partial(limited, 3), transform=double)
    assert list(pickle.loads(pickle.dumps(dataset))) == [0, 2, 4]


def test_cycle_over_persistent_workers_begins_each_pass_anew():
    loader = fork(stream(share), 2, persistent_workers=True)
    given = list(itertools.islice(cycle(loader), 2 * COUNT + 3))
    assert sorted(given[:COUNT]) == sorted(given[COUNT : 2 * COUNT]) == list(range(COUNT))


def test_cycle_error_of_the_loader_reaches_the_caller():
    given = cycle(stream(careless))
    assert next(given) == 1
    with pytest.raises(RuntimeError, match="StopIteration"):
        next(given)
