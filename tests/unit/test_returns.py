"""Returns and advantages: golden values, and what must not be confused.

Golden values of other parts are held where those are tested:

    n-step sums at sampling, priorities    unit/replay/test_golden_draws.py, property/test_replay_model.py
    running mean and variance              unit/envs/test_normalize.py
    V-trace                                unit/test_returns_vtrace.py
    distributions, supports, polyak        agents/test_distributions.py, agents/test_supports.py
    interquartile mean                     unit/train/test_aggregate.py
"""

import math

import pytest
import torch

from rlfeed.errors import ConfigError, FieldError
from rlfeed.returns import (
    continuing,
    discounted_returns,
    gae,
    lambda_returns,
    masked_mean,
    n_step_returns,
    rescale,
    standardize,
    successors,
    unrescale,
    vtrace,
)
from rlfeed.types import Batch


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)


def flags(*values):
    return torch.tensor(values, dtype=torch.bool)


def assert_near(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


# r = 1, gamma = 0.9, lambda = 0.8, values 0.5, 0.6, 0.7, then 0.8. The middle step may end the episode.
VALUE = rows([0.5, 0.6, 0.7])
ENDS = {  # discount, next_value, continues
    "running": ([0.9, 0.9, 0.9], [0.6, 0.7, 0.8], [True, True, False]),
    "terminated": ([0.9, 0.0, 0.9], [0.6, 0.65, 0.8], [True, False, False]),
    "truncated": ([0.9, 0.9, 0.9], [0.6, 0.65, 0.8], [True, False, False]),
}
WRONG = {  # what a truncated step is mistaken for
    "as terminated": [1.328, 0.4],
    "value of the next episode": [1.7816, 1.03],
    "sum goes on": [2.310368, 1.7644],
    "value of the step itself": [1.7168, 0.94],
}


def advantages(end):
    discount, next_value, continues = ENDS[end]
    return gae(torch.ones(1, 3), rows(discount), VALUE, rows(next_value), flags(continues), lam=0.8)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("running", [2.310368, 1.7644, 1.02]),
        ("terminated", [1.328, 0.4, 1.02]),
        ("truncated", [1.7492, 0.985, 1.02]),
    ],
)
def test_gae_known_rows_equals_golden(end, expected):
    """B4, B15, B16, B22: the three ways in which a step is not followed by the next."""
    assert_near(advantages(end), [expected])


@pytest.mark.parametrize("mistake", WRONG)
def test_gae_truncated_differs_from_mistake(mistake):
    """B4, B22, B23."""
    assert (advantages("truncated")[0, :2] - rows(WRONG[mistake])).abs().min() > 0.01


# Five steps, two rows, of rlax (Apache 2.0), rlax/_src/multistep_test.py.
REWARD = rows([1.0, 0.0, -1.0, 0.0, 1.0], [0.5, 0.8, -0.7, 0.0, 2.1])
DISCOUNT = rows([0.5, 0.9, 1.0, 0.5, 0.8], [0.9, 0.5, 0.3, 0.8, 0.7])
NEXT = rows([3.0, 1.0, 5.0, -5.0, 3.0], [-1.7, 1.2, 2.3, 2.2, 2.7])
RUNNING = torch.ones(2, 5, dtype=torch.bool)
TO_THE_END = [[1.315, 0.63, 0.7, 1.7, 3.4], [1.33592, 0.9288, 0.2576, 3.192, 3.99]]


def test_lambda_returns_rlax_rows_equals_golden():
    expected = [[1.6460547, 0.72281253, 0.7375001, 0.6500001, 3.4], [0.7866317, 0.9913063, 0.1101501, 2.834, 3.99]]

    assert_near(lambda_returns(REWARD, DISCOUNT, NEXT, RUNNING, lam=0.75), expected)


