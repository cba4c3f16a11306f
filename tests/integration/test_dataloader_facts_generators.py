"""Facts 14 to 27 about torch's DataLoader: generators, padding, outputs fed back; see `test_dataloader_facts.py`."""

import itertools
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from support.facts import Forked, Items, Rows, loader_of, make_buffer, take, values
from support.graphs import graph_of
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from rlfeed import errors
from rlfeed.feed import ReplayDataset, epoch, pad_collate, stream
from rlfeed.replay import Episode, Transition
from rlfeed.rollout import Feedback, Rollout
from rlfeed.testing import IdentifiableEnv

# ------------------------------------------------------------------------------------------- generators and padding


class OnlyIter:
    """Has `__iter__` and derives from nothing."""

    def __iter__(self):
        return iter(range(6))


def share(worker_id, num_workers, seed):
    yield from range(worker_id, 6, num_workers)


def test_generator_and_mere_iterables_are_refused_at_the_first_batch():
    """Facts 14 and 16.

    said    DataLoader(generator, batch_size=32) loads it; a class with `__iter__` is enough
    torch   a TypeError that speaks of len(): only when iterated, or at once with shuffle; the same TypeError; it must
            derive from IterableDataset
    rlfeed  `stream(factory)` of a generator function; refused when it is made, and told what to give
    """
    for data in ((i for i in range(6)), OnlyIter()):
        loader = DataLoader(data, batch_size=2)  # nothing is said yet
        with pytest.raises(TypeError, match=r"has no len\(\)"):
            iter(loader).__next__()
        with pytest.raises(TypeError, match=r"has no len\(\)"):
            DataLoader(data, batch_size=2, shuffle=True)

    with pytest.raises(errors.ConfigError, match=r"factory is a generator, .*expected a generator function"):
        stream(i for i in range(6))
    with pytest.raises(errors.ConfigError, match=r"OnlyIter, which has __iter__; expected a generator function"):
        stream(OnlyIter())
    for num_workers in (0, 2):
        options = {"multiprocessing_context": "fork"} if num_workers else {}
        assert sorted(values(DataLoader(stream(share), num_workers=num_workers, **options))) == [0, 1, 2, 3, 4, 5]


def test_whole_batches_need_batch_size_none():
    """Fact 15.

    said    a stream of (32, 10) batches comes out as (32, 10)
    torch   with a batch size it becomes batches of batches; with batch_size=None it does
    rlfeed  both ways; pad_collate says which one was meant
    """
    blocks = Items(lambda: (torch.rand(32, 10) for _ in range(32)))
    assert next(iter(DataLoader(blocks, batch_size=32))).shape == (32, 32, 10)
    assert next(iter(DataLoader(blocks, batch_size=None))).shape == (32, 10)

    whole = ReplayDataset(make_buffer(), Transition(), batch_size=32)
    assert next(iter(DataLoader(whole, batch_size=None))).observation.shape == (32, 2)
    single = ReplayDataset(make_buffer(), Transition())
    assert next(iter(DataLoader(single, batch_size=32, collate_fn=pad_collate))).observation.shape == (32, 2)
    with pytest.raises(errors.FieldError, match=r"expected a list of samples\. Give the DataLoader a batch_size"):
        next(iter(DataLoader(single, batch_size=None, collate_fn=pad_collate)))


def test_items_are_tensors_without_a_transform_that_makes_them():
    """Fact 17.

    said    tensors need a ToTensor() transform
    torch   that is for pictures and arrays; the loader makes tensors of arrays and numbers, and leaves tensors alone
    rlfeed  a transform is given a `Batch` of tensors
    """
    for item in (torch.ones(3), np.ones(3, np.float32), 1.0):
        assert torch.is_tensor(next(iter(DataLoader(Rows(2, lambda i, item=item: item), batch_size=2))))
    given = []
    take(loader_of(make_buffer(), transform=lambda batch: given.append(batch) or batch), 1)
    assert given[0].observation.dtype == torch.float32


