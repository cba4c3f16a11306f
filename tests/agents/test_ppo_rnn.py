"""Recurrent PPO: what the learner computes of sequences is what acting computed step by step."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.actor_critic import Inputs
from agents.blocks import Block, cut, minibatches
from agents.ppo import PPO, PPOConfig
from rlfeed.envs import make_envs
from rlfeed.nest import map_nest
from rlfeed.rollout import Rollout
from rlfeed.testing import IdentifiableEnv
from rlfeed.types import PolicyContext

ENDS = ("terminated", "truncated", "both")


def make(envs, layers=1, core="lstm", **config):
    torch.set_num_threads(1)
    fixed = {"widths": (8,), "core": core, "core_width": 6, "core_layers": layers, "epochs": 1, "minibatches": 2}
    agent = PPO(
        PPOConfig(**{**fixed, **config}),
        envs.observation_space,
        envs.action_space,
        total_steps=1000,
        seed=0,
        device=torch.device("cpu"),
    )
    scale = torch.Generator().manual_seed(3)
    with torch.no_grad():  # small observations, and decisions that depend on them
        for parameter in agent.network.policy.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(generator=scale) * 0.3)
    return agent


def blocks_of(lengths, ends=ENDS, steps=7, num_envs=3, **config):
    """Play two blocks in episodes of known lengths; the second one begins inside episodes."""
    envs = make_envs(lambda: IdentifiableEnv(lengths=lengths, ends=ends), num_envs, mode="serial")
    agent = make(envs, **config)
    blocks = Rollout(envs, agent.policy, seed=0).blocks(steps)
    return agent, [next(blocks), next(blocks)]


def first_loss(agent, batch, count=1):
    block = cut(batch, agent.network.normalized, sequences=True)
    minibatch = next(minibatches(block, agent.estimate(block), count, agent.order))
    return agent.loss(minibatch, torch.tensor(1e-5))[1]


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    layers=st.integers(1, 2),
    core=st.sampled_from(["lstm", "gru"]),
)
def test_first_minibatch_with_random_boundaries_has_a_ratio_of_one(lengths, layers, core):
    """(d), B26, B31, B34, B36, B49: acting step by step and learning in sequences agree, also with 2 layers."""
    agent, batches = blocks_of(lengths, layers=layers, core=core)
    for batch in batches:
        scalars = first_loss(agent, batch)
        assert scalars["train/clip_fraction"].item() == 0
        assert scalars["train/approx_kl"].item() == pytest.approx(0, abs=1e-10)


def test_first_minibatch_after_learning_has_a_ratio_of_one_again():
    envs = make_envs("CartPole-v1", 4, mode="serial")
    agent = make(envs, epochs=2)
    blocks = Rollout(envs, agent.policy, seed=0).blocks(24)
    for _ in range(3):
        batch = next(blocks)
        assert first_loss(agent, batch)["train/approx_kl"].item() == pytest.approx(0, abs=1e-10)
        agent.learn(batch, env_steps=0)


def test_ratio_without_the_carry_of_before_the_block_is_not_one():
    """B26: a learner that begins every sequence with zeros would not agree."""
    agent, batches = blocks_of((9,))
    zeroed = batches[1].map(lambda leaf: leaf)
    object.__setattr__(zeroed, "carry", map_nest(torch.zeros_like, zeroed.carry))
    assert first_loss(agent, zeroed)["train/clip_fraction"].item() > 0


def test_ratio_without_the_previous_action_is_not_one():
    agent, batches = blocks_of((9,))
    block = cut(batches[0], agent.network.normalized, sequences=True)
    blind = block._replace(inputs=block.inputs._replace(prev_action=torch.zeros_like(block.inputs.prev_action)))
    minibatch = next(minibatches(blind, agent.estimate(block), 1, agent.order))
    assert agent.loss(minibatch, torch.tensor(1e-5))[1]["train/clip_fraction"].item() > 0


def padded(block, extra):
    """Make the same block with so many more columns of padding, filled with what must not matter."""

    def longer(leaf):
        more = leaf[:, :1].repeat_interleave(extra, dim=1)
        return torch.cat([leaf, torch.full_like(more, 3)], dim=1) if leaf.dtype != torch.bool else torch.cat(
            [leaf, torch.zeros_like(more)], dim=1
        )  # fmt: skip

    batch = block.batch
    changed = {
        name: map_nest(longer, getattr(batch, name))
        for name in ("action", "reward", "terminated", "truncated", "mask", "loss_mask", "is_first", "extras")
    }
    wide = batch.map(lambda leaf: leaf)
    for name, value in changed.items():
        object.__setattr__(wide, name, value)
    return Block(wide, Inputs(*(map_nest(longer, part) for part in block.inputs)), longer(block.mask), block.lengths)


def test_loss_and_gradients_do_not_depend_on_padding():
    """(a), B33, B35: padded to twice the length, loss and gradients are the same."""
    agent, batches = blocks_of((3, 1, 5))
    block = cut(batches[1], agent.network.normalized, sequences=True)
    found = []
    for one in (block, padded(block, 7)):
        agent.order.manual_seed(5)
        estimates = agent.estimate(one)
        agent.network.zero_grad(set_to_none=False)
        loss, _ = agent.loss(next(minibatches(one, estimates, 1, agent.order)), torch.tensor(0.2))
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in agent.network.parameters()])
        found.append((loss.detach(), gradients, estimates["advantage"][one.mask]))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_estimates_of_a_block_are_those_of_its_episodes_alone():
    """(b), B32: what lies beside an episode in a block does not reach it."""
    agent, batches = blocks_of((7,), steps=14, num_envs=1)
    whole = agent.estimate(cut(batches[0], agent.network.normalized, sequences=True))
    for row in range(2):
        part = slice(7 * row, 7 * row + 7)
        block = cut(batches[0], agent.network.normalized, sequences=True)
        alone = Block(
            block.batch.map(lambda leaf, row=row: leaf[row : row + 1]),
            map_nest(lambda leaf, row=row: leaf[row : row + 1], block.inputs),
            block.mask[row : row + 1],
            block.lengths[row : row + 1],
        )
        for name, value in agent.estimate(alone).items():
            assert torch.allclose(value[0], whole[name].flatten()[part], atol=1e-4)


def test_one_environment_or_several_give_the_same_estimates():
    """(h): environments of a block do not mix."""
    agent, batches = blocks_of((4, 2), num_envs=3)
    block = cut(batches[0], agent.network.normalized, sequences=True)
    together = (block.batch.reward[block.mask], agent.estimate(block)["value"][block.mask])
    apart = []
    for env in range(3):
        keep = batches[0].final_index[:, 0] == env
        one = batches[0].map(lambda leaf, env=env: leaf[env : env + 1] if len(leaf) == 3 else leaf)
        index = batches[0].final_index[keep].clone()
        index[:, 0] = 0
        object.__setattr__(one, "final_index", index)
        object.__setattr__(one, "final_observation", batches[0].final_observation[keep])
        alone = cut(one, agent.network.normalized, sequences=True)
        apart.append((alone.batch.reward[alone.mask], agent.estimate(alone)["value"][alone.mask]))
    rewards, values = (torch.cat(part) for part in zip(*apart, strict=True))
    assert torch.equal(rewards, together[0])
    assert torch.allclose(values, together[1], atol=1e-3)


def test_minibatches_are_of_whole_sequences_and_about_as_large():
    agent, batches = blocks_of((2, 3), steps=20, num_envs=5)
    block = cut(batches[0], agent.network.normalized, sequences=True)
    parts = list(minibatches(block, {}, 4, agent.order))
    counts = [int(part.mask.sum()) for part in parts]
    assert sum(counts) == 100
    assert all(20 <= count <= 30 for count in counts)
    for part in parts:
        observation = part.inputs.observation
        assert part.mask.shape[1] == part.mask.sum(dim=1).max()  # no column of padding alone
        follows = observation[:, 1:, 2] == observation[:, :-1, 2] + 1
        assert follows[part.mask[:, 1:]].all()


def test_policy_reads_the_previous_action_of_spaces_that_do_not_begin_at_zero():
    """P12 needs it; zeros, as an episode begins, are no action of such a space."""
    envs = make_envs(lambda: IdentifiableEnv(), 1, mode="serial")
    envs.action_space = spaces.Discrete(5, start=3)
    agent = make(envs)
    observation, rows = np.zeros((2, 4), np.float32), 2

    def act(first, action):
        context = PolicyContext(
            np.full(rows, first), "explore", np.arange(rows), 0, np.array(action), np.zeros(rows, np.float32), None,
            np.random.default_rng(0),
        )  # fmt: skip
        return agent.policy(observation, agent.policy.initial_carry(rows), context).extras["log_prob"]

    assert act(True, [0, 0])[0] == act(True, [5, 0])[0]
    told = act(False, [3, 6])
    assert told[0] != told[1]


def test_values_of_first_observations_are_those_of_the_rollout():
    agent, batches = blocks_of((4,))
    block = cut(batches[0], agent.network.normalized, sequences=True)
    first = block.batch.is_first[:, 0]
    values = agent.estimate(block)["value"][first, 0]
    assert torch.allclose(agent.values(block.batch.observation[first, 0]), values, atol=1e-4)