def test_discounted_returns_rlax_rows_equals_golden():
    assert_near(discounted_returns(REWARD, DISCOUNT, NEXT, RUNNING), TO_THE_END)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, [[2.5, 0.9, 4.0, -2.5, 3.4], [-1.03, 1.4, -0.01, 1.76, 3.99]]),
        (3, [[2.8, -3.15, 0.7, 1.7, 3.4], [1.2155, 0.714, 0.2576, 3.192, 3.99]]),
        (5, TO_THE_END),
        (7, TO_THE_END),
    ],
)
def test_n_step_returns_rlax_rows_equals_golden(n, expected):
    assert_near(n_step_returns(REWARD, DISCOUNT, NEXT, RUNNING, n=n), expected)


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        (1.0, [[-1.45118, -4.4557, 2.5396, 0.5249, -0.49], [3.0, 2.0, 1.0, 0.0, -4.9]]),
        (0.7, [[-0.676979, -5.248167, 2.4846, 0.6704, -0.49], [2.2899, 1.73, 1.0, 0.0, -4.9]]),
        (0.4, [[0.56731, -6.042, 2.3431, 0.815, -0.49], [1.725, 1.46, 1.0, 0.0, -4.9]]),
    ],
)
def test_gae_rlax_rows_equals_golden(lam, expected):
    reward = rows([0.0, 0.0, 1.0, 0.0, -0.5], [0.0, 0.0, 0.0, 0.0, 1.0])
    value = rows([1.0, 4.0, -3.0, -2.0, -1.0, -1.0], [-3.0, -2.0, -1.0, 0.0, 5.0, -1.0])
    discount = rows([0.99] * 5, [0.9, 0.9, 0.9, 0.0, 0.9])

    actual = gae(reward, discount, value[:, :-1], value[:, 1:], RUNNING, lam=lam)

    assert_near(actual, expected, 1e-3)  # as precise as rlax gives them


Q_REWARD, Q_NEXT = rows([1.0, 0.0, 2.0]), rows([1.0, 1.5, 2.0])  # max Q(s1), Q(s2), Q(s3)


@pytest.mark.parametrize(
    ("discount", "next_value", "continues", "expected"),
    [
        # Running: 3.8 = 2 + 0.9 * 2; 2.6955 = 0.9 (0.35 * 1.5 + 0.65 * 3.8).
        ([0.9, 0.9, 0.9], [1.0, 1.5, 2.0], [True, True, False], [2.8918675, 2.6955, 3.8]),
        # Step 1 terminated: neither the next value nor the next return: 1 + 0.9 (0.35 * 1 + 0.65 * 0).
        ([0.9, 0.0, 0.9], [1.0, 1.5, 2.0], [True, False, False], [1.315, 0.0, 3.8]),
        # Step 1 truncated, 0.7 the final observation's value: 0.9 * 0.7; 1 + 0.9 (0.35 + 0.65 * 0.63).
        ([0.9, 0.9, 0.9], [1.0, 0.7, 2.0], [True, False, False], [1.68355, 0.63, 3.8]),
    ],
)
def test_lambda_returns_of_action_values_equals_golden(discount, next_value, continues, expected):
    """B1, B2, B3: Q(lambda) with every kind of end."""
    actual = lambda_returns(Q_REWARD, rows(discount), rows(next_value), flags(continues), lam=0.65)

    assert_near(actual, [expected])


def test_lambda_returns_running_differs_from_value_one_step_late():
    """B1, B2: the step before the last bootstraps from what follows it, not from what follows the last."""
    actual = lambda_returns(Q_REWARD, torch.full((1, 3), 0.9), Q_NEXT, RUNNING[:1, :3], lam=0.65)

    assert (actual[0, :2] - rows([2.984005, 2.853])).abs().min() > 0.05


@pytest.mark.parametrize(
    ("steps", "discount", "next_value", "continues", "expected"),
    [
        (3, [0.9] * 4, [0.0, 0.0, 10.0, 20.0], [True, True, True, False], 5.23 + 0.729 * 10),
        (3, [0.9, 0.0, 0.9, 0.9], [0.0, 10.0, 10.0, 20.0], [True, False, True, False], 2.8),
        (3, [0.9] * 4, [0.0, 10.0, 99.0, 20.0], [True, False, True, False], 2.8 + 0.81 * 10),
        (9, [0.9] * 4, [0.0, 0.0, 0.0, 10.0], [True, True, True, False], 8.146 + 0.6561 * 10),
    ],
)
def test_n_step_returns_known_ends_equals_golden(steps, discount, next_value, continues, expected):
    """B9: rewards 1, 2, 3, 4 and gamma 0.9; the discount is gamma^k of the k steps summed."""
    actual = n_step_returns(rows([1.0, 2.0, 3.0, 4.0]), rows(discount), rows(next_value), flags(continues), n=steps)

    assert_near(actual[0, 0], expected)


def test_gae_every_column_is_estimated():
    """B13, B19: T rewards give T advantages; the last one counts."""
    reward = rows([0.0, 0.0, 0.0, 0.0, 1.0])

    actual = gae(reward, *torch.full((1, 1, 5), 0.5), *torch.zeros(2, 1, 5), RUNNING[:1], lam=1.0)

    assert_near(actual, [[0.0625, 0.125, 0.25, 0.5, 1.0]])


# R2D2's value rescaling, epsilon 0.001.


@pytest.mark.parametrize(
    ("x", "expected"), [(0, 0.0), (1, 0.415213562), (10, 2.326624790), (100, 9.149875621), (1000, 31.638584039)]
)
def test_rescale_known_values_equals_golden(x, expected):
    assert_near(rescale(torch.tensor([x, -x], dtype=torch.float32)), [expected, -expected], 2e-7)


