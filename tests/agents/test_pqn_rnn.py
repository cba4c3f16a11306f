"""PQN with a core: what the actor saw step by step is what the learner sees in one piece, whatever ends in between."""

import dataclasses

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from agents.pqn import PQNConfig, episodes
from rlfeed.envs import make_envs
from rlfeed.rollout import Rollout
from rlfeed.types import PolicyOutput


class Noise(gymnasium.Env):
    """Show noise for 1 to 6 steps; the rewards are noise; half of the episodes terminate, half are truncated."""

    observation_space = spaces.Box(-9, 9, (3,), np.float32)

    def __init__(self, start=4):
        self.action_space = spaces.Discrete(3, start=start)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.truncates = self.np_random.integers(1, 7), self.np_random.random() < 0.5
        return self._seen(), {}

    def step(self, action):
        self.left -= 1
        over = bool(self.left == 0)
        return self._seen(), float(self.np_random.normal()), over and not self.truncates, over and self.truncates, {}

    def _seen(self):
        return self.np_random.normal(size=3).clip(-9, 9).astype(np.float32)


class Telling:
    """Act as a policy does, and keep the values it chose by."""

    def __init__(self, agent):
        self.agent, self.told = agent, None
        step = agent.network.step

        def watched(*inputs):
            self.told, carry = step(*inputs)
            return self.told, carry

        agent.network.step = watched

    def initial_carry(self, num_envs):
        return self.agent.policy.initial_carry(num_envs)

    def __call__(self, observation, carry, context):
        out = self.agent.policy(observation, carry, context)
        return PolicyOutput(out.action, out.carry, {"values": self.told.numpy()})


def make(core="lstm", layers=2, start=4, **settings):
    return PQNConfig(core=core, core_width=8, core_layers=layers, widths=(8,), epsilon_end=0.3, **settings).build(
        Noise.observation_space, spaces.Discrete(3, start=start), total_steps=1000, seed=0, device=torch.device("cpu")
    )


def second_block(agent, num_envs=4, length=9):
    """Give a block that begins in the middle of episodes."""
    envs = make_envs(Noise, num_envs, kwargs={"start": agent.first_action}, mode="serial")
    blocks = Rollout(envs, Telling(agent), seed=3).blocks(length)
    next(blocks)
    return next(blocks)


def padded(batch, columns=5):
    """Add columns of padding that is not zero where nothing may look."""
    wide = {}
    for name in ("observation", "action", "reward", "terminated", "truncated", "mask", "is_first"):
        leaf = getattr(batch, name)
        more = torch.zeros_like(leaf[:, :1]).expand(-1, columns, *leaf.shape[2:]).clone()
        wide[name] = torch.cat([leaf, more + 7 if name in ("observation", "reward") else more], dim=1)
    wide["action"][:, -columns:] = 4
    return dataclasses.replace(batch, **wide, loss_mask=None, discount=None, extras={})


@pytest.mark.parametrize(("core", "layers", "start"), [("lstm", 1, 4), ("lstm", 2, 0), ("gru", 1, 0), ("gru", 2, 4)])
def test_learner_unroll_equals_the_actors_steps(core, layers, start):
    """B26, B27, B31, B34, B36, B49: carry, previous action and resets are the actor's, in blocks with ends anywhere.

    (d)
    """
    agent = make(core, layers, start)
    block = second_block(agent)
    assert not block.is_first[:, 0].all()
    assert block.is_first[:, 1:].any()
    batch = episodes(block)
    values = agent.network(*agent._inputs(batch))[0][:, :-1]
    assert batch.mask.sum() == block.reward.numel()
    assert torch.allclose(values[batch.mask], batch.extras["values"][batch.mask], atol=1e-6)


