"""A finite pass gives every stored step exactly once, as it is stored: any unit, any streams, any fill level (I8)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pass_twin import PassTwin, held
from support.replay_checks import check_transitions, check_windows, make_buffer
from support.replay_twin import make_step

from rlfeed.errors import NotEnoughDataError
from rlfeed.feed import epoch
from rlfeed.replay import Episode, Sequence, Transition

STACKS, SPARSE = {"frames": {"image": 3}}, {"carry_every": 2}
CASES = [
    (Transition(), {}),
    (Transition(n_step=3), {}),
    (Transition(), STACKS),
    (Transition(n_step=2), STACKS),
    (Sequence(3), {}),
    (Sequence(1), {}),
    (Sequence(4, burn_in=3), {}),
    (Sequence(2, burn_in=1, stride=2), STACKS),
    (Sequence(4, burn_in=2), SPARSE),
    (Sequence(2), SPARSE),
    (Episode(), {}),
    (Episode(), STACKS),
    (Episode(), SPARSE),
]
KINDS = ("go on", "go on", "terminated", "truncated", "both", "cut", "first")


def fill(twin, buffer, moves):
    """Take one step of each lane per move; a cut comes after the step, an episode's beginning before it."""
    for number, kinds in enumerate(moves):
        lanes = list(range(len(kinds)))
        ends = [(kind in ("terminated", "both"), kind in ("truncated", "both")) for kind in kinds]
        first = [lane for lane in lanes if kinds[lane] == "first"]
        rewards = [float(100 * number + lane) for lane in lanes]
        buffer.add(make_step(twin, lanes, ends, rewards=rewards, first=first))
        if cut := [lane for lane in lanes if kinds[lane] == "cut"]:
            buffer.cut(cut)
            for lane in cut:
                twin.lanes[lane].cut()


def check_pass(twin, batches, unit, batch_size):
    """Every sample is the twin's, and all of them together are all of the twin's."""
    for batch in batches:
        (check_transitions if isinstance(unit, Transition) else check_windows)(batch, twin, unit)
    ids = [identity for batch in batches for identity in batch.ids.tolist()]
    assert sorted(ids) == sorted(twin.samples(unit))
    assert sorted(identity for batch in batches for identity in held(batch)) == sorted(twin.steps())
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)


@pytest.mark.parametrize(("unit", "options"), CASES, ids=str)
@settings(max_examples=15, deadline=None)
@given(
    moves=st.lists(st.lists(st.sampled_from(KINDS), min_size=2, max_size=2), max_size=60),
    batch_size=st.integers(1, 7),
    shuffle=st.booleans(),
    bucket=st.sampled_from([1, 2]),
)
def test_epoch_any_streams_each_stored_step_once(unit, options, moves, batch_size, shuffle, bucket):
    twin = PassTwin(2, 17, **options)
    buffer = make_buffer(2, 17, frame_stack=twin.frames, carry_every=twin.carry_every)
    fill(twin, buffer, moves)
    if not twin.steps():
        with pytest.raises(NotEnoughDataError, match="holds no step"):
            epoch(buffer, unit, batch_size)
        return
    given_once = epoch(buffer, unit, batch_size, shuffle=shuffle, bucket=bucket, seed=len(moves))
    count = len(given_once)
    batches = list(given_once)
    assert len(batches) == count == -(-len(twin.samples(unit)) // batch_size)
    check_pass(twin, batches, unit, batch_size)


def test_epoch_lanes_that_wrapped_many_times_give_pieces():
    """The same at a size at which every case certainly occurs: lanes that wrapped, long and short episodes."""
    generator = np.random.default_rng(0)
    moves = generator.choice(KINDS, size=(200, 3), p=[0.45, 0.45, 0.03, 0.03, 0.01, 0.02, 0.01]).tolist()
    twin = PassTwin(3, 41)
    buffer = make_buffer(3, 41)
    fill(twin, buffer, moves)
    for unit in (Transition(n_step=4), Sequence(5, burn_in=2), Episode()):
        check_pass(twin, list(epoch(buffer, unit, 4)), unit, 4)
    pieces = [batch for batch in epoch(buffer, Episode(), 1) if not batch.is_first[0, 0]]
    assert pieces  # what is left of episodes whose beginning was overwritten
