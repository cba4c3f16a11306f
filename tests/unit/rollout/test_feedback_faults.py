"""What goes wrong when a model is fed its own outputs: each fault is an error that names it, or cannot happen."""

import gc
import weakref

import numpy as np
import pytest
import torch
from support.graphs import graph_of
from torch import nn

from rlfeed.errors import FieldError
from rlfeed.rollout import Feedback


def make(kind, values):
    return np.array(values) if kind == "numpy" else torch.from_numpy(np.array(values))


KINDS = pytest.mark.parametrize("kind", ["numpy", "torch"])


def test_feedback_lstm_state_with_the_layers_first_is_refused_and_the_fix_works():
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 3, num_layers=2, batch_first=True)
    x0, h = torch.rand(4, 1, 3), torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match=r"carry\[0\] has shape \(2, 4, 3\).*give carry.transpose\(0, 1\)"):
        Feedback(lstm, x0, (h, h))

    def cell(x, carry):
        out, (h, c) = lstm(x, tuple(part.transpose(0, 1).contiguous() for part in carry))
        return out, (h.transpose(0, 1), c.transpose(0, 1))

    outs = list(Feedback(cell, x0, (h.transpose(0, 1), h.transpose(0, 1)), max_steps=5))
    x, state = x0, None
    with torch.inference_mode():
        for out in outs:
            x, state = lstm(x, state)
            assert torch.equal(out, x)  # and so the state was kept: without it every output differs


def test_feedback_lstm_output_is_a_pair_and_is_not_taken_for_a_tensor():
    lstm = nn.LSTM(3, 3, batch_first=True)
    feedback = Feedback(lambda x, carry: (lstm(x), carry), torch.rand(2, 1, 3))
    with pytest.raises(FieldError, match=r"out\[1\]\[0\] has shape \(1, 2, 3\); expected a leading axis of 2"):
        next(feedback)


@pytest.mark.parametrize("result", [torch.rand(2, 3), [torch.rand(2, 3), ()], None, (torch.rand(2, 3), (), ())])
def test_feedback_cell_that_returns_no_pair_is_refused(result):
    # A tensor of two rows would unpack without a word.
    with pytest.raises(FieldError, match=r"cell returned a \w+; expected the pair \(out, carry\)"):
        next(Feedback(lambda x, carry: result, torch.rand(2, 3)))


@pytest.mark.parametrize("compact", [False, True])
def test_feedback_graph_does_not_grow_without_gradients_nor_past_the_cut(compact):
    weight = torch.ones(1, requires_grad=True)

    def build(**options):
        return Feedback(
            lambda x, c: (x * weight, c * weight),
            torch.ones(2),
            torch.ones(2),
            stop=lambda out: torch.arange(len(out)) == (1 if len(out) == 2 and not compact else 9),
            max_steps=40,
            compact=compact,
            **options,
        )

    assert all(out.grad_fn is None and not out.requires_grad for out in build())
    growing = [graph_of(out) for out in build(grad=True)]
    assert growing[-1] > 39
    cut = [graph_of(out) for out in build(grad=True, detach_every=4)]
    assert max(cut) < 20
    assert cut[8:12] == cut[36:]


def test_feedback_without_gradients_keeps_no_earlier_output_alive():
    feedback = Feedback(lambda x, c: (x + 1, c), torch.zeros(2))
    alive = [weakref.ref(next(feedback)) for _ in range(10)]
    gc.collect()
    assert [ref() is not None for ref in alive] == [False] * 9 + [True]


def in_place(x, carry):
    x += 1
    return x, carry


class OneBuffer:
    """Write every output into the same array."""

    def __init__(self, buffer):
        self.buffer = buffer

    def __call__(self, x, carry):
        self.buffer[:] = x + 1
        return self.buffer, carry


class TwoBuffers:
    """Write the outputs into two arrays in turn, given out as views."""

    def __init__(self, buffer):
        self.buffers, self.turn = (buffer, buffer + 0), 0

    def __call__(self, x, carry):
        self.turn = 1 - self.turn
        self.buffers[self.turn][:] = x + 1
        return self.buffers[self.turn][:], carry


@KINDS
@pytest.mark.parametrize("careless", ["in_place", "one", "two", "carry"])
@pytest.mark.parametrize("compact", [False, True])
def test_feedback_cell_that_writes_in_place_corrupts_nothing(kind, careless, compact):
    x0, carry = make(kind, [0.0, 5.0, 2.0]), ()
    cell = in_place
    if careless == "one":
        cell = OneBuffer(make(kind, [0.0] * 3))
    if careless == "two":
        cell = TwoBuffers(make(kind, [0.0] * 3))
    if careless == "carry":
        carry = make(kind, [0.0, 5.0, 2.0])

        def cell(x, carry):
            carry += 1
            return carry, x * 0 + carry

    if compact and careless in ("one", "two"):
        return  # a buffer of all rows does not fit fewer
    feedback = Feedback(cell, x0, carry, stop=lambda out: out >= 7, compact=compact)
    expected = [[1, 6, 3], [2, 7, 4], [3, 7, 5], [4, 7, 6], [5, 7, 7], [6, 7, 7], [7, 7, 7]]
    for _ in range(2):
        assert [out.tolist() for out in list(feedback)] == expected
    assert x0.tolist() == [0, 5, 2]
    state = feedback.state_dict()
    assert state["x"].tolist() == ([] if compact else [7, 7, 7])


