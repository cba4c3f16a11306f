"""Samplers: which starts are drawn, how often, and with what weights."""

import math
import multiprocessing

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch.utils.data import DataLoader

from rlfeed import errors
from rlfeed.feed import ReplayDataset, pad_collate
from rlfeed.replay import Episode, Mixture, Prioritized, Recent, ReplayBuffer, Sequence, Transition, Uniform
from rlfeed.replay.priorities import Tree
from rlfeed.replay.samplers import sequence_priorities, shares
from rlfeed.types import Step

SPACE = Box(-np.inf, np.inf, (1,), np.float32)


def buffer_of(sampler, capacity=64, num_envs=1, storage="private", **kwargs):
    return ReplayBuffer(
        SPACE, Discrete(9), capacity=capacity, num_envs=num_envs, sampler=sampler, storage=storage, **kwargs
    )


def step(i, length=10**9, num_envs=1, **extras):
    def column(value, dtype):
        return np.full(num_envs, value, dtype)

    observation = np.full((num_envs, 1), i, np.float32)
    return Step(
        observation, column(i % 9, np.int64), column(i, np.float32), observation + 1,
        column(i % length == length - 1, bool), column(False, bool), is_first=column(i % length == 0, bool),
        extras={name: column(value, np.float32) for name, value in extras.items()},
    )  # fmt: skip


def fill(buffer, steps, **kwargs):
    return np.concatenate([buffer.add(step(i, num_envs=buffer.num_envs, **kwargs)) for i in range(steps)])


def frequencies(buffer, ids, unit, count=20_000):
    drawn = buffer.sample(count, unit).ids.numpy()
    return np.array([(drawn == identity).mean() for identity in ids])


def five_sigma(share, count):
    return 5 * math.sqrt(share * (1 - share) / count) + 1e-9


def test_prioritized_draws_in_proportion_to_priority_to_the_alpha():
    buffer = buffer_of(Prioritized(alpha=0.5))
    ids = fill(buffer, 4)
    assert buffer.update_priorities(ids, [1.0, 4.0, 9.0, 16.0]) == 4  # before any unit was named, too
    for share, expected in zip(frequencies(buffer, ids, Transition()), [0.1, 0.2, 0.3, 0.4], strict=True):
        assert abs(share - expected) < five_sigma(expected, 20_000)


def test_weights_of_a_batch_follow_the_formula_and_beta_can_be_annealed():
    """B46, B47. Trap 25 and 26: (N P)^-beta over the batch's greatest; a changed beta changes the weights."""
    buffer = buffer_of(Prioritized(alpha=1.0, beta=0.5))
    ids = fill(buffer, 3)
    buffer.update_priorities(ids, [1.0, 4.0, 16.0])
    for beta in (0.5, 1.0, 0.0):
        buffer.set_beta(beta)
        batch = buffer.sample(200, Transition())
        priority = np.array([1.0, 4.0, 16.0])[np.searchsorted(ids, batch.ids.numpy())]
        raw = (3 * priority / 21.0) ** -beta
        np.testing.assert_allclose(batch.weights.numpy(), raw / raw.max(), rtol=1e-6)


def test_weights_scaled_to_the_buffer_use_its_least_mass_drawn_or_not():
    buffer = buffer_of(Prioritized(alpha=1.0, beta=1.0, scale="buffer"))
    ids = fill(buffer, 3)
    buffer.update_priorities(ids, [1e-6, 2.0, 4.0])
    batch = buffer.sample(50, Transition())
    priority = np.array([1e-6, 2.0, 4.0])[np.searchsorted(ids, batch.ids.numpy())]
    np.testing.assert_allclose(batch.weights.numpy(), 1e-6 / priority, rtol=1e-5)
    buffer.update_priorities(ids, [2.0, 2.0, 4.0])  # the least rises again
    batch = buffer.sample(50, Transition())
    assert set(np.round(batch.weights.numpy(), 6).tolist()) == {1.0, 0.5}


