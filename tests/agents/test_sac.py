import copy
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.nn import functional

from agents.sac import PAST, SACConfig, crossq, sac, xqc
from rlfeed.errors import CheckpointError, ConfigError, FieldError, SpaceError
from rlfeed.types import Batch, PolicyContext

CPU = torch.device("cpu")
PLAIN = {"actor_widths": (8,), "critic_widths": (8,), "noise_correlation": 0.0}
CROSSQ = {**PLAIN, "norm": "renorm", "tau": 0.0, "policy_delay": 3}
XQC = {**PLAIN, "norm": "batch", "unit_weights": True, "atoms": 11, "scale_rewards": True, "policy_delay": 3}
KINDS = {"sac": PLAIN, "crossq": CROSSQ, "xqc": XQC}


def make(actions=None, observation=None, seed=0, total_steps=100, **config):
    space = observation or spaces.Box(-10, 10, (3,))
    actions = actions or spaces.Box(-1, 1, (2,))
    settings = SACConfig(**{**PLAIN, **config})
    return settings.build(space, actions, total_steps=total_steps, seed=seed, device=CPU)


def batch(rows=16, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    fields = {
        "observation": torch.randn(rows, 3, generator=generator),
        "action": torch.rand(rows, 2, generator=generator) * 2 - 1,
        "reward": torch.randn(rows, generator=generator),
        "terminated": torch.zeros(rows, dtype=torch.bool),
        "truncated": torch.zeros(rows, dtype=torch.bool),
        "discount": torch.full((rows,), 0.9),
        "next_observation": torch.randn(rows, 3, generator=generator),
        "extras": {PAST: torch.randn(rows, generator=generator)},
    }
    return Batch(**{**fields, **changes})


def step_of(data):
    """What a loss of the critics is computed from."""
    return data.observation, data.action, data.reward, data.discount, data.next_observation


def context(rows, mode="greedy", is_first=None, prev_reward=0.0, seed=0):
    first = np.zeros(rows, bool) if is_first is None else np.full(rows, is_first)
    reward = np.full(rows, prev_reward, np.float32)
    return PolicyContext(first, mode, np.arange(rows), 0, None, reward, None, np.random.default_rng(seed))


def double(agent):
    """The same agent in double precision."""
    twin = copy.deepcopy(agent)
    twin.policy_net.encoder, flat = torch.nn.Flatten(), torch.nn.ModuleList([torch.nn.Flatten()])
    twin.critics.encoders = twin.target.encoders = flat  # the encoder makes float32 of every observation
    for part in (twin.policy_net, twin.critics, twin.target):
        part.double()
    twin.log_alpha.data = twin.log_alpha.data.double()
    return twin


def layers(perceptrons, member):
    """The plain layers of one member, as weight [out, in] and bias."""
    found = [layer for layer in perceptrons.layers if hasattr(layer, "weight")]
    return [(layer.weight[member].T, layer.bias[member, 0]) for layer in found]


def forward(found, x):
    for weight, bias in found[:-1]:
        x = functional.linear(x, weight, bias).relu()
    return functional.linear(x, *found[-1])


def slow_log_prob(mean, log_std, raw):
    """The density of tanh(raw), the textbook way."""
    normal = torch.distributions.Normal(mean, log_std.exp())
    return (normal.log_prob(raw) - torch.log(1 - torch.tanh(raw) ** 2)).sum(-1)


def test_critics_loss_and_its_gradient_are_those_of_two_networks_in_double_precision():
    agent = double(make(alpha=0.3))
    for network in (agent.critics, agent.target, agent.policy_net):
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)).double()
    observation, action, reward, discount, after = (part.double() for part in step_of(batch()))
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(5)).double()
    loss, value = agent.critics_loss(observation, action, reward, discount, after, noise)
    loss.backward()

    mean, log_std = forward(layers(agent.policy_net.perceptrons, 0), after).detach().chunk(2, dim=1)
    raw = mean + log_std.exp() * noise
    beyond = torch.cat([after, raw.tanh()], dim=1)
    following = [forward(layers(agent.target.perceptrons, member), beyond).squeeze(1) for member in (0, 1)]
    entropy = -0.3 * slow_log_prob(mean, log_std, raw)
    target = (reward + discount * (torch.minimum(*following) + entropy)).detach()
    now = torch.cat([observation, action], dim=1)
    parts = [[(w.detach().requires_grad_(), b.detach().requires_grad_()) for w, b in found]
             for found in (layers(agent.critics.perceptrons, 0), layers(agent.critics.perceptrons, 1))]  # fmt: skip
    values = [forward(found, now).squeeze(1) for found in parts]
    expected = sum(0.5 * functional.mse_loss(v, target) for v in values)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # log_alpha was rounded to single precision
    assert value.item() == pytest.approx(torch.stack(values).mean().item(), rel=1e-9)
    mine = [layer for layer in agent.critics.perceptrons.layers if hasattr(layer, "weight")]
    for member in (0, 1):
        for layer, (weight, bias) in zip(mine, parts[member], strict=True):
            assert torch.allclose(layer.weight.grad[member].T, weight.grad, rtol=1e-5, atol=1e-9)
            assert torch.allclose(layer.bias.grad[member, 0], bias.grad, rtol=1e-5, atol=1e-9)


