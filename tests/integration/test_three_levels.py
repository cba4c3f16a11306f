"""The three ways to read a buffer give the same batches while it rests, for any number of workers, however started."""

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete
from torch.utils.data import DataLoader

from rlfeed.feed import ReplayDataset, make_loader, pad_collate
from rlfeed.nest import leaves
from rlfeed.replay import Episode, ReplayBuffer, Sequence, Transition
from rlfeed.types import Step

UNITS = [Transition(n_step=3), Sequence(6, burn_in=2), Episode()]
SIZE, COUNT = 5, 8


@pytest.fixture(scope="module")
def buffer():
    """Rows that name their lane and step; episodes of 3 to 9 steps; the oldest ones overwritten."""
    space = Dict({"place": Box(-np.inf, np.inf, (2,), np.float32), "picture": Box(0, 255, (3, 3), np.uint8)})
    buffer = ReplayBuffer(space, Discrete(5), capacity=240, num_envs=3)
    begins, lengths = np.zeros(3, int), np.array([3, 5, 9])

    def observe(t):
        place = np.stack([np.arange(3), np.full(3, t)], axis=1).astype(np.float32)
        return {"place": place, "picture": np.full((3, 3, 3), t % 251, np.uint8)}

    for t in range(200):
        ends = t - begins == lengths - 1
        buffer.add(
            Step(
                observe(t), np.full(3, t % 5), np.arange(3) * 1000.0 + t, observe(t + 1),
                ends & (np.arange(3) != 1), ends & (np.arange(3) == 1), is_first=t == begins,
            )
        )  # fmt: skip
        begins[ends] = t + 1
    return buffer


def read(batches):
    """Everything in a batch, by name."""
    seen = []
    for _, batch in zip(range(COUNT), batches, strict=False):
        names = ("observation", "action", "reward", "terminated", "truncated", "discount", "ids", "weights")
        names += ("next_observation", "mask", "loss_mask", "lengths", "is_first", "burn_in")
        seen.append(
            {
                (name, path): leaf.tolist()
                for name in names
                if getattr(batch, name) is not None
                for path, leaf in leaves(getattr(batch, name))
            }
        )
    return seen


def levels(buffer, unit, workers, method):
    context = method if workers else None
    single = ReplayDataset(buffer, unit, seed=7)
    loader = DataLoader(
        single, batch_size=SIZE, collate_fn=pad_collate, num_workers=workers, multiprocessing_context=context
    )
    yield read(loader)
    whole = ReplayDataset(buffer, unit, batch_size=SIZE, seed=7)
    yield read(DataLoader(whole, batch_size=None, num_workers=workers, multiprocessing_context=context))
    with make_loader(buffer, unit, batch_size=SIZE, num_workers=workers, seed=7) as ring:
        if workers:
            ring.multiprocessing_context = context
        yield read(ring)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: type(unit).__name__)
def test_levels_give_the_same_batches(buffer, unit, workers):
    wanted = list(levels(buffer, unit, 0, None))
    assert wanted[0] == wanted[1] == wanted[2]
    assert all(found == wanted[0] for found in levels(buffer, unit, workers, "fork"))
    assert len({str(batch) for batch in wanted[0]}) == COUNT


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's workers, spawned, at their end
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: type(unit).__name__)
def test_levels_give_the_same_batches_however_workers_start(buffer, unit, workers, method):
    wanted = next(levels(buffer, unit, 0, None))
    assert all(found == wanted for found in levels(buffer, unit, workers, method))