def test_new_steps_have_the_greatest_priority_still_stored():
    """B11. Trap 24: neither the greatest there ever was nor a constant."""
    buffer = buffer_of(Prioritized(alpha=1.0), capacity=8)
    tree = buffer.unit_sampler(Transition()).drawer.tree
    ids = fill(buffer, 2)
    buffer.update_priorities(ids, [100.0, 3.0])
    later = buffer.add(step(2))
    tree.fold()
    assert tree.masses(later).tolist() == [100.0]
    buffer.update_priorities([ids[0], later[0]], [2.0, 1.0])
    latest = buffer.add(step(3))
    tree.fold()
    assert tree.masses(latest).tolist() == [3.0]


def test_greatest_priority_that_is_overwritten_does_not_live_on():
    buffer = buffer_of(Prioritized(alpha=1.0), capacity=6)
    tree = buffer.unit_sampler(Transition()).drawer.tree
    ids = fill(buffer, 5)
    buffer.update_priorities(ids, [50.0, 1.0, 2.0, 1.0, 1.0])
    assert int(buffer.add(step(5))[0]) == 5
    assert buffer.add(step(6))[0] == 6  # row 0 is overwritten by now
    tree.fold()
    assert tree.masses(np.array([6])).tolist() == [2.0]


def test_priorities_that_actors_give_are_used_as_they_are():
    extras = {"priority": Box(0, np.inf, (), np.float32)}
    buffer = buffer_of(Prioritized(alpha=0.5), extras=extras)
    ids = np.concatenate([buffer.add(step(i, priority=value)) for i, value in enumerate([4.0, 0.0, 16.0])])
    shares_drawn = frequencies(buffer, ids, Transition())
    assert shares_drawn[1] == 0.0
    assert abs(shares_drawn[0] - 1 / 3) < five_sigma(1 / 3, 20_000)
    assert "priority" not in buffer.sample(2, Transition()).extras


def test_update_of_overwritten_steps_is_dropped_and_counted_with_many_batches_in_flight():
    """Trap 20: five batches drawn, the lane overwritten, then all five come back: nothing lands on newer rows."""
    buffer = buffer_of(Prioritized(alpha=1.0), capacity=20)
    fill(buffer, 15)
    batches = [buffer.sample(8, Transition()) for _ in range(5)]
    for i in range(15, 29):
        buffer.add(step(i))
    oldest = 29 + 1 - 20
    for batch in batches:
        live = int((batch.ids >= oldest).sum())
        assert buffer.update_priorities(batch.ids, np.full(8, 1e6)) == live
    dropped = sum(int((batch.ids < oldest).sum()) for batch in batches)
    assert dropped > 0
    assert buffer.stats().stale_updates == dropped
    masses = buffer.unit_sampler(Transition()).drawer.tree.masses(np.arange(oldest, 29))
    updated = {identity for batch in batches for identity in batch.ids.tolist() if identity >= oldest}
    assert {oldest + i for i, mass in enumerate(masses) if mass == 1e6} == updated


def test_last_value_of_a_duplicate_wins_and_the_sum_stays_whole():
    """Trap 27."""
    buffer = buffer_of(Prioritized(alpha=1.0))
    ids = fill(buffer, 3)
    tree = buffer.unit_sampler(Transition()).drawer.tree
    buffer.update_priorities([ids[1], ids[1], ids[0], ids[1]], [5.0, 7.0, 2.0, 3.0])
    assert tree.masses(ids).tolist() == [2.0, 3.0, 1.0]
    assert tree.total() == 6.0


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        ([0, 1], [1.0, math.nan], r"values\[1\] is nan; expected finite numbers >= 0"),
        ([0, 1], [-1.0, 1.0], r"values\[0\] is -1.0; expected finite"),
        ([0, 1], [math.inf, 1.0], r"values\[0\] is inf"),
        ([0, 7], [1.0, 1.0], r"ids\[1\] is 7, which this buffer never gave out"),
        ([0, 5 << 44], [1.0, 1.0], r"ids\[1\] is .* never gave out"),
        ([0, 1], [1.0], r"values has shape \(1,\); expected \(2,\)"),
        ([0.5], [1.0], r"ids has shape \(1,\) and dtype float64"),
    ],
)
def test_update_with_what_is_no_priority_is_refused_and_changes_nothing(ids, values, message):
    buffer = buffer_of(Prioritized(alpha=1.0))
    given = fill(buffer, 3)
    buffer.update_priorities(given, [4.0, 5.0, 6.0])
    with pytest.raises(errors.FieldError, match=message):
        buffer.update_priorities(np.array(ids), np.array(values))
    assert buffer.unit_sampler(Transition()).drawer.tree.masses(given).tolist() == [4.0, 5.0, 6.0]


