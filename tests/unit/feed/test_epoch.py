"""One finite pass: its order, its batches, what happens beside a writer."""

import pickle

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from support.batches import assert_same
from support.pass_twin import PassTwin
from support.replay_checks import make_buffer
from support.replay_twin import make_step

from rlfeed.errors import ConfigError, NotEnoughDataError, StaleReadError, UnsupportedError
from rlfeed.feed import DeviceFeed, cycle, epoch
from rlfeed.replay import Episode, Hindsight, Prioritized, ReplayBuffer, Sequence, Transition
from rlfeed.types import Batch


def add(buffer, twin, steps, length):
    """Add steps of one lane, in episodes of a length; the reward is the step's number."""
    for _ in range(steps):
        lane = twin.lanes[0]
        number = sum(row.step is not None for row in lane.rows)
        last = (lane.rows[-1].index if lane.open else 0) + 1 == length
        buffer.add(make_step(twin, [0], [(last, False)], rewards=[float(number)]))


def stored(steps, *, rows=100, length=7, **options):
    twin = PassTwin(1, rows)
    buffer = make_buffer(1, rows, **options)
    add(buffer, twin, steps, length)
    return buffer, twin


def rewards(batches):
    return [batch.reward.tolist() for batch in batches]


def test_epoch_without_shuffling_is_in_the_order_of_storage_with_a_short_last_batch():
    buffer, _ = stored(10)
    given = epoch(buffer, Transition(), 4, shuffle=False)
    assert len(given) == 3
    assert rewards(given) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(given) == 3
    assert next(given, "ended") == "ended"


