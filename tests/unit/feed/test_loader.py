"""`make_loader`: draws made in the learner, for any number of workers, on a growing buffer, resumed, limited, mixed."""

import multiprocessing
import time

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch.utils.data import DataLoader

from rlfeed import errors
from rlfeed.feed import ReplayDataset, make_loader, pad_collate
from rlfeed.replay import Episode, Limiter, Mixture, Prioritized, Recent, ReplayBuffer, Sequence, Transition, Uniform
from rlfeed.types import Step

SPACE = Box(-np.inf, np.inf, (1,), np.float32)


def buffer_of(capacity=400, sampler=Uniform(), num_envs=2, storage="shared", **kwargs):  # noqa: B008
    return ReplayBuffer(
        SPACE, Discrete(9), capacity=capacity, num_envs=num_envs, sampler=sampler, storage=storage, **kwargs
    )


def step(i, num_envs=2, length=7, base=0.0, **kwargs):
    def column(value, dtype):
        return np.full(num_envs, value, dtype)

    observation = np.full((num_envs, 1), base + i, np.float32)
    return Step(
        observation, column(i % 9, np.int64), column(base + i, np.float32), observation + 1,
        column(i % length == length - 1, bool), column(False, bool), is_first=column(i % length == 0, bool), **kwargs,
    )  # fmt: skip


def fill(buffer, begin, end, **kwargs):
    for i in range(begin, end):
        buffer.add(step(i, buffer.num_envs, **kwargs))


def train(buffer, loader, begin, end, number=0):
    """A learner: take a batch, give priorities back, add two steps; what it saw, as plain numbers."""
    seen, batches = [], iter(loader)
    for i in range(begin, end):
        batch = next(batches)
        seen.append((batch.ids.tolist(), batch.reward.tolist(), batch.weights.tolist()))
        if isinstance(buffer.sampler, Prioritized):
            loader.update_priorities(batch, np.random.default_rng(i).uniform(0, 5, len(batch)))
        fill(buffer, 2 * i, 2 * i + 2)
    return seen


SAMPLERS = [Uniform(), Prioritized(), Recent(50.0), Mixture({Uniform(): 0.5, Prioritized(): 0.5})]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
@pytest.mark.parametrize("unit", [Transition(n_step=2), Sequence(3)], ids=lambda unit: type(unit).__name__)
def test_batches_do_not_depend_on_the_number_of_workers_on_a_growing_buffer(sampler, unit):
    seen = []
    for workers in (0, 1, 2):
        buffer = buffer_of(sampler=sampler)
        fill(buffer, 0, 60)
        loader = make_loader(buffer, unit, batch_size=6, num_workers=workers, seed=5)
        seen.append(train(buffer, loader, 30, 55))
        loader.close()
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_batches_do_not_depend_on_how_workers_are_started(context):
    def batches(workers):
        buffer, online = buffer_of(sampler=Prioritized()), buffer_of()
        fill(buffer, 0, 60)
        fill(online, 0, 80)
        loader = make_loader([(buffer, 0.5), (online, 0.5)], Sequence(3), batch_size=6, num_workers=workers, seed=5)
        loader.multiprocessing_context = context if workers else None
        seen = train(buffer, loader, 30, 36)
        loader.close()
        return seen

    assert batches(1) == batches(0)


def test_iterator_goes_on_after_an_error_and_ends_when_another_begins():
    buffer = buffer_of()
    calls = []

    def fragile(batch):
        calls.append(len(calls))
        if len(calls) == 3:
            raise ValueError("once")
        return batch

    loader = make_loader(buffer, Transition(), batch_size=4, transform=fragile)
    batches = iter(loader)
    with pytest.raises(errors.NotEnoughDataError):
        next(batches)
    fill(buffer, 0, 30)
    seen = [next(batches).ids.tolist() for _ in range(2)]
    with pytest.raises(ValueError, match="once"):
        next(batches)
    seen += [next(batches).ids.tolist() for _ in range(2)]
    again = make_loader(buffer, Transition(), batch_size=4)
    assert seen[:2] == [next(iter(again)).ids.tolist() for _ in range(2)]
    other = iter(loader)
    next(other)
    with pytest.raises(errors.ConfigError, match="another one began"):
        next(batches)
    loader.close()
    with pytest.raises(errors.ConfigError, match="was closed"):
        next(other)