def test_update_without_priorities_names_the_sampler():
    buffer = buffer_of(Uniform())
    with pytest.raises(errors.UnsupportedError, match=r"the sampler is Uniform\(\), which keeps none"):
        buffer.update_priorities(fill(buffer, 2), [1.0, 1.0])


def test_all_priorities_zero_is_a_typed_error_and_no_endless_loop():
    buffer = buffer_of(Prioritized())
    buffer.update_priorities(fill(buffer, 3), [0.0, 0.0, 0.0])
    with pytest.raises(errors.NotEnoughDataError, match="all have priority 0"):
        buffer.sample(2, Transition())


@pytest.mark.parametrize("rows", [4, 5, 15, 16, 17, 31, 100, 255, 256, 257, 999])
def test_tree_of_any_capacity_finds_the_leaf_that_a_running_sum_finds(rows):
    """Trap 22: any capacity keeps the order; trap 23: the newest row has its full share."""
    buffer = buffer_of(Prioritized(alpha=1.0), capacity=rows)
    ids = fill(buffer, rows - 1)
    generator = np.random.default_rng(rows)
    values = generator.integers(1, 50, rows - 1).astype(float)
    buffer.update_priorities(ids, values)
    sampler = buffer.unit_sampler(Transition())
    draws = sampler.draw(7, 0, 4000)
    upto = np.cumsum(values)
    places = generator_of_draws(7, 4000) * upto[-1]
    assert draws.ids.tolist() == np.searchsorted(upto, places, "right").tolist()


def generator_of_draws(key, count):
    """The same numbers in [0, 1) as the kernels use, written down once more."""
    out = []
    for number in range(count):
        c, k = [number & 0xFFFFFFFF, number >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32]
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        out.append(((c[0] | c[1] << 32) >> 11) * 2.0**-53)
    return np.array(out)


def test_a_million_updates_leave_no_drift():
    """Trap 21: every sum is computed from its children anew."""
    buffer = buffer_of(Prioritized(alpha=1.0), capacity=3000)
    ids = fill(buffer, 2999)
    tree, generator = buffer.unit_sampler(Transition()).drawer.tree, np.random.default_rng(0)
    tree.fold()
    for _ in range(1000):
        tree.set(generator.choice(ids, 1000), 10.0 ** generator.uniform(-12, 12, 1000))
    leaves = tree.nodes[: tree.levels[0, 1]]
    assert tree.total() == pytest.approx(math.fsum(leaves), rel=1e-13)
    assert (tree.masses(buffer.sample(5000, Transition()).ids.numpy()) > 0).all()


def test_tree_that_a_killed_writer_left_in_the_middle_is_mended():
    buffer = buffer_of(Prioritized(alpha=1.0))
    ids = fill(buffer, 5)
    tree = buffer.unit_sampler(Transition()).drawer.tree
    buffer.update_priorities(ids, np.ones(5))
    tree._state[0], tree.nodes[3] = 1, 8.0  # a leaf written, the sums above not yet, and nobody to say so
    buffer.update_priorities(ids[:1], [2.0])
    assert tree.total() == 2 + 1 + 1 + 8 + 1


