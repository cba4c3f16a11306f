"""The pure recursion: outputs become inputs, rows stop on their own, and it can be saved in the middle."""

import numpy as np
import pytest
import torch

from rlfeed.errors import ConfigError, DivergedError, FieldError
from rlfeed.rollout import Feedback


def double(x, carry):
    return x * 2, carry


def fibonacci(x, carry):
    return x + carry, x


KINDS = [np.array, torch.tensor]


@pytest.mark.parametrize("make", KINDS)
def test_feedback_output_becomes_the_next_input(make):
    outs = [out.tolist() for out in Feedback(double, make([1.0, 3.0]), max_steps=3)]
    assert outs == [[2, 6], [4, 12], [8, 24]]


@pytest.mark.parametrize("make", KINDS)
def test_feedback_carry_goes_along(make):
    feedback = Feedback(fibonacci, make([1]), make([0]), max_steps=7)
    assert [int(out[0]) for out in feedback] == [1, 2, 3, 5, 8, 13, 21]


def test_feedback_feed_makes_the_next_input_of_a_nest():
    feedback = Feedback(
        lambda x, carry: ({"token": x + 1}, carry), np.array([0]), feed=lambda out, x: out["token"] * 10, max_steps=3
    )
    assert [int(out["token"][0]) for out in feedback] == [1, 11, 111]


def test_feedback_every_iter_is_a_fresh_start():
    feedback = Feedback(double, np.array([1.0]), max_steps=2)
    assert [out.tolist() for out in feedback] == [out.tolist() for out in feedback] == [[2], [4]]


@pytest.mark.parametrize("make", KINDS)
def test_feedback_stopped_rows_keep_their_last_output_and_are_marked(make):
    feedback = Feedback(double, make([1.0, 3.0, 9.0]), stop=lambda out: out > 10)
    seen = [(out.tolist(), feedback.valid.tolist()) for out in feedback]
    assert seen == [
        ([2, 6, 18], [True, True, True]),
        ([4, 12, 18], [True, True, False]),
        ([8, 12, 18], [True, False, False]),
        ([16, 12, 18], [True, False, False]),
    ]
    assert feedback.lengths.tolist() == [4, 2, 1]


def test_feedback_stopped_rows_keep_their_input_and_carry_too():
    def cell(x, carry):
        return x + carry, carry + 1

    feedback = Feedback(cell, np.array([0, 5]), np.array([0, 0]), stop=lambda out: out >= 5, max_steps=4)
    assert [out.tolist() for out in feedback] == [[0, 5], [1, 5], [3, 5], [6, 5]]
    assert feedback.state_dict()["carry"].tolist() == [4, 1]
    feedback = Feedback(cell, np.array([0, 5]), np.array([0, 0]), feed=lambda out, x: x + 1, stop=lambda out: out >= 5)
    assert [out.tolist() for out in feedback] == [[0, 5], [2, 5], [4, 5], [6, 5]]
    assert feedback.state_dict()["x"].tolist() == [4, 6]


@pytest.mark.parametrize("make", KINDS)
def test_feedback_value_that_is_not_finite_names_step_row_and_key(make):
    def cell(x, carry):
        return {"v": x["v"] * x["v"]}, carry

    start = make([1.0, 1e200], dtype=np.float64 if make is np.array else torch.float64)
    feedback = Feedback(cell, {"v": start})
    with np.errstate(over="ignore"), pytest.raises(DivergedError, match=r'step \d, row 1: out\["v"\] is not finite'):
        for _ in zip(range(5), feedback, strict=False):
            pass


def test_feedback_check_stop_ends_the_row_before_the_bad_output_and_marks_it():
    def cell(x, carry):
        return np.where(x >= 4, np.nan, x * 2), carry

    feedback = Feedback(cell, np.array([1.0, 4.0, 0.0]), max_steps=4, check="stop")
    outs = [(out.tolist(), feedback.valid.tolist()) for out in feedback]
    assert outs[1] == ([4.0, pytest.approx(np.nan, nan_ok=True), 0.0], [True, False, True])
    assert outs[2] == ([4.0, pytest.approx(np.nan, nan_ok=True), 0.0], [False, False, True])
    assert feedback.invalid.tolist() == [True, True, False]
    assert feedback.lengths.tolist() == [2, 0, 4]


def test_feedback_check_off_lets_everything_through():
    outs = list(Feedback(lambda x, c: (x * np.nan, c), np.array([1.0]), max_steps=2, check="off"))
    assert np.isnan(outs).all()


def test_feedback_grad_keeps_the_graph_and_otherwise_is_inference():
    weight = torch.tensor([2.0], requires_grad=True)
    *_, last = Feedback(lambda x, c: (x * weight, c), torch.ones(1), max_steps=3, grad=True)
    last.sum().backward()
    assert weight.grad.item() == 3 * 2.0**2
    *_, last = Feedback(lambda x, c: (x * weight, c), torch.ones(1), max_steps=3)
    assert last.is_inference()


@pytest.mark.parametrize("make", KINDS)
def test_feedback_saved_in_the_middle_goes_on_with_the_next_output(make):
    def build():
        return Feedback(fibonacci, make([1, 5]), make([0, 1]), stop=lambda out: out > 60, max_steps=9)

    whole = [out.tolist() for out in build()]
    first = build()
    head = [out.tolist() for _, out in zip(range(4), first, strict=False)]
    state = first.state_dict()
    next(first)  # what happens later does not change the state
    second = build()
    second.load_state_dict(state)
    tail = [out.tolist() for out in second]
    assert (head + tail)[: len(whole)] == whole[:4] + tail == whole
    assert [out.tolist() for out in second] == whole


def test_feedback_closed_gives_nothing_more():
    feedback = Feedback(double, np.array([1.0]))
    next(feedback)
    feedback.close()
    with pytest.raises(StopIteration):
        next(feedback)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"check": "rise"}, "Did you mean 'raise'"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"x0": np.float64(3)}, "no leading axis"),
    ],
)
def test_feedback_wrong_argument_is_named(arguments, part):
    with pytest.raises(ConfigError) as error:
        Feedback(double, **{"x0": np.ones(1), **arguments})
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("cell", "carry", "part"),
    [
        (lambda x, c: (x[:1], c), (), "out has shape (1,); expected a leading axis of 2"),
        (lambda x, c: (np.ones((2, 2)), c), (), "of shape (2, 2); expected float64 of shape (2,)"),
        (lambda x, c: (x.astype(np.float32), c), (), "float32"),
        (lambda x, c: (x, (c, c)), np.ones(2), "carry is a tuple of 2 parts; expected float64"),
        (lambda x, c: (x, ()), (np.ones(2),), "carry is a tuple of 0 parts; expected a tuple of 1 parts"),
        (lambda x, c: (3.0, c), (), "out is 3.0"),
    ],
)
def test_feedback_shapes_that_do_not_come_back_are_refused(cell, carry, part):
    with pytest.raises(FieldError) as error:
        next(Feedback(cell, np.ones(2), carry))
    assert part in str(error.value)


def test_feedback_stop_must_say_one_bool_for_each_row():
    with pytest.raises(FieldError, match=r"stop\(out\) is float64 of shape \(2,\)"):
        next(Feedback(double, np.ones(2), stop=lambda out: out))
