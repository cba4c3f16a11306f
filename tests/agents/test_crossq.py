"""CrossQ and XQC: batch statistics, unit weights, categorical critics."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.common import Support
from agents.critics import BatchRenorm, Critics, Perceptrons, ReturnScale
from agents.sac import PAST, SACConfig
from rlfeed.types import Batch, PolicyContext

CPU = torch.device("cpu")
SMALL = {"actor_widths": (8, 8), "critic_widths": (8, 8), "noise_correlation": 0.0}
CROSSQ = {**SMALL, "norm": "renorm", "tau": 0.0, "policy_delay": 3, "norm_warmup": 4}
XQC = {**SMALL, "norm": "batch", "unit_weights": True, "atoms": 11, "scale_rewards": True}


def make(**config):
    spaces_of = spaces.Box(-10, 10, (3,)), spaces.Box(-1, 1, (2,))
    return SACConfig(**config).build(*spaces_of, total_steps=100, seed=0, device=CPU)


def batch(rows=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        observation=torch.randn(rows, 3, generator=generator),
        action=torch.rand(rows, 2, generator=generator) * 2 - 1,
        reward=torch.randn(rows, generator=generator),
        terminated=torch.zeros(rows, dtype=torch.bool),
        truncated=torch.zeros(rows, dtype=torch.bool),
        discount=torch.full((rows,), 0.9),
        next_observation=5 + torch.randn(rows, 3, generator=generator),
        extras={PAST: torch.randn(rows, generator=generator)},
    )


def losses(agent, data, noise):
    return agent.critics_loss(data.observation, data.action, data.reward, data.discount, data.next_observation, noise)


def norms(network):
    return [layer for layer in network.perceptrons.layers if isinstance(layer, BatchRenorm)]


def test_joint_pass_normalises_by_the_mixture_of_what_is_and_what_follows():
    """B41: apart, or with what follows in evaluation mode, it does not learn."""
    agent, data = make(**CROSSQ), batch(256)
    losses(agent, data, torch.zeros(256, 2))
    after = agent.policy_net(data.next_observation)[0].tanh().detach()
    mixture = torch.cat([
        torch.cat([data.observation, data.action], dim=1), torch.cat([data.next_observation, after], dim=1)
    ])  # fmt: skip
    first = norms(agent.critics)[0]
    assert torch.allclose(first.mean[0, 0], 0.01 * mixture.mean(dim=0), atol=1e-6)
    assert torch.allclose(first.variance[1, 0], 0.99 + 0.01 * mixture.var(dim=0, correction=0), atol=1e-5)
    assert [norm.batches.item() for norm in norms(agent.critics)] == [1, 1, 1]
    assert [norm.batches.item() for norm in norms(agent.policy_net)] == [0, 0, 0]


def test_learn_actor_sees_the_critics_as_they_are_in_evaluation():
    agent, data = make(**{**CROSSQ, "policy_delay": 1}), batch()
    agent.learn(data, env_steps=0)
    before = [norm.batches.item() for norm in norms(agent.critics)]
    whole = agent._lower(data.observation, data.action)
    agent.actor_loss(data.observation, torch.zeros(16, 2))
    assert [norm.batches.item() for norm in norms(agent.critics)] == before == [1, 1, 1]
    assert [norm.batches.item() for norm in norms(agent.policy_net)] == [2, 2, 2]
    one_by_one = torch.cat([agent._lower(data.observation[i : i + 1], data.action[i : i + 1]) for i in range(16)])
    assert torch.allclose(whole, one_by_one, atol=1e-6)


def test_policy_acts_alike_whatever_else_is_in_the_batch():
    agent = make(**CROSSQ)
    for update in range(6):
        agent.learn(batch(seed=update), env_steps=0)
    observation = batch().observation.numpy()

    def act(rows):
        context = PolicyContext(
            np.zeros(len(rows), bool), "greedy", np.arange(len(rows)), 0, None, np.zeros(len(rows), np.float32), None,
            np.random.default_rng(0),
        )  # fmt: skip
        return agent.policy(rows, (), context).action

    assert np.allclose(act(observation)[:4], act(observation[:4]), atol=1e-6)


def test_learn_without_target_networks_saves_none():
    agent = make(**CROSSQ)
    assert agent.target is None
    assert "target" not in agent.state_dict()
    for update in range(6):
        agent.learn(batch(seed=update), env_steps=0)
    assert norms(agent.critics)[0].batches.item() == 6
    assert norms(agent.policy_net)[0].batches.item() == 2


def slow_renorm(layer, x, mean, variance, warm):
    """Algorithm 1 of the paper, for one member."""
    spread = (x.var(dim=0, correction=0) + 1e-3).sqrt()
    centre = x.mean(dim=0)
    running = (variance + 1e-3).sqrt()
    r = (spread / running).clamp(1 / 3, 3) if warm else torch.ones_like(spread)
    d = ((centre - mean) / running).clamp(-5, 5) if warm else torch.zeros_like(spread)
    return layer.scale[0, 0] * ((x - centre) / spread * r + d) + layer.shift[0, 0]


def test_batch_renorm_is_batch_norm_until_it_is_warm():
    layer = BatchRenorm(1, 3, warmup=3)
    layer.scale.data += torch.tensor([0.1, 0.2, 0.3])
    layer.shift.data += torch.tensor([1.0, 2.0, 3.0])
    mean, variance = torch.zeros(3), torch.ones(3)
    for step in range(6):
        x = torch.randn(32, 3, generator=torch.Generator().manual_seed(step)) * torch.tensor([1.0, 4.0, 0.1]) + step
        out = layer(x.unsqueeze(0), True)[0]
        assert torch.allclose(out, slow_renorm(layer, x, mean, variance, warm=step >= 3), atol=1e-4)
        mean = 0.99 * mean + 0.01 * x.mean(dim=0)
        variance = 0.99 * variance + 0.01 * x.var(dim=0, correction=0)
    assert torch.allclose(layer.mean[0, 0], mean, atol=1e-5)
    assert torch.allclose(layer.variance[0, 0], variance, atol=1e-5)
    frozen = layer(x.unsqueeze(0), False)[0]
    expected = layer.scale[0, 0] * (x - mean) / (variance + 1e-3).sqrt() + layer.shift[0, 0]
    assert torch.allclose(frozen, expected, atol=1e-4)
    assert layer.batches.item() == 6


def test_batch_renorm_gradient_is_that_of_batch_norm():
    layer = BatchRenorm(1, 3).double()
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.sin(layer(one.unsqueeze(0), True)).sum().backward()
    torch.sin(torch.nn.functional.batch_norm(two, None, None, training=True, eps=1e-3)).sum().backward()
    assert torch.allclose(one.grad, two.grad, atol=1e-9)


def unit_norms(agent):
    for network in (agent.policy_net, agent.critics):
        for layer in network.perceptrons.layers:
            if hasattr(layer, "weight"):
                yield layer.weight.norm(dim=1)


def test_unit_weights_have_norm_one_from_the_start_and_after_every_update():
    agent = make(**XQC, lr=1e-2)
    for update in range(4):
        assert all(torch.allclose(norm, torch.ones_like(norm), atol=1e-5) for norm in unit_norms(agent))
        agent.learn(batch(seed=update), env_steps=0)
    target = agent.target.perceptrons.layers[1].weight.norm(dim=1)
    assert not torch.allclose(target, torch.ones_like(target), atol=1e-7)  # an average of unit vectors is shorter


def test_categorical_loss_is_the_cross_entropy_to_the_lower_critics_projected_distribution():
    agent, data = make(**{**XQC, "norm": "none", "scale_rewards": False}, alpha=0.3), batch(6)
    data.discount[2] = 0.0
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        loss, value = losses(agent, data, noise)
        action, log_prob = agent._draw(data.next_observation, noise)
        following = agent.target(data.next_observation, action).softmax(dim=2)
        now = agent.critics(data.observation, data.action).softmax(dim=2)
    support, expected = Support(-5.0, 5.0, 11), 0.0
    for row in range(6):
        means = [support.mean(following[member, row]).item() for member in (0, 1)]
        lower = following[int(means[1] < means[0]), row]
        discount = data.discount[row].item()
        places = [data.reward[row].item() + discount * (z - 0.3 * log_prob[row].item()) for z in range(-5, 6)]
        target = np.zeros(11)
        for place, share in zip(places, lower.tolist(), strict=True):
            at = min(max(place, -5.0), 5.0) + 5.0
            below = int(at)
            target[below] += share * (1 - (at - below))
            target[min(below + 1, 10)] += share * (at - below)
        for member in (0, 1):
            expected -= float((target * np.log(now[member, row].numpy())).sum()) / 6
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert value.item() == pytest.approx(support.mean(now).mean().item(), rel=1e-4)


def test_return_scale_is_the_deviation_of_the_returns_seen():
    scale, drawn = ReturnScale(v_max=5.0), np.random.default_rng(0).normal(2.0, 3.0, (50, 64)).astype(np.float32)
    for returns in drawn:
        scaled = scale(torch.ones(64), torch.from_numpy(returns))
    assert scale.deviation().item() == pytest.approx(drawn.std(), rel=1e-4)
    assert scaled[0].item() == pytest.approx(1 / drawn.std(), rel=1e-4)


def test_return_scale_of_a_return_that_never_varies_keeps_it_on_the_support():
    scale = ReturnScale(v_max=5.0)
    assert scale(torch.full((8,), 30.0), torch.full((8,), 30.0))[0].item() == pytest.approx(2.5)
    assert ReturnScale(v_max=5.0)(torch.zeros(8), torch.zeros(8)).tolist() == [0.0] * 8


def test_policy_tells_the_discounted_return_before_each_step():
    agent = make(**XQC, gamma=0.5)
    observation, carry, told = np.zeros((2, 3), np.float32), agent.policy.initial_carry(2), []
    for prev_reward in ([0.0, 0.0], [1.0, 4.0], [2.0, 0.0]):
        context = PolicyContext(
            np.zeros(2, bool), "random", np.arange(2), 0, None, np.array(prev_reward, np.float32), None,
            np.random.default_rng(0),
        )  # fmt: skip
        out = agent.policy(observation, carry, context)
        carry = out.carry
        told.append(out.extras[PAST].tolist())
    assert told == [[0.0, 0.0], [1.0, 4.0], [2.5, 2.0]]
    assert set(agent.columns) == {PAST}


@pytest.mark.parametrize("norm", ["none", "renorm", "batch"])
def test_perceptrons_members_do_not_touch_each_other(norm):
    both = Perceptrons(
        2, 3, (4,), 1, norm=norm, warmup=0, gain=1.0, generator=torch.Generator().manual_seed(0)
    )  # fmt: skip
    x = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(1))
    before = both(x, True)
    for parameter in both.parameters():
        parameter.data[1] += 1.0
    other = torch.stack([x[0], x[1] + 1.0])
    assert torch.equal(both(other, False)[0], both(x, False)[0])
    assert before.shape == (2, 8, 1)


def test_critics_under_bfloat16_give_single_precision():
    space = spaces.Box(-1, 1, (3,))
    critics = Critics(space, 2, (8,), norm="batch", warmup=0, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        out = critics(torch.zeros(4, 3), torch.zeros(4, 2), learning=True)
    assert out.dtype == torch.float32
    agent = make(**XQC, bfloat16=True)
    agent.learn(batch(), env_steps=0)
    assert all(torch.isfinite(parameter).all() for parameter in agent.critics.parameters())
