"""Categorical values, target networks, the epsilon ladder and clipped gradients."""

import math

import pytest
import torch
from torch import nn

from agents.common import Support, clip_gradients, epsilon_ladder, polyak
from rlfeed.errors import ConfigError


def assert_near(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("reward", "discount", "expected"),
    [
        (0.5, 1.0, [0.1, 0.25, 0.65]),
        (0.0, 1.0, [0.2, 0.3, 0.5]),  # B42, B43: atoms onto atoms
        (0.3, 0.0, [0.0, 0.7, 0.3]),
        (5.0, 1.0, [0.0, 0.0, 1.0]),
        (-5.0, 1.0, [1.0, 0.0, 0.0]),
        (0.5, 0.5, [0.0, 0.35, 0.65]),
    ],
)
def test_projection_known_rows_equals_golden(reward, discount, expected):
    """B42, B43."""
    probs = torch.tensor([[0.2, 0.3, 0.5]])

    actual = Support(-1, 1, 3).project(probs, torch.tensor([reward]), torch.tensor([discount]))

    assert_near(actual, [expected])


@pytest.mark.parametrize(("v_min", "v_max", "atoms"), [(-10, 10, 51), (-5, 5, 101), (0, 7, 51), (-0.3, 0.1, 2)])
def test_projection_of_nothing_is_identity(v_min, v_max, atoms):
    """B42: an atom that lies on an atom, whatever its number rounds to, gives its whole share to that one."""
    probs = torch.rand(8, atoms, generator=torch.Generator().manual_seed(0)).softmax(-1)

    assert torch.equal(Support(v_min, v_max, atoms).project(probs, torch.zeros(8), torch.ones(8)), probs)


def test_projection_keeps_all_mass_and_the_mean():
    """B43, B44: for any reward and discount, the largest too, in float32."""
    support, generator = Support(-10, 10, 51), torch.Generator().manual_seed(0)
    probs = torch.rand(2000, 51, generator=generator).softmax(-1)
    reward = 40 * torch.rand(2000, generator=generator) - 20
    reward[:4] = torch.tensor([1e30, -1e30, 10.0, 9.9999999])
    discount = torch.rand(2000, generator=generator)

    actual = support.project(probs, reward, discount)

    assert_near(actual.sum(-1), torch.ones(2000))
    assert actual.min() >= 0
    moved = (reward[:, None] + discount[:, None] * support.atoms).clamp(-10, 10)
    assert_near(support.mean(actual), (probs * moved).sum(-1), 1e-4)


def test_projection_equals_slow_twin():
    support, generator = Support(-2, 3, 6), torch.Generator().manual_seed(1)
    probs = torch.rand(20, 6, generator=generator).softmax(-1)
    reward, discount = 4 * torch.rand(2, 20, generator=generator) - 2

    actual = support.project(probs, reward, discount.abs().clamp(max=1))

    for row in range(20):
        expected = [0.0] * 6
        for atom in range(6):
            value = reward[row].item() + min(abs(discount[row].item()), 1) * (atom - 2)
            place = min(max(value, -2), 3) + 2
            low = min(int(place), 4)
            expected[low] += probs[row, atom].item() * (low + 1 - place)
            expected[low + 1] += probs[row, atom].item() * (place - low)
        assert_near(actual[row], expected, 1e-5)


def test_projection_of_sequences_keeps_their_axes():
    support = Support(0, 1, 3)
    probs = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)

    actual = support.project(probs, torch.full((2, 4), 0.1), torch.full((2, 4), 0.9))

    assert actual.shape == (2, 4, 3)
    assert_near(actual[1, 2], support.project(probs[1, 2:3], torch.tensor([0.1]), torch.tensor([0.9]))[0])


def test_projection_of_nan_is_nan_and_no_crash():
    actual = Support(0, 1, 3).project(torch.full((1, 3), 1 / 3), torch.tensor([math.nan]), torch.ones(1))

    assert actual.isnan().any()


