"""Streams beside the infinite one: a finite loader that goes on for ever, and a user's own generator."""

import inspect
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from rlfeed.errors import ConfigError, WorkerError
from rlfeed.feed.turns import Turns
from rlfeed.replay.samplers import stream_key, subkey

Factory = Callable[[int, int, int], Generator[Any, None, None]]
_WANTED = "expected a generator function, called as factory(worker_id, num_workers, seed) once in each worker"


def cycle(loader: Iterable[Any]) -> Iterator[Any]:
    """Go through a finite loader again and again; each pass is a new iterator of it.

    Args:
        loader: Anything that can be iterated over more than once, and gives at least one batch.

    Yields:
        Its batches, for ever.

    Raises:
        ConfigError: If a pass gives nothing: it would turn in circles for ever.
    """
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ConfigError(
                f"cycle: a pass over the {type(loader).__name__} gave nothing; expected at least one batch. An "
                "iterator can be gone through only once: give the loader itself."
            )


def stream(
    factory: Factory,
    *,
    transform: Callable[[Any], Any] | None = None,
    shuffle_buffer: int = 0,
    seed: int = 0,
) -> "Stream":
    """Make an `IterableDataset` of a generator function, for torch's `DataLoader`.

    Args:
        factory: Called as ``factory(worker_id, num_workers, seed)``, once in each worker for each pass (0, 1 and a seed
            without workers). It returns a generator, finite or not, of this worker's share of the items. The seed, 0 ..
            2^63 - 1, is another one in every worker and every pass, and does not depend on the global random state.
        transform: Applied to each item, in the worker.
        shuffle_buffer: Items kept back to give them in random order: each that comes takes the place of one drawn at
            random, which is given; the rest follows at the end. 0 keeps the order.
        seed: Of the factory's seeds and of the random order, >= 0.

    Returns:
        The dataset. Where items are whole batches, give the loader ``batch_size=None``. A StopIteration by mistake is a
        `WorkerError`, and not the end.

    Raises:
        ConfigError: If the factory is no such function, or an argument is wrong; all findings at once.
    """
    wrong = _faults(factory)
    if transform is not None and not callable(transform):
        wrong.append(f"transform is a {type(transform).__name__}; expected a function of one item")
    for name, value in (("shuffle_buffer", shuffle_buffer), ("seed", seed)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
            wrong.append(f"{name} is {value!r}; expected an int >= 0")
    if wrong:
        raise ConfigError(f"stream: {'; '.join(wrong)}.")
    return Stream(factory, transform, int(shuffle_buffer), int(seed))


class Stream(IterableDataset[Any]):
    """Run a generator function in each worker; made by `stream`.

    Args:
        factory: The function.
        transform: Applied to each item.
        shuffle_buffer: Items kept back.
        seed: Of the seeds.
    """

    def __init__(
        self, factory: Factory, transform: Callable[[Any], Any] | None, shuffle_buffer: int, seed: int
    ) -> None:
        self._factory, self._transform, self._shuffle_buffer, self._seed = factory, transform, shuffle_buffer, seed
        self._turns = Turns()

    def __getstate__(self) -> dict[str, Any]:
        for name, function in (("factory", self._factory), ("transform", self._transform)):
            if _is_local(function):
                raise ConfigError(
                    f"stream: {name} is {function!r}, which cannot be sent to another process; expected a function "
                    "that a module defines by name. Define it with def outside of functions, or give the DataLoader "
                    "multiprocessing_context='fork'."
                )
        return self.__dict__

    def __iter__(self) -> Iterator[Any]:
        worker, (turn, _) = get_worker_info(), self._turns.begin()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        key = stream_key(self._seed, "stream", rank=worker_id, turn=turn)
        items = self._factory(worker_id, num_workers, key & (1 << 63) - 1)
        if not inspect.isgenerator(items):
            raise ConfigError(
                f"stream: factory returned a {type(items).__name__}; expected a generator: in anything else a "
                "StopIteration by mistake would end the stream in silence. Write a function with yield, such as "
                "def factory(worker_id, num_workers, seed): yield from ..."
            )
        items = self._shuffled(items, subkey(key, 0)) if self._shuffle_buffer else items
        try:
            for item in items:
                yield item if self._transform is None else self._transform(item)
        except (StopIteration, RuntimeError) as error:  # Python makes a RuntimeError of one that leaves a generator
            if isinstance(error, StopIteration) or isinstance(error.__cause__, StopIteration):
                raise WorkerError(
                    f"stream: factory or transform raised StopIteration in worker {worker_id}; expected items, and the "
                    "end of the generator at its end. Where it calls next(), give it a default."
                ) from error
            raise

    def _shuffled(self, items: Iterable[Any], key: int) -> Iterator[Any]:
        generator = np.random.Generator(np.random.Philox(key=key & (1 << 64) - 1))
        kept: list[Any] = []
        for item in items:
            if len(kept) == self._shuffle_buffer:
                place = int(generator.integers(len(kept)))
                yield kept[place]
                kept[place] = item
            else:
                kept.append(item)
        for place in generator.permutation(len(kept)):
            yield kept[place]


def _faults(factory: Any) -> list[str]:
    """Say why something is no factory, and what to give instead."""
    name = type(factory).__name__
    if inspect.isgenerator(factory):
        return [f"factory is a generator, which one worker alone could use up; {_WANTED}. Give the function itself"]
    if inspect.isclass(factory) or (not callable(factory) and hasattr(factory, "__iter__")):
        name = factory.__name__ if inspect.isclass(factory) else name
        return [f"factory is {name}, which has __iter__; {_WANTED}. Give a function that yields from it"]
    if not callable(factory):
        return [f"factory is a {name}; {_WANTED}"]
    try:
        inspect.signature(factory).bind(0, 1, 0)
    except TypeError as error:
        return [f"factory does not take three arguments ({error}); {_WANTED}"]
    except ValueError:  # built-in functions do not say what they take
        pass
    return []


def _is_local(function: Any) -> bool:
    """Tell whether another process could not find a function by its name."""
    return "<" in getattr(getattr(function, "func", function), "__qualname__", "")  # <lambda>, <locals>
