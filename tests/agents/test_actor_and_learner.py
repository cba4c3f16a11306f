"""What the learner computes of stored steps is what the actor computed, and its clocks do not count environments."""

from dataclasses import replace

import pytest
import torch
from support.probing import config_for

from agents.blocks import cut, minibatches
from agents.dqn import DQN
from agents.ppo import PPO
from agents.training import build_parts, new_buffer, new_source, train
from rlfeed.testing.probes import ArmEnv, CorridorEnv, RegulatorEnv


@pytest.mark.parametrize("memory", ["lstm", "gru"])
@pytest.mark.parametrize("burn_in", [0, 3])
def test_burn_in_from_the_stored_carry_gives_the_values_by_which_the_actor_chose(memory, burn_in):
    """(e), B26, B27, B28: with the weights that acted, in the middle of episodes and at their beginning."""
    settings = {"memory": memory, "length": 5, "burn_in": burn_in, "epsilon_fraction": 0.01}
    config = config_for("r2d2", "P17", settings, learning_starts=0)
    parts = build_parts(config, CorridorEnv)
    buffer = new_buffer(config, parts, "private")
    new_source(config, parts, buffer).collect(buffer, steps=400)
    batch = buffer.sample(64, parts.agent.unit)
    begins = batch.is_first[:, 0]
    assert begins.any()
    assert not begins.all()
    drift = parts.agent.learn(batch, env_steps=0).scalars["train/q_drift"]
    assert drift.item() < 1e-5
    for leaf in batch.carry.values() if isinstance(batch.carry, dict) else batch.carry:
        leaf.zero_()  # as if every sequence began an episode
    assert burn_in or parts.agent.learn(batch, env_steps=0).scalars["train/q_drift"].item() > 1e-3


def test_sequences_without_an_error_keep_a_priority():
    """Where everything is learned, nothing could be drawn."""
    parts = build_parts(config_for("r2d2", "P17", {}), CorridorEnv)
    buffer = new_buffer(config_for("r2d2", "P17", {}), parts, "private")
    new_source(config_for("r2d2", "P17", {}), parts, buffer).collect(buffer, steps=200)
    batch = buffer.sample(16, parts.agent.unit)
    batch.reward.zero_()
    for network in (parts.agent.network, parts.agent.target):
        torch.nn.utils.vector_to_parameters(
            torch.zeros(sum(p.numel() for p in network.parameters())), network.parameters()
        )
    priorities = parts.agent.learn(batch, env_steps=0).priorities
    assert torch.equal(priorities > 0, batch.loss_mask)


@pytest.mark.parametrize("num_envs", [1, 4])
def test_target_network_is_copied_after_so_many_updates_with_any_number_of_environments(num_envs, monkeypatch):
    """B50: updates are due by env steps, copies by updates; neither by turns of all environments together."""
    copies, learn = [], DQN.learn

    def watched(agent, batch, *, env_steps):
        told = learn(agent, batch, env_steps=env_steps)
        same = [torch.equal(a, b) for a, b in zip(agent.target.parameters(), agent.network.parameters(), strict=True)]
        if all(same):
            copies.append(agent.updates.value)
        return told

    monkeypatch.setattr(DQN, "learn", watched)
    rounds = {"total_steps": 240, "learning_starts": 24, "batch_size": 16, "train_every": 8, "updates_per_round": 2}
    config = config_for("dqn", "P4", {"target_every": 10}, **rounds)
    agent, _ = train(replace(config, env=replace(config.env, num_envs=num_envs)), env=ArmEnv)
    assert agent.updates.value == 2 * (1 + (240 - 24) // 8)
    assert copies == [10, 20, 30, 40, 50]


@pytest.mark.parametrize("preset", ["ppo", "ppo_rnn"])
def test_first_minibatch_of_every_block_of_a_run_has_a_ratio_of_one(preset, monkeypatch):
    """(d): also once observations have been counted, by whose statistics actor and learner normalise."""
    found, learn = [], PPO.learn

    def watched(agent, batch, *, env_steps):
        block = cut(batch, agent.network.normalized, sequences=agent.network.core is not None)
        minibatch = next(minibatches(block, agent.estimate(block), 1, torch.Generator()))
        found.append(agent.loss(minibatch, torch.tensor(0.2))[1]["train/approx_kl"].item())
        return learn(agent, batch, env_steps=env_steps)

    monkeypatch.setattr(PPO, "learn", watched)
    train(config_for(preset, "P14", {}, total_steps=200), env=RegulatorEnv)
    assert len(found) == 10
    assert max(found) < 1e-6