def test_epoch_drop_last_leaves_out_the_short_batch_alone():
    """Feed trap T3: one tail for the whole pass."""
    buffer, _ = stored(10)
    assert rewards(epoch(buffer, Transition(), 4, shuffle=False, drop_last=True)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(epoch(buffer, Transition(), 5, drop_last=True)) == 2
    assert list(epoch(buffer, Transition(), 11, drop_last=True)) == []


def test_epoch_order_comes_from_the_seed_alone_and_leaves_the_global_state():
    """Feed traps T5 and T6."""
    buffer, _ = stored(60)
    before = torch.get_rng_state()
    orders = [rewards(epoch(buffer, Transition(), 60, seed=seed))[0] for seed in (0, 1, 0)]
    assert torch.equal(torch.get_rng_state(), before)
    assert orders[0] == orders[2] != orders[1]
    assert all(sorted(order) == list(range(60)) for order in orders)


def test_epoch_order_of_one_seed_is_uniform_over_places():
    """The step that comes first is every step about equally often: 12 steps, 600 seeds, 50 each."""
    buffer, _ = stored(12)
    first = [int(next(epoch(buffer, Transition(), 1, seed=seed)).reward[0]) for seed in range(600)]
    counts = np.bincount(first, minlength=12)
    assert counts.sum() == 600
    assert ((counts - 50) ** 2 / 50).sum() < 11 + 5 * np.sqrt(22) + 5  # chi-square, 5 standard deviations


def test_epoch_steps_near_an_open_end_sum_to_where_the_data_ends():
    buffer, _ = stored(5, length=99)
    batch = next(epoch(buffer, Transition(n_step=3, gamma=0.5), 9, shuffle=False))
    assert batch.reward.tolist() == [0 + 0.5 + 0.5, 1 + 1 + 0.75, 2 + 1.5 + 1, 3 + 2, 4]
    assert batch.discount.tolist() == [0.125, 0.125, 0.125, 0.25, 0.5]
    assert batch.next_observation["vector"][:, 2].tolist() == [3, 4, 5, 5, 5]


def test_epoch_sequences_tile_an_episode_from_its_first_step():
    buffer, _ = stored(9, length=7)
    batch = next(epoch(buffer, Sequence(3, burn_in=1), 9, shuffle=False))
    assert batch.reward.tolist() == [[0, 1, 2, 0], [2, 3, 4, 5], [5, 6, 0, 0], [7, 8, 0, 0]]
    assert batch.loss_mask.int().tolist() == [[1, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0], [1, 1, 0, 0]]


def test_epoch_is_a_snapshot_later_steps_are_not_seen():
    buffer, twin = stored(10)
    given = epoch(buffer, Transition(), 4, shuffle=False)
    whole = epoch(buffer, Episode(), 4, shuffle=False)
    head = rewards([next(given)])
    add(buffer, twin, 8, 7)
    assert head + rewards(given) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert next(whole).lengths.tolist() == [7, 3]


def test_epoch_overwritten_meanwhile_raises_again_and_again_and_names_the_row():
    """I8: what is lost is never missed in silence."""
    buffer, twin = stored(30, rows=40)
    given = epoch(buffer, Transition(), 8, shuffle=False)
    assert rewards([next(given)]) == [list(range(8))]
    add(buffer, twin, 12, 7)
    assert rewards([next(given)]) == [list(range(8, 16))]
    add(buffer, twin, 14, 7)
    for _ in range(2):
        with pytest.raises(StaleReadError, match=r"row 18 of lane 0 was overwritten .* 29 rows were written .* 40; "):
            next(given)


def test_epoch_batch_whose_transform_failed_comes_again():
    buffer, _ = stored(6)
    faults = iter([True])

    def transform(batch):
        if next(faults, False):
            raise KeyError("once")
        return batch.reward.tolist()

    given = epoch(buffer, Transition(), 3, shuffle=False, transform=transform)
    with pytest.raises(KeyError):
        next(given)
    assert list(given) == [[0, 1, 2], [3, 4, 5]]


def episode(length):
    flags = torch.zeros(1, length, dtype=torch.bool)
    return Batch(
        observation=torch.zeros(1, length + 1, 1), action=torch.zeros(1, length, 1), reward=torch.zeros(1, length),
        terminated=flags, truncated=flags,
    )  # fmt: skip


def padded_share(batches):
    return sum(int(batch.mask.sum()) for batch in batches) / sum(batch.mask.numel() for batch in batches)


def test_epoch_bucket_fills_batches_of_uneven_episodes():
    """Whole episodes of 16 to 256 steps, 64 a batch: 0.54 of a padded batch is steps; at least 0.85 with buckets."""
    lengths = np.random.default_rng(0).integers(16, 257, 512).tolist()
    space = Box(0, 1, (1,), np.float32)
    buffer = ReplayBuffer(space, space, capacity=sum(lengths) + 600, storage="private")
    for length in lengths:
        buffer.extend(episode(length))
    plain, bucketed = (list(epoch(buffer, Episode(), 64, bucket=bucket)) for bucket in (1, 8))
    assert padded_share(plain) < 0.6
    assert padded_share(bucketed) > 0.85
    for batches in (plain, bucketed):
        assert sorted(int(n) for batch in batches for n in batch.lengths) == sorted(lengths)
    longest = [int(batch.lengths.max()) for batch in bucketed]
    assert longest != sorted(longest)  # batches come in random order all the same


def test_epoch_bucket_short_last_batch_stays_last():
    buffer, _ = stored(30, length=3)  # ten episodes
    assert [len(batch) for batch in epoch(buffer, Episode(), 4, bucket=2)] == [4, 4, 2]


def test_epoch_of_a_prioritized_buffer_takes_each_step_once_too():
    buffer, _ = stored(20, sampler=Prioritized())
    buffer.update_priorities(buffer.sample(4, Transition()).ids.numpy(), np.zeros(4))
    batch = next(epoch(buffer, Transition(), 99))
    assert sorted(batch.reward.tolist()) == list(range(20))
    assert batch.weights.tolist() == [1.0] * 20


def test_epoch_through_a_device_feed_is_the_same_pass():
    buffer, _ = stored(30)
    fed = list(DeviceFeed(epoch(buffer, Sequence(4), 3), "cpu"))
    for batch, wanted in zip(fed, epoch(buffer, Sequence(4), 3), strict=True):
        assert_same(batch, wanted)


def test_cycle_of_one_pass_is_refused_when_it_ends():
    buffer, _ = stored(6)
    with pytest.raises(ConfigError, match="give the loader itself"):
        list(cycle(epoch(buffer, Transition(), 3)))


def test_snapshot_survives_pickling_with_its_samples():
    buffer, twin = stored(30, storage="shared")
    snapshot = buffer.snapshot(Sequence(4, burn_in=2))
    again = pickle.loads(pickle.dumps(snapshot))
    add(buffer, twin, 3, 7)
    picked = np.array([5, 0, 7])
    assert_same(again.gather(picked), snapshot.gather(picked))


@pytest.mark.parametrize(
    ("unit", "error", "match"),
    [
        (Sequence(3, boundary="strict"), UnsupportedError, "expected 'pad'"),
        (Sequence(3, boundary="cross"), UnsupportedError, "expected 'pad'"),
        (Sequence(3, stride=2), ConfigError, "Leave stride out"),
        (Episode(max_length=6), ConfigError, "max_length .* is 6, but an episode of 7 steps"),
        (Transition(relabel=Hindsight("final", 1.0, max)), UnsupportedError, "relabel=None"),
        ("Transition", ConfigError, "unit: is 'Transition'"),
    ],
)
def test_epoch_unit_that_cannot_hold_each_step_once_is_refused(unit, error, match):
    buffer, _ = stored(8)
    with pytest.raises(error, match=match):
        epoch(buffer, unit, 4)


def test_epoch_sparse_carries_need_windows_on_their_grid():
    buffer, _ = stored(8, carry_every=2)
    with pytest.raises(ConfigError, match="stores a carry every 2 steps"):
        epoch(buffer, Sequence(3), 4)


def test_epoch_wrong_arguments_are_all_named():
    with pytest.raises(ConfigError, match=r"batch_size is 0; .* seed is -1; .* bucket is 0; .* buffer is a list"):
        epoch([], Transition(), 0, seed=-1, bucket=0)


def test_epoch_of_nothing_is_an_error():
    with pytest.raises(NotEnoughDataError, match="holds no step"):
        epoch(make_buffer(1, 10), Transition(), 4)
