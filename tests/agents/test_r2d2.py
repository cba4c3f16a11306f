"""R2D2's updates against numbers by hand, a slow twin that goes step by step, and the DQN it is without memory."""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.dqn import DQN, DQNConfig
from agents.r2d2 import R2D2, R2D2Config, _Seen
from rlfeed.errors import ConfigError, FieldError, SpaceError
from rlfeed.nest import map_nest
from rlfeed.types import Batch, PolicyContext

CPU = torch.device("cpu")
PLAIN = {"memory": "none", "feed_back": False, "rescale": False, "widths": (), "burn_in": 0}


def make(observation=None, actions=None, num_envs=2, total_steps=100, **config):
    settings = {"length": 4, "burn_in": 2, "memory_width": 6, "widths": (5,), "n_step": 2, **config}
    return R2D2(
        R2D2Config(**settings),
        observation or spaces.Box(-10, 10, (3,)),
        actions or spaces.Discrete(2),
        total_steps=total_steps,
        seed=0,
        device=CPU,
        num_envs=num_envs,
    )


def distinct(agent, seed=1):
    """Give the target network weights of its own, so that a mixed-up network shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in agent.target.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return agent


def sequences(agent, rows, columns=None, seed=0):
    """Make a batch of (burn-in, trained steps, first, end) rows with random content, noise in the padding."""
    rng = np.random.default_rng(seed)
    lengths = [burn_in + steps for burn_in, steps, _, _ in rows]
    size, steps = len(rows), columns or max(lengths)
    column = np.arange(steps)[None]
    mask = column < np.array(lengths)[:, None]
    before = np.array([burn_in for burn_in, _, _, _ in rows])
    first, terminated, truncated = (np.zeros((size, steps), bool) for _ in range(3))
    for row, (_, _, opens, end) in enumerate(rows):
        first[row, 0] = opens
        terminated[row, lengths[row] - 1] = end == "terminated"
        truncated[row, lengths[row] - 1] = end == "truncated"
    opens = first[:, 0]
    start, count = agent.network.first_action, agent.network.actions
    core = agent.network.core
    normal = lambda *shape: torch.from_numpy(rng.normal(size=shape).astype(np.float32))  # noqa: E731
    return Batch(
        observation=normal(size, steps + 1, 3),
        action=torch.from_numpy(rng.integers(start, start + count, (size, steps))),
        reward=normal(size, steps),
        terminated=torch.from_numpy(terminated),
        truncated=torch.from_numpy(truncated),
        discount=torch.from_numpy(np.where(terminated, 0.0, agent.config.gamma).astype(np.float32)),
        mask=torch.from_numpy(mask),
        loss_mask=torch.from_numpy(mask & (column >= before[:, None])),
        lengths=torch.tensor(lengths),
        is_first=torch.from_numpy(first),
        burn_in=torch.from_numpy(before),
        carry=() if core is None else map_nest(lambda leaf: normal(*leaf.shape), core.initial_carry(size)),
        prev_action=torch.from_numpy(np.where(opens, 0, rng.integers(start, start + count, size))),
        prev_reward=torch.from_numpy(np.where(opens, 0.0, rng.normal(size=size)).astype(np.float32)),
        ids=torch.arange(size),
        weights=torch.from_numpy(rng.uniform(0.2, 1.0, size).astype(np.float32)),
        extras={"values": normal(size, steps, count)},
    )


ROWS = [
    (2, 4, False, None),  # from the middle of an episode, and on
    (0, 4, True, "truncated"),  # from its beginning
    (1, 3, True, "terminated"),  # burn-in clipped by it
    (2, 1, False, "terminated"),  # short
    (0, 2, True, None),  # cut
]


def learned(agent, batch):
    """Learn without moving the weights; give loss, gradients, priorities and the other scalars."""
    agent.optimizer = torch.optim.SGD(agent.network.parameters(), lr=0.0)
    agent.lr = lambda env_steps: 0.0
    out = agent.learn(batch, env_steps=0)
    gradients = {name: parameter.grad.clone() for name, parameter in agent.network.named_parameters()}
    return out.scalars["train/loss"].item(), gradients, out.priorities, out.scalars


def h(x):
    return math.copysign(math.sqrt(abs(x) + 1) - 1, x) + 1e-3 * x


def h_inverse(y):
    return math.copysign(((math.sqrt(1 + 4e-3 * (abs(y) + 1 + 1e-3)) - 1) / 2e-3) ** 2 - 1, y)


def stepped(network, batch, row, first_column):
    """Go over a row one step at a time, as an actor does; the trained steps and what follows count."""
    carry = map_nest(lambda leaf: leaf[row : row + 1], batch.carry)
    if batch.is_first[row, 0] and network.core is not None:
        carry = network.core.initial_carry(1)
    values = []
    for column in range(int(batch.lengths[row]) + 1):
        action = batch.prev_action[row] if column == 0 else batch.action[row, column - 1]
        reward = batch.prev_reward[row] if column == 0 else batch.reward[row, column - 1]
        opens = column == 0 and bool(batch.is_first[row, 0])
        seen = (batch.observation[row, column], action, reward, torch.tensor(opens))
        value, carry = network.step(_Seen(*(part.unsqueeze(0) for part in seen)), carry)
        values.append(value[0].tolist())
    return values[first_column:]


@torch.no_grad()
def twin(agent, batch):
    """Compute loss and errors in Python floats, one sequence and one step at a time."""
    config, loss, errors = agent.config, 0.0, np.zeros(batch.reward.shape)
    scale, unscale = (h, h_inverse) if config.rescale else (float, float)
    for row in range(len(batch)):
        begin, end = int(batch.burn_in[row]), int(batch.lengths[row])
        online, target = (stepped(network, batch, row, begin) for network in (agent.network, agent.target))
        total = 0.0
        for t in range(begin, end):
            k = min(config.n_step, end - t)
            goal = sum(config.gamma**i * float(batch.reward[row, t + i]) for i in range(k))
            if not batch.terminated[row, t + k - 1]:
                best = int(np.argmax(online[t + k - begin]))
                goal += config.gamma**k * unscale(target[t + k - begin][best])
            action = int(batch.action[row, t]) - agent.network.first_action
            delta = scale(goal) - online[t - begin][action]
            total += delta**2 / 2
            errors[row, t] = abs(delta)
        loss += float(batch.weights[row]) * total / len(batch)
    return loss, errors


@pytest.mark.parametrize("memory", ["lstm", "gru", "none"])
@pytest.mark.parametrize("n_step", [1, 3, 9])
def test_learn_equals_a_slow_twin_that_goes_step_by_step(memory, n_step):
    agent = distinct(make(memory=memory, n_step=n_step))
    batch = sequences(agent, ROWS)
    loss, _, priorities, _ = learned(agent, batch)
    expected, errors = twin(agent, batch)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert priorities.numpy() == pytest.approx(errors, abs=1e-4)


@pytest.mark.parametrize(
    "changes", [{"burn_in": 0}, {"feed_back": False}, {"rescale": False}, {"length": 1, "burn_in": 0}]
)
def test_learn_equals_the_twin_with_parts_left_out(changes):
    agent = distinct(make(**changes))
    rows = [(min(b, agent.config.burn_in), min(n, agent.config.length), first, end) for b, n, first, end in ROWS]
    batch = sequences(agent, rows)
    loss, _, priorities, _ = learned(agent, batch)
    expected, errors = twin(agent, batch)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert priorities.numpy() == pytest.approx(errors, abs=1e-4)


def test_learn_of_single_steps_without_memory_has_the_gradients_of_dqn():
    """The oracle: with sequences of one step and nothing to remember R2D2 is DQN, whose errors below 1 are squared."""
    spec = spaces.Box(-10, 10, (3,)), spaces.Discrete(2)
    agent = distinct(make(**{**PLAIN, "widths": (5,), "length": 1, "n_step": 1, "max_grad_norm": 1e9}))
    config = DQNConfig(widths=(5,), n_step=1, dueling=True, max_grad_norm=1e9, priority_exponent=0.9)
    dqn = DQN(config, *spec, total_steps=9, seed=0, device=CPU)
    for ours, theirs in ((agent.network, dqn.network), (agent.target, dqn.target)):
        theirs.load_state_dict({name: value / 4 for name, value in ours.state_dict().items()})
        ours.load_state_dict(theirs.state_dict())
    batch = sequences(agent, [(0, 1, False, None), (0, 1, True, "terminated"), (0, 1, False, "truncated")])
    batch.reward.mul_(0.1)
    flat = {
        name: getattr(batch, name)[:, 0] for name in ("action", "reward", "terminated", "truncated", "discount")
    }
    transitions = Batch(
        observation=batch.observation[:, 0], next_observation=batch.observation[:, 1], weights=batch.weights, **flat
    )
    loss, gradients, priorities, _ = learned(agent, batch)
    assert priorities.max() < 1  # where the Huber loss is the square
    assert dqn.learn(transitions, env_steps=0).scalars["train/loss"].item() == pytest.approx(loss, rel=1e-5)
    for name, parameter in dqn.network.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-6), name


# Values of states 0 .. 4 in a table: the action is always the first, the second is worth nothing.
REWARDS, NEXT_VALUES = [1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0, 50.0]


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        # 1 + .9 2 + .81 3 + .729 V(3); the last two have fewer rewards, and gamma^2 and gamma^1 before the value.
        (None, [5.23 + 0.729 * 40, 2 + 2.7 + 3.24 + 0.729 * 50, 3 + 3.6 + 0.81 * 50, 4 + 0.9 * 50]),
        ("truncated", [5.23 + 0.729 * 40, 2 + 2.7 + 3.24 + 0.729 * 50, 3 + 3.6 + 0.81 * 50, 4 + 0.9 * 50]),
        ("terminated", [5.23 + 0.729 * 40, 2 + 2.7 + 3.24, 3 + 3.6, 4.0]),
    ],
)
def test_targets_of_the_last_steps_are_shorter_returns_by_hand(end, expected):
    """B51: rlpyt bootstraps one step early and without gamma^n: 5.23 + 30; Stoix from the reset observation."""
    agent = make(observation=spaces.Discrete(5), n_step=3, gamma=0.9, **PLAIN)
    for network in (agent.network, agent.target):
        network.advantage.weight.data.zero_()
        network.value.weight.data.zero_()
    # The dueling heads give V + A - mean A: value v and advantages (v, -v) are actions of worth 2 v and 0.
    agent.target.value.weight.data[:] = torch.tensor(NEXT_VALUES) / 2
    agent.target.advantage.weight.data[:] = torch.stack([torch.tensor(NEXT_VALUES), -torch.tensor(NEXT_VALUES)]) / 2
    agent.network.advantage.weight.data[0] = 1e-6  # the network prefers the first action, and says 0 of it
    batch = sequences(agent, [(0, 4, True, end)])
    fields = {"observation": torch.arange(5).unsqueeze(0), "action": torch.zeros(1, 4, dtype=torch.int64)}
    batch = Batch(**{**_fields(batch), **fields, "reward": torch.tensor([REWARDS])})
    assert learned(agent, batch)[2][0].tolist() == pytest.approx(expected, rel=1e-5)


def _fields(batch, pick=lambda leaf: leaf):
    names = (
        "observation action reward terminated truncated discount mask loss_mask lengths is_first burn_in carry "
        "prev_action prev_reward ids weights extras"
    )
    return {name: map_nest(pick, getattr(batch, name)) for name in names.split()}


def widened(batch, columns, noise):
    """Pad a batch to more columns."""
    fields = _fields(batch)
    for name, leaf in list(fields.items()):
        if name in ("lengths", "burn_in", "carry", "prev_action", "prev_reward", "ids", "weights", "extras"):
            continue
        wide = torch.zeros(len(leaf), columns + (name == "observation"), *leaf.shape[2:], dtype=leaf.dtype)
        if wide.is_floating_point():
            wide += noise
        wide[:, : leaf.shape[1]] = leaf
        fields[name] = wide
    values = fields["extras"]["values"]
    wide = torch.full((len(values), columns, values.shape[2]), noise)
    wide[:, : values.shape[1]] = values
    return Batch(**{**fields, "extras": {"values": wide}})


@pytest.mark.parametrize("noise", [0.0, 1e6])
def test_learn_of_a_batch_padded_to_twice_its_length_is_the_same(noise):
    """(a), B33: padding is invisible, whatever stands in it."""
    agent = distinct(make())
    batch = sequences(agent, ROWS)
    loss, gradients, priorities, told = learned(agent, batch)
    wide_loss, wide_gradients, wide_priorities, wide_told = learned(agent, widened(batch, 12, noise))
    assert wide_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(wide_gradients[name], gradient, rtol=1e-4, atol=1e-6), name
    assert torch.allclose(wide_priorities[:, :6], priorities, atol=1e-5)
    assert not wide_priorities[:, 6:].any()
    for tag in ("train/q_mean", "train/q_drift"):
        assert wide_told[tag].item() == pytest.approx(told[tag].item(), rel=1e-4)


def test_learn_of_rows_in_another_order_is_the_same():
    """(c), B32: no row sees another's carry."""
    agent, order = distinct(make()), torch.tensor([3, 0, 4, 2, 1])
    batch = sequences(agent, ROWS)
    loss, gradients, priorities, _ = learned(agent, batch)
    other, permuted, moved, _ = learned(agent, Batch(**_fields(batch, lambda leaf: leaf[order])))
    assert other == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(moved, priorities[order], atol=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(permuted[name], gradient, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("row", range(len(ROWS)))
def test_learn_of_one_sequence_is_its_share_of_the_batch(row):
    """B31: shorter sequences beside longer ones have the values that they have alone."""
    agent = distinct(make())
    batch = sequences(agent, ROWS)
    _, _, priorities, _ = learned(agent, batch)
    _, _, alone, _ = learned(agent, Batch(**_fields(batch, lambda leaf: leaf[row : row + 1])))
    assert torch.allclose(alone[0], priorities[row], atol=1e-6)


def test_learn_reads_the_stored_carry_of_a_sequence_from_the_middle():
    """B26: training does not begin with zeros."""
    agent = distinct(make())
    batch = sequences(agent, ROWS[:1])
    before = learned(agent, batch)[2]
    batch.carry[0].zero_()
    assert not torch.allclose(learned(agent, batch)[2], before, atol=1e-3)


@pytest.mark.parametrize("row", [1, 2])
def test_learn_of_an_episode_from_its_beginning_knows_nothing_of_what_was_before(row):
    """B28, B36, B49: carry, previous action and previous reward are reset together, also inside the burn-in."""
    agent = distinct(make())
    batch = sequences(agent, ROWS)
    before = learned(agent, batch)[2][row]
    batch.carry[0][row] += 5
    batch.carry[1][row] -= 5
    batch.prev_action[row] = 1
    batch.prev_reward[row] = 7
    assert torch.equal(learned(agent, batch)[2][row], before)


def test_burn_in_has_no_gradient():
    agent = make(burn_in=2)
    batch = sequences(agent, ROWS[:1])
    batch.observation.requires_grad_()
    learned(agent, batch)
    moved = batch.observation.grad[0].abs().sum(dim=1) > 0
    assert moved.tolist() == [False, False, True, True, True, True, False]  # the last is of targets alone


def test_burn_in_warms_both_networks():
    agent = distinct(make())
    batch = sequences(agent, ROWS[:1])
    before = agent._targets(window := agent._window(batch), torch.zeros(1, 5, 2), batch.carry)
    window.seen.observation[:, :2] += 1
    assert not torch.equal(agent._targets(window, torch.zeros(1, 5, 2), batch.carry), before)


def test_learn_weights_scale_each_sequence():
    agent = distinct(make())
    batch = sequences(agent, ROWS[:2])
    parts = []
    for weights in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.25)):
        batch.weights.copy_(torch.tensor(weights))
        parts.append(learned(agent, batch)[0])
    assert parts[2] == pytest.approx(0.5 * parts[0] + 0.25 * parts[1], rel=1e-5)


