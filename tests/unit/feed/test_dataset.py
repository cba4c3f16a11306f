"""The dataset in torch's own DataLoader: numbered, live, gathered once."""

import itertools

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from support.batches import assert_same
from torch.utils.data import DataLoader

from rlfeed import errors
from rlfeed.feed import DeviceFeed, ReplayDataset, device, make_loader, pad_collate
from rlfeed.feed import dataset as dataset_module
from rlfeed.feed.engines import DirectEngine
from rlfeed.replay import Episode, ReplayBuffer, Transition, kernels
from rlfeed.types import Batch, Step

SPACE = Box(-np.inf, np.inf, (2,), np.float32)


def make_buffer(steps=300, **options):
    buffer = ReplayBuffer(SPACE, Discrete(5), capacity=4000, **options)
    extend(buffer, 0, steps)
    return buffer


def extend(buffer, begin, steps, length=7):
    for i in range(begin, begin + steps):
        index = i % length
        here, there = np.full((1, 2), i, np.float32), np.full((1, 2), i + 1, np.float32)
        last, no, first = np.array([index == length - 1]), np.array([False]), np.array([index == 0])
        buffer.add(Step(here, np.array([i % 5]), np.array([i], np.float32), there, last, no, is_first=first))


def take(loader, count):
    iterator = iter(loader)
    batches = list(itertools.islice(iterator, count))
    del iterator  # lets torch's workers go
    return batches


@pytest.mark.parametrize("unit", [Transition(n_step=2), Episode()], ids=str)
@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_on_a_buffer_at_rest_do_not_depend_on_level_or_workers(unit, num_workers):
    buffer = make_buffer()
    expected = take(make_loader(buffer, unit, batch_size=8, seed=3), 7)
    dataset = ReplayDataset(buffer, unit, seed=3)
    plain = DataLoader(dataset, batch_size=8, collate_fn=pad_collate, num_workers=num_workers)
    again = DataLoader(ReplayDataset(buffer, unit, seed=3), batch_size=8, collate_fn=pad_collate)
    whole = DataLoader(ReplayDataset(buffer, unit, batch_size=8, seed=3), batch_size=None, num_workers=num_workers)
    for loader in (plain, whole, DeviceFeed(again, "cpu")):
        for batch, wanted in zip(take(loader, 7), expected, strict=True):
            assert type(batch) is Batch
            assert_same(batch, wanted)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_batches_do_not_depend_on_the_start_method(method):
    buffer = make_buffer()
    expected = take(make_loader(buffer, Transition(), batch_size=8, seed=3), 3)
    loader = DataLoader(
        ReplayDataset(buffer, Transition(), seed=3), batch_size=8, collate_fn=pad_collate, num_workers=1,
        multiprocessing_context=method,
    )  # fmt: skip
    for batch, wanted in zip(take(loader, 3), expected, strict=True):
        assert_same(batch, wanted)


def test_workers_see_steps_added_after_they_started():
    buffer = make_buffer(steps=14)
    loader = DataLoader(ReplayDataset(buffer, Transition()), batch_size=64, collate_fn=pad_collate, num_workers=2)
    iterator = iter(loader)
    assert next(iterator).reward.max() < 14
    extend(buffer, 14, 2800)
    # 2 batches a worker were under way before the steps were added; those after them must know.
    later = [next(iterator) for _ in range(8)][-4:]
    assert all(batch.reward.max() > 1000 for batch in later)
    del iterator


def test_collate_gathers_a_batch_once(monkeypatch):
    calls = []
    original = kernels.gather_transitions
    monkeypatch.setattr(kernels, "gather_transitions", lambda *args: calls.append(1) or original(*args))
    loader = DataLoader(ReplayDataset(make_buffer(), Transition()), batch_size=32, collate_fn=pad_collate)
    take(loader, 5)
    assert len(calls) == 5


def test_draws_of_all_workers_are_each_number_once():
    """Batch b holds draws bB .. bB+B-1, whoever makes it: 2 workers' ids are 0 workers' ids, in order."""
    buffer = make_buffer()
    small = DataLoader(ReplayDataset(buffer, Transition()), batch_size=4, collate_fn=pad_collate)
    one = torch.cat([batch.ids for batch in take(small, 12)])
    whole = take(DataLoader(ReplayDataset(buffer, Transition()), batch_size=48, collate_fn=pad_collate), 1)[0].ids
    assert torch.equal(one, whole)


def test_state_next_iterator_goes_on_where_the_state_says():
    buffer = make_buffer()
    straight = take(DataLoader(ReplayDataset(buffer, Transition()), batch_size=4, collate_fn=pad_collate), 9)
    for num_workers in (0, 2):
        resumed = ReplayDataset(buffer, Transition())
        resumed.load_state_dict({"draw": 5 * 4})
        loader = DataLoader(resumed, batch_size=4, collate_fn=pad_collate, num_workers=num_workers)
        for batch, wanted in zip(take(loader, 4), straight[5:], strict=True):
            assert_same(batch, wanted)


def ids_of(loader, count=3):
    return [batch.ids.tolist() for batch in take(loader, count)]