def test_state_of_other_draws_is_refused():
    buffer = buffer_of()
    fill(buffer, 0, 60)
    loader = make_loader(buffer, Transition(), batch_size=4, lookahead=40)
    next(iter(loader))
    for options, wrong in (
        ({"batch_size": 1}, "batch_size"),
        ({"batch_size": 4, "seed": 1}, "key"),
        ({"batch_size": 4, "lookahead": 2}, "lookahead"),
    ):
        with pytest.raises(errors.CheckpointError, match=f"another {wrong}"):
            make_loader(buffer, Transition(), **options).load_state_dict(loader.state_dict())


def test_another_loader_does_not_lift_a_limiter():
    buffer = buffer_of(num_envs=1)
    loader = make_loader(buffer, Transition(), batch_size=8, limiter=Limiter(1.0, min_size=5, tolerance=0))
    fill(buffer, 0, 5)
    make_loader(buffer, Transition(), batch_size=8, seed=1).close()
    next(iter(loader))
    with pytest.raises(errors.NotEnoughDataError, match="expected 8 more steps"):
        next(iter(loader))
    with buffer.bypass_limiter(), buffer.bypass_limiter():
        fill(buffer, 5, 25)
    with pytest.raises(errors.NotEnoughDataError, match="expected 8 more steps"):
        next(iter(loader))


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("after", [0, 1])
def test_resume_goes_on_with_the_very_next_batch_also_those_drawn_ahead(tmp_path, before, after):
    """Draws that were under way were made on an older buffer: they come back as they were, by another kind of feed."""
    buffer = buffer_of(sampler=Prioritized())
    fill(buffer, 0, 60)
    loader = make_loader(buffer, Transition(), batch_size=6, num_workers=before, seed=5)
    train(buffer, loader, 30, 45)
    buffer.save(tmp_path / "saved")
    state = loader.state_dict()
    assert (state["batch"], len(state["entries"])) == (15, 4)
    expected = train(buffer, loader, 45, 60)
    restored = ReplayBuffer.load(tmp_path / "saved")
    other = make_loader(restored, Transition(), batch_size=6, num_workers=after, seed=5)
    other.load_state_dict(state)
    assert train(restored, other, 45, 60) == expected


def test_draws_are_saved_with_the_buffer_and_a_loader_made_alike_goes_on(tmp_path):
    buffer = buffer_of(sampler=Prioritized())
    fill(buffer, 0, 60)
    loader = make_loader(buffer, Transition(), batch_size=6, seed=5)
    train(buffer, loader, 30, 45)
    buffer.save(tmp_path / "saved")
    expected = train(buffer, loader, 45, 60)
    restored = ReplayBuffer.load(tmp_path / "saved")
    assert train(restored, make_loader(restored, Transition(), batch_size=6, seed=5), 45, 60) == expected
    other = make_loader(restored, Transition(), batch_size=6, seed=6)  # another stream begins at its beginning
    assert other.stats().drawn == 0


def test_the_three_levels_give_the_same_batches_on_a_buffer_at_rest():
    buffer = buffer_of()
    fill(buffer, 0, 100)
    for unit in (Transition(), Sequence(4), Episode()):
        plain = iter(DataLoader(ReplayDataset(buffer, unit, seed=3), batch_size=5, collate_fn=pad_collate))
        whole = iter(DataLoader(ReplayDataset(buffer, unit, batch_size=5, seed=3), batch_size=None))
        ring = iter(make_loader(buffer, unit, batch_size=5, seed=3))
        for _ in range(6):
            ids = [next(level).ids.tolist() for level in (plain, whole, ring)]
            assert ids[0] == ids[1] == ids[2]


def test_ranks_and_seeds_have_draws_of_their_own():
    buffer = buffer_of()
    fill(buffer, 0, 100)
    streams = [
        next(iter(make_loader(buffer, Transition(), batch_size=30, seed=seed, rank=rank))).ids.tolist()
        for seed, rank in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(stream) for stream in streams}) == 3


def test_stats_account_for_every_draw():
    """I7: drawn = delivered + in flight."""
    buffer = buffer_of()
    fill(buffer, 0, 50)
    loader = make_loader(buffer, Transition(), batch_size=8, lookahead=3)
    batches = iter(loader)
    for delivered in range(1, 6):
        next(batches)
        stats = loader.stats()
        assert (stats.drawn, stats.delivered, stats.in_flight) == ((delivered + 3) * 8, delivered * 8, 24)
    counted = buffer.stats()
    assert (counted.drawn, counted.delivered, counted.replay_ratio) == (64, 40, 40 / 100)


