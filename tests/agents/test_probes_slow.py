"""Every preset on every probe that it can play."""

import math
from functools import partial

import pytest
import torch
from support.probing import SMALL, train_on, value_errors, wobbling_return

import agents.training
from rlfeed.envs import make_envs
from rlfeed.testing.probes import PROBES, TemperatureEnv

pytestmark = pytest.mark.slow

RECURRENT = [preset for preset, small in SMALL.items() if small.recurrent]
VALUED = [number for number, probe in PROBES.items() if probe.answers and number != "P8"]
LONG_WAY = {"r2d2": {"length": 16, "burn_in": 8}}  # sequences for P10 and P17; 30 steps stay beyond the burn-in


def pairs(numbers, presets=tuple(SMALL)):
    """Every preset with the probes of these that it can play."""
    return [
        (preset, number) for preset in presets for number in numbers
        if set(SMALL[preset].actions) & set(PROBES[number].actions)
    ]  # fmt: skip


@pytest.mark.parametrize(("preset", "number"), pairs(VALUED))
def test_preset_on_a_value_probe_estimates_the_known_values(preset, number):
    """P1, P2, P3, P4, P5, P6, P7, P13, P14, P15, P19, B20, B38.

    An agent with a memory is asked for first observations of episodes alone. In P14 the values of PPO are those of the
    policy that explores.
    """
    probe = PROBES[number]
    agent, mean_return = train_on(preset, number)
    later = number in ("P3", "P6", "P7") and SMALL[preset].recurrent
    if number != "P14" or preset == "sac":
        assert value_errors(agent, number, slice(1) if later else slice(None)).max() < probe.tolerance
    assert probe.passes_at is None or mean_return > probe.passes_at


@pytest.mark.parametrize("autoreset", ["same_step", "next_step", "disabled"])
@pytest.mark.parametrize("preset", SMALL)
def test_preset_in_any_autoreset_mode_values_the_endless_problem(preset, autoreset, monkeypatch):
    """P8, B25."""
    monkeypatch.setattr(agents.training, "make_envs", partial(make_envs, autoreset=autoreset))
    agent, _ = train_on(preset, "P7", mode="sync")
    assert value_errors(agent, "P7", slice(1)).max() < PROBES["P8"].tolerance


@pytest.mark.parametrize(("delay", "total_steps"), [(1, 2_000), (5, 10_000), (30, 60_000)])
@pytest.mark.parametrize("preset", RECURRENT)
def test_preset_with_memory_recalls_a_cue(preset, delay, total_steps):
    """P10, B26, B30, B35."""
    _, mean_return = train_on(
        preset, "P10", kwargs={"delay": delay}, total_steps=total_steps, agent=LONG_WAY.get(preset)
    )
    assert mean_return > PROBES["P10"].passes_at


@pytest.mark.parametrize("preset", RECURRENT)
def test_preset_whose_memory_is_taken_away_does_not_recall(preset):
    _, mean_return = train_on(preset, "P10", kwargs={"delay": 1}, agent=SMALL[preset].control)
    assert mean_return < 0.8


@pytest.mark.parametrize("preset", SMALL)
def test_preset_learns_nothing_from_the_episode_before(preset):
    """P11, B32, B36, B49."""
    _, mean_return = train_on(preset, "P11")
    assert abs(mean_return) < PROBES["P11"].fails_at


@pytest.mark.parametrize("preset", RECURRENT)
def test_preset_that_is_fed_its_action_keeps_its_place(preset):
    """P12, B49: one random action in ten steps out of tune costs half a reward; a clock would lose half of all."""
    agent, mean_return = train_on(preset, "P12")
    assert mean_return > PROBES["P12"].passes_at
    assert wobbling_return(agent, "P12", epsilon=0.2) > 8.5


@pytest.mark.parametrize("preset", RECURRENT)
def test_preset_with_memory_walks_to_the_good_end(preset):
    """P17, B35."""
    _, mean_return = train_on(preset, "P17", total_steps=33_000, agent=LONG_WAY.get(preset))
    assert mean_return > PROBES["P17"].passes_at


@pytest.mark.parametrize(("target_entropy", "sigma"), [(-1.0, 0.0890), (-0.5, 0.1468)])
def test_sac_temperature_comes_to_that_of_its_target_entropy(target_entropy, sigma):
    """P16, B38: the sign, the target and the log-probability, against the soft optimum."""
    agent, _ = train_on("sac", "P16", total_steps=8_000, agent={"learn_alpha": True, "target_entropy": target_entropy})
    alpha = agent.log_alpha.exp().item()
    assert alpha == pytest.approx(TemperatureEnv.temperature(target_entropy), rel=0.3)
    assert math.sqrt(alpha / 2) == pytest.approx(sigma, rel=0.2)


def test_sac_temperature_falls_where_entropy_costs_nothing():
    """P16: the entropy comes to that of the uniform distribution, log 2, which is above its target."""
    agent, _ = train_on("sac", "P16", total_steps=2_000, kwargs={"flat": True}, agent={"learn_alpha": True})
    assert agent.log_alpha.exp().item() < 0.01


def test_rainbow_distribution_of_a_lottery_has_its_two_returns():
    """P19: a mass of 0.7 on 0 and of 0.3 on 1."""
    agent, _ = train_on("rainbow", "P19", total_steps=4_000)
    mass = agent.network(torch.zeros(1, 1)).softmax(dim=-1).flatten().detach()
    atoms = torch.linspace(-2.0, 2.0, 21)
    assert mass[(atoms - 0.0).abs().argmin()].item() == pytest.approx(0.7, abs=0.1)
    assert mass[(atoms - 1.0).abs().argmin()].item() == pytest.approx(0.3, abs=0.1)
