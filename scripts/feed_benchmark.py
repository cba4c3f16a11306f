"""What the feed costs from the buffer to the learner's process, beside PyTorch's DataLoader and TorchRL's thread."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
from contest import Case, Contest
from contestants import Contestant, Draw, Rlfeed, Sample, padded, transitions
from feed_contestants import COLUMNS, Loading, RlfeedLoader, StockBatches, StockItems, touch
from feed_life import look
from gymnasium.spaces import Box
from peers import TorchRL
from torch import Tensor
from torch.utils.data import DataLoader
from workloads import WrongSampleError, check_padded, check_pixels, check_transitions, make_movie, make_stream

from rlfeed.feed import ReplayDataset, pad_collate
from rlfeed.nest import leaves
from rlfeed.replay import Episode, ReplayBuffer, Sequence, Transition
from rlfeed.types import Batch, Step

ROUND_S = 0.05
REST_S = 0.02
AHEAD = 6  # batches that anybody makes ahead
FIELDS = [field.name for field in fields(Batch) if field.init]
Check = Callable[[Sample], object]
Work = Callable[[Any], Draw]


class FeedBenchmark:
    """Let everybody bring batches into this process.

    Times are of the wall clock, for a consumer that reads one number of each tensor and does nothing else.

    Args:
        contest: Times it.
        rows: Steps held where rows are small; the other sizes follow from it.
    """

    def __init__(self, contest: Contest, rows: int) -> None:
        self._contest, self._rows = contest, rows

    def _compete(
        self,
        title: str,
        own: Mapping[RlfeedLoader, Draw],
        others: list[Contestant],
        work: Work,
        check: Check,
        count: int,
    ) -> None:
        """Measure rlfeed's loaders beside those of others, after five batches of each are found right."""
        draws, notes = {contestant.name: draw for contestant, draw in own.items()}, {}
        for contestant in others:
            draws[contestant.name] = work(contestant)
        try:
            for name, draw in list(draws.items()):
                try:
                    for _ in range(5):
                        check(draw(count))
                except WrongSampleError as reason:
                    notes[name] = f"gives something else: {reason}"
                    del draws[name]
            peers = {contestant.name for contestant in others}
            cases = {
                name: loaded(lambda d=draw: d(count), name in peers and not name.endswith("0 workers"))
                for name, draw in draws.items()
            }
            self._contest.measure(f"{title}; wall clock", cases, notes, round_s=ROUND_S, cpu=time.process_time)
        finally:
            for contestant in (*own, *others):
                if isinstance(contestant, Loading):
                    contestant.close()
            draws.clear()  # torch's workers end with their iterator
            gc.collect()

    def transport(self) -> None:
        """Bring a batch of 16 tensors across a worker process, small and large ones."""
        for floats, count, unit in ((32, 32, Sequence(8)), (1024, 64, Sequence(32))):
            buffer = hold_wide(floats, min(self._rows, 4096))
            tensors = every_tensor(buffer.sample(count, unit))
            queue, stock, own, here = StockBatches(1), StockBatches(1), RlfeedLoader(1), RlfeedLoader(0)
            draws = {
                "rlfeed, 1 worker": own.load(buffer, unit, every_tensor),
                "rlfeed, gathered in this process": here.load(buffer, unit, every_tensor),
                "DataLoader, clones, 1 worker": stock.load(
                    lambda generator, n, t=tensors: {name: tensor.clone() for name, tensor in t.items()}
                ),
                "torch's queue, an empty dict": queue.load(lambda generator, n: {}),
            }
            cases = {name: loaded(lambda d=draw, n=count: d(n), "clones" in name) for name, draw in draws.items()}
            cases |= {f"{name}, already there": waiting(case) for name, case in cases.items() if "1 worker" in name}
            size = sum(tensor.nbytes for tensor in tensors.values())
            title = f"transport of {len(tensors)} tensors, {size / 1e6:.2f} MB; wall clock"
            self._contest.measure(title, cases, round_s=ROUND_S, cpu=time.process_time)
            for loader in (queue, stock, own, here):
                loader.close()
            del draws, cases  # torch's workers end with their iterator
            gc.collect()

    def vectors(self) -> None:
        """Bring 256 transitions of 17 floats and 6 actions."""
        stream = make_stream(self._rows)
        buffer = Rlfeed().hold(stream, self._rows)
        own = {(c := RlfeedLoader(w)): c.load(buffer, Transition(), transitions) for w in (1, 0, 2)}
        others = [StockBatches(1), StockBatches(2), StockBatches(0), StockItems(1), *torchrl()]
        title = f"256 transitions with successors of {self._rows:,}, 42 KB"
        self._compete(
            title, own, others, lambda c: c.uniform(stream), lambda sample: check_transitions(sample, 256), 256
        )

    def plain(self) -> None:
        """Bring the same through torch's DataLoader in one line, by handles and by samples."""
        stream = make_stream(min(self._rows, 100_000))
        buffer, opened = Rlfeed(lanes=1).hold(stream, len(stream)), []

        def line(collate: Callable[..., Any] | None, workers: int) -> Case:
            dataset, context = ReplayDataset(buffer, Transition()), "fork" if workers else None
            loader = DataLoader(
                dataset, batch_size=256, collate_fn=collate, num_workers=workers, multiprocessing_context=context
            )
            opened.append(iter(loader))
            return loaded(lambda batches=opened[-1]: five(next(batches)))

        cases = {
            "pad_collate, 0 workers": line(pad_collate, 0),
            "pad_collate, 1 worker": line(pad_collate, 1),
            "torch's collate of its samples, 0 workers": line(None, 0),
        }
        for stock in (StockItems(0), StockItems(1)):
            draw = stock.uniform(stream)
            cases[stock.name] = loaded(lambda d=draw: d(256), peer=True)
        title = "DataLoader(ReplayDataset(...), batch_size=256), 17 floats, 6 actions; wall clock"
        self._contest.measure(title, cases, round_s=ROUND_S, cpu=time.process_time)
        opened.clear()

    def pixels(self) -> None:
        """Bring 256 stacks of four frames with their successors."""
        movie = make_movie(max(1, self._rows // 20_000), 1000 if self._rows > 100_000 else 50)
        buffer = Rlfeed().hold_movie(movie)
        own = {(c := RlfeedLoader(w)): c.load(buffer, Transition(), transitions) for w in (2, 1, 0)}
        others = [StockBatches(2), StockBatches(1), StockBatches(0), StockItems(2)]
        title = f"256 stacks of 4 x 84 x 84 with successors, of {movie.steps:,} steps, 14 MB"
        self._compete(title, own, others, lambda c: c.pixels(movie), lambda sample: check_pixels(sample, 256), 256)

    def episodes(self) -> None:
        """Bring 64 whole episodes, padded."""
        stream = make_stream(self._rows // 5)
        buffer = Rlfeed().hold(stream, len(stream))
        own = {(c := RlfeedLoader(w)): c.load(buffer, Episode(), padded) for w in (1, 0, 2)}
        others = [StockBatches(1), StockItems(1), StockBatches(0), *torchrl()]
        title = f"64 whole episodes of 5 .. 200 steps, padded, of {len(stream):,} steps"
        self._compete(title, own, others, lambda c: c.episodes(stream), lambda s: check_padded(s, 64, 200), 64)

    def padded(self) -> None:
        """Bring 64 whole episodes of up to 256 steps of 76 floats."""
        stream = make_stream(self._rows // 5, floats=64, actions=11, lengths=(16, 256))
        buffer = Rlfeed(floats=64, actions=11).hold(stream, len(stream))
        own = {(c := RlfeedLoader(w)): c.load(buffer, Episode(), padded) for w in (2, 1, 0)}
        others = [StockItems(2), StockItems(1), StockItems(0), StockBatches(2)]
        title = f"64 x up to 256 x 76 floats, padded, of {len(stream):,} steps"
        self._compete(title, own, others, lambda c: c.episodes(stream), lambda s: check_padded(s, 64, 256), 64)

    def life(self) -> None:
        """Look once at how loaders begin, end and go on, and when they see what is written late."""
        self._contest.tell("a feed's life, looked at once", look())


def loaded(draw: Callable[[], Sample], peer: bool = False) -> Case:
    """Time batch after batch, once what others left under way is over and what was made ahead has been taken.

    Args:
        draw: Gives a batch.
        peer: Whether another library does it, and beside the consumer.

    Returns:
        The case.
    """

    def call() -> None:
        touch(draw())

    def settle() -> None:
        time.sleep(REST_S)
        for _ in range(AHEAD):
            call()

    return Case(call, peer=peer, clock=time.perf_counter, settle=settle)


def waiting(case: Case) -> Case:
    """Time what is left to do for a batch that has been waiting for its consumer.

    Args:
        case: Of `loaded`.

    Returns:
        The case.
    """
    return replace(case, before=lambda: time.sleep(REST_S), most=5, peer=False)


def torchrl() -> list[Contestant]:
    """Take TorchRL in where it is installed.

    Returns:
        TorchRL with a thread that makes one batch ahead, or nobody.
    """
    try:
        contestant = TorchRL(prefetch=1)
    except ImportError:
        return []
    contestant.name = "torchrl, prefetch=1"
    return [contestant]


def hold_wide(floats: int, rows: int) -> ReplayBuffer:
    """Fill a buffer whose sequences have 16 tensors: what a recurrent learner takes.

    Args:
        floats: Numbers in an observation.
        rows: Steps, all of one episode.

    Returns:
        The buffer.
    """
    spaces = Box(-1, 1, (floats,), np.float32), Box(-1, 1, (2,), np.float32)
    buffer = ReplayBuffer(*spaces, capacity=rows + 8, extras={"value": Box(-np.inf, np.inf, (), np.float32)})
    no, zero = np.zeros(1, bool), np.zeros(1, np.float32)
    action, observation = np.zeros((1, 2), np.float32), np.ones((1, floats), np.float32)
    for t in range(rows):
        first = np.array([t == 0])
        buffer.add(Step(observation, action, zero, observation, no, no, is_first=first, extras={"value": zero}))
    return buffer


def every_tensor(batch: Batch) -> Sample:
    """Name all tensors of a batch.

    Args:
        batch: From a buffer.

    Returns:
        The tensors.
    """
    found: Sample = {}
    for name in FIELDS:
        nest = getattr(batch, name)
        if isinstance(nest, Tensor):
            found[name] = nest
        elif nest:
            found |= {f"{name}{path}": leaf for path, leaf in leaves(nest)}
    return found


def five(batch: Any) -> Sample:
    """Name the fields of transitions, of a `Batch` or a mapping.

    Args:
        batch: From a loader.

    Returns:
        The fields.
    """
    return transitions(batch) if isinstance(batch, Batch) else {name: batch[name] for name in COLUMNS}