def test_recent_draws_half_as_often_after_a_half_life():
    buffer = buffer_of(Recent(half_life=4.0), capacity=100)
    ids = fill(buffer, 9)
    weights = 0.5 ** (np.arange(8, -1, -1) / 4.0)
    for share, expected in zip(frequencies(buffer, ids, Transition()), weights / weights.sum(), strict=True):
        assert abs(share - expected) < five_sigma(expected, 20_000)


@pytest.mark.parametrize(
    "unit", [Transition(n_step=2), Sequence(3), Episode(), Sequence(5, boundary="strict")], ids=str
)
def test_recent_weighs_the_valid_starts_of_any_unit_by_age(unit):
    """Ends, two lanes, three wraps; `Episode` and rare starts are listed instead of rejected."""
    buffer = buffer_of(Recent(half_life=30.0), capacity=100, num_envs=2)
    fill(buffer, 180, length=6)
    uniform = buffer_of(Uniform(), capacity=100, num_envs=2)
    fill(uniform, 180, length=6)
    starts = np.unique(uniform.sample(5000, unit).ids.numpy())
    rows = starts & ((1 << 44) - 1)
    weights = 0.5 ** (-2.0 * rows / 30.0 + 2.0 * rows.max() / 30.0)
    expected = weights / weights.sum()
    found = frequencies(buffer, starts, unit)
    assert found.sum() == pytest.approx(1.0)
    for share, wanted in zip(found, expected, strict=True):
        assert abs(share - wanted) < five_sigma(wanted, 20_000)


def test_shares_give_every_part_its_exact_fraction_at_every_moment():
    for fractions in ([0.25, 0.75], [0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3], [0.9, 0.05, 0.05], [1.0]):
        parts, before = shares(0, 3000, fractions)
        assert before == [0] * len(fractions)
        for part, fraction in enumerate(fractions):
            upto = np.cumsum(parts == part)
            assert np.abs(upto - fraction * np.arange(1, 3001)).max() <= len(fractions)
            assert upto[-1] == round(3000 * fraction)
        for begin in (1, 1000, 1771):  # a function of the number alone
            later, before = shares(begin, 700, fractions)
            assert np.array_equal(parts[begin : begin + 700], later)
            assert before == [int((parts[:begin] == part).sum()) for part in range(len(fractions))]
    assert shares(2**43, 10, [0.25, 0.75])[0].tolist() == shares(0, 10, [0.25, 0.75])[0].tolist()


