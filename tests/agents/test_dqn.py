import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.dqn import DQN, DQNConfig
from rlfeed.errors import CheckpointError, ConfigError, FieldError, SpaceError
from rlfeed.replay import Prioritized
from rlfeed.types import Batch, PolicyContext


def make(actions=None, observation=None, total_steps=100, **config):
    return DQN(
        DQNConfig(**{"widths": (), **config}),
        observation or spaces.Box(-10, 10, (2,)),
        actions or spaces.Discrete(2),
        total_steps=total_steps,
        seed=0,
        device=torch.device("cpu"),
    )


def set_linear(network, weight, bias=(0.0, 0.0)):
    with torch.no_grad():
        network.advantage.weight.copy_(torch.tensor(weight))
        network.advantage.bias.copy_(torch.tensor(bias))


def targets_of(agent, batch):
    return agent.targets(batch.reward, batch.discount, batch.next_observation)


def batch(**changes):
    fields = {
        "observation": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        "action": torch.tensor([0, 1]),
        "reward": torch.tensor([1.0, 2.0]),
        "terminated": torch.tensor([False, True]),
        "truncated": torch.tensor([False, False]),
        "discount": torch.tensor([0.81, 0.0]),
        "next_observation": torch.tensor([[1.0, 2.0], [1.0, 2.0]]),
        "weights": torch.ones(2),
    }
    return Batch(**{**fields, **changes})


def context(rows, mode="greedy", mask=None, env_steps=0):
    return PolicyContext(
        np.zeros(rows, bool), mode, np.arange(rows), env_steps, None, np.zeros(rows), mask, np.random.default_rng(0)
    )


# Q(s) = W s. The network prefers action 1 at (1, 2): values 1 and 2. The target network says 10 and 3 there.
ONLINE, TARGET = [[1.0, 0.0], [0.0, 1.0]], [[4.0, 3.0], [1.0, 1.0]]


@pytest.mark.parametrize(("double", "bootstrap"), [(True, 3.0), (False, 10.0)])
def test_targets_by_hand_choose_and_value_with_the_right_networks(double, bootstrap):
    agent = make(double=double)
    set_linear(agent.network, ONLINE)
    set_linear(agent.target, TARGET)
    assert targets_of(agent, batch()).tolist() == pytest.approx([1.0 + 0.81 * bootstrap, 2.0])


def test_targets_where_terminated_ignore_even_an_infinite_value():
    agent = make()
    set_linear(agent.target, TARGET)
    agent.target.advantage.bias.data[:] = torch.inf
    assert targets_of(agent, batch()).tolist() == [torch.inf, 2.0]


def test_targets_where_truncated_bootstrap():
    agent = make()
    set_linear(agent.network, ONLINE)
    set_linear(agent.target, TARGET)
    truncated = batch(truncated=torch.tensor([True, False]))
    assert torch.equal(targets_of(agent, truncated), targets_of(agent, batch()))


def test_learn_from_sequences_is_refused():
    with pytest.raises(FieldError, match="expected batches of Transition"):
        make().learn(batch(next_observation=None), env_steps=0)


def test_learn_loss_is_huber_of_the_errors():
    agent = make()
    set_linear(agent.network, ONLINE)
    set_linear(agent.target, TARGET)
    # Q(s, a) is 1 and 1; targets are 3.43 and 2: huber(2.43) = 2.43 - 0.5 and huber(1) = 0.5.
    metrics = agent.learn(batch(), env_steps=0).scalars
    assert metrics["train/loss"].item() == pytest.approx((1.93 + 0.5) / 2)
    assert metrics["train/q_mean"].item() == pytest.approx(1.0)


def test_learn_weights_scale_each_error():
    agent = make(priority_exponent=0.5)
    set_linear(agent.network, ONLINE)
    set_linear(agent.target, TARGET)
    metrics = agent.learn(batch(weights=torch.tensor([0.5, 0.0])), env_steps=0).scalars
    assert metrics["train/loss"].item() == pytest.approx(1.93 * 0.5 / 2)


def test_learn_moves_only_the_values_of_actions_taken():
    agent = make()
    before = agent.network.advantage.weight.detach().clone()
    agent.learn(batch(action=torch.tensor([0, 0])), env_steps=0)
    moved = agent.network.advantage.weight != before
    assert moved[0].any()
    assert not moved[1].any()