def test_values_of_sequences_become_one_priority_each_over_the_loss_mask():
    buffer = buffer_of(sampler=Prioritized(alpha=1.0, eta=0.5))
    fill(buffer, 0, 40)
    loader = make_loader(buffer, Sequence(4, burn_in=2, stride=1), batch_size=5)
    batch = next(iter(loader))
    values = torch.arange(batch.mask.numel(), dtype=torch.float32).reshape(batch.mask.shape)
    assert loader.update_priorities(batch, values) == 5
    tree = buffer.unit_sampler(Sequence(4, burn_in=2, stride=1)).drawer.tree
    expected = {}
    for identity, row, kept in zip(batch.ids.tolist(), values.numpy(), batch.loss_mask.numpy(), strict=True):
        expected[identity] = 0.5 * row[kept].max() + 0.5 * row[kept].mean()
    for identity, value in expected.items():
        assert tree.masses(np.array([identity]))[0] == pytest.approx(value)


def test_stats_tell_the_age_and_the_policy_lag_of_what_was_drawn():
    buffer = buffer_of(num_envs=1, extras={"policy_version": Box(0, 100, (), np.int64)})
    for i in range(10):
        buffer.add(step(i, 1, 10**9, extras={"policy_version": np.array([i // 2])}))
    batch = buffer.sample(50, Transition())
    stats = buffer.stats()
    assert stats.sample_age == pytest.approx(float((9 - batch.ids).double().mean()))
    assert stats.sample_lag == pytest.approx(float((4 - batch.ids // 2).double().mean()))


# ---------------------------------------------------------------------------------------------------- mixed buffers


@pytest.mark.parametrize("workers", [0, 2])
def test_mixed_buffers_keep_exact_fractions_and_say_where_rows_came_from(workers):
    demos, online = buffer_of(), buffer_of(num_envs=1)
    fill(demos, 0, 50)
    fill(online, 0, 80, base=1000.0)
    loader = make_loader([(demos, 0.25), (online, 0.75)], Transition(), batch_size=10, num_workers=workers)
    sources = []
    for _, batch in zip(range(20), loader, strict=False):
        assert ((batch.reward >= 1000) == (batch.source == 1)).all()
        assert (batch.reward == (batch.ids & (2**20 - 1)) * 0 + batch.observation[:, 0]).all()
        sources += batch.source.tolist()
    assert sources.count(0) == 50
    assert demos.stats().delivered == 50
    loader.close()


def test_mixed_windows_are_padded_together_and_priorities_go_to_their_buffer():
    demos, online = buffer_of(sampler=Prioritized(alpha=1.0)), buffer_of(sampler=Prioritized(alpha=1.0))
    fill(demos, 0, 40, length=3)
    fill(online, 0, 40, length=9, base=1000.0)
    loader = make_loader([(demos, 0.5), (online, 0.5)], Episode(), batch_size=6)
    batch = next(iter(loader))
    assert batch.mask.shape == (6, 9)
    assert batch.lengths.tolist() == [3 if source == 0 else 9 for source in batch.source.tolist()]
    assert (batch.reward[~batch.mask] == 0).all()
    assert loader.update_priorities(batch, np.where(batch.source.numpy() == 0, 2.0, 5.0)) == 6
    assert demos.unit_sampler(Episode()).drawer.tree.total() > 0
    trees = [buffer.unit_sampler(Episode()).drawer.tree for buffer in (demos, online)]
    for part, (tree, value) in enumerate(zip(trees, (2.0, 5.0), strict=True)):
        assert set(tree.masses(batch.ids.numpy()[batch.source.numpy() == part]).tolist()) == {value}


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        (lambda a, b: [(a, 0.5), (b, 0.4)], "0.9 in sum"),
        (lambda a, b: [(a, 0.5), (ReplayBuffer(SPACE, Box(0, 1, (2,)), capacity=50), 0.5)], "store different fields"),
        (lambda a, b: [], "buffer has nothing"),
    ],
)
def test_mixtures_that_do_not_fit_together_are_refused(buffers, message):
    with pytest.raises(errors.ConfigError, match=message):
        make_loader(buffers(buffer_of(), buffer_of()), Transition(), batch_size=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected an int of at least 1"),
        ({"batch_size": 4, "num_workers": 5}, r"num_workers is 5; expected 0 .. lookahead, which is 4"),
        ({"batch_size": 4, "lookahead": -1, "seed": -1}, "lookahead is -1; expected an int of at least 0; seed is -1"),
        ({"batch_size": 4, "timeout_s": 0.0}, "timeout_s is 0.0"),
        ({"batch_size": 2.5, "timeout_s": float("nan"), "limiter": 3}, r"batch_size is 2.5.*timeout_s is nan.*limiter"),
        ({"batch_size": True, "num_workers": "many"}, "batch_size is True.*num_workers is 'many'"),
    ],
)
def test_settings_out_of_range_are_refused_together(options, message):
    with pytest.raises(errors.ConfigError, match=message):
        make_loader(buffer_of(), Transition(), **options)


# ---------------------------------------------------------------------------------------------------- the limiter


def test_limiter_tells_a_learner_that_is_the_only_writer_how_many_steps_to_collect():
    buffer = buffer_of(num_envs=1)
    loader = make_loader(buffer, Transition(), batch_size=8, limiter=Limiter(4.0, min_size=10, tolerance=8))
    fill(buffer, 0, 7)
    with pytest.raises(errors.NotEnoughDataError, match="expected 3 more steps first"):
        next(iter(loader))
    fill(buffer, 7, 10)
    batches = iter(loader)
    next(batches)  # the tolerance
    with pytest.raises(errors.NotEnoughDataError, match="expected 2 more steps first"):
        next(batches)
    for i in range(10, 40, 2):
        fill(buffer, i, i + 2)
        next(iter(loader))  # two steps pay for one batch of eight, and for no more
        with pytest.raises(errors.NotEnoughDataError, match="expected 2 more steps"):
            next(iter(loader))


def test_limiter_can_be_changed_at_run_time_and_bypassed_for_prefilling():
    """Trap 34."""
    buffer = buffer_of(num_envs=1)
    loader = make_loader(buffer, Transition(), batch_size=8, limiter=Limiter(1.0, min_size=5, tolerance=0))
    with buffer.bypass_limiter():
        fill(buffer, 0, 100)
    next(iter(loader))  # at most one batch ahead
    with pytest.raises(errors.NotEnoughDataError, match="expected 8 more steps"):
        next(iter(loader))  # what was prefilled earns no samples
    loader.set_limiter(Limiter(8.0, min_size=5, tolerance=0))
    with pytest.raises(errors.NotEnoughDataError, match="expected 1 more steps"):
        next(iter(loader))
    loader.set_limiter(None)
    for _ in range(20):
        next(iter(loader))


def test_limiter_counts_come_back_with_the_buffer(tmp_path):
    """Trap 33: no burst of updates after a resume, and no writer that waits for a learner of before."""
    buffer = buffer_of(num_envs=1)
    limiter = Limiter(2.0, min_size=10, tolerance=8)
    loader = make_loader(buffer, Transition(), batch_size=8, limiter=limiter)
    fill(buffer, 0, 30)
    batches = iter(loader)
    for _ in range(6):
        next(batches)
    buffer.save(tmp_path / "saved")
    restored = ReplayBuffer.load(tmp_path / "saved")
    assert restored.stats().delivered == 48
    fill(restored, 30, 31)  # nobody limits yet
    again = make_loader(restored, Transition(), batch_size=8, limiter=limiter)
    with pytest.raises(errors.NotEnoughDataError, match="expected 3 more steps"):
        next(iter(again))


def write_steps(writer, count, reply):
    try:
        for i in range(count):
            writer.add(step(i, 1))
        reply.put("written")
    except errors.RlfeedError as error:
        reply.put(f"{type(error).__name__}: {error}")


def start_writer(writer, count):
    processes = multiprocessing.get_context("spawn")
    reply = processes.Queue()
    child = processes.Process(target=write_steps, args=(writer, count, reply), daemon=True)
    child.start()
    return child, reply


def test_limiter_holds_a_faster_writer_back_and_both_sides_get_through():
    buffer = buffer_of(num_envs=1)
    limiter = Limiter(2.0, min_size=20, tolerance=32)
    loader = make_loader(buffer, Transition(), batch_size=16, limiter=limiter, num_workers=1)
    child, reply = start_writer(buffer.writer([0]), 300)
    taken = 0
    for _ in loader:
        taken += 16
        stats = buffer.stats()
        assert taken <= 2.0 * (stats.inserted - 20) + 32
        assert 2.0 * (stats.inserted - 20) <= taken + 32 + 2.0  # the step that crossed the line is in
        if taken >= 16 * 30:
            break
    loader.close()  # and now nobody holds it back
    assert reply.get(timeout=60) == "written"
    child.join(60)


def test_timeouts_name_the_side_that_blocks_and_what_it_waits_for():
    buffer = buffer_of(num_envs=1)
    writer = buffer.writer([0])
    limiter = Limiter(2.0, min_size=5, tolerance=4)
    loader = make_loader(buffer, Transition(), batch_size=2, limiter=limiter, timeout_s=0.5)
    begin = time.monotonic()
    with pytest.raises(errors.FeedTimeoutError, match=r"sampling: waited 0\.5 s for writers to insert 5 more steps"):
        next(iter(loader))
    assert time.monotonic() - begin < 30
    child, reply = start_writer(writer, 1000)
    message = reply.get(timeout=60)
    assert "FeedTimeoutError: inserting: waited 0.5 s for the learner to take" in message
    child.join(60)
    assert buffer.stats().inserted == 8  # the first whose samples nobody took


def test_state_of_uniform_draws_needs_no_ids_whatever_memory_held_before():
    """Feed trap T39: weights that nobody sets are not compared."""
    buffer = buffer_of()
    fill(buffer, 0, 100)
    loader = make_loader(buffer, Transition(), batch_size=8)
    next(iter(loader))
    for batch in range(loader._table.delivered, loader._table.drawn):
        loader._table.entry(batch).weights[:] = batch

    assert "entries" not in loader.state_dict()


# ---------------------------------------------------------------------------------------------------- late priorities


def values_for(number, count):
    return np.random.default_rng(number).uniform(0, 5, count).astype(np.float32)


def train_late(late, resume_at=None, directory=None):
    buffer = buffer_of(sampler=Prioritized())
    fill(buffer, 0, 60)
    loader = make_loader(buffer, Transition(), batch_size=6, seed=5)
    seen, waiting = [], None
    for number in range(14):
        batch = next(iter(loader))
        seen.append((batch.ids.tolist(), batch.weights.tolist()))
        if late:
            loader.update_late(batch, lambda n=number: values_for(n, 6))
        else:
            if waiting is not None:
                loader.update_priorities(*waiting)
            waiting = batch, values_for(number, 6)
        if number == resume_at:
            buffer.save(directory)
            buffer = ReplayBuffer.load(directory)
            loader = make_loader(buffer, Transition(), batch_size=6, seed=5)
    return seen


def test_late_priorities_take_effect_at_the_second_tick_through_a_save_too(tmp_path):
    """As if they had been given one batch later, however fast the device was."""
    delayed = train_late(late=False)
    assert train_late(late=True) == delayed
    assert train_late(late=True, resume_at=7, directory=tmp_path / "saved") == delayed


def test_late_priorities_are_fetched_no_sooner_than_they_are_due():
    buffer = buffer_of(sampler=Prioritized())
    fill(buffer, 0, 60)
    loader = make_loader(buffer, Transition(), batch_size=6)
    batches, fetched = iter(loader), []
    for number in range(6):
        loader.update_late(next(batches), lambda n=number: (fetched.append(n), values_for(n, 6))[1])
        assert fetched == list(range(number - 1))


def test_batches_that_a_feed_held_when_a_state_was_loaded_were_never_delivered():
    """I7: drawn is delivered and in flight and discarded, and the limiter counts what is delivered."""
    buffer = buffer_of()
    fill(buffer, 0, 60)
    loader = make_loader(buffer, Transition(), batch_size=3)
    for _ in zip(range(10), loader, strict=False):
        pass
    loader.batches_ahead = 2
    before = loader.stats()
    loader.load_state_dict(loader.state_dict())
    stats = loader.stats()
    assert before.delivered == stats.delivered == 8 * 3
    assert stats.drawn == stats.delivered + stats.in_flight + stats.discarded
    assert buffer.stats().delivered == 8 * 3
    loader.close()


def test_feed_deeper_than_draws_are_kept_is_refused():
    buffer = buffer_of()
    fill(buffer, 0, 60)
    with pytest.raises(errors.ConfigError, match="depth is 31; expected at most 30"):
        make_loader(buffer, Transition(), batch_size=3).attach(depth=31)