def test_mixture_draws_each_number_with_its_sampler_and_weighs_by_the_whole():
    buffer = buffer_of(Mixture({Uniform(): 0.5, Prioritized(alpha=1.0, beta=1.0): 0.5}))
    ids = fill(buffer, 4)
    buffer.update_priorities(ids, [0.0, 1.0, 1.0, 2.0])
    expected = 0.5 * np.full(4, 0.25) + 0.5 * np.array([0.0, 0.25, 0.25, 0.5])
    for share, wanted in zip(frequencies(buffer, ids, Transition()), expected, strict=True):
        assert abs(share - wanted) < five_sigma(wanted, 20_000)
    batch = buffer.sample(400, Transition())
    raw = 1.0 / expected[np.searchsorted(ids, batch.ids.numpy())]
    np.testing.assert_allclose(batch.weights.numpy(), raw / raw.max(), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Prioritized(alpha=-1.0, beta=2.0), "alpha is -1.0; expected a number >= 0; beta is 2.0; expected 0"),
        (lambda: Prioritized(scale="max"), "scale is 'max'"),
        (lambda: Recent(0.0), "half_life is 0.0"),
        (lambda: Mixture({Uniform(): 0.5, Recent(5.0): 0.4}), "0.9 in sum"),
        (lambda: Mixture({}), "is empty"),
        (lambda: Mixture({Uniform(): 0.5, Prioritized(scale="buffer"): 0.5}), "only a sampler of its own"),
        (lambda: Mixture({Prioritized(): 0.5, Prioritized(alpha=1.0): 0.5}), "two Prioritized"),
        (lambda: buffer_of("uniform"), "sampler is 'uniform'"),
        (lambda: buffer_of(Prioritized()).set_beta(1.5), "beta is 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(errors.ConfigError, match=message):
        make()


def test_sequence_priorities_are_eta_max_plus_the_rest_mean_over_the_mask():
    values, mask = np.array([[1.0, 3.0, 9.0], [2.0, 50.0, 50.0]]), np.array([[1, 1, 1], [1, 0, 0]], bool)
    expected = [0.9 * 9.0 + 0.1 * 13.0 / 3.0, 2.0]
    np.testing.assert_allclose(sequence_priorities(values, mask, 0.9), expected, rtol=1e-15)
    with pytest.raises(errors.FieldError, match=r"values has shape \(2, 2\)"):
        sequence_priorities(values[:, :2], mask, 0.9)


@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_workers_of_a_stock_loader_draw_by_live_priorities(context):
    """Priorities that the learner gives after the workers started, and rows written after the last tick."""
    buffer = buffer_of(Prioritized(alpha=1.0), capacity=100, storage="shared")
    ids = fill(buffer, 20)
    options = {"num_workers": 1, "multiprocessing_context": context, "prefetch_factor": 1}
    loader = DataLoader(ReplayDataset(buffer, Transition()), batch_size=50, collate_fn=pad_collate, **options)
    batches = iter(loader)
    first = next(batches)
    assert len(set(first.ids.tolist())) > 5
    values = np.zeros(20)
    values[7] = 1.0
    buffer.update_priorities(ids, values)
    next(batches)  # was under way
    assert set(next(batches).ids.tolist()) == {int(ids[7])}
    new = buffer.add(step(20))
    next(batches)
    drawn = set(next(batches).ids.tolist())
    assert drawn == {int(ids[7]), int(new[0])}


def update_in_child(buffer, ids, values, reply):
    reply.put(buffer.update_priorities(ids, values))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_update_from_another_process_is_seen_here(context):
    buffer = buffer_of(Prioritized(alpha=1.0), storage="shared")
    ids = fill(buffer, 3)
    buffer.sample(1, Transition())
    processes = multiprocessing.get_context(context)
    reply = processes.Queue()
    child = processes.Process(target=update_in_child, args=(buffer, ids, [0.0, 0.0, 5.0], reply))
    child.start()
    assert reply.get(timeout=60) == 3
    child.join(60)
    assert set(buffer.sample(50, Transition()).ids.tolist()) == {int(ids[2])}


def sample_in_child(buffer, reply):
    reply.put(buffer.sample(64, Transition()).ids.tolist())


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_copies_of_a_buffer_in_other_processes_have_draws_of_their_own(context):
    """Trap 39: no two streams of one seed are the same."""
    buffer = buffer_of(Uniform(), storage="shared")
    fill(buffer, 60)
    processes = multiprocessing.get_context(context)
    reply = processes.Queue()
    children = [processes.Process(target=sample_in_child, args=(buffer, reply)) for _ in range(2)]
    for child in children:
        child.start()
    streams = [reply.get(timeout=60) for _ in children] + [buffer.sample(64, Transition()).ids.tolist()]
    for child in children:
        child.join(60)
    assert len({tuple(stream) for stream in streams}) == 3
    again = buffer_of(Uniform(), storage="shared")
    fill(again, 60)
    assert again.sample(64, Transition()).ids.tolist() == streams[2]


def test_two_units_of_one_buffer_keep_trees_of_their_own_on_the_same_priorities():
    buffer = buffer_of(Prioritized(alpha=1.0))
    ids = fill(buffer, 6, length=3)
    buffer.update_priorities(ids, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    buffer.sample(1, Transition())
    episodes = buffer.unit_sampler(Episode()).drawer.tree
    assert isinstance(episodes, Tree)
    assert episodes.total() == 1.0 + 4.0
    buffer.update_priorities(ids[:1], [9.0])
    assert episodes.total() == 13.0
    assert buffer.unit_sampler(Transition()).drawer.tree.total() == 29.0


def test_values_may_be_tensors():
    buffer = buffer_of(Prioritized(alpha=1.0))
    fill(buffer, 4)
    batch = buffer.sample(4, Transition())
    error = torch.ones(4, requires_grad=True) * 2
    assert buffer.update_priorities(batch.ids, error) == 4


@pytest.mark.parametrize(
    "sampler",
    [Prioritized(beta=0.7), Recent(20.0), Mixture({Uniform(): 0.25, Prioritized(): 0.5, Recent(9.0): 0.25})],
    ids=str,
)
def test_saved_samplers_go_on_with_the_very_next_batches(tmp_path, sampler):
    """Trap 32: the tree, beta and draw numbers come back; so does what happens after, and a second save."""
    units = [Transition(n_step=2), Sequence(4), Episode()]
    buffer = buffer_of(sampler, capacity=120, num_envs=2, storage="shared")

    def go_on(target, begin, end):
        seen = []
        for i in range(begin, end):
            target.add(step(i, 7, num_envs=2))
            batch = target.sample(6, units[i % 3])
            seen.append((batch.ids.tolist(), batch.weights.tolist()))
            if isinstance(sampler, Prioritized):
                target.update_priorities(batch.ids, np.random.default_rng(i).uniform(0, 9, 6))
        return seen

    fill(buffer, 40, length=7)
    if isinstance(sampler, Prioritized):
        buffer.set_beta(0.9)
    go_on(buffer, 40, 120)
    buffer.save(tmp_path / "first")
    expected = go_on(buffer, 120, 220)
    loaded = ReplayBuffer.load(tmp_path / "first")
    assert loaded.sampler == sampler
    assert go_on(loaded, 120, 160) == expected[:40]
    loaded.save(tmp_path / "second")
    assert go_on(ReplayBuffer.load(tmp_path / "second"), 160, 220) == expected[40:]


def save_in_child(buffer, directory):
    buffer.sample(1, Transition())
    buffer.save(directory)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_copy_in_another_process_saves_the_priorities_too(tmp_path, context):
    buffer = buffer_of(Prioritized(alpha=1.0), storage="shared")
    ids = fill(buffer, 3)
    buffer.update_priorities(ids, [0.0, 0.0, 5.0])
    child = multiprocessing.get_context(context).Process(target=save_in_child, args=(buffer, tmp_path / "saved"))
    child.start()
    child.join(60)
    assert set(ReplayBuffer.load(tmp_path / "saved").sample(20, Transition()).ids.tolist()) == {int(ids[2])}


def test_tree_of_a_second_unit_takes_over_no_priority_of_what_was_overwritten():
    buffer = buffer_of(Prioritized(alpha=1.0), capacity=8)
    ids = fill(buffer, 4)
    buffer.update_priorities(ids, [1.0, 1000.0, 1.0, 1.0])
    buffer.sample(1, Transition())
    for i in range(4, 12):
        buffer.add(step(i))
    tree = buffer.unit_sampler(Transition(n_step=2)).drawer.tree
    assert tree.masses(buffer.sample(100, Transition(n_step=2)).ids.numpy()).max() == 1.0


def test_priorities_beyond_what_sums_can_bear_are_kept_within():
    buffer = buffer_of(Prioritized(alpha=2.0, beta=1.0))
    ids = fill(buffer, 3)
    tree = buffer.unit_sampler(Transition()).drawer.tree
    buffer.update_priorities(ids, [1e-200, 1e200, 1e308])
    batch = buffer.sample(50, Transition())
    assert set(batch.ids.tolist()) == set(ids[1:].tolist())
    assert np.isfinite(batch.weights.numpy()).all()
    buffer.update_priorities(ids, [5.0, 5.0, 5.0])
    assert tree.masses(ids).tolist() == [25.0, 25.0, 25.0]
    assert buffer.update_priorities([], []) == 0
