"""A finite pass gives every stored step exactly once, as it is stored: any unit, any streams, any fill level (I8)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.pass_twin import PassTwin, held
from support.replay_checks import check_transitions, check_windows, make_buffer
from support.replay_twin import make_step
from support.slow_streams import slow_device
from support.start_method import start_method

from rlfeed.errors import NotEnoughDataError
from rlfeed.feed import epoch
from rlfeed.replay import Episode, Sequence, Transition

slow = pytest.fixture(slow_device)
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
KINDS = ("go on", "terminated", "truncated", "both", "cut", "first")
STREAMS = st.tuples(st.integers(0, 80), st.sampled_from([0.3, 0.8, 0.95]), st.integers(0, 1000))


def filled(twin, rows, stream, **options):
    """A buffer of two lanes after some steps, of which so many go on, drawn at random from a seed."""
    steps, goes_on, seed = stream
    chances = [goes_on, *[(1 - goes_on) / 5] * 5]
    buffer = make_buffer(2, rows, frame_stack=twin.frames, carry_every=twin.carry_every, **options)
    fill(twin, buffer, np.random.default_rng(seed).choice(KINDS, size=(steps, 2), p=chances).tolist())
    return buffer


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
@settings(max_examples=10, deadline=None)
@given(stream=STREAMS, batch_size=st.integers(1, 7), shuffle=st.booleans(), bucket=st.sampled_from([1, 2]))
def test_epoch_any_streams_each_stored_step_once(unit, options, stream, batch_size, shuffle, bucket):
    twin = PassTwin(2, 17, **options)
    buffer = filled(twin, 17, stream)
    if not twin.steps():
        with pytest.raises(NotEnoughDataError, match="holds no step"):
            epoch(buffer, unit, batch_size)
        return
    given_once = epoch(buffer, unit, batch_size, shuffle=shuffle, bucket=bucket, seed=stream[0])
    count = len(given_once)
    batches = list(given_once)
    assert len(batches) == count == -(-len(twin.samples(unit)) // batch_size)
    check_pass(twin, batches, unit, batch_size)


@pytest.mark.parametrize(("unit", "options"), CASES, ids=str)
def test_epoch_lanes_that_wrapped_give_what_is_left_of_episodes(unit, options):
    """The same where every case certainly occurs: 12 lanes that wrapped in the middle of an episode."""
    for seed in range(6):
        twin = PassTwin(2, 17, **options)
        buffer = filled(twin, 17, (60, 0.93, seed))
        check_pass(twin, list(epoch(buffer, unit, 4)), unit, 4)


@pytest.mark.parametrize(("unit", "options"), CASES, ids=str)
def test_epoch_rows_on_a_device_give_what_is_left_of_episodes(unit, options, slow):
    twin = PassTwin(2, 17, **options)
    buffer = filled(twin, 17, (60, 0.93, 1), storage="cuda")
    check_pass(twin, list(epoch(buffer, unit, 4)), unit, 4)


@pytest.mark.parametrize("unit", [Transition(n_step=2), Sequence(3, burn_in=2), Episode()], ids=str)
@settings(max_examples=4, deadline=None)
@given(stream=STREAMS, num_workers=st.integers(1, 3), batch_size=st.integers(1, 40))
def test_epoch_workers_each_stored_step_once(unit, stream, num_workers, batch_size):
    twin = PassTwin(2, 60)
    buffer = filled(twin, 60, (stream[0] + 1, *stream[1:]), storage="shared")
    with start_method("fork"):
        check_pass(twin, list(epoch(buffer, unit, batch_size, num_workers=num_workers)), unit, batch_size)