@pytest.mark.parametrize("allowed", [(1, 1), (1, 0), (0, 1)])
def test_learn_masked_actions_are_not_bootstrapped_from(allowed):
    spec = spaces.Dict({"place": spaces.Box(-10, 10, (3,)), "action_mask": spaces.MultiBinary(2)})
    agent = distinct(make(observation=spec))
    batch = sequences(agent, ROWS)
    mask = torch.tensor(allowed, dtype=torch.int8).expand(*batch.observation.shape[:2], 2)
    observation = {"place": batch.observation, "action_mask": mask}
    window = agent._window(Batch(**{**_fields(batch), "observation": observation}))
    values = torch.tensor([1.0, 2.0]).expand(5, 5, 2)  # the network prefers the second
    best = 1 if allowed[1] else 0
    worth = h_inverse(float(agent.target(window.seen, batch.carry, 2)[1, 4, best]))  # of what followed a truncation
    target = agent._targets(window, values, batch.carry)[1, 3]
    assert target.item() == pytest.approx(h(float(batch.reward[1, 3]) + 0.99 * worth), rel=1e-3)


def test_learn_actions_that_do_not_start_at_zero_are_the_same():
    agent, shifted = distinct(make()), distinct(make(actions=spaces.Discrete(2, start=5)))
    batch = sequences(agent, ROWS)
    moved = {"action": batch.action + 5, "prev_action": torch.where(batch.is_first[:, 0], 0, batch.prev_action + 5)}
    moved["action"][~batch.mask] = 0  # padding is zeros
    loss = learned(agent, batch)[0]
    assert learned(shifted, Batch(**{**_fields(batch), **moved}))[0] == pytest.approx(loss, rel=1e-6)