def test_learn_gradient_is_clipped_and_reported_before():
    agent = make(lr=1.0, max_grad_norm=0.001)
    agent.optimizer = torch.optim.SGD(agent.network.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in agent.network.parameters()]
    norm = agent.learn(batch(), env_steps=0).scalars["train/grad_norm"].item()
    moved = torch.cat([(b - a).flatten() for a, b in zip(before, agent.network.parameters(), strict=True)]).norm()
    assert norm > 0.1
    assert moved.item() == pytest.approx(0.001, rel=1e-3)


def test_learn_target_network_is_copied_at_its_interval_only():
    agent = make(target_every=3)
    first = agent.target.advantage.weight.clone()
    for update in range(1, 7):
        agent.learn(batch(), env_steps=0)
        same = torch.equal(agent.target.advantage.weight, agent.network.advantage.weight)
        assert same == (update % 3 == 0)
        if update < 3:
            assert torch.equal(agent.target.advantage.weight, first)


def test_learn_rate_falls_over_the_run():
    agent = make(lr=0.1, lr_end=0.02, total_steps=100)
    for env_steps, expected in ((0, 0.1), (50, 0.06), (100, 0.02)):
        agent.learn(batch(), env_steps=env_steps)
        assert agent.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        assert agent.scalars(env_steps)["train/learning_rate"] == pytest.approx(expected)


def test_learn_exploration_rate_falls_over_its_fraction():
    agent = make(epsilon_start=1.0, epsilon_end=0.1, epsilon_fraction=0.5, total_steps=100)
    rates = [agent.scalars(env_steps)["rollout/exploration_rate"] for env_steps in (0, 25, 50, 100)]
    assert rates == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_actions_that_do_not_start_at_zero_are_played_and_learned():
    actions = spaces.Discrete(2, start=5)
    agent, plain = make(actions=actions), make()
    set_linear(agent.network, ONLINE)
    out = agent.policy(np.array([[3.0, 1.0], [1.0, 3.0]], np.float32), (), context(2))
    assert out.action.tolist() == [5, 6]
    set_linear(plain.network, ONLINE)
    for a in (agent, plain):
        set_linear(a.target, TARGET)
    shifted = agent.learn(batch(action=torch.tensor([5, 6])), env_steps=0).scalars["train/loss"]
    assert shifted == plain.learn(batch(), env_steps=0).scalars["train/loss"]


def test_policy_greedy_respects_the_action_mask():
    agent = make()
    set_linear(agent.network, ONLINE)
    mask = np.array([[False, True], [True, True]])
    out = agent.policy(np.array([[3.0, 1.0], [3.0, 1.0]], np.float32), (), context(2, mask=mask))
    assert out.action.tolist() == [1, 0]


def test_policy_explores_with_the_scheduled_probability():
    agent = make(epsilon_start=1.0, epsilon_end=0.0, epsilon_fraction=1.0, total_steps=100)
    set_linear(agent.network, ONLINE)
    observation = np.tile(np.array([[3.0, 1.0]], np.float32), (4000, 1))
    others = [agent.policy(observation, (), context(4000, "explore", None, n)).action.mean() for n in (0, 50, 100)]
    assert others == pytest.approx([0.5, 0.25, 0.0], abs=0.03)  # half of the random actions are the greedy one