def test_generator_is_used_up_by_one_pass_and_repeated_by_forks():
    """Fact 18.

    said    a generator serves every epoch
    torch   the second pass is empty; it cannot be sent to a spawned worker; forked ones have a copy each
    rlfeed  the function is called anew: in each worker, for each pass
    """
    generator = (i for i in range(3))
    loader = DataLoader(Items(lambda: generator))
    assert (values(loader), values(loader)) == ([0, 1, 2], [])
    with pytest.raises(TypeError, match="cannot pickle 'generator' object"):
        ForkingPickler.dumps(generator)
    again = (i for i in range(3))
    assert sorted(values(Forked(Items(lambda: again), num_workers=2))) == [0, 0, 1, 1, 2, 2]

    loader = Forked(stream(share), num_workers=2)
    assert [sorted(values(loader)) for _ in range(2)] == [[0, 1, 2, 3, 4, 5]] * 2


def batches_of(data, batch_size):
    for i in range(len(data) // batch_size):
        yield data[i * batch_size : (i + 1) * batch_size]


def test_batches_by_whole_division_lose_the_tail():
    """Fact 19.

    said    there are len(data) // batch_size batches
    torch   code that counts so never sees the rest; the DataLoader itself gives it
    rlfeed  a pass gives a last short batch
    """
    assert sum(map(len, batches_of(torch.arange(100), 32))) == 96
    assert sum(map(len, DataLoader(torch.arange(100), batch_size=32))) == 100
    assert [len(batch) for batch in epoch(make_buffer(steps=100), Transition(), 32)] == [32, 32, 32, 4]


def test_pad_sequence_forgets_which_values_are_padding():
    """Fact 20.

    said    pad_sequence(batch_first=True) collates what differs in length
    torch   yes; but 0 is a value too, and the lengths are gone
    rlfeed  `lengths` and `mask` come along
    """
    first, second = pad_sequence([torch.zeros(1), torch.zeros(3)], batch_first=True)
    assert torch.equal(first, second)

    batch = next(iter(DataLoader(ReplayDataset(make_buffer(), Episode()), batch_size=40, collate_fn=pad_collate)))
    assert set(batch.lengths.tolist()) == {1, 2, 3}
    assert torch.equal(batch.mask, torch.arange(3) < batch.lengths[:, None])
    assert torch.equal(batch.mask.sum(1), batch.lengths)
    assert not batch.reward[~batch.mask].any()


def test_lazy_items_are_made_one_batch_at_a_time():
    """Fact 21.

    said    a generator saves memory
    torch   yes: what nobody asked for is never made
    rlfeed  the same; what is drawn ahead is bounded by `lookahead`
    """
    made = []
    batches = iter(DataLoader(Items(lambda: (made.append(i) or i for i in range(1000))), batch_size=4))
    for taken in range(1, 4):
        next(batches)
        assert len(made) == 4 * taken

    loader = loader_of(make_buffer(), lookahead=2)
    take(loader, 3)
    assert loader.stats().drawn == (3 + 2) * 10


# ---------------------------------------------------------------------------------------------- outputs fed back


def test_loader_takes_nothing_back_and_rollouts_do():
    """Facts 22 and 23.

    said    a DataLoader is not made for feeding outputs back; who does it all the same corrupts data, or loops for ever
    torch   right: it has no way in, and workers are ahead of the consumer; there is no channel by which that could
            happen: the worker never learns of it
    rlfeed  `Rollout` through environments, `Feedback` without; I/O goes one way; what runs back is explicit
    """
    value = torch.ones(1)
    for loader, expected in (
        (DataLoader(Rows(3, lambda i: value.clone()), batch_size=None), [1, 2, 4]),
        (Forked(Rows(3, lambda i: value.clone()), batch_size=None, num_workers=1), [8, 8, 8]),
    ):
        got = []
        for item in loader:
            got.append(item.item())
            value.mul_(2)  # "fed back": a worker has its own copy, and has made the next ones already
        assert got == expected
        assert not hasattr(iter(loader), "send")

    assert [out.tolist() for out in Feedback(lambda x, carry: (2 * x, carry), torch.ones(1), max_steps=3)] == [
        [2.0],
        [4.0],
        [8.0],
    ]
    rollout = Rollout(IdentifiableEnv(lengths=(9,)), lambda observation: (observation[:, 2].astype(np.int64) + 1) % 5)
    steps = list(itertools.islice(rollout, 4))
    assert [step.next_observation[0, 3] for step in steps] == [1, 2, 3, 4]  # what the policy returned, given back
    assert [step.action[0] for step in steps] == [1, 2, 3, 4]  # and it depended on what was given back before


class FeedsItself:
    """As it is often written: a model that is given its own output, as an iterator over itself."""

    def __init__(self, model, x, steps):
        self.model, self.x, self.left = model, x, steps

    def __iter__(self):
        return self

    def __next__(self):
        if not self.left:
            raise StopIteration
        self.left -= 1
        self.x = self.model(self.x)
        return self.x


def test_model_fed_with_itself_grows_a_graph_and_is_used_up():
    """Fact 24.

    said    an iterator with x = model(x) is all it takes
    torch   it works once: every step hangs on the graph of all before it, and a second loop gives nothing
    rlfeed  inference mode, and every iter() is a fresh start
    """
    model, x0 = nn.Linear(3, 3), torch.ones(1, 3)
    outputs = FeedsItself(model, x0, 50)
    sizes = [graph_of(out) for out in outputs]
    assert [later - earlier for earlier, later in itertools.pairwise(sizes)] == [2] * 49
    assert list(outputs) == []

    outputs = Feedback(lambda x, carry: (model(x), carry), x0, max_steps=50)
    first, second = list(outputs), list(outputs)
    assert all(out.grad_fn is None for out in first)
    assert len(first) == 50
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    kept = Feedback(lambda x, carry: (model(x), carry), x0, max_steps=3, grad=True)
    assert list(kept)[-1].grad_fn is not None  # where gradients through time are wanted


def test_lstm_gives_a_tuple_and_its_time_axis_is_not_always_the_second():
    """Fact 25.

    said    lstm(x)[:, -1, :] is the last output
    torch   a TypeError: (output, (h, c)); and without batch_first axis 1 is the batch
    rlfeed  batches are [B, T] always, and `lengths` says where the last step is
    """
    lstm, x = nn.LSTM(3, 4), torch.rand(5, 2, 3)  # T = 5, B = 2
    with pytest.raises(TypeError, match="tuple indices must be integers or slices, not tuple"):
        lstm(x)[:, -1, :]
    output, (h, _) = lstm(x)
    assert torch.equal(output[-1], h[0])
    assert output[:, -1, :].shape == (5, 4)  # one row of the batch through all time

    episodes = make_buffer().sample(8, Episode())
    lstm = nn.LSTM(2, 4, batch_first=True)
    last = lstm(episodes.observation[:, :-1])[0][torch.arange(8), episodes.lengths - 1]
    rows = zip(episodes.observation, episodes.lengths, strict=True)
    alone = [lstm(row[None, :length])[0][0, -1] for row, length in rows]
    assert torch.allclose(last, torch.stack(alone), atol=1e-6)


def test_recurrent_state_that_is_not_carried_is_forgotten():
    """Fact 26.

    said    the output as the next input keeps the hidden state going
    torch   it does not: (h, c) of every step are thrown away unless they are passed on
    rlfeed  the carry is passed on, and saved with the state
    """
    torch.manual_seed(0)
    lstm, x0 = nn.LSTM(3, 3), torch.rand(1, 2, 3)
    with torch.inference_mode():
        forgetful, x, state = x0, x0, None
        for _ in range(4):
            forgetful = lstm(forgetful)[0]
            x, state = lstm(x, state)
    assert not torch.allclose(forgetful, x)

    def cell(x, carry):
        out, (h, c) = lstm(x[None], (carry[0][None], carry[1][None]))
        return out[0], (h[0], c[0])

    *_, last = Feedback(cell, x0[0], (torch.zeros(2, 3), torch.zeros(2, 3)), max_steps=4)
    assert torch.equal(last, x[0])


def test_output_of_another_shape_is_fed_on_by_torch_and_refused_here():
    """Fact 27.

    said    reshaping the output keeps the batch
    torch   one more axis at every step, and nobody complains
    rlfeed  an error at the first step
    """
    model, x = nn.Linear(10, 10), torch.rand(2, 10)
    shapes = []
    for _ in range(3):
        x = model(x).unsqueeze(0)
        shapes.append(tuple(x.shape))
    assert shapes == [(1, 2, 10), (1, 1, 2, 10), (1, 1, 1, 2, 10)]
    with pytest.raises(errors.FieldError, match="Feedback: out"):
        next(iter(Feedback(lambda x, carry: (model(x).unsqueeze(0), carry), torch.rand(2, 10))))