def test_learn_target_network_is_copied_at_its_interval():
    agent = distinct(make(target_every=2))
    batch = sequences(agent, ROWS)
    same = []
    for _ in range(4):
        agent.learn(batch, env_steps=0)
        pairs = zip(agent.target.parameters(), agent.network.parameters(), strict=True)
        same.append(all(torch.equal(a, b) for a, b in pairs))
    assert same == [False, True, False, True]


def test_learn_of_transitions_is_refused():
    agent = make()
    batch = sequences(agent, ROWS)
    with pytest.raises(FieldError, match="expected batches of Sequence"):
        agent.learn(Batch(**{**_fields(batch), "burn_in": None}), env_steps=0)


def test_learn_in_bfloat16_is_near_what_it_is_in_float32():
    agent, narrow = distinct(make()), distinct(make(bfloat16=True))
    batch = sequences(agent, ROWS)
    assert learned(narrow, batch)[0] == pytest.approx(learned(agent, batch)[0], rel=0.1)
    assert learned(narrow, batch)[0] != learned(agent, batch)[0]


def context(rows, mode="greedy", mask=None, env_steps=10**9, is_first=True):
    return PolicyContext(
        np.full(rows, is_first), mode, np.arange(rows), env_steps, np.zeros(rows, np.int64),
        np.zeros(rows, np.float32), mask, np.random.default_rng(0),
    )  # fmt: skip