def test_targets_are_those_of_a_loop_over_steps():
    """B3, B4 with a core: a final observation is judged with the carry of its own episode."""
    agent = make(gamma=0.9, lam=0.7)
    block = second_block(agent)
    batch = episodes(block)
    target, mask = agent.targets(batch)
    finals = {tuple(at.tolist()): seen for at, seen in zip(block.final_index, block.final_observation, strict=True)}
    for row, (ours, inside) in enumerate(zip(target, mask, strict=True)):
        steps = int(inside.sum())
        env, begin = int(batch.ids[row]) >> 44, int(batch.ids[row]) & (2**44 - 1)
        begins = bool(block.is_first[env, begin])
        carry = tuple(leaf[env : env + 1] for leaf in block.carry) if begin == 0 else agent.network.initial_carry(1)
        previous = 0 if begins else int(block.prev_action[env]) - 4 + 1
        values = []
        for t in range(begin, begin + steps + 1):
            seen = finals[env, t - 1] if (env, t - 1) in finals and t > begin else block.observation[env, t]
            value, carry = agent.network.step(seen[None], torch.tensor([previous]), carry)
            values.append(value.max().item())
            if t < begin + steps:
                previous = int(block.action[env, t]) - 4 + 1
        expected = None
        for t in reversed(range(steps)):
            reward, over = block.reward[env, begin + t].item(), bool(block.terminated[env, begin + t])
            ahead = values[t + 1] if expected is None else 0.3 * values[t + 1] + 0.7 * expected
            expected = reward if over else reward + 0.9 * ahead
            assert ours[t].item() == pytest.approx(expected, abs=1e-5)


def test_targets_and_updates_do_not_see_padding():
    """B33, B35; (a)"""
    one, other = make(minibatches=1, epochs=1), make(minibatches=1, epochs=1)
    batch = episodes(second_block(one))
    wide = padded(batch)
    length = batch.reward.shape[1]
    (target, mask), (wide_target, wide_mask) = one.targets(batch), one.targets(wide)
    assert torch.allclose(wide_target[:, :length], target, atol=1e-6)
    assert torch.equal(wide_mask[:, :length], mask)
    assert not wide_mask[:, length:].any()
    for agent, rows, goal, inside in ((one, batch, target, mask), (other, wide, wide_target, wide_mask)):
        agent.network.adopt(goal[inside])
        inputs, action, goal, inside = agent._rows(rows, goal, inside)
        agent.loss(inputs, action, goal, inside)[0].backward()
    assert one._gradient.norm() > 0.01
    assert torch.allclose(one._gradient, other._gradient, atol=1e-6)


def test_one_block_with_an_end_inside_is_two_episodes_apart():
    """B32; (b): nothing of an episode reaches the next one in its row."""
    agent = make()
    block = second_block(agent)
    row, t = block.final_index[(block.final_index[:, 1] < 8).nonzero()[0, 0]].tolist()
    changed = block.clone()
    changed.observation[row, : t + 1] += 1.0
    changed.reward[row, : t + 1] += 5.0
    before, after = (agent.targets(episodes(each)) for each in (block, changed))
    pieces = episodes(block)
    behind = (pieces.ids >> 44 == row) & ((pieces.ids & (2**44 - 1)) > t)
    assert behind.any()
    assert torch.equal(before[0][behind], after[0][behind])
    others = pieces.ids >> 44 != row
    assert torch.equal(before[0][others], after[0][others])
    assert not torch.equal(before[0], after[0])


def test_learn_takes_whole_episodes_and_all_of_its_updates():
    agent = make(minibatches=4, epochs=2)
    before = agent.network.head.weight.clone()
    learned = agent.learn(second_block(agent), env_steps=0)
    for _ in range(2):
        learned = agent.learn(second_block(agent), env_steps=0)
    assert learned.updates == 8
    assert agent.updates.value == 24
    assert all(torch.isfinite(value) for value in learned.scalars.values())
    assert not torch.equal(agent.network.head.weight, before)


def test_values_are_those_of_the_first_step_of_an_episode():
    agent = make()
    seen = torch.tensor([[0.5, -0.5, 1.0]])
    value, _ = agent.network.step(seen, torch.tensor([0]), agent.network.initial_carry(1))
    assert agent.values(seen).tolist() == [value.max().item()]
