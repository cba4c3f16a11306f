"""PQN: its targets against values computed by hand, what an update does, its policy, its settings and its state."""

import itertools
import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.config import EnvConfig
from agents.pqn import PQNConfig, pqn, rectification
from rlfeed.envs import make_envs
from rlfeed.errors import CheckpointError, ConfigError, SpaceError
from rlfeed.rollout import Rollout
from rlfeed.types import Batch, PolicyContext

CPU, GAMMA, LAM = torch.device("cpu"), 0.9, 0.65


def make(*, actions=None, total_steps=100, seed=0, linear=True, **settings):
    """Make an agent; a linear one has the two numbers of an observation for values."""
    settings = {"gamma": GAMMA, "lam": LAM, "widths": () if linear else (8,), **settings}
    agent = PQNConfig(**settings).build(
        spaces.Box(-99, 99, (2,)), actions or spaces.Discrete(2), total_steps=total_steps, seed=seed, device=CPU
    )
    if linear:
        agent.network.load_state_dict({**agent.network.state_dict(), "head.weight": torch.eye(2)})
    return agent


def block(values, reward, *, ends=(), finals=(), truncated=False, lost=(), extras=None, action=None):
    """Make a block of rows whose observations show the best value, as `make`'s linear network takes it."""
    values, reward = torch.tensor(values), torch.tensor(reward)
    flag = torch.zeros(reward.shape, dtype=torch.bool)
    terminated, mask, is_first = flag.clone(), ~flag, flag.clone()
    for row, t in ends:
        terminated[row, t] = True
        if t + 1 < reward.shape[1]:
            is_first[row, t + 1] = True
    for row, t in lost:
        mask[row, t] = False
    seen = torch.stack([values, torch.full_like(values, -50.0)], dim=-1)
    return Batch(
        observation=seen,
        action=torch.zeros(reward.shape, dtype=torch.int64) if action is None else action,
        reward=reward,
        terminated=flag if truncated else terminated,
        truncated=terminated if truncated else flag,
        mask=mask,
        is_first=is_first,
        prev_action=torch.zeros(len(reward), dtype=torch.int64),
        final_observation=torch.tensor([[value, -50.0] for value in finals]).reshape(-1, 2),
        final_index=torch.tensor(ends, dtype=torch.int64).reshape(-1, 2),
        extras=extras or {},
    )


def context(rows, mode="greedy", mask=None, env_steps=0):
    return PolicyContext(
        np.ones(rows, bool), mode, np.arange(rows), env_steps, np.zeros(rows, np.int64), np.zeros(rows, np.float32),
        mask, np.random.default_rng(0),
    )  # fmt: skip


def test_targets_of_an_episode_that_goes_on_are_q_lambda():
    """B1, B2: the value before the last is of the state before the last, not of the one the block lands in."""
    target, mask = make().targets(block([[0.5, 1.0, 1.5, 2.0]], [[1.0, 0.0, 2.0]]))
    assert target[0].tolist() == pytest.approx([2.8918675, 2.6955, 3.8])
    assert mask.all()


def test_targets_at_a_termination_inside_a_block_have_nothing_of_what_follows():
    """B3: neither the next value nor the next return passes a termination."""
    rows = block([[0.5, 1.0, 1.5, 2.0]], [[1.0, 0.0, 2.0]], ends=[(0, 1)], finals=[70.0])
    # 1 + 0.9 * (0.35 * 1 + 0.65 * 0), 0, 2 + 0.9 * 2
    assert make().targets(rows)[0][0].tolist() == pytest.approx([1.315, 0.0, 3.8])


def test_targets_at_a_truncation_inside_a_block_bootstrap_from_its_final_observation():
    """B3, B4: not from the reset observation (1.5), and not as if it had terminated."""
    rows = block([[0.5, 1.0, 1.5, 2.0]], [[1.0, 0.0, 2.0]], ends=[(0, 1)], finals=[4.0], truncated=True)
    # 1 + 0.9 * (0.35 * 1 + 0.65 * 3.6), 0 + 0.9 * 4, 2 + 0.9 * 2
    assert make().targets(rows)[0][0].tolist() == pytest.approx([3.421, 3.6, 3.8])


