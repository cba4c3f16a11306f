"""Stop at any draw, go on with any number of workers: the batches are those of the run that never stopped."""

import collections
import itertools
import pickle

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from support.worker_loaders import add, buffer_of, loader_of

from rlfeed.feed import make_loader
from rlfeed.replay import Episode, Mixture, Prioritized, Recent, ReplayBuffer, Sequence, Transition, Uniform
from rlfeed.types import Step

UNITS = {"transition": Transition(n_step=2), "sequence": Sequence(5, burn_in=1), "episode": Episode(max_length=8)}
SAMPLERS = {
    "uniform": lambda: Uniform(),
    "prioritized": lambda: Prioritized(),
    "recent": lambda: Recent(half_life=20),
    "mixture": lambda: Mixture({Uniform(): 0.5, Prioritized(): 0.5}),
}


class Run:
    """A learner that reads, writes priorities back and adds steps, the same whenever it is asked for batch n."""

    def __init__(self, unit, sampler, capacity=2100, grow=1):
        self.unit, self.sampler, self.grow, self.at, self.seen = unit, sampler, grow, 0, []
        self.buffer = buffer_of(capacity, rows=1000, sampler=SAMPLERS[sampler]())

    def loader(self, workers, **kwargs):
        return loader_of(self.buffer, self.unit, workers, **kwargs)

    def go_on(self, loader, batches, source=None):
        for batch in itertools.islice(source or loader, batches):
            weights = None if batch.weights is None else batch.weights.tolist()
            self.seen.append((batch.ids.tolist(), batch.reward.tolist(), weights))
            if self.sampler in ("prioritized", "mixture"):
                loader.update_priorities(batch, np.random.default_rng(self.at).uniform(0, 5, len(batch)))
            add(self.buffer, 1000 + self.grow * self.at, 1000 + self.grow * (self.at + 1))
            self.at += 1


LIGHT = [("transition", "uniform"), ("sequence", "prioritized"), ("episode", "recent"), ("sequence", "mixture")]
HEAVY = [pair for pair in itertools.product(UNITS, SAMPLERS) if pair not in LIGHT]


@pytest.mark.parametrize(
    ("unit", "sampler"), [*LIGHT, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in HEAVY)]
)
def test_run_that_stops_at_random_draws_and_resumes_with_other_workers_never_differs(unit, sampler, tmp_path):
    """I6, I10, feed trap T39: a ring that turns over, so what was drawn before the stop may be overwritten after it."""
    whole = Run(UNITS[unit], sampler)
    whole.go_on(whole.loader(0), 24)

    generator = np.random.default_rng([len(unit), len(sampler)])
    run, state = Run(UNITS[unit], sampler), None
    while run.at < 24:
        workers, way = int(generator.integers(0, 5)), generator.choice(["state", "save", "close"])
        with run.loader(workers) as loader:
            if state is not None:
                loader.load_state_dict(state)
            run.go_on(loader, min(24 - run.at, int(generator.integers(1, 9))))
            state = pickle.loads(pickle.dumps(loader.state_dict())) if way != "save" else None
            if way == "save":
                run.buffer.save(tmp_path / str(run.at))
        if way == "save":
            run.buffer = ReplayBuffer.load(tmp_path / str(run.at))
        assert run.seen == whole.seen[: run.at], (workers, way)