def test_two_hot_known_value_equals_golden():
    assert_near(Support(0, 1, 3).two_hot(torch.tensor([0.3, 0.5, 7.0])), [[0.4, 0.6, 0], [0, 1, 0], [0, 0, 1]])


def test_two_hot_mean_is_the_value():
    value = torch.linspace(-5, 5, 1001)

    assert_near(Support(-5, 5, 101).mean(Support(-5, 5, 101).two_hot(value)), value, 2e-6)


def test_hl_gauss_sums_to_one_and_has_the_mean():
    support, value = Support(-5, 5, 101), torch.tensor([-50.0, -5.0, -4.0, 0.03, 3.14, 5.0, 50.0])

    shares = support.hl_gauss(value)

    assert_near(shares.sum(-1), torch.ones(7))
    assert_near(support.mean(shares)[2:5], value[2:5], 1e-3)
    assert shares[0].argmax() == 0
    assert torch.equal(shares[0], shares[1])


def test_hl_gauss_equals_normal_distribution_by_bins():
    normal = torch.distributions.Normal(0.3, 0.5 * 0.75)
    bins = normal.cdf(torch.tensor([-0.25, 0.25, 0.75, 1.25]))

    assert_near(Support(0, 1, 3).hl_gauss(torch.tensor([0.3]))[0], bins.diff() / (bins[-1] - bins[0]))


def test_support_wrong_arguments_are_refused_all_at_once():
    """B44: v_min == v_max would put all mass on atom 0, in silence."""
    with pytest.raises(
        ConfigError, match=r"v_min is 1 and v_max 1; expected numbers, v_min below v_max. atoms is 1; exp"
    ):
        Support(1, 1, 1)
    for v_min, v_max in ((2, 1), (math.nan, 1), (0, math.inf)):
        with pytest.raises(ConfigError, match="v_min below v_max"):
            Support(v_min, v_max)


# Target networks.


def test_polyak_known_steps_equals_golden():
    target, online = nn.Linear(1, 1), nn.Linear(1, 1)
    for network, value in ((target, 0.0), (online, 1.0)):
        for parameter in network.parameters():
            nn.init.constant_(parameter, value)

    for _ in range(1000):
        polyak(target, online, 0.005)

    assert target.weight.item() == pytest.approx(0.99334603, abs=1e-6)
    assert target.bias.item() == pytest.approx(0.99334603, abs=1e-6)
    assert online.weight.item() == 1


def test_polyak_copies_buffers_and_shares_nothing():
    """B40: statistics of normalisation do not lag behind the parameters they go with."""
    target, online = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    online(torch.randn(16, 3, generator=torch.Generator().manual_seed(0)))

    polyak(target, online, 0.1)

    assert torch.equal(target.running_mean, online.running_mean)
    assert torch.equal(target.running_var, online.running_var)
    assert target.num_batches_tracked == 1
    online(torch.ones(16, 3))
    assert not torch.equal(target.running_mean, online.running_mean)


def test_polyak_whole_step_copies():
    target, online = nn.Linear(3, 2), nn.Linear(3, 2)

    polyak(target, online, 1.0)

    assert torch.equal(target.weight, online.weight)


# Exploration, gradients.


def test_epsilon_ladder_of_eight_equals_golden():
    expected = [0.4, 0.16, 0.064, 0.0256, 0.01024, 0.004096, 0.0016384, 0.00065536]

    assert epsilon_ladder(8) == pytest.approx(expected, rel=1e-12)
    assert epsilon_ladder(1) == [0.4]


@pytest.mark.parametrize("scale", [0.01, 1.0, 1e6])
def test_clip_gradients_equals_torch(scale):
    networks = [nn.Linear(4, 3), nn.Linear(4, 3)]
    for network in networks:
        generator = torch.Generator().manual_seed(0)
        for parameter in network.parameters():
            parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    unused = nn.Parameter(torch.zeros(2))

    norm = clip_gradients([*networks[0].parameters(), unused], 0.5)
    expected = nn.utils.clip_grad_norm_(networks[1].parameters(), 0.5)

    assert_near(norm, expected)
    for ours, peers in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert_near(ours.grad, peers.grad)
