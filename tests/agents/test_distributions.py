"""Distributions of actions: golden values, oracles of torch.distributions, masks, and heads for spaces."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.common import ActionHead, Categorical, DiagonalGaussian, TanhGaussian
from rlfeed.errors import PolicyError, SpaceError, UnsupportedError

LOGITS = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, -5.0]])


def torch_generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_near(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=tolerance, atol=tolerance)


# The tanh-Gaussian's log-density, in the unit of actions in -1 .. 1.


@pytest.mark.parametrize(
    ("mean", "std", "u", "expected"),
    [
        (0.0, 1.0, 0.0, -0.9189385),
        (0.0, 1.0, 1.0, -0.5513769),
        (0.0, 1.0, 10.0, -32.3052329),
        (10.0, 0.1, 10.0, 19.9973522),
        (20.0, 0.1, 20.0, 39.9973522),
        (-20.0, 0.1, -20.0, 39.9973522),
    ],
)
def test_tanh_gaussian_known_values_equals_golden(mean, std, u, expected):
    """B37: exact where the action rounds to 1."""
    actual = TanhGaussian(torch.tensor([mean]), torch.tensor([std]).log()).log_prob(torch.tensor([u]))

    assert actual.dtype == torch.float32
    assert actual.item() == pytest.approx(expected, rel=2e-6)


def test_tanh_gaussian_saturated_differs_from_mistakes():
    """B37: neither log(1 - tanh(u)^2 + 1e-6) nor the atanh of a clamped action gives 19.9973522."""
    mean, u = torch.tensor(10.0), torch.tensor(10.0)
    ordinary = torch.distributions.Normal(mean, 0.1)
    padded = ordinary.log_prob(u) - (1 - u.tanh() ** 2 + 1e-6).log()
    clamped = u.tanh().clamp(-1 + 1e-6, 1 - 1e-6).atanh()
    recovered = TanhGaussian(mean[None], torch.tensor([0.1]).log()).log_prob(clamped[None])

    assert padded.item() == pytest.approx(1.3836 + 13.8155, abs=1e-3)
    assert clamped < 7.5
    assert recovered.item() < 0


def test_tanh_gaussian_moderate_values_equal_torch():
    mean, log_std, u = torch.randn(3, 4, 2, generator=torch_generator(), dtype=torch.float64)
    transforms = [torch.distributions.TanhTransform(cache_size=1)]
    peer = torch.distributions.TransformedDistribution(torch.distributions.Normal(mean, log_std.exp()), transforms)

    actual = TanhGaussian(mean, log_std).log_prob(u)

    assert_near(actual, peer.log_prob(u.tanh()).sum(-1), 1e-9)


def test_tanh_gaussian_sampled_action_goes_with_its_density():
    mean, log_std = torch.tensor([[0.3, -0.2]]), torch.tensor([-0.5, 0.1])
    head = TanhGaussian(mean, log_std)

    action, log_prob = head.sample_action(torch_generator())
    u = head.sample(torch_generator())

    assert torch.equal(action, u.tanh())
    assert torch.equal(log_prob, head.log_prob(u))
    with pytest.raises(UnsupportedError, match="no closed form"):
        head.entropy()


def test_tanh_gaussian_extreme_draws_have_finite_gradients():
    mean = torch.tensor([[-500.0, 0.0, 500.0]], requires_grad=True)
    log_std = torch.full((3,), 2.0, requires_grad=True)

    action, log_prob = TanhGaussian(mean, log_std).sample_action(torch.tensor([[9.0, -9.0, 9.0]]))
    (action.sum() + log_prob.sum()).backward()

    assert mean.grad.isfinite().all()
    assert log_std.grad.isfinite().all()


def test_tanh_gaussian_density_integrates_to_one():
    u = torch.linspace(-12, 12, 200_001, dtype=torch.float64)[:, None]
    density = TanhGaussian(torch.tensor([0.7], dtype=torch.float64), torch.tensor([0.2])).log_prob(u).exp()

    assert torch.trapezoid(density, u[:, 0].tanh()).item() == pytest.approx(1, abs=1e-5)


# Gaussians.


def test_gaussian_equals_torch():
    mean, other_mean, log_std, action = torch.randn(4, 5, 3, generator=torch_generator(), dtype=torch.float64)
    one, other = DiagonalGaussian(mean, log_std), DiagonalGaussian(other_mean, log_std[0] / 2)
    peer = torch.distributions.Normal(mean, log_std.exp())
    other_peer = torch.distributions.Normal(other_mean, (log_std[0] / 2).exp())

    assert_near(one.log_prob(action), peer.log_prob(action).sum(-1), 1e-9)
    assert_near(one.entropy(), peer.entropy().sum(-1), 1e-9)
    assert_near(one.kl(other), torch.distributions.kl_divergence(peer, other_peer).sum(-1), 1e-9)
    assert_near(TanhGaussian(mean, log_std).kl(TanhGaussian(other_mean, log_std[0] / 2)), one.kl(other), 1e-12)
    assert one.mode is mean


def test_gaussian_entropy_of_shared_deviation_is_of_every_row():
    assert DiagonalGaussian(torch.zeros(4, 2), torch.zeros(2)).entropy().shape == (4,)


def test_gaussian_samples_have_mean_and_deviation():
    head = DiagonalGaussian(torch.tensor([2.0]).expand(20_000, 1), torch.tensor([0.5]).log())

    drawn = head.sample(np.random.default_rng(0))

    assert drawn.mean().item() == pytest.approx(2, abs=0.02)
    assert drawn.std().item() == pytest.approx(0.5, abs=0.02)


def test_gaussian_sample_passes_gradients():
    mean, log_std = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)

    DiagonalGaussian(mean, log_std).sample(torch.tensor([3.0])).backward()

    assert (mean.grad.item(), log_std.grad.item()) == (1.0, 3.0)


# Categories and masks.


def test_categorical_equals_torch():
    one, other = Categorical(LOGITS), Categorical(LOGITS.flip(1))
    peer, other_peer = (torch.distributions.Categorical(logits=logits) for logits in (LOGITS, LOGITS.flip(1)))
    action = torch.tensor([2, 0])

    assert_near(one.log_prob(action), peer.log_prob(action))
    assert_near(one.entropy(), peer.entropy())
    assert_near(one.probs, peer.probs)
    assert_near(one.kl(other), torch.distributions.kl_divergence(peer, other_peer))
    assert one.mode.tolist() == [2, 0]


@pytest.mark.parametrize("generator", [np.random.default_rng(3), torch_generator(3)], ids=["numpy", "torch"])
def test_categorical_samples_as_often_as_probable(generator):
    drawn = Categorical(torch.tensor([0.5, 0.2, 0.3]).log().expand(50_000, 3)).sample(generator)

    assert_near(drawn.bincount() / 50_000, [0.5, 0.2, 0.3], 0.01)


def test_categorical_same_generator_draws_the_same():
    first, second = (Categorical(torch.zeros(100, 7)).sample(np.random.default_rng(5)) for _ in range(2))

    assert torch.equal(first, second)
    assert len(first.unique()) == 7


def test_categorical_masked_actions_have_probability_zero():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    head = Categorical(LOGITS, mask)

    assert head.probs[~mask].tolist() == [0.0] * 3
    assert_near(head.probs[0], [1 / (1 + math.exp(2)), 0, 1 / (1 + math.exp(-2))])
    assert_near(head.entropy()[1], 0.0)
    assert head.log_prob(torch.tensor([1, 1])).tolist() == [-math.inf, 0.0]
    assert head.mode.tolist() == [2, 1]
    assert_near(head.entropy()[0], Categorical(LOGITS[:1, [0, 2]]).entropy()[0])


def test_categorical_masked_actions_are_never_drawn():
    mask = torch.tensor([True, False, True, False])
    noise = torch.tensor([[0.0] * 4, [1e-38] * 4, [1.0, 0.0, 1.0, 0.0], [90.0, 0.0, 80.0, 0.0]])  # 0: as drawn at times

    drawn = Categorical(torch.tensor([-80.0, 50.0, -90.0, 0.0]).expand(4, 4), mask).sample(noise)

    assert set(drawn.tolist()) <= {0, 2}


def test_categorical_mask_leaves_no_nan_in_gradients():
    logits = LOGITS.clone().requires_grad_()
    mask = torch.tensor([[True, False, True], [False, True, False]])
    head, other = Categorical(logits, mask), Categorical(logits.detach() * 2, mask)

    (head.log_prob(torch.tensor([0, 1])).sum() + head.entropy().sum() + head.kl(other).sum()).backward()

    assert logits.grad.isfinite().all()
    assert logits.grad[~mask].tolist() == [0.0] * 3
    assert logits.grad[0, 0] != 0


def test_categorical_impossible_logit_counts_as_masked():
    head = Categorical(torch.tensor([[0.0, -math.inf, 0.0]]))

    assert_near(head.entropy(), [math.log(2)])
    assert head.kl(head).tolist() == [0.0]


def test_categorical_everything_masked_is_refused_when_acting_and_finite_when_learning():
    """Padding has a mask of zeros: there nothing is chosen, and a loss that leaves it out must not be NaN."""
    logits = LOGITS.clone().requires_grad_()
    head = Categorical(logits, torch.tensor([[True, True, True], [False, False, False]]))

    (head.log_prob(torch.tensor([0, 0])) + head.entropy())[0].backward()

    assert logits.grad.isfinite().all()
    assert head.entropy().isfinite().all()
    for act in (lambda: head.mode, lambda: head.sample(np.random.default_rng(0))):
        with pytest.raises(PolicyError, match=r"forbids every action in row \(1,\)"):
            act()


def test_categorical_kl_to_what_forbids_an_action_is_infinite():
    one, other = Categorical(LOGITS[:1]), Categorical(LOGITS[:1], torch.tensor([[True, True, False]]))

    assert one.kl(other).tolist() == [math.inf]
    assert 0 < other.kl(one).item() < math.inf


# Heads: what a network puts out for a space.


@pytest.mark.parametrize(
    ("space", "outputs"),
    [
        (spaces.Discrete(3, start=-1), 3),
        (spaces.MultiDiscrete([2, 4, 3]), 9),
        (spaces.MultiDiscrete([[2, 3], [5, 2]], start=[[0, 1], [-3, 0]]), 12),
        (spaces.MultiBinary(3), 6),
        (spaces.MultiBinary([2, 2]), 8),
        (spaces.Box(-1, 1, (3,)), 3),
        (spaces.Box(-1, 1, ()), 1),
        (spaces.Box(-np.inf, np.inf, (2, 2)), 4),
    ],
    ids=str,
)
@pytest.mark.parametrize("leading", [(5,), (2, 4)])
def test_head_samples_lie_in_the_space(space, outputs, leading):
    head = ActionHead(space)
    numbers = torch.randn(*leading, outputs, generator=torch_generator()).clamp(-0.9, 0.9)
    drawn = head(numbers, log_std=torch.full((outputs,), -9.0) if head.is_continuous else None)

    for action in (drawn.sample(np.random.default_rng(1)), drawn.mode):
        assert head.outputs == outputs
        assert action.shape == (*leading, *space.shape)
        assert all(space.contains(np.asarray(row, space.dtype)) for row in action.reshape(-1, *space.shape).numpy())
        assert drawn.log_prob(action).shape == drawn.entropy().shape == leading


def test_head_joint_log_probability_is_the_sum_of_the_components():
    logits = torch.tensor([[1.0, 2.0, 0.5, 0.0, -1.0]])
    drawn, parts = ActionHead(spaces.MultiDiscrete([2, 3], start=[1, 0]))(logits), logits.split([2, 3], dim=-1)
    expected = parts[0].log_softmax(-1)[0, 1] + parts[1].log_softmax(-1)[0, 2]
    entropies = [torch.distributions.Categorical(logits=part).entropy() for part in parts]

    assert_near(drawn.log_prob(torch.tensor([[2, 2]])), expected[None])
    assert_near(drawn.entropy(), entropies[0] + entropies[1])


def test_head_mask_holds_for_each_component():
    head = ActionHead(spaces.MultiDiscrete([2, 3]))
    mask = torch.tensor([[False, True, True, False, False]])

    drawn = head(torch.zeros(1, 5), mask=mask)

    assert drawn.mode.tolist() == [[1, 0]]
    assert drawn.entropy().tolist() == [0.0]
    drawn = ActionHead(spaces.MultiDiscrete([3, 2]))(torch.zeros(1, 5), mask=torch.arange(5)[None] == 0)
    with pytest.raises(PolicyError, match=r"row \(0, 1\)"):  # the component that is filled up
        drawn.sample(torch_generator())


def test_head_components_of_fewer_actions_leave_no_nan():
    logits = torch.zeros(2, 5, requires_grad=True)
    drawn = ActionHead(spaces.MultiDiscrete([2, 3]))(logits)

    (drawn.entropy().sum() + drawn.log_prob(torch.zeros(2, 2, dtype=torch.int32)).sum()).backward()

    assert_near(drawn.entropy(), [math.log(6)] * 2)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            spaces.Dict({"arm": spaces.Discrete(2)}),
            r'action_space: is a Dict of action_space\["arm"\]; expected Discrete',
        ),
        (spaces.Tuple([spaces.Discrete(2)] * 2), r"is a Tuple of action_space\[0\], action_space\[1\]; expected"),
        (spaces.Box(0, 255, (2,), np.uint8), "expected Discrete, MultiDiscrete, MultiBinary or a Box of floats"),
        (spaces.Text(3), "No agent here plays it"),
        (spaces.Box(-1, 1, (0,)), "no numbers at all"),
    ],
)
def test_head_space_that_no_agent_plays_is_refused(space, message):
    with pytest.raises(SpaceError, match=message):
        ActionHead(space)