def test_unrescale_of_rescaled_values_is_identity_in_float32():
    x = torch.logspace(-6, 6, 2001, dtype=torch.float64).float()
    x = torch.cat([x, -x])

    there = rescale(x)

    assert there.dtype == torch.float32
    assert ((unrescale(there).double() - x.double()) / x.double()).abs().max() < 2e-7


def test_unrescale_textbook_form_fails_in_float32():
    """The form that others use: why ours is another one."""
    x, epsilon = torch.tensor([1e-3, 1e-6]), 1e-3
    y = rescale(x)
    textbook = (((1 + 4 * epsilon * (y + 1 + epsilon)).sqrt() - 1) / (2 * epsilon)) ** 2 - 1

    assert ((textbook - x) / x).abs().min() > 0.01


def test_rescale_gradient_at_zero_is_finite():
    x = torch.zeros(1, requires_grad=True)

    torch.autograd.backward(unrescale(rescale(x)))

    assert_near(x.grad, [1.0], 1e-3)


def test_transformed_n_step_double_q_rlax_rows_equals_golden():
    """rlax/_src/nonlinear_bellman_test.py: h(2-step return of h^-1(target Q)) less Q, signed hyperbolic pair."""
    value, next_value = rows([1.1, 1.1, 3.1], [3.1, -1.1, -2.1]), rows([1.2, 0.2, 2.2], [2.2, 1.2, -1.2])
    reward, discount = rows([-1.3, -1.3, 2.3], [1.3, 5.3, -3.3]), rows([0.0, 0.89, 0.85], [0.88, 1.0, 0.83])

    targets = rescale(n_step_returns(reward, discount, unrescale(next_value), RUNNING[:, :3], n=2))

    expected = [[-1.6178751, 0.85600746, -0.75762916], [-0.87689304, 0.6246443, 0.3598088]]
    assert_near(targets - value, expected, 5e-5)  # rlax's own inverse is off by 2e-5 in float32


# Means that leave out padding.


def test_masked_mean_padding_does_not_count():
    values = rows([1.0, 2.0, math.nan], [6.0, math.inf, math.nan])
    mask = flags([True, True, False], [True, False, False])

    assert masked_mean(values, mask) == 3
    assert masked_mean(values[:, :1], None) == 3.5
    assert masked_mean(values, ~mask & mask) == 0


def test_masked_mean_of_nan_outside_has_finite_gradients():
    values = rows([1.0, math.nan]).requires_grad_()

    masked_mean(values, flags([True, False])).backward()

    assert values.grad.tolist() == [[1.0, 0.0]]


def test_standardize_padding_does_not_count():
    values = rows([1.0, 2.0, 3.0, 50.0])
    mask = flags([True, True, True, False])

    assert_near(standardize(values, mask), [[-1.0, 0.0, 1.0, 0.0]])
    assert_near(standardize(values[:, :3], None), [[-1.0, 0.0, 1.0]])


@pytest.mark.parametrize(("mask", "expected"), [([False, True], [0.0, 7.0]), ([False, False], [0.0, 0.0])])
def test_standardize_single_value_stays(mask, expected):
    assert standardize(rows([4.0, 7.0]), flags(mask)).tolist() == [expected]


def test_standardize_equal_values_gives_zeros():
    """Their mean is rounded: what is left of 0.3 must not be divided by itself."""
    assert standardize(torch.full((2, 3), 0.3), None).tolist() == [[0.0] * 3] * 2


# Where episodes end, in blocks and in sequences.


def batch(terminated, truncated, **others):
    terminated, truncated = flags(terminated), flags(truncated)
    zeros = torch.zeros(terminated.shape)
    return Batch(observation=zeros, action=zeros, reward=zeros, terminated=terminated, truncated=truncated, **others)


def test_continuing_flags_alone_stop():
    block = batch([False, True, False, False, False, False], [False, False, False, True, False, False])

    assert continuing(block).tolist() == [[True, False, True, False, True, False]]


def test_continuing_cut_and_lost_steps_stop_without_a_flag():
    """Step 1 is the last of a cut episode; step 4 was lost, so step 3 is the last of its own."""
    nowhere = [False] * 6
    is_first, mask = flags([True, False, True, False, False, True]), flags([True, True, True, True, False, True])
    block = batch(nowhere, nowhere, is_first=is_first, mask=mask)

    assert continuing(block).tolist() == [[True, False, True, False, False, False]]


def test_continuing_padding_stops():
    nowhere = [False] * 4

    padded = continuing(batch(nowhere, nowhere, mask=flags([True, True, False, False])))

    assert padded.tolist() == [[True, False, False, False]]


