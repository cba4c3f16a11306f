"""The pure recursion's options: fewer rows, cut graphs, late checks, no rows at all. Each equals a plain loop."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlfeed.errors import ConfigError, DivergedError
from rlfeed.rollout import Feedback


def to(kind, values, dtype="float64"):
    """Make an array or a tensor of the same values."""
    return np.array(values, dtype) if kind == "numpy" else torch.tensor(values, dtype=getattr(torch, dtype))


def plain_loop(lengths, bad, max_steps):
    """Say slowly what rows 0.. must give that count 1, 2, ... and stop at their length, or break before step bad."""
    outs, last = [], [None] * len(lengths)
    for step in range(max_steps):
        new = [step < min(length, broken) for length, broken in zip(lengths, bad, strict=True)]
        if not any(new):
            break
        last = [100 * row + step + 1 if fresh else last[row] for row, fresh in enumerate(new)]
        outs.append((list(last), new))
    return outs


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["numpy", "torch"]),
    rows=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 8)), min_size=1, max_size=5),
    compact=st.booleans(),
    max_steps=st.integers(1, 8),
)
def test_feedback_any_pattern_of_ends_equals_a_plain_loop(kind, rows, compact, max_steps):
    lengths, bad = zip(*rows, strict=True)
    n = len(rows)
    limits = {"length": to(kind, lengths), "bad": to(kind, bad)}

    def cell(x, carry):
        assert len(x["value"]) == len(carry[0]) == len(carry[1]["bad"])
        count = carry[0] + 1
        return {"value": x["value"] + 1 + 0 * (1 / (carry[1]["bad"] >= count)), "left": carry[1]["length"] - count}, (
            count,
            carry[1],
        )

    feedback = Feedback(
        cell,
        {"value": to(kind, [100.0 * row for row in range(n)])},
        (to(kind, [0.0] * n), limits),
        feed=lambda out, x: {"value": out["value"]},
        stop=lambda out: out["left"] <= 0,
        max_steps=max_steps,
        check="stop",
        compact=compact,
    )
    with np.errstate(all="ignore"):
        seen = [(out["value"].tolist(), feedback.valid.tolist()) for out in feedback]
    assert seen == plain_loop(lengths, bad, max_steps)
    ends = [min(length, broken, max_steps) for length, broken in rows]
    assert feedback.lengths.tolist() == ends
    assert feedback.invalid.tolist() == [broken < min(length, max_steps) for length, broken in rows]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_feedback_compact_cell_feed_and_stop_see_only_rows_that_go_on(kind):
    seen = []

    def cell(x, carry):
        seen.append((x[:, 0].tolist(), carry["row"].tolist()))
        return x * 2, carry

    def feed(out, x):
        assert len(out) == len(x) == len(seen[-1][0])
        return out

    def stop(out):
        assert len(out) == len(seen[-1][0])
        return out[:, 0] > 10

    x0, row = to(kind, [[1.0], [9.0], [3.0]]), to(kind, [0, 1, 2], "int64")
    outs = [o[:, 0].tolist() for o in Feedback(cell, x0, {"row": row}, feed=feed, stop=stop, compact=True)]
    assert seen == [([1, 9, 3], [0, 1, 2]), ([2, 6], [0, 2]), ([4], [0]), ([8], [0])]
    assert outs == [[2, 18, 6], [4, 18, 12], [8, 18, 12], [16, 18, 12]]


def test_feedback_compact_late_output_of_another_width_is_refused_not_broadcast():
    widths = iter([2, 1])

    def cell(x, carry):
        return {"x": x + 1, "wide": np.ones((len(x), next(widths)))}, carry

    feedback = Feedback(
        cell, np.array([0, 5]), feed=lambda out, x: out["x"], stop=lambda out: out["x"] > 5, compact=True
    )
    next(feedback)
    with pytest.raises(Exception, match=r'step 1: out\["wide"\] is float64 of shape \(1, 1\); expected .* \(1, 2\)'):
        next(feedback)


def test_feedback_gradient_reaches_x0_and_the_first_carry():
    x0, carry = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    *_, last = Feedback(lambda x, c: (x * c, c), x0, carry, max_steps=4, grad=True)
    last.sum().backward()
    assert (x0.grad.tolist(), carry.grad.tolist()) == ([1, 1], [4, 4])


def test_feedback_compact_keeps_the_gradient_of_every_row():
    grads = []
    for compact in (False, True):
        weight = torch.tensor(1.5, requires_grad=True)
        feedback = Feedback(
            lambda x, c, w=weight: (x * w, c),
            torch.tensor([1.0, 4.0, 2.0]),
            stop=lambda out: out > 5,
            max_steps=4,
            grad=True,
            compact=compact,
        )
        sum(out.sum() for out in feedback).backward()
        grads.append(weight.grad.item())
    # Rows stop after 4, 1 and 3 outputs and repeat the last one: d/dw of sum_t x0 w^t.
    by_hand = (1 + 2 * 1.5 + 3 * 1.5**2 + 4 * 1.5**3) + 4 * 4 + 2 * (1 + 2 * 1.5 + 2 * 3 * 1.5**2)
    assert grads == pytest.approx([by_hand, by_hand], rel=1e-5)


def unrolled(weight, x, steps, every):
    """Backpropagation through time, cut by hand."""
    outs = []
    for step in range(steps):
        x = x * weight + 1
        outs.append(x)
        if every and (step + 1) % every == 0:
            x = x.detach()
    return outs


@pytest.mark.parametrize("every", [None, 1, 2, 3, 10])
def test_feedback_detach_every_gives_the_gradient_of_an_unrolled_loop_cut_there(every):
    weights = [torch.tensor(0.7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    x0 = torch.tensor([1.0, -2.0], dtype=torch.float64)
    given = list(Feedback(lambda x, c: (x * weights[0] + 1, c), x0, max_steps=7, grad=True, detach_every=every))
    expected = unrolled(weights[1], x0, 7, every)
    for mine, theirs in zip(given, expected, strict=True):
        assert torch.equal(mine, theirs)
    sum((out**2).sum() for out in given).backward()
    sum((out**2).sum() for out in expected).backward()
    assert weights[0].grad.item() == pytest.approx(weights[1].grad.item(), rel=1e-12)


def test_feedback_detach_every_two_gives_the_gradient_worked_out_by_hand():
    weight = torch.tensor(2.0, requires_grad=True)
    outs = list(Feedback(lambda x, c: (x * weight, c), torch.ones(1), max_steps=4, grad=True, detach_every=2))
    # Outputs 2, 4, 8, 16; the input of the third is the constant 4: its gradient is 4, the last one's 4 * 2 w.
    per_out = [torch.autograd.grad(out.sum(), weight, retain_graph=True)[0].item() for out in outs]
    assert per_out == [1, 4, 4, 16]


def test_feedback_detach_every_cuts_the_carry_too():
    weight = torch.tensor(3.0, requires_grad=True)
    outs = list(
        Feedback(
            lambda x, c: (x + c * weight, c * weight),
            torch.zeros(1),
            torch.ones(1),
            max_steps=3,
            grad=True,
            detach_every=1,
        )
    )
    # carry 1, 3, 9; out_t = out_{t-1} + carry_t w with both constant: the gradient is the carry alone.
    assert [torch.autograd.grad(out.sum(), weight, retain_graph=True)[0].item() for out in outs] == [1, 3, 9]


@pytest.mark.parametrize("every", [1, 2, 4, 100])
@pytest.mark.parametrize("compact", [False, True])
def test_feedback_check_every_names_the_step_row_and_key_in_which_it_happened(every, compact):
    def cell(x, carry):
        step = int(carry[0])
        bad = torch.zeros(len(x), dtype=torch.float64)
        if step == 4:
            bad[-1] = torch.inf  # the third of three rows; the second when compact: row 1 has stopped
        return {"fine": x, "wrong": x[:, None] + bad[:, None]}, carry + 1

    feedback = Feedback(
        cell,
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.int64),
        feed=lambda out, x: out["fine"],
        stop=lambda out: torch.arange(len(out["fine"])) == (1 if len(out["fine"]) == 3 else -1),
        max_steps=9,
        check_every=every,
        compact=compact,
    )
    given = []
    with pytest.raises(DivergedError, match=r'step 4, row 2: out\["wrong"\] is not finite'):
        given.extend(feedback)
    assert len(given) == {1: 4, 2: 5, 4: 7, 100: 8}[every]  # read after 5, 6, 8 steps, and at the end
    again = feedback.__next__ if every == 1 else feedback.state_dict
    with pytest.raises(DivergedError, match="step 4, row 2"):
        again()


def test_feedback_check_every_reads_a_tensor_once_in_so_many_steps(monkeypatch):
    reads = []
    real = torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: reads.append(1) or real(tensor))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: reads.append(1) or real(tensor))
    list(Feedback(lambda x, c: (x + 1, c), torch.zeros(2), max_steps=12, check_every=4))
    assert len(reads) == 3
    reads.clear()
    list(Feedback(lambda x, c: (x + 1, c), torch.zeros(2), max_steps=12))
    assert len(reads) == 12


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64, torch.int32, torch.bool]
)
def test_feedback_check_is_about_values_not_about_their_sum(dtype, every):
    greatest = {torch.float16: 6e4, torch.bfloat16: 3e38, torch.float32: 3e38}.get(dtype, 1)
    large = torch.full((2, 4), greatest).to(dtype)
    feedback = Feedback(lambda x, c: (x.clone(), c), large, max_steps=3, check_every=every)
    assert len(list(feedback)) == 3  # their sum is infinite, they are not
    if dtype.is_floating_point or dtype.is_complex:
        large[1, 2] = torch.nan
        with pytest.raises(DivergedError, match="step 0, row 1"):
            list(feedback)


@pytest.mark.parametrize("every", [1, 3])
def test_feedback_check_leaves_rows_that_stopped_alone(every):
    def cell(x, carry):
        return torch.where(x > 3, torch.nan, x + 1), carry

    feedback = Feedback(cell, torch.tensor([0.0, 2.0]), stop=lambda out: out > 3, check_every=every)
    assert [out.tolist() for out in feedback] == [[1, 3], [2, 4], [3, 4], [4, 4]]


def test_feedback_check_every_reads_the_rest_when_the_last_row_ends():
    feedback = Feedback(
        lambda x, c: (torch.where(x > 1, torch.inf, x + 1), c), torch.zeros(1), stop=lambda out: out > 3, check_every=99
    )
    given = []
    with pytest.raises(DivergedError, match="step 2, row 0"):
        given.extend(feedback)
    assert len(given) == 2  # and not the bad one


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("start", [3.0, [3.0, 4.0]])
def test_feedback_unbatched_gives_what_the_cell_gives(kind, start):
    def cell(x, carry):
        assert x.shape == np.shape(start)
        return {"v": x * 2}, (carry[0] + 1,)

    feedback = Feedback(
        cell,
        to(kind, start),
        (to(kind, 0, "int64"),),
        feed=lambda out, x: out["v"],
        stop=lambda out: bool(out["v"].max() > 20),
        batched=False,
    )
    outs = [out["v"].tolist() for out in feedback]
    assert outs == [(np.array(start) * 2**k).tolist() for k in (1, 2, 3)]
    assert feedback.lengths.tolist() == [3]
    assert outs == [out["v"].tolist() for out in feedback]


@pytest.mark.parametrize("check", ["raise", "stop"])
def test_feedback_unbatched_value_that_is_not_finite_is_an_error_or_the_end(check):
    def cell(x, carry):
        return np.where(x < 4, x * 2, np.nan), carry

    feedback = Feedback(cell, np.array([1.0, 2.0]), batched=False, check=check)
    if check == "raise":
        with pytest.raises(DivergedError, match="step 1: out is not finite"):
            list(feedback)
    else:
        assert [out.tolist() for out in feedback] == [[2, 4]]
        assert feedback.invalid.tolist() == [True]


def test_feedback_check_stop_ends_before_an_output_in_which_every_row_is_bad():
    feedback = Feedback(lambda x, c: (np.where(x < 4, x + 1, np.nan), c), np.array([2.0, 2.0]), check="stop")
    assert [out.tolist() for out in feedback] == [[3, 3], [4, 4]]
    assert (feedback.step, feedback.lengths.tolist(), feedback.invalid.tolist()) == (2, [2, 2], [True, True])


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"check_every": 0}, "check_every is 0"),
        ({"max_steps": 2.5}, "max_steps is 2.5; expected an integer"),
        ({"stop": 3}, "stop is 3; expected a function"),
        ({"cell": None}, "cell is None; expected a function"),
        ({"check_every": 2, "check": "stop"}, "a row that ends before its first bad output must be known in that step"),
        ({"detach_every": 2}, "Pass grad=True"),
        ({"detach_every": 0, "grad": True}, "detach_every is 0"),
        ({"x0": {"a": np.ones(2), "b": np.ones(3)}}, 'x0["b"] has shape (3,); expected a leading axis of 2'),
        ({"carry": np.ones((1, 2, 8))}, "nn.LSTM and nn.GRU keep [layers, n, ...]: give carry.transpose(0, 1)"),
        ({"carry": (np.ones(2), 3)}, "carry[1] is 3; expected an array"),
        ({"carry": np.ones(())}, "carry has shape (); expected a leading axis of 2 rows"),
        ({"x0": 3.0, "batched": False}, "x0 is 3.0; expected an array"),
    ],
)
def test_feedback_wrong_option_is_named(arguments, part):
    with pytest.raises(ConfigError) as error:
        Feedback(**{"cell": lambda x, c: (x, c), "x0": np.ones(2), **arguments})
    assert part in str(error.value)


def test_feedback_nothing_stopped_the_cell_is_called_once_and_nothing_is_copied():
    made = []

    def cell(x, carry):
        made.append(x + 1)
        return made[-1], carry

    for step, out in enumerate(itertools.islice(Feedback(cell, torch.zeros(2)), 8)):
        assert len(made) == step + 1
        assert step < 3 or out is made[-1]
