"""Agents on problems whose answers are known, one preset of each module; test_probes_slow.py has all of them.

B20: right formulas, each tested alone, have not been enough to learn.
"""

import numpy as np
import pytest
from support.probing import train_on, value_errors

from rlfeed.envs import make_envs
from rlfeed.rollout import Rollout
from rlfeed.testing.probes import PROBES, LeakEnv
from rlfeed.types import PolicyOutput


@pytest.mark.parametrize(("preset", "probe"), [("dqn", "P5"), ("ppo", "P6"), ("pqn", "P6")])
def test_agent_on_a_probe_estimates_the_known_values(preset, probe):
    """P5, P6, B20."""
    agent, mean_return = train_on(preset, probe, total_steps=800)
    assert value_errors(agent, probe).max() < PROBES[probe].tolerance
    assert mean_return == PROBES[probe].best_return


def test_agent_of_continuous_actions_finds_the_best_one():
    """P15, B38."""
    _, mean_return = train_on("sac", "P15", total_steps=1_000)
    assert mean_return > PROBES["P15"].passes_at


def test_agent_with_memory_recalls_the_cue():
    """P10, B20, B35."""
    _, mean_return = train_on("r2d2", "P10", total_steps=600, kwargs={"delay": 1})
    assert mean_return == 1.0


class Rememberer:
    """Show the cue in the action, keep it in the carry, and push as one channel says at the first observation."""

    def __init__(self, channel):
        self.channel, self.kept = channel, np.zeros((8, 1), np.float32)

    def initial_carry(self, num_envs):
        return np.zeros((num_envs, 1), np.float32)

    def __call__(self, observation, carry, context):
        seen = {
            "carry": carry[:, 0],
            "previous action": 2.0 * np.asarray(context.prev_action) - 1.0,
            "previous reward": context.prev_reward,
            "memory of its own": self.kept[context.env_ids, 0],
        }[self.channel]
        says = np.where(context.is_first, seen, observation[:, 0])
        carry = np.where(observation != 0, observation, carry)
        self.kept[context.env_ids] = carry
        return PolicyOutput((says > 0).astype(np.int64), carry)


@pytest.mark.parametrize(
    ("channel", "expected"),
    [("carry", 0.0), ("previous action", 0.0), ("previous reward", 0.0), ("memory of its own", 1.0)],
)
@pytest.mark.parametrize("autoreset", ["same_step", "next_step", "disabled"])
def test_rollout_lets_nothing_through_from_one_episode_to_the_next(autoreset, channel, expected):
    """P11, B32, B36, B49: what is fed back begins anew at every reset; a policy that keeps something is found out."""
    rollout = Rollout(make_envs(LeakEnv, 8, mode="sync", autoreset=autoreset), Rememberer(channel))
    first_steps = [step.reward[step.is_first] for _, step in zip(range(80), rollout, strict=False)]
    assert np.concatenate(first_steps).mean() == pytest.approx(expected, abs=0.2)
