"""A recursion that was saved goes on as if nothing had happened: after every step, with every kind of value."""

import io
import pickle
from typing import NamedTuple

import numpy as np
import pytest
import torch

from rlfeed.codec import decode, encode
from rlfeed.errors import CheckpointError
from rlfeed.rollout import Feedback

CARRIES = {
    "tensor": lambda values: values,
    "tuple": lambda values: (values, (values * 10, values[:, None] + 0)),
    "dict": lambda values: {"h": values, "deep": {"c": values + 1}},
}


def plus_one(nest):
    if isinstance(nest, dict):
        return {key: plus_one(part) for key, part in nest.items()}
    return tuple(plus_one(part) for part in nest) if isinstance(nest, tuple) else nest + 1


def first_leaf(nest):
    while isinstance(nest, dict | tuple):
        nest = next(iter(nest.values())) if isinstance(nest, dict) else nest[0]
    return nest


def cell(x, carry):
    """Add the carry; row 3's output stops being finite."""
    total = x["a"] + first_leaf(carry)
    log = np.log if isinstance(total, np.ndarray) else torch.log
    return {"a": total, "b": log(40 - total)[:, None]}, plus_one(carry)


def feed(out, x):
    return {"a": out["a"]}


def stop(out):
    return out["a"] == 6


def build(kind="torch", carry="tuple", compact=False, **options):
    values = [0.0, 3.0, 1.0, 30.0]
    x0 = np.array(values) if kind == "numpy" else torch.tensor(values, dtype=torch.float64)
    return Feedback(
        cell,
        {"a": x0},
        CARRIES[carry](x0 * 0),
        feed=feed,
        stop=stop,
        max_steps=8,
        check="stop",
        compact=compact,
        **options,
    )


def told(feedback, out):
    nothing_new = np.isnan(np.asarray(out["b"])) | ~feedback.valid[:, None]
    return out["a"].tolist(), np.where(nothing_new, -1, np.asarray(out["b"])).tolist(), feedback.valid.tolist()


def ends(feedback):
    return feedback.step, feedback.lengths.tolist(), feedback.invalid.tolist(), feedback.active.tolist()


def through_bytes(state):
    return decode(np.frombuffer(b"".join(bytes(part) for part in encode(state)), np.uint8))


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("compact", [False, True])
def test_feedback_saved_after_any_step_goes_on_exactly(kind, carry, compact):
    whole = build(kind, carry, compact)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = [told(whole, out) for out in whole]
        # What the pattern is to hold: rows that stop, one whose output is not finite, one that goes on to the bound.
        assert ends(whole) == (8, [4, 3, 8, 4], [False, False, False, True], [False, False, True, False])
        for cut in range(9):
            first = build(kind, carry, compact)
            head = [told(first, next(first)) for _ in range(cut)]
            state = through_bytes(first.state_dict())
            list(first)  # what the first one does later changes nothing
            second = build(kind, carry, compact)
            second.load_state_dict(state)
            second.load_state_dict(second.state_dict())
            assert head + [told(second, out) for out in second] == expected
            assert ends(second) == ends(whole)
            assert [told(second, out) for out in second] == expected  # a further iter() is a fresh start


def test_feedback_loaded_goes_on_by_next_as_by_iter():
    first = build()
    states = [(out["a"].tolist(), first.state_dict()) for out in first]
    second = build()
    second.load_state_dict(states[2][1])
    assert next(second)["a"].tolist() == states[3][0]


@pytest.mark.parametrize("compact", [False, True])
def test_feedback_pickled_in_the_middle_goes_on(compact):
    whole = [out["a"].tolist() for out in build(compact=compact)]
    first = build(compact=compact)
    head = [next(first)["a"].tolist() for _ in range(5)]
    second = pickle.load(io.BytesIO(pickle.dumps(first)))
    assert head + [next(second)["a"].tolist() for _ in range(3)] == whole


def test_feedback_with_gradients_pickled_in_the_middle_goes_on_without_the_graph():
    first = Feedback(Recurrent(), torch.ones(3, 2), torch.ones(3, 2), max_steps=6, grad=True)
    for _ in range(4):
        next(first)
    second = pickle.loads(pickle.dumps(first))
    ours, theirs = next(second), next(first)
    assert torch.equal(ours, theirs)
    state = second.state_dict()
    assert not state["x"].requires_grad
    assert not state["carry"].requires_grad


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = torch.nn.GRUCell(2, 2)

    def forward(self, x, carry):
        carry = self.gru(x, carry)
        return carry, carry


class State(NamedTuple):
    h: torch.Tensor
    more: dict


@pytest.mark.parametrize("compact", [False, True])
def test_feedback_named_tuples_keep_their_names_also_through_a_file(compact):
    def cell(x, carry):
        following = State(carry.h + 1, {"total": carry.more["total"] + x.h, "none": ()})
        return following, following

    def build():
        start = State(torch.tensor([0.0, 1.0]), {"total": torch.zeros(2), "none": ()})
        stop = lambda out: out.h >= 5  # noqa: E731
        return Feedback(cell, start, start, stop=stop, max_steps=6, compact=compact)

    whole = [(out.h.tolist(), out.more["total"].tolist()) for out in build()]
    assert whole[-1] == ([5, 5], [10, 10])
    for cut in range(6):
        first = build()
        head = [(out.h.tolist(), out.more["total"].tolist()) for _, out in zip(range(cut), first, strict=False)]
        second = build()
        second.load_state_dict(through_bytes(first.state_dict()))
        assert head + [(out.h.tolist(), out.more["total"].tolist()) for out in second] == whole


@pytest.mark.parametrize(
    "wrong",
    [
        lambda state: {**state, "active": state["active"][:2]},
        lambda state: {**state, "x": {"a": state["x"]["a"][:2]}},
        lambda state: {**state, "carry": ()},
        lambda state: {**state, "x": {"a": state["x"]["a"].float()}},
    ],
)
def test_feedback_state_of_another_one_is_refused(wrong):
    feedback = build()
    next(feedback)
    with pytest.raises(CheckpointError, match=r"expected .* and 4"):
        feedback.load_state_dict(wrong(feedback.state_dict()))
    assert feedback.step == 1  # and it is as it was


def test_feedback_closed_in_the_middle_is_over_and_begins_anew_with_the_next_iter():
    feedback = build()
    whole = [out["a"].tolist() for out in feedback]
    next(iter(feedback))
    feedback.close()
    feedback.close()
    with pytest.raises(StopIteration):
        next(feedback)
    assert feedback.lengths.tolist() == [1, 1, 1, 1]
    assert [out["a"].tolist() for out in feedback] == whole