def test_policy_explores_on_a_ladder_by_environment():
    agent = make(num_envs=8)
    golden = [0.4, 0.16, 0.064, 0.0256, 0.01024, 0.004096, 0.0016384, 0.00065536]
    assert agent.policy.epsilon(10**9).tolist() == pytest.approx(golden, rel=1e-5)
    assert agent.policy.epsilon(0).tolist() == [1.0] * 8
    halves = [agent_of.epsilon(10**9).tolist() for agent_of in (make(num_envs=4).actor(i, 2)[0] for i in (0, 1))]
    assert halves[0] + halves[1] == pytest.approx(golden, rel=1e-5)


def test_policy_takes_random_actions_as_often_as_its_environment_should():
    agent, rows = make(num_envs=4000, epsilon_power=0.0, epsilon=0.5), np.ones((4000, 3), np.float32)
    greedy = agent.policy(rows, agent.policy.initial_carry(4000), context(4000)).action
    assert len(set(greedy.tolist())) == 1
    explored = agent.policy(rows, agent.policy.initial_carry(4000), context(4000, "explore")).action
    assert (explored != greedy).mean() == pytest.approx(0.25, abs=0.03)  # half of the random ones are the greedy one


def test_policy_respects_the_action_mask_in_every_mode():
    agent, mask = make(num_envs=100, epsilon=1.0, epsilon_power=0.0), np.tile([[False, True], [True, False]], (50, 1))
    for mode in ("greedy", "explore"):
        out = agent.policy(np.ones((100, 3), np.float32), agent.policy.initial_carry(100), context(100, mode, mask))
        assert out.action.tolist() == [1, 0] * 50