def test_actor_loss_and_its_gradient_are_those_of_a_slow_twin_in_double_precision():
    agent = double(make(alpha=0.3, target_entropy=-0.5))
    observation = batch().observation.double()
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(5)).double()
    loss, alpha_loss = agent.actor_loss(observation, noise)
    loss.backward()
    alpha_loss.backward()

    parts = [(w.detach().requires_grad_(), b.detach().requires_grad_())
             for w, b in layers(agent.policy_net.perceptrons, 0)]  # fmt: skip
    mean, log_std = forward(parts, observation).chunk(2, dim=1)
    raw = mean + log_std.exp() * noise
    log_prob = slow_log_prob(mean, log_std, raw)
    now = torch.cat([observation, raw.tanh()], dim=1)
    lower = torch.minimum(*(forward(layers(agent.critics.perceptrons, m), now).squeeze(1) for m in (0, 1)))
    expected = (0.3 * log_prob - lower).mean()
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert agent.log_alpha.grad.item() == pytest.approx(-(log_prob.mean().item() - 1.0), rel=1e-6)  # H is -0.5 twice
    mine = [layer for layer in agent.policy_net.perceptrons.layers if hasattr(layer, "weight")]
    for layer, (weight, bias) in zip(mine, parts, strict=True):
        assert torch.allclose(layer.weight.grad[0].T, weight.grad, rtol=1e-5, atol=1e-9)
        assert torch.allclose(layer.bias.grad[0, 0], bias.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["sac", "crossq"])
def test_targets_where_terminated_are_the_reward_whatever_follows(kind):
    """B39: the entropy term was added at terminal steps too."""
    agent, rows = make(**KINDS[kind]), 16
    ended = batch(discount=torch.zeros(rows), reward=torch.full((rows,), 2.0))
    agent.log_alpha.data.fill_(5.0)
    with torch.no_grad():
        if kind == "sac":
            value = agent.critics(ended.observation, ended.action)
            agent.target.perceptrons.layers[-1].bias.fill_(torch.inf)
        else:
            after = agent.policy_net(ended.next_observation)[0].tanh()
            joint = torch.cat([ended.observation, ended.next_observation]), torch.cat([ended.action, after])
            value = agent.critics(*joint, learning=True)[:, :rows]
        loss, _ = agent.critics_loss(*step_of(ended), torch.zeros(rows, 2))
    assert loss.item() == pytest.approx((0.5 * (value.squeeze(2) - 2.0) ** 2).mean(1).sum().item(), rel=1e-5)


