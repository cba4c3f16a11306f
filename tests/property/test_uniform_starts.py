"""Draws are uniform over the valid starts, first and last included, for every unit at every fill level (I8).

Traps 10 and 23 (the last start is drawn), 12 (lanes that wrap), 13 (a start, not an episode, is what is drawn).
"""

import numpy as np
import pytest
from support.replay_checks import make_buffer
from support.replay_twin import ReplayTwin, make_step

from rlfeed.errors import NotEnoughDataError
from rlfeed.replay import Episode, Sequence, Transition

PER_START = 200
LEVELS = (1, 2, 5, 12, 26, 41, 71, 100)  # steps of each lane of 30 rows: from one row to more than three wraps
STACKS = {"frames": {"image": 3}}
SPARSE = {"carry_every": 2}
CASES = [
    (Transition(), {}),
    (Transition(), STACKS),
    (Transition(n_step=3), {}),
    (Transition(n_step=4), STACKS),
    (Episode(), {}),
    (Sequence(3), {}),
    (Sequence(3), STACKS),
    (Sequence(2, burn_in=2), {}),
    (Sequence(2, burn_in=1, boundary="strict"), {}),
    (Sequence(8), {}),  # longer than most episodes
    (Sequence(8, boundary="strict"), {}),
    (Sequence(8, stride=3), {}),
    (Sequence(3, stride=2), {}),
    (Sequence(2, stride=5), {}),
    (Sequence(2, stride=5, boundary="strict"), {}),
    (Sequence(4, burn_in=2, stride=2), SPARSE),
    (Sequence(3, stride=4, boundary="strict"), SPARSE),
    (Sequence(3, burn_in=2, boundary="cross"), {}),
    (Sequence(4, boundary="cross", stride=3), {}),
    (Sequence(4, boundary="cross", stride=2), STACKS | SPARSE),
]


@pytest.mark.parametrize(("unit", "options"), CASES, ids=str)
@pytest.mark.parametrize("ends", [0.2, 0.5], ids=["episodes of about 5 steps", "episodes of about 2 steps"])
def test_draws_many_cover_every_start_uniformly(unit, options, ends):
    """B8, B12."""
    generator = np.random.default_rng(5)
    twin = ReplayTwin(2, 30, **options)
    buffer = make_buffer(2, 30, frame_stack=twin.frames, carry_every=twin.carry_every)
    sampler, drawn = buffer.unit_sampler(unit), 0
    for number in range(max(LEVELS)):
        flags = [(d < ends * 0.6, ends * 0.4 < d < ends) for d in generator.random(2).tolist()]
        buffer.add(make_step(twin, [0, 1], flags, rewards=[float(number)] * 2))
        if number + 1 not in LEVELS:
            continue
        starts = sorted(twin.starts(unit))
        if not starts:
            with pytest.raises(NotEnoughDataError):
                sampler.draw(1, drawn, 10)
            continue
        ids = sampler.draw(1, drawn, PER_START * len(starts)).ids
        drawn += len(ids)
        assert set(ids.tolist()) == set(starts)
        counts = np.zeros(len(starts))
        np.add.at(counts, np.searchsorted(starts, ids), 1)
        chi_square, freedom = ((counts - PER_START) ** 2 / PER_START).sum(), len(starts) - 1
        assert chi_square <= freedom + 5 * np.sqrt(2 * freedom) + 5  # 5 standard deviations
    assert drawn > 0 or (ends == 0.5 and unit.length == 8)  # hardly an episode has eight steps there


def test_draws_none_of_many_episodes_long_enough_is_an_error_at_once():
    """Trap 16: 200 episodes of one step, windows of two: rejection ends, and says what is missing."""
    twin = ReplayTwin(1, 500)
    buffer = make_buffer(1, 500)
    for number in range(200):
        buffer.add(make_step(twin, [0], [(True, False)], rewards=[float(number)]))
    for unit in (Sequence(2, boundary="strict"), Sequence(2, stride=7, boundary="strict")):
        with pytest.raises(NotEnoughDataError, match="holds 200 steps"):
            buffer.sample(32, unit)