def test_targets_at_an_end_in_the_last_column_do_not_look_into_the_next_block():
    for truncated, expected in ((False, 2.0), (True, 2.0 + GAMMA * 4.0)):
        rows = block([[0.5, 1.0, 9.0]], [[1.0, 2.0]], ends=[(0, 1)], finals=[4.0], truncated=truncated)
        assert make().targets(rows)[0][0, 1].item() == pytest.approx(expected)


def test_targets_of_lost_steps_are_left_out_and_the_step_before_bootstraps():
    rows = block([[0.5, 1.0, 1.5, 2.0]], [[1.0, 0.0, 2.0]], lost=[(0, 1)])
    target, mask = make().targets(rows)
    assert mask.tolist() == [[True, False, True]]
    assert target[0].tolist() == pytest.approx([1 + GAMMA * 1.0, 0.0, 3.8])


def test_targets_of_permuted_environments_are_the_permuted_targets():
    """(c)"""
    values, reward = [[0.5, 1.0, 1.5], [2.0, 0.1, 0.3], [0.7, 0.2, 3.0]], [[1.0, 0.0], [0.0, 5.0], [2.0, 2.0]]
    order = [2, 0, 1]
    plain = make().targets(block(values, reward, ends=[(1, 0)], finals=[4.0]))[0]
    moved = block([values[n] for n in order], [reward[n] for n in order], ends=[(2, 0)], finals=[4.0])
    assert torch.equal(make().targets(moved)[0], plain[order])


def test_targets_of_one_environment_or_as_many_as_steps_are_the_same_set():
    """(h)"""
    values, reward = [0.5, 1.0, 1.5, 2.0, 0.1], [1.0, 0.0, 2.0, 3.0]
    wide = block([[a, b] for a, b in itertools.pairwise(values)], [[r] for r in reward])
    long = make(lam=0.0).targets(block([values], [reward]))[0]
    assert torch.equal(long.flatten(), make(lam=0.0).targets(wide)[0].flatten())


def test_targets_take_the_best_of_the_allowed_actions_and_leave_out_what_has_no_mask():
    # The values are -50 of action 1, the only one allowed at step 1.
    allowed = torch.tensor([[[True, True], [False, True], [True, True]]])
    rows = block([[0.5, 1.0, 1.5, 2.0]], [[1.0, 0.0, 2.0]], extras={"action_mask": allowed})
    target, mask = make().targets(rows)
    assert mask.tolist() == [[True, True, False]]
    second = GAMMA * 1.5
    assert target[0].tolist() == pytest.approx([1 + GAMMA * ((1 - LAM) * -50 + LAM * second), second, 0.0])
    end = block([[0.5, 1.0]], [[1.0]], ends=[(0, 0)], finals=[4.0], extras={"action_mask": allowed[:, :1]})
    target, mask = make().targets(end)
    assert (target.item(), mask.item()) == (1.0, True)


def random_block(rows=4, length=6, seed=0, action_start=0):
    generator = torch.Generator().manual_seed(seed)
    flag = torch.zeros(rows, length, dtype=torch.bool)
    return Batch(
        observation=torch.randn(rows, length + 1, 2, generator=generator),
        action=torch.randint(2, (rows, length), generator=generator) + action_start,
        reward=torch.randn(rows, length, generator=generator),
        terminated=torch.rand(rows, length, generator=generator) < 0.2,
        truncated=flag,
        mask=~flag,
        is_first=flag,
        prev_action=torch.zeros(rows, dtype=torch.int64),
        prev_reward=torch.zeros(rows),
    )


def test_learn_shows_every_step_once_in_each_epoch():
    agent, shown = make(linear=False, epochs=3, minibatches=4), []
    rows = random_block()
    forward = agent.trained.forward

    def watched(observation, *rest):
        shown.append(observation)
        return forward(observation, *rest)

    agent.trained.forward = watched
    learned = agent.learn(rows, env_steps=0)
    assert learned.updates == agent.updates.value == 12
    assert torch.equal(shown.pop(0), rows.observation)  # for the targets
    assert [len(part) for part in shown] == [6] * 12
    everything = sorted(rows.observation[:, :-1].reshape(-1, 2).tolist())
    orders = [torch.cat(shown[4 * n : 4 * n + 4]).reshape(-1, 2).tolist() for n in range(3)]
    assert [sorted(order) for order in orders] == [everything] * 3
    assert orders[0] != orders[1] != orders[2]