def test_targets_use_the_discount_of_the_steps_really_summed():
    agent = make()
    data = batch(2, discount=torch.tensor([0.9**3, 0.9]))
    for parameter in agent.target.parameters():
        parameter.data.zero_()
    agent.target.perceptrons.layers[-1].bias.data.fill_(7.0)  # worth 7 wherever
    agent.log_alpha.data.fill_(-torch.inf)
    with torch.no_grad():
        value = agent.critics(data.observation, data.action).squeeze(2)
        loss, _ = agent.critics_loss(*step_of(data), torch.zeros(2, 2))
    target = data.reward + torch.tensor([0.9**3 * 7, 0.9 * 7])
    assert loss.item() == pytest.approx((0.5 * (value - target) ** 2).mean(1).sum().item(), rel=1e-5)


@pytest.mark.parametrize(("raw", "expected"), [(10.0, 19.9973522), (20.0, 39.9973522)])
def test_log_prob_of_saturated_actions_is_exact_in_single_precision(raw, expected):
    """B37, B38: taking tanh back from the action, or adding 1e-6 inside the logarithm, loses all of it."""
    agent = make(actions=spaces.Box(-1, 1, (1,)))
    head = agent.policy_net.perceptrons.layers[-1]
    head.weight.data.zero_()
    head.bias.data[:] = torch.tensor([raw, math.log(0.1)])
    action, log_prob = agent._draw(torch.zeros(1, 3), torch.zeros(1, 1))
    assert log_prob.item() == pytest.approx(expected, abs=1e-4)
    assert action.item() == 1.0
    log_prob.sum().backward()
    assert torch.isfinite(head.bias.grad).all()


def test_learn_moves_the_actor_at_every_third_call_only():
    """B39: the delay was off by one."""
    agent = make(policy_delay=3)
    for update in range(1, 8):
        before = [parameter.detach().clone() for parameter in agent._acting]
        critics = agent.critics.perceptrons.layers[0].weight.detach().clone()
        scalars = agent.learn(batch(seed=update), env_steps=0).scalars
        same = all(torch.equal(old, new) for old, new in zip(before, agent._acting, strict=True))
        assert same == (update % 3 != 0)
        assert ("train/actor_loss" in scalars) == (update % 3 == 0)
        assert not torch.equal(critics, agent.critics.perceptrons.layers[0].weight)


def test_learn_moves_target_critics_by_tau():
    agent = make(tau=0.25)
    before = [parameter.clone() for parameter in agent.target.parameters()]
    agent.learn(batch(), env_steps=0)
    for old, new, online in zip(before, agent.target.parameters(), agent.critics.parameters(), strict=True):
        assert torch.allclose(new, 0.75 * old + 0.25 * online, atol=1e-6)
        assert not new.requires_grad