def test_each_new_iterator_has_draws_of_its_own_for_any_number_of_workers():
    buffer = make_buffer()
    turns = {}
    for num_workers, persistent in ((0, False), (2, False), (2, True)):
        loader = DataLoader(
            ReplayDataset(buffer, Transition(), seed=1), batch_size=8, collate_fn=pad_collate, num_workers=num_workers,
            persistent_workers=persistent,
        )  # fmt: skip
        turns[num_workers, persistent] = [ids_of(loader) for _ in range(3)]
        del loader
    assert turns[0, False] == turns[2, False] == turns[2, True]
    assert len({str(turn) for turn in turns[0, False]}) == 3


def test_state_of_a_later_turn_can_be_resumed():
    buffer = make_buffer()
    dataset = ReplayDataset(buffer, Transition())
    loader = DataLoader(dataset, batch_size=8, collate_fn=pad_collate)
    take(loader, 2)
    assert dataset.state_dict() == {"turn": 1, "draw": 0}
    second = ids_of(loader, 4)
    again = ReplayDataset(buffer, Transition())
    again.load_state_dict({"turn": 1, "draw": 16})
    loader = DataLoader(again, batch_size=8, collate_fn=pad_collate)
    assert ids_of(loader, 2) == second[2:]
    assert again.state_dict() == {"turn": 2, "draw": 0}


def test_other_collates_get_plain_samples():
    batch = take(DataLoader(ReplayDataset(make_buffer(), Transition()), batch_size=6), 1)[0]
    assert type(batch) is dict
    assert batch["observation"].shape == (6, 2)
    assert torch.equal(batch["next_observation"], batch["observation"] + 1)


def test_samples_by_themselves_are_mappings():
    sample = next(iter(ReplayDataset(make_buffer(), Episode())))
    assert sample["reward"].shape == (7,)
    assert sample["observation"].shape == (8, 2)
    assert sample["lengths"] == 7
    assert "carry" not in sample


def test_foreign_order_of_samples_is_gathered_one_by_one():
    stream = iter(ReplayDataset(make_buffer(), Episode()))
    samples = [next(stream) for _ in range(4)]
    batch = pad_collate([samples[2], samples[0]])
    assert torch.equal(batch.reward[1], samples[0]["reward"])
    assert batch.mask.all()


def test_transform_acts_on_the_batch_at_every_level():
    def halve(batch):
        return batch.map(lambda tensor: tensor / 2 if tensor.is_floating_point() else tensor)

    buffer = make_buffer()
    plain = take(make_loader(buffer, Transition(), batch_size=8), 1)[0]
    level1 = DataLoader(ReplayDataset(buffer, Transition(), transform=halve), batch_size=8, collate_fn=pad_collate)
    level2 = DataLoader(ReplayDataset(buffer, Transition(), batch_size=8, transform=halve), batch_size=None)
    for loader in (level1, level2, make_loader(buffer, Transition(), batch_size=8, transform=halve)):
        assert torch.equal(take(loader, 1)[0].reward, plain.reward / 2)


def test_empty_buffer_in_this_process_says_how_many_steps_to_collect():
    loader = DataLoader(ReplayDataset(make_buffer(steps=0), Transition()), batch_size=4, collate_fn=pad_collate)
    with pytest.raises(errors.NotEnoughDataError, match=r"holds 0 steps.*Collect more steps first"):
        next(iter(loader))


def test_empty_buffer_in_a_worker_waits_for_the_first_steps():
    buffer = make_buffer(steps=0)
    dataset = ReplayDataset(buffer, Transition())
    iterator = iter(DataLoader(dataset, batch_size=4, collate_fn=pad_collate, num_workers=1))
    extend(buffer, 0, 20)
    assert next(iterator).reward.max() < 20
    del iterator


def test_empty_buffer_in_a_worker_gives_up_with_what_it_waited_for(monkeypatch):
    monkeypatch.setattr(dataset_module, "WAIT_S", 0.05)
    loader = DataLoader(
        ReplayDataset(make_buffer(steps=0), Episode()), batch_size=4, collate_fn=pad_collate, num_workers=1
    )
    with pytest.raises(errors.FeedTimeoutError, match=r"waited 0.05 s for data.*at least one episode that has ended"):
        next(iter(loader))


def test_private_storage_with_workers_is_refused():
    loader = DataLoader(
        ReplayDataset(make_buffer(storage="private"), Transition()), batch_size=4, collate_fn=pad_collate, num_workers=1
    )
    with pytest.raises(errors.UnsupportedError, match="storage='private'"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batch_size": 0}, errors.ConfigError),
        ({"seed": -1}, errors.ConfigError),
    ],
)
def test_dataset_wrong_arguments_are_refused(options, error):
    with pytest.raises(error):
        ReplayDataset(make_buffer(steps=0), Transition(), **options)


def test_global_random_state_is_not_touched_by_our_loader_without_workers():
    dataset = ReplayDataset(make_buffer(), Transition())
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    next(iter(dataset)).get("reward")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