def test_learn_loss_is_half_the_squared_error_in_units_of_the_targets_deviation():
    agent, rows = make(epochs=1, minibatches=1), random_block()
    target = agent.targets(rows)[0]
    value = rows.observation[:, :-1].gather(2, rows.action.unsqueeze(2)).squeeze(2)
    deviation = target.std(correction=0)
    learned = agent.learn(rows, env_steps=0)
    assert learned.scalars["train/loss"].item() == pytest.approx(
        (0.5 * ((value - target) / deviation) ** 2).mean().item(), rel=1e-4
    )
    assert learned.scalars["train/q_mean"].item() == pytest.approx(value.mean().item(), rel=1e-4)


def test_learn_actions_that_do_not_start_at_zero_are_played_and_learned():
    one, other = make(linear=False), make(linear=False, actions=spaces.Discrete(2, start=5))
    first = [a.learn(random_block(action_start=s), env_steps=0) for a, s in ((one, 0), (other, 5))]
    assert first[0].scalars["train/loss"] == first[1].scalars["train/loss"]
    seen = np.array([[3.0, 1.0], [1.0, 3.0]], np.float32)
    rows = context(2)
    rows.prev_action = np.array([5, 6])
    assert (other.policy(seen, (), rows).action == one.policy(seen, (), context(2)).action + 5).all()


def test_adopt_changes_the_unit_of_the_head_and_no_value():
    agent = make(linear=False)
    observation = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(1))
    before = agent.network(observation)[0]
    targets = torch.tensor([100.0, 140.0, 60.0, 100.0])
    agent.network.adopt(targets)
    assert agent.network.mean.item() == pytest.approx(100.0)
    assert agent.network.deviation.item() == pytest.approx(targets.std(correction=0).item())
    assert torch.allclose(agent.network(observation)[0], before, atol=1e-4)
    agent.network.adopt(targets + 50)  # the second of two blocks counts a little more than half
    share = 0.05 / (1 - 0.95**2)
    assert agent.network.mean.item() == pytest.approx(100 + 50 * share, rel=1e-5)
    variance = 800 + share * (1 - share) * 50**2
    assert agent.network.deviation.item() == pytest.approx(math.sqrt(variance), rel=1e-5)
    assert torch.allclose(agent.network(observation)[0], before, atol=1e-4)


def test_adopt_equal_targets_keep_a_deviation():
    agent = make(linear=False)
    agent.network.adopt(torch.full((4,), 50.0))
    assert agent.network.deviation.item() == pytest.approx(0.5)
    agent = make(linear=False)
    agent.network.adopt(torch.zeros(4))
    assert agent.network.deviation.item() > 0
    assert torch.isfinite(agent.network(torch.ones(1, 1, 2))[0]).all()


def test_rectification_on_adam_is_radam():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(40, 3, generator=generator)
    ours, theirs = (torch.zeros(3, requires_grad=True) for _ in range(2))
    adam, radam = torch.optim.Adam([ours], lr=0.1, eps=1e-12), torch.optim.RAdam([theirs], lr=0.1, eps=1e-12)
    for update, gradient in enumerate(gradients, 1):
        before = [parameter.detach().clone() for parameter in (ours, theirs)]
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        adam.param_groups[0]["lr"] = 0.1 * rectification(update)
        adam.step()
        radam.step()
        moved = [p.detach() - b for p, b in zip((ours, theirs), before, strict=True)]
        if update <= 5:
            assert rectification(update) == 0.0
            assert not moved[0].any()
        else:
            assert torch.allclose(*moved, rtol=1e-3, atol=1e-7)


def test_policy_greedy_respects_the_action_mask_and_keeps_it():
    agent = make()
    mask = np.array([[False, True], [True, True]])
    out = agent.policy(np.array([[3.0, 1.0], [3.0, 1.0]], np.float32), (), context(2, mask=mask))
    assert out.action.tolist() == [1, 0]
    assert out.extras["action_mask"].tolist() == mask.tolist()


