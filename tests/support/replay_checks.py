"""Whether a batch of the buffer is what its slow twin says."""

from functools import cache

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from rlfeed.errors import ConfigError, NotEnoughDataError
from rlfeed.replay import ReplayBuffer, Sequence, Transition

SPACE = gymnasium.spaces.Dict(vector=Box(-np.inf, np.inf, (3,), np.float32), image=Box(0, 255, (40, 40), np.uint8))
CARRY = {"carry": Box(-np.inf, np.inf, (1,), np.float32)}
PER_STEP = ("action", "reward", "terminated", "truncated", "is_first", "mask", "loss_mask")


def make_buffer(lanes, rows, **options):
    """A small buffer of the twin's observations."""
    options = {"extras": CARRY, "storage": "private"} | options
    return ReplayBuffer(SPACE, Discrete(11), capacity=rows * lanes, num_envs=lanes, **options)


def check_unit(buffer, twin, unit, batch_size):
    """Sample a unit and compare every field of every row with the twin; or see it refused where the twin has none."""
    if twin.span(unit) > twin.lanes[0].capacity:
        with pytest.raises(ConfigError):
            buffer.sample(1, unit)
        return
    starts = twin.starts(unit)
    if not starts:
        with pytest.raises(NotEnoughDataError):
            buffer.sample(1, unit)
        return
    batch = buffer.sample(batch_size, unit)
    assert len(batch) == batch_size
    assert set(batch.ids.tolist()) <= starts
    (check_transitions if isinstance(unit, Transition) else check_windows)(batch, twin, unit)


def check_transitions(batch, twin, unit):
    """Compare every transition with the twin."""
    transition = cache(lambda identity: twin.transition(identity, unit))
    for i, identity in enumerate(batch.ids.tolist()):
        expected = transition(identity)
        for name in ("observation", "next_observation"):
            for key, value in expected[name].items():
                assert np.array_equal(getattr(batch, name)[key][i], value), (name, key)
        assert batch.action[i] == expected["action"]
        assert batch.reward[i].item() == pytest.approx(expected["reward"], rel=1e-6)
        assert batch.terminated[i] == expected["terminated"]
        assert batch.truncated[i] == expected["truncated"]
        assert batch.discount[i].item() == pytest.approx(expected["discount"], rel=1e-6)


def check_windows(batch, twin, unit):
    """Compare every window with the twin, and its padding with zeros (I9, trap 17)."""
    longest = batch.reward.shape[1]
    if isinstance(unit, Sequence) and unit.boundary == "cross":
        assert longest == unit.burn_in + unit.length
    else:
        assert longest == batch.lengths.max()
    window = cache(lambda identity: twin.window(identity, unit))
    for i, identity in enumerate(batch.ids.tolist()):
        expected = window(identity)
        n = len(expected["reward"])
        assert batch.lengths[i] == n
        for key, value in expected["observation"].items():
            assert np.array_equal(batch.observation[key][i, : n + 1], value), key
            assert not batch.observation[key][i, n + 1 :].any()
        for name in PER_STEP:
            assert getattr(batch, name)[i, :n].tolist() == expected[name], name
            assert not getattr(batch, name)[i, n:].any(), name
        assert batch.discount[i, :n].tolist() == pytest.approx(expected["discount"], rel=1e-6)
        assert not batch.discount[i, n:].any()
        assert batch.burn_in[i] == expected["burn_in"]
        assert (batch.prev_action[i], batch.prev_reward[i]) == (expected["prev_action"], expected["prev_reward"])
        assert batch.carry[i].item() == expected["carry"]