@KINDS
@pytest.mark.parametrize("careless", [in_place, OneBuffer, TwoBuffers])
def test_feedback_cell_that_writes_in_place_while_no_row_stops_corrupts_no_output(kind, careless):
    x0 = make(kind, [0.0, 5.0])
    cell = careless if careless is in_place else careless(x0 + 0)
    outs = list(Feedback(cell, x0, max_steps=9))
    assert [out.tolist() for out in outs] == [[step, 5 + step] for step in range(1, 10)]


@KINDS
def test_feedback_carry_in_one_array_is_kept_for_rows_that_stopped_and_in_the_state(kind):
    buffer = make(kind, [0.0, 0.0])

    def cell(x, carry):
        buffer[:] = carry + 1
        return x + buffer, buffer

    feedback = Feedback(cell, make(kind, [0.0, 4.0]), buffer + 0, stop=lambda out: out >= 6, max_steps=3)
    outs = [(out.tolist(), feedback.state_dict()["carry"].tolist()) for out in feedback]
    assert outs == [([1, 5], [1, 1]), ([3, 7], [2, 2]), ([6, 7], [3, 2])]


@KINDS
def test_feedback_state_is_not_changed_by_a_carry_that_is_written_in_place_later(kind):
    def cell(x, carry):
        carry += 1
        return x + 1, carry

    feedback = Feedback(cell, make(kind, [0.0]), make(kind, [0.0]))
    for _ in range(5):
        next(feedback)
    state = feedback.state_dict()
    next(feedback)
    assert state["carry"].tolist() == [5]


@KINDS
def test_feedback_state_is_not_changed_by_a_cell_that_writes_in_place(kind):
    feedback = Feedback(in_place, make(kind, [0.0]), max_steps=9)
    next(feedback)
    state = feedback.state_dict()
    list(zip(range(3), feedback, strict=False))
    assert state["x"].tolist() == state["out"].tolist() == [1]
    feedback.load_state_dict(state)
    assert next(feedback).tolist() == [2]
    assert state["x"].tolist() == [1]


LATER = {
    "rows": (lambda x: x[:1], r"out is .* of shape \(1, 3\); expected .* of shape \(2, 3\)"),
    "broadcast": (lambda x: x[:, :1], r"out is .* of shape \(2, 1\); expected .* of shape \(2, 3\)"),
    "dtype": (lambda x: x.astype(np.float32) if isinstance(x, np.ndarray) else x.float(), r"out is .*float32 of shape"),
    "structure": (lambda x: {"x": x}, r"out is a dict with the keys \['x'\]; expected .*float64 of shape \(2, 3\)"),
    "object": (lambda x: None, r"out is None; expected .*float64"),
}


@KINDS
@pytest.mark.parametrize("change", LATER)
@pytest.mark.parametrize("part", ["out", "carry", "x"])
@pytest.mark.parametrize("stopped", [False, True])
def test_feedback_change_in_a_later_step_is_refused_in_that_step(kind, change, part, stopped):
    spoil, message = LATER[change]
    calls = []

    def cell(x, carry):
        calls.append(1)
        late = len(calls) == 5
        return spoil(x) if late and part == "out" else x + 0, spoil(carry) if late and part == "carry" else carry + 0

    x0 = make(kind, [[0.0] * 3] * 2)
    feedback = Feedback(
        cell,
        x0,
        x0 + 1,
        feed=lambda out, x: spoil(out) if len(calls) == 5 and part == "x" else out,
        stop=lambda out: make(kind, [False, stopped]),
        max_steps=9,
    )
    seen = []
    name = {"out": "out", "carry": "carry", "x": "the next x"}[part]
    with pytest.raises(FieldError, match="step 4: " + message.replace("out", name, 1)):
        seen.extend(feedback)
    assert len(seen) == 4


def test_feedback_nest_that_changes_names_the_part():
    outs = iter(
        [{"a": np.ones(2), "b": (np.ones(2), np.ones(2))}, {"a": np.ones(2), "b": (np.ones(2), np.ones((2, 1)))}]
    )
    feedback = Feedback(lambda x, c: (next(outs), c), np.ones(2), feed=lambda out, x: out["a"])
    next(feedback)
    with pytest.raises(FieldError, match=r'step 1: out\["b"\]\[1\] is float64 of shape \(2, 1\); expected float64 of'):
        next(feedback)


def test_feedback_cell_that_raises_can_be_called_again():
    calls = []

    def cell(x, carry):
        calls.append(1)
        if len(calls) == 2:
            raise ConnectionError("once")
        return x + 1, carry

    feedback = Feedback(cell, np.zeros(1))
    next(feedback)
    with pytest.raises(ConnectionError, match="once"):
        next(feedback)
    assert next(feedback).tolist() == [2]


def test_feedback_without_stop_or_bound_goes_on_and_with_both_ends_at_the_first():
    endless = Feedback(lambda x, c: (x + 1, c), np.zeros(1))
    for _ in range(1000):
        out = next(endless)
    assert out.tolist() == [1000]
    assert len(list(Feedback(lambda x, c: (x + 1, c), np.zeros(1), stop=lambda out: out >= 4, max_steps=9))) == 4
    assert len(list(Feedback(lambda x, c: (x + 1, c), np.zeros(1), stop=lambda out: out >= 99, max_steps=9))) == 9