def test_learn_actor_gives_the_critics_no_gradient():
    both = [make(policy_delay=delay) for delay in (1, 2)]
    for agent in both:
        agent.learn(batch(), env_steps=0)
    for one, other in zip(*(agent.critics.parameters() for agent in both), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("shape", [(3,), (8, 8, 3)])
def test_networks_share_no_parameter(shape):
    """B39, B40: actor, critics and target critics shared an encoder, so each moved the others."""
    dtype = np.uint8 if len(shape) == 3 else np.float32
    agent = make(observation=spaces.Box(0, 255, shape, dtype))
    parts = [list(network.parameters()) for network in (agent.policy_net, agent.critics, agent.target)]
    places = [parameter.data_ptr() for part in parts for parameter in part]
    assert len(set(places)) == len(places)
    assert len(agent.critics.encoders) == (2 if len(shape) == 3 else 1)  # a vector's has nothing to learn
    observation = torch.ones(4, *shape).to(torch.uint8 if len(shape) == 3 else torch.float32)
    first, second = agent.critics(observation, torch.zeros(4, 2)).unbind()
    first.sum().backward()
    for parameter in agent.critics.encoders.parameters():
        moved = parameter.grad is not None and bool(parameter.grad.any())
        assert moved == any(parameter is own for own in agent.critics.encoders[0].parameters())
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_loaded_into_another_agent_learns_on_bit_equal(kind):
    """B41: the counter of batch renormalisation was not saved."""
    one, other = make(**KINDS[kind]), make(**KINDS[kind], seed=9)
    for update in range(4):
        one.learn(batch(seed=update), env_steps=10)
    saved = one.state_dict()
    for update in range(4, 8):
        one.learn(batch(seed=update), env_steps=20)
    other.load_state_dict(saved)
    for update in range(4, 8):
        other.learn(batch(seed=update), env_steps=20)
    for name, part in one.parts().items():
        if isinstance(part, torch.nn.Module):
            twin = other.parts()[name].state_dict()
            assert all(torch.equal(value, twin[key]) for key, value in part.state_dict().items()), name
    if kind == "crossq":
        assert other.critics.perceptrons.layers[0].batches.item() == 8
        assert other.policy_net.perceptrons.layers[0].batches.item() == 2


def test_load_state_dict_of_another_kind_is_a_checkpoint_error():
    with pytest.raises(CheckpointError, match="target"):
        make(**CROSSQ).load_state_dict(make().state_dict())


def test_policy_greedy_takes_the_mean_and_exploring_its_distribution():
    agent = make()
    head = agent.policy_net.perceptrons.layers[-1]
    head.weight.data.zero_()
    head.bias.data[:] = torch.tensor([0.5, -0.5, math.log(0.2), math.log(0.4)])
    observation = np.zeros((20_000, 3), np.float32)
    greedy = agent.policy(observation, (), context(20_000)).action
    assert np.allclose(greedy, np.tanh([0.5, -0.5]), atol=1e-6)
    raw = np.arctanh(agent.policy(observation, (), context(20_000, "explore")).action.astype(np.float64))
    assert raw.mean(0) == pytest.approx([0.5, -0.5], abs=0.01)
    assert raw.std(0) == pytest.approx([0.2, 0.4], abs=0.01)


def test_policy_noise_is_correlated_in_time_and_begins_anew_with_an_episode():
    agent = make(noise_correlation=0.8)
    head = agent.policy_net.perceptrons.layers[-1]
    head.weight.data.zero_()
    head.bias.data.zero_()
    rows, observation = 5000, np.zeros((5000, 3), np.float32)
    carry, noises, told = agent.policy.initial_carry(rows), [], context(rows, "explore", is_first=True)
    for _ in range(3):
        out = agent.policy(observation, carry, told)
        carry = out.carry
        noises.append(np.arctanh(out.action[:, 0].astype(np.float64)))
        told.is_first = np.zeros(rows, bool)
    told.is_first = np.ones(rows, bool)
    noises.append(np.arctanh(agent.policy(observation, carry, told).action[:, 0].astype(np.float64)))
    found = np.corrcoef(noises)
    assert [noise.std() for noise in noises] == pytest.approx([1.0] * 4, abs=0.05)
    assert found[0, 1:] == pytest.approx([0.8, 0.64, 0.0], abs=0.05)
    assert found[2, 3] == pytest.approx(0.0, abs=0.05)


def test_values_are_the_lower_critics_of_the_mean_action():
    agent = make()
    observation = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    action = agent.policy_net(observation)[0].tanh()
    first, second = agent.critics(observation, action).squeeze(2)
    assert torch.equal(agent.values(observation), torch.minimum(first, second))


def bandit(reward, alpha, deviation, **config):
    """An agent of one number that acts by N(0, deviation), and the gradients of alpha and deviation, by their logs."""
    agent = make(actions=spaces.Box(-1, 1, (1,)), observation=spaces.Box(0, 1, (1,)), **config)
    agent._lower = lambda observation, action: reward(action.squeeze(1))
    head = agent.policy_net.perceptrons.layers[-1]
    head.weight.data.zero_()
    head.bias.data[:] = torch.tensor([0.0, math.log(deviation)])
    agent.log_alpha.data.fill_(math.log(alpha))
    noise = torch.randn(4_000, 1, generator=torch.Generator().manual_seed(1))
    noise = torch.cat([noise, -noise])
    loss, alpha_loss = agent.actor_loss(torch.zeros(len(noise), 1), noise)
    (loss + alpha_loss).backward(inputs=agent._acting)
    return agent.log_alpha.grad.item(), head.bias.grad[0, 0, 1].item() / alpha


@pytest.mark.parametrize(("target", "alpha", "deviation"), [(-1.0, 0.01585, 0.0890), (-0.5, 0.04308, 0.1468)])
def test_temperature_and_deviation_rest_where_the_bandit_has_its_soft_optimum(target, alpha, deviation):
    """P16: with r = -a^2 that is N(0, alpha / 2) of the target entropy; beside it both are driven back."""

    def drift(at_alpha, at_deviation):
        return bandit(lambda action: -action.square(), at_alpha, at_deviation, target_entropy=target)

    assert drift(alpha, deviation) == pytest.approx((0.0, 0.0), abs=0.05)
    assert drift(alpha, 1.2 * deviation)[0] > 0.1  # gradients: what is descended
    assert drift(alpha, deviation / 1.2)[0] < -0.1
    assert drift(alpha, 1.2 * deviation)[1] > 0.3
    assert drift(alpha, deviation / 1.2)[1] < -0.2


def test_temperature_without_rewards_falls_at_any_deviation_that_entropy_prefers():
    """P16: with r = 0 only entropy counts: its largest value, log 2, is above the target, so alpha falls for good."""
    narrow, wide = (bandit(lambda action: 0.0 * action, 0.1, deviation)[1] for deviation in (0.7, 1.1))
    assert narrow < -0.05 < 0.05 < wide  # the squashed Gaussian of the largest entropy lies between
    assert bandit(lambda action: 0.0 * action, 0.1, 0.88)[0] == pytest.approx(1 + math.log(2), abs=0.1)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Discrete(3), r"is Discrete\(3\); SAC plays a Box of floats only. Use dqn, rainbow, r2d2, pqn or ppo"),
        (spaces.MultiDiscrete([2, 3]), "Use ppo"),
        (spaces.Box(-np.inf, np.inf, (2,)), "is Box.*bounded Boxes only. Bound it in a wrapper"),
        (spaces.Box(0, 9, (2,), np.int64), "Box of floats only"),
        (spaces.Box(-1, 1, (0,)), "Box of floats only"),
        (spaces.Dict(a=spaces.Box(-1, 1, (2,))), r"is Dict.*a single Box"),
    ],
)
def test_sac_with_actions_it_cannot_play_is_refused(space, message):
    with pytest.raises(SpaceError, match=message):
        make(actions=space)