def test_loader_counts_and_resumes():
    buffer = make_buffer()
    straight = take(make_loader(buffer, Transition(), batch_size=4), 9)
    loader = make_loader(buffer, Transition(), batch_size=4)
    take(loader, 5)
    assert (loader.stats().delivered, loader.state_dict()["batch"]) == (20, 5)
    resumed = make_loader(buffer, Transition(), batch_size=4, num_workers=1)
    resumed.load_state_dict(loader.state_dict())
    for wanted, batch in zip(straight[5:], resumed, strict=False):
        assert_same(batch, wanted)
    resumed.close()


def test_turns_differ_though_torch_is_seeded_anew_each_epoch():
    buffer = make_buffer()
    for num_workers in (0, 1):
        loader = DataLoader(
            ReplayDataset(buffer, Transition()), batch_size=8, collate_fn=pad_collate, num_workers=num_workers
        )
        turns = []
        for _ in range(3):
            torch.manual_seed(0)
            turns.append(str(ids_of(loader, 2)))
        assert len(set(turns)) == 3


def test_two_iterators_alive_at_once_have_a_turn_each():
    loader = DataLoader(ReplayDataset(make_buffer(), Transition()), batch_size=8, collate_fn=pad_collate, num_workers=2)
    expected = [ids_of(loader) for _ in range(2)]
    loader = DataLoader(ReplayDataset(make_buffer(), Transition()), batch_size=8, collate_fn=pad_collate, num_workers=2)
    one, two = iter(loader), iter(loader)
    both = [[next(each).ids.tolist() for _ in range(3)] for each in (one, two)]
    assert sorted(map(str, both)) == sorted(map(str, expected))
    del one, two


def test_state_loaded_reaches_workers_that_are_running_already():
    buffer = make_buffer()
    straight = ids_of(make_loader(buffer, Transition(), batch_size=8), 4)
    dataset = ReplayDataset(buffer, Transition())
    loader = DataLoader(dataset, batch_size=8, collate_fn=pad_collate, num_workers=1, persistent_workers=True)
    ids_of(loader, 2)
    dataset.load_state_dict({"draw": 16})
    assert ids_of(loader, 2) == straight[2:]
    del loader


def test_handles_that_were_looked_at_stay_what_they_were():
    stream = iter(ReplayDataset(make_buffer(), Transition()))
    samples = [next(stream) for _ in range(4)]
    seen = [sample["ids"].item() for sample in samples]
    assert pad_collate(samples).ids.tolist() == seen


def test_transform_reaches_samples_of_other_collates():
    def negate(batch):
        return batch.map(lambda tensor: -tensor if tensor.is_floating_point() else tensor)

    dataset = ReplayDataset(make_buffer(), Transition(), transform=negate)
    batch = take(DataLoader(dataset, batch_size=6), 1)[0]
    assert batch["weights"].tolist() == [-1.0] * 6


def runs_out(batch):
    return next(iter([]))


@pytest.mark.parametrize("batch_size", [None, 8])
def test_transform_that_raises_stop_iteration_is_an_error_and_not_the_end(batch_size):
    """Feed trap T28: torch would take it for the end, and go on without that worker's batches."""
    dataset = ReplayDataset(make_buffer(), Transition(), batch_size=batch_size, transform=runs_out)
    options = {"batch_size": None} if batch_size else {"batch_size": 8, "collate_fn": pad_collate}
    with pytest.raises(errors.WorkerError, match="the transform raised StopIteration in worker 0"):
        next(iter(DataLoader(dataset, **options)))


def test_loader_counts_draws_whatever_the_transform_makes_of_them():
    def double(batch):
        return {"reward": torch.cat([batch.reward, batch.reward])}

    loader = make_loader(make_buffer(), Transition(), batch_size=4, transform=double)
    take(loader, 3)
    assert (loader.state_dict()["batch"], loader.stats().delivered) == (3, 12)


def test_loader_resumes_after_what_the_consumer_had_not_what_the_feed_took(monkeypatch):
    class Ahead(DirectEngine):
        reads_ahead = True

    monkeypatch.setattr(device, "engine_for", Ahead)
    buffer = make_buffer()
    straight = ids_of(make_loader(buffer, Transition(), batch_size=4), 5)
    loader = make_loader(buffer, Transition(), batch_size=4)
    feed = DeviceFeed(loader, "cpu", depth=3)
    assert [next(feed).ids.tolist() for _ in range(2)] == straight[:2]
    assert loader.state_dict()["batch"] == 2
    resumed = make_loader(buffer, Transition(), batch_size=4)
    resumed.load_state_dict(loader.state_dict())
    assert ids_of(resumed, 3) == straight[2:]


def test_library_misuse_is_said_in_our_words():
    with pytest.raises(errors.ConfigError, match="buffer is a list; expected a ReplayBuffer"):
        ReplayDataset([1, 2], Transition())
    loader = DataLoader(ReplayDataset(make_buffer(), Transition()), batch_size=None, collate_fn=pad_collate)
    with pytest.raises(errors.FieldError, match="got a Handle; expected a list of samples"):
        next(iter(loader))