def test_policy_actions_begin_with_the_first_of_the_space():
    agent = make(actions=spaces.Discrete(2, start=5))
    for mode in ("greedy", "explore"):
        out = agent.policy(np.ones((2, 3), np.float32), agent.policy.initial_carry(2), context(2, mode))
        assert set(out.action.tolist()) <= {5, 6}


def test_memory_begins_with_time_scales_from_one_step_to_many():
    agent = make(memory_steps=100, memory_width=3)
    bias = agent.network.core.core.bias_ih_l0.view(4, 3)
    assert bias[1].exp().tolist() == pytest.approx([1.0, 10.0, 100.0], rel=1e-5)
    assert torch.equal(bias[0], -bias[1])


def test_state_dict_loaded_into_another_agent_learns_on_bit_equal():
    one, other = (distinct(make(target_every=4)) for _ in range(2))
    batch = sequences(one, ROWS)
    for _ in range(3):
        one.learn(batch, env_steps=10)
    other.load_state_dict(one.state_dict())
    for agent in (one, other):
        for _ in range(3):
            agent.learn(batch, env_steps=20)
    assert other.updates.value == one.updates.value == 6
    for a, b in ((one.network, other.network), (one.target, other.target)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_config_with_several_wrong_values_names_all():
    with pytest.raises(ConfigError, match=r"agent\.burn_in: is 8; expected 0 or more, .* agent\.length, 8") as error:
        R2D2Config(burn_in=8, length=8, gamma=2, memory="rnn", compile=True)
    assert all(f"agent.{name}: is" in str(error.value) for name in ("gamma", "memory", "compile"))


def test_r2d2_with_continuous_actions_is_refused():
    with pytest.raises(SpaceError, match=r"action_space: is Box\(.*R2D2 plays Discrete ones only"):
        make(actions=spaces.Box(-1, 1, (1,)))