@pytest.mark.parametrize("sampler", ["uniform", "recent"])
@pytest.mark.parametrize("unit", UNITS)
def test_state_can_be_had_while_what_was_drawn_is_overwritten(unit, sampler):
    """A lane of 35 rows that turns over while five batches are under way: their ids are saved then."""
    run = Run(UNITS[unit], sampler, capacity=70, grow=3)
    loader = run.loader(0)
    for _ in range(6):
        run.go_on(loader, 1)
        assert set(loader.state_dict()) == {"key", "batch_size", "batch", "entries"}


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("ahead", [0, 4])
@pytest.mark.parametrize("way", ["state", "save"])
def test_what_was_drawn_before_a_stop_outlives_steps_that_are_added_after_it(workers, ahead, way, tmp_path):
    """Also before the first batch is asked for, and with batches that a `DeviceFeed` had taken and not handed over."""

    def start():
        run = Run(UNITS["transition"], "uniform", capacity=70, grow=0)
        add(run.buffer, 1000, 1028)
        return run

    def take(run, loader, count, begin):
        """Take batches as a feed does that has ``ahead`` more of them in its hands."""
        loader.attach(depth=ahead)
        batches, held = iter(loader), collections.deque()
        for _ in range(count):
            while len(held) <= ahead:
                held.append(next(batches))
                loader.batches_ahead = len(held)
            batch = held.popleft()
            loader.batches_ahead = len(held)
            run.seen.append((batch.ids.tolist(), batch.reward.tolist()))
            if len(run.seen) >= begin:
                add(run.buffer, 0, 21)

    whole = start()
    take(whole, whole.loader(0), 24, begin=10)

    run = start()
    loader = run.loader(2)
    take(run, loader, 10, begin=11)
    if way == "save":
        run.buffer.save(tmp_path / "buffer")
        run.buffer = ReplayBuffer.load(tmp_path / "buffer")
    again = run.loader(workers)
    if way == "state":
        again.load_state_dict(loader.state_dict())
    loader.close()
    again.attach(depth=ahead)
    add(run.buffer, 0, 21)  # now, before any batch is asked for
    take(run, again, 14, begin=10)
    again.close()
    assert run.seen == whole.seen


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_buffers_that_are_mixed_resume_with_any_number_of_workers(workers):
    def made():
        runs = [Run(UNITS["transition"], name) for name in ("uniform", "prioritized")]
        return runs, [(runs[0].buffer, 0.25), (runs[1].buffer, 0.75)]

    def go_on(runs, loader, batches):
        for batch in itertools.islice(loader, batches):
            loader.update_priorities(batch, np.random.default_rng(runs[0].at).uniform(0, 5, len(batch)))
            seen.append((batch.ids.tolist(), batch.source.tolist(), batch.reward.tolist(), batch.weights.tolist()))
            for run in runs:
                add(run.buffer, 1000 + run.at, 1001 + run.at)
                run.at += 1

    def loader_of(parts, workers):
        loader = make_loader(parts, UNITS["transition"], batch_size=6, num_workers=workers, seed=5)
        if workers:
            loader.multiprocessing_context = "fork"
        return loader

    seen = []
    runs, parts = made()
    go_on(runs, loader_of(parts, 0), 18)
    whole, seen = seen, []
    runs, parts = made()
    state = None
    for count, batches in ((2, 7), (workers, 6), (4, 5)):
        with loader_of(parts, count) as loader:
            if state is not None:
                loader.load_state_dict(pickle.loads(pickle.dumps(state)))
            go_on(runs, loader, batches)
            state = loader.state_dict()
    assert seen == whole


@pytest.mark.parametrize(("lanes", "batch_size"), [(1, 4096), (64, 256)])
def test_state_without_priorities_is_at_most_4_kib(lanes, batch_size):
    """Feed trap T39."""
    space = Box(-np.inf, np.inf, (1,), np.float32)
    buffer = ReplayBuffer(space, Discrete(9), capacity=200 * lanes, num_envs=lanes)
    loader = make_loader(buffer, Transition(), batch_size=batch_size, lookahead=4)
    batches, no = iter(loader), np.zeros(lanes, bool)
    for i in range(90):
        observation, first = np.full((lanes, 1), i, np.float32), np.full(lanes, i == 0)
        rewards, actions = np.full(lanes, i, np.float32), np.full(lanes, i % 9)
        buffer.add(Step(observation, actions, rewards, observation + 1, no, no, is_first=first))
        if i > 1:
            next(batches)
            assert len(pickle.dumps(loader.state_dict())) <= 4096