def test_continuing_step_that_is_none_has_no_next():
    nowhere = [False] * 4

    assert continuing(batch(nowhere, nowhere, mask=flags([True, False, True, True]))).tolist() == [
        [False, False, True, False]
    ]


def test_continuing_final_observation_alone_stops():
    nowhere = [False] * 4

    assert continuing(batch(nowhere, nowhere, final_index=torch.tensor([[0, 1]]))).tolist() == [
        [True, False, True, False]
    ]


def test_continuing_leaves_the_batch_alone():
    block = batch([False, False], [False, True], is_first=flags([True, True]), mask=flags([True, True]))

    continuing(block)

    assert block.truncated.tolist() == [[False, True]]
    assert block.terminated.tolist() == [[False, False]]


def test_continuing_transitions_are_refused():
    with pytest.raises(FieldError, match=r"reward has shape \(2,\); expected \[B, T\]"):
        continuing(batch([False, False], [False, False]).map(lambda tensor: tensor[0]))


def test_successors_finals_take_their_places():
    """B16, B23: identifiable values: 10 row + column, finals 100 and more."""
    value = rows([0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, 13.0])
    index = torch.tensor([[0, 1], [1, 2]])

    assert successors(value, torch.tensor([100.0, 101.0]), index).tolist() == [[1, 100, 3], [11, 12, 101]]
    assert successors(value).tolist() == [[1, 2, 3], [11, 12, 13]]
    assert successors(value, torch.zeros(0), index[:0]).tolist() == [[1, 2, 3], [11, 12, 13]]
    assert value[0].tolist() == [0, 1, 2, 3]


def test_successors_action_values_keep_their_axis():
    value = torch.arange(2 * 3 * 2.0).view(2, 3, 2)

    actual = successors(value, torch.tensor([[-1.0, -2.0]]), torch.tensor([[1, 0]]))

    assert actual.tolist() == [[[2, 3], [4, 5]], [[-1, -2], [10, 11]]]


def test_successors_incomplete_or_misshapen_finals_are_refused():
    value, index = torch.zeros(2, 3), torch.tensor([[0, 1]])

    with pytest.raises(FieldError, match=r"final_value has shape \(2,\); expected \(1,\)"):
        successors(value, torch.zeros(2), index)
    with pytest.raises(FieldError, match="final_value is None; expected both or neither"):
        successors(value, None, index)


# What is refused, and what must not spread.


def test_returns_wrong_tensors_are_refused_with_every_finding():
    with pytest.raises(FieldError) as error:
        gae(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(3), torch.zeros(2, 3), lam=0.9)

    assert str(error.value) == (
        "gae: value has shape (2, 4); expected (2, 3), as reward. next_value has shape (3,); expected (2, 3), as "
        "reward. continues is torch.float32; expected bool."
    )


@pytest.mark.parametrize("shape", [(3,), (2, 0), (2, 3, 1)])
def test_returns_no_rows_of_steps_are_refused(shape):
    parts = torch.zeros(3, *shape)

    with pytest.raises(FieldError, match=r"reward has shape .*; expected \[B, T\], at least one of each"):
        lambda_returns(*parts, torch.zeros(shape, dtype=torch.bool), lam=0.9)


def test_n_step_returns_no_step_is_refused():
    with pytest.raises(ConfigError, match="n is 0; expected at least 1"):
        n_step_returns(REWARD, DISCOUNT, NEXT, RUNNING, n=0)


def test_returns_of_nan_behind_an_end_are_finite():
    """NaN times 0 is NaN: what a mask leaves out is chosen away, in gradients too."""
    nan = math.nan
    reward, discount = rows([1.0, 1.0, nan, nan]), rows([0.9, 0.0, 0.9, 0.9])
    value = rows([0.5, 0.5, nan, nan]).requires_grad_()
    next_value = rows([0.5, nan, nan, nan]).requires_grad_()
    continues = flags([True, False, True, False])
    parts = (reward, discount, next_value, continues)

    found = {
        "lambda_returns": lambda_returns(*parts, lam=0.9),
        "n_step_returns": n_step_returns(*parts, n=3),
        "gae": gae(reward, discount, value, next_value, continues, lam=0.9),
        "vtrace": vtrace(torch.zeros(1, 4), reward, discount, value, next_value, continues).advantages,
    }

    assert [name for name, tensor in found.items() if not tensor[0, :2].isfinite().all()] == []
    for name in ("lambda_returns", "n_step_returns", "gae"):
        (gradient,) = torch.autograd.grad(found[name][0, :2].sum(), next_value, retain_graph=True)
        assert gradient.isfinite().all(), name