def test_state_dict_loaded_into_another_agent_learns_on_bit_equal():
    one, other = make(target_every=4), make(target_every=4)
    for _ in range(3):
        one.learn(batch(), env_steps=10)
    saved = one.state_dict()
    for _ in range(3):
        one.learn(batch(), env_steps=20)
    other.load_state_dict(saved)
    for _ in range(3):
        other.learn(batch(), env_steps=20)
    assert other.updates.value == one.updates.value == 6
    for a, b in ((one.network, other.network), (one.target, other.target)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_state_dict_shares_no_memory_with_the_agent():
    agent = make()
    saved = agent.state_dict()
    kept = saved["network"]["advantage.weight"].clone()
    agent.learn(batch(), env_steps=0)
    assert torch.equal(saved["network"]["advantage.weight"], kept)


def test_load_state_dict_of_another_network_is_a_checkpoint_error():
    with pytest.raises(CheckpointError, match="'network' does not fit this DQN"):
        make().load_state_dict(make(widths=(3,)).state_dict())


@pytest.mark.parametrize(
    ("actions", "other"),
    [(spaces.Box(-1, 1, (1,)), "sac or ppo"), (spaces.MultiDiscrete([2, 2]), "ppo"), (spaces.MultiBinary(2), "ppo")],
)
def test_dqn_with_actions_that_are_not_discrete_names_the_agent_that_plays_them(actions, other):
    with pytest.raises(SpaceError, match=rf"action_space: is .*DQN plays Discrete ones only\. Use {other}, which"):
        make(actions=actions)


def test_targets_respect_the_action_mask_of_the_next_observation():
    space = spaces.Dict({"action_mask": spaces.MultiBinary(3), "x": spaces.Box(-10, 10, (1,))})
    for double, best in ((True, 2), (False, 1)):
        agent = make(observation=space, actions=spaces.Discrete(3), double=double)
        set_linear(agent.network, [[0.0] * 4] * 3, (3.0, 1.0, 2.0))  # would choose 0, then 2
        set_linear(agent.target, [[0.0] * 4] * 3, (30.0, 20.0, 10.0))  # would choose 0, then 1
        masks = torch.tensor([[0, 1, 1], [0, 0, 0]], dtype=torch.int8)  # no action is left at a terminal observation
        following = {"action_mask": masks, "x": torch.zeros(2, 1)}
        found = agent.targets(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0]), following)
        assert found.tolist() == [1 + 0.5 * (30.0, 20.0, 10.0)[best], 2.0]


def test_learn_priorities_are_the_errors_before_importance_weights():
    """B47: priorities from weighted errors would be 1.215 and 0."""
    agent = make(priority_exponent=0.6)
    set_linear(agent.network, ONLINE)
    set_linear(agent.target, TARGET)
    learned = agent.learn(batch(weights=torch.tensor([0.5, 0.0])), env_steps=0)
    assert learned.priorities.tolist() == pytest.approx([2.43, 1.0], abs=1e-5)
    assert make().learn(batch(), env_steps=0).priorities is None


def test_beta_rises_to_one_and_not_past_it():
    """B46."""
    agent = make(priority_exponent=0.6, beta=0.4, total_steps=100)
    assert [agent.beta(step) for step in (0, 50, 100, 1000)] == pytest.approx([0.4, 0.7, 1.0, 1.0])
    assert agent.sampler == Prioritized(alpha=0.6, beta=0.4)
    assert make().beta(50) is None


def test_target_network_shares_no_memory_with_the_network():
    """B39: a shared part would chase itself."""
    agent = make(widths=(4,), dueling=True)
    memory = [{p.untyped_storage().data_ptr() for p in net.parameters()} for net in (agent.network, agent.target)]
    assert not memory[0] & memory[1]
    assert not any(p.requires_grad for p in agent.target.parameters())


def test_target_network_gets_the_buffers_too():
    """B40: statistics of a normalisation, say, are no parameters."""
    agent = make(target_every=1)
    for network, value in ((agent.network, 3.0), (agent.target, 0.0)):
        network.register_buffer("statistic", torch.tensor(value))
    agent.learn(batch(), env_steps=0)
    assert agent.target.get_buffer("statistic").item() == 3.0


def test_actor_ladder_of_several_explores_less_with_each():
    agent = make(epsilon_start=0.4, epsilon_end=0.4, epsilon_power=7.0)
    ladder = [agent.actor(number, 8)[0].epsilon(0) for number in range(8)]
    assert ladder == pytest.approx([0.4 ** (1 + number) for number in range(8)])
    assert agent.actor(0, 1)[0].epsilon(0) == 0.4
    assert agent.actor(3, 8)[1] is agent.network


def test_config_with_several_wrong_values_names_all():
    with pytest.raises(ConfigError, match=r"agent\.lr: is -1.*agent\.gamma: is 2.*agent\.n_step: is 0"):
        DQNConfig(lr=-1, gamma=2, n_step=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"v_min": 1.0, "v_max": 1.0}, r"agent\.v_min: is 1\.0; expected less than v_max, which is 1\.0\."),
        ({"v_min": float("nan")}, r"agent\.v_min: is nan"),
        ({"hl_gauss": True}, r"agent\.hl_gauss: is True; expected False where agent\.atoms is 1\."),
        ({"beta": 1.1}, r"agent\.beta: is 1\.1"),
    ],
)
def test_config_of_a_distribution_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DQNConfig(**settings)
