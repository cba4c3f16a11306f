"""The demonstration: one stream of prioritized batches, whatever happens to those who make it."""

import hashlib
import os
import signal

import numpy as np
import pytest
from support.worker_loaders import add, buffer_of, loader_of

from rlfeed.replay import Prioritized, ReplayBuffer, Sequence


def train(count, workers, *, kill_every=0, resume_at=None, directory=None, then=0):
    """Learn from a buffer that grows and turns over: hash every batch, give its priorities back, add steps.

    Workers are killed as often as asked; at one batch everything is saved, loaded, and gone on with by other workers.
    """
    options = {"unit": Sequence(4, burn_in=2), "batch_size": 16, "on_worker_death": "restart"}
    buffer, digest = buffer_of(capacity=6000, rows=500, sampler=Prioritized()), hashlib.sha256()
    loader = loader_of(buffer, workers=workers, **options)
    batches, generator = iter(loader), np.random.default_rng(workers)
    for number in range(count):
        batch = next(batches)
        for tensor in (batch.ids, batch.reward, batch.observation, batch.weights, batch.mask):
            digest.update(tensor.numpy().tobytes())
        loader.update_priorities(batch, np.abs(np.sin(batch.ids.numpy() % 1000 + number)) + 0.01)
        add(buffer, 500 + number, 501 + number)
        if kill_every and number % kill_every == kill_every - 1:
            process = loader._making.gatherer._processes[generator.integers(loader.num_workers)]
            os.kill(process.pid, signal.SIGKILL)
        if number == resume_at:
            buffer.save(directory)
            loader.close()
            buffer = ReplayBuffer.load(directory)
            loader = loader_of(buffer, workers=then, **options)
            batches = iter(loader)
    loader.close()
    return digest.hexdigest()


def test_prioritized_batches_are_the_same_through_kills_and_a_resume(tmp_path):
    wanted = train(150, 0)
    assert train(150, 2, kill_every=40, resume_at=80, directory=tmp_path / "saved", then=1) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_ten_thousand_prioritized_batches_are_the_same_through_kills_and_a_resume(workers, tmp_path):
    wanted = train(10_000, 0)
    again = train(10_000, workers, kill_every=100, resume_at=5000, directory=tmp_path / "saved", then=5 - workers)
    assert again == wanted