def test_sac_with_actions_of_any_shape_learns_and_acts():
    agent = make(actions=spaces.Box(-2, 7, (2, 3)), target_entropy=-1.0)
    assert agent.target_entropy == -6.0
    agent.learn(batch(action=torch.zeros(16, 2, 3)), env_steps=0)
    assert agent.policy(np.zeros((4, 3), np.float32), (), context(4, "explore")).action.shape == (4, 2, 3)


def test_learn_from_sequences_is_refused():
    with pytest.raises(FieldError, match="expected batches of Transition"):
        make().learn(batch(next_observation=None), env_steps=0)


def test_learn_rates_fall_over_the_run():
    agent = make(lr=0.1, lr_end=0.02, alpha_lr=0.1, total_steps=100)
    agent.learn(batch(), env_steps=50)
    groups = agent.policy_optimizer.param_groups + agent.critic_optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.06, 0.006, 0.06])
    assert agent.scalars(50)["train/learning_rate"] == pytest.approx(0.06)


def test_learn_with_a_given_temperature_leaves_it():
    agent = make(alpha=0.3, learn_alpha=False)
    agent.learn(batch(), env_steps=0)
    assert agent.log_alpha.item() == pytest.approx(math.log(0.3))


def test_config_with_several_wrong_values_names_all():
    with pytest.raises(ConfigError, match=r"agent\.gamma: is 2.*agent\.tau: is -1.*agent\.v_min: is 5"):
        SACConfig(gamma=2, tau=-1, v_min=5, v_max=5)


@pytest.mark.parametrize("preset", [sac, crossq, xqc])
def test_presets_build_what_they_are_named_after(preset):
    agent = preset().agent
    assert (agent.tau == 0) == (preset is crossq)
    assert (agent.norm, agent.atoms) == {sac: ("none", 1), crossq: ("renorm", 1), xqc: ("batch", 101)}[preset]