def test_policy_explores_with_the_scheduled_probability():
    agent = make(epsilon_start=1.0, epsilon_end=0.0, epsilon_fraction=1.0, total_steps=100)
    observation = np.tile(np.array([[3.0, 1.0]], np.float32), (4000, 1))
    others = [agent.policy(observation, (), context(4000, "explore", None, n)).action.mean() for n in (0, 50, 100)]
    assert others == pytest.approx([0.5, 0.25, 0.0], abs=0.03)  # half of the random actions are the greedy one


def test_values_are_of_the_best_action():
    assert make().values(torch.tensor([[3.0, 1.0], [-2.0, 1.5]])).tolist() == [3.0, 1.5]


@pytest.mark.parametrize("core", ["none", "lstm"])
def test_state_dict_loaded_into_another_agent_learns_on_bit_equal(core):
    one, other = (make(linear=False, core=core, core_width=4, seed=seed, minibatches=2) for seed in (0, 1))
    rows = random_block()
    rows = Batch(**{**vars_of(rows), "carry": one.policy.initial_carry(len(rows))})
    one.learn(rows, env_steps=0)
    other.load_state_dict(one.state_dict())
    for agent in (one, other):
        agent.learn(rows, env_steps=50)
    mine, theirs = one.network.state_dict(), other.network.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert one.updates.value == other.updates.value == 16


@pytest.mark.parametrize("core", ["none", "gru"])
def test_learn_in_bfloat16_is_near_the_same_loss(core):
    losses = []
    for bfloat16 in (False, True):
        agent = make(linear=False, core=core, core_width=8, epochs=1, minibatches=1, bfloat16=bfloat16)
        rows = Batch(**{**vars_of(random_block()), "carry": agent.policy.initial_carry(4)})
        losses.append(agent.learn(rows, env_steps=0).scalars["train/loss"].item())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


@pytest.mark.parametrize(
    "space",
    [spaces.Discrete(5), spaces.Dict({"a": spaces.Box(-1, 1, (2,)), "b": spaces.Box(0, 255, (8, 8, 1), "uint8")})],
)
@pytest.mark.parametrize("core", ["none", "gru"])
def test_pqn_plays_and_learns_from_nested_observations_and_images(space, core):
    config = PQNConfig(widths=(8,), core=core, core_width=8, epochs=1, minibatches=2)
    agent = config.build(space, spaces.Discrete(3), total_steps=100, seed=0, device=CPU)

    class Play(gymnasium.Env):
        observation_space, action_space = space, spaces.Discrete(3)

        def reset(self, *, seed=None, options=None):
            self.left = 3
            return space.sample(), {}

        def step(self, action):
            self.left -= 1
            return space.sample(), 1.0, self.left == 0, False, {}

    space.seed(0)
    block = next(Rollout(make_envs(Play, 2, mode="serial"), agent.policy).blocks(5))
    assert torch.isfinite(agent.learn(block, env_steps=0).scalars["train/loss"])


def vars_of(rows):
    names = ("observation", "action", "reward", "terminated", "truncated", "mask", "is_first")
    return {name: getattr(rows, name) for name in (*names, "prev_action", "prev_reward")}


def test_load_state_dict_of_another_network_is_a_checkpoint_error():
    with pytest.raises(CheckpointError, match="'network' does not fit this PQN"):
        make(linear=False).load_state_dict(make(linear=False, widths=(3,)).state_dict())


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (1,)), spaces.MultiDiscrete([2, 2])])
def test_pqn_with_other_actions_is_refused(space):
    with pytest.raises(SpaceError, match=r"PQN plays Discrete ones only\. Use ppo"):
        make(actions=space)


def test_config_with_several_wrong_values_names_all():
    with pytest.raises(ConfigError, match=r"agent\.lr: is -1.*agent\.lam: is 2.*agent\.core: is rnn.*one of"):
        PQNConfig(lr=-1, lam=2, core="rnn")


def test_config_with_minibatches_that_do_not_divide_is_refused():
    run = pqn()
    with pytest.raises(ConfigError, match=r"agent\.minibatches: is 7 for blocks of 32 x 32 = 1024 steps"):
        type(run)(agent=PQNConfig(minibatches=7), env=EnvConfig(num_envs=32), block_length=32)
    with pytest.raises(ConfigError, match=r"agent\.minibatches: is 7 for 4 environments; expected at most as many"):
        type(run)(agent=PQNConfig(minibatches=7, core="gru"), env=EnvConfig(num_envs=4))
