"""The buffer against its slow twin: random episodes, lanes, cuts, wraps, stacks, carries and units (I1, I2, I8, I9).

Traps 1, 2 (true successors), 3, 12 (the seam, three wraps), 5 (both flags), 6 to 9 (n-step sums), 11 and 14 (windows
keep to their episode, and its flags are the true ones), 15 (a row per window), 16 (no batch is ever shorter), 17
(padding) and 18 (carries).
"""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.replay_checks import check_unit, make_buffer
from support.replay_twin import ReplayTwin, make_step

from rlfeed.replay import Episode, Sequence, Transition

GAMMAS = st.sampled_from([0.5, 0.9, 1.0])


@st.composite
def sequences(draw, every):
    strides = st.integers(1, 3).map(lambda n: n * every)
    return Sequence(
        draw(st.integers(1, 5)),
        burn_in=draw(st.integers(0, 4 // every)) * every,
        gamma=draw(GAMMAS),
        boundary=draw(st.sampled_from(["pad", "strict", "cross"])),
        stride=draw(strides if every > 1 else st.none() | strides),
    )


def units(every):
    transitions = st.builds(Transition, n_step=st.integers(1, 4), gamma=GAMMAS)
    return st.one_of(transitions, sequences(every), sequences(every), st.builds(Episode, gamma=GAMMAS))


@st.composite
def histories(draw):
    lanes, rows = draw(st.integers(1, 3)), draw(st.integers(6, 18))
    every = draw(st.sampled_from([1, 1, 2, 3]))
    frames = {"vector": draw(st.sampled_from([1, 2])), "image": draw(st.sampled_from([1, 1, 3]))}
    ends = st.sampled_from([(False, False)] * 5 + [(True, False), (False, True), (True, True)])
    events = []
    for _ in range(draw(st.integers(1, 60))):
        chosen = draw(st.permutations(range(lanes)))[: draw(st.integers(1, lanes))]
        kind = draw(st.sampled_from(["step"] * 12 + ["cut", "abandon", "update"]))
        events.append((kind, list(chosen), [draw(ends) for _ in chosen]))
    return {"lanes": lanes, "rows": rows}, {"frames": frames, "carry_every": every}, events, draw(
        st.lists(units(every), min_size=1, max_size=4)
    )


def play(size, options, events):
    twin = ReplayTwin(**size, **options)
    buffer = make_buffer(**size, frame_stack=options["frames"], carry_every=options["carry_every"])
    for number, (kind, chosen, ends) in enumerate(events):
        if kind == "cut":
            open_lanes = sum(twin.lanes[lane].open for lane in chosen)
            for lane in chosen:
                twin.lanes[lane].cut()
            assert buffer.cut(chosen) == open_lanes
        elif kind == "update":
            write_back(buffer, twin, number)
        else:
            rewards = [float(number + 0.25 * lane) for lane in chosen]
            before = [len(twin.lanes[lane].rows) for lane in chosen]
            first = set(chosen) if kind == "abandon" else None
            step = make_step(twin, chosen, ends, rewards=rewards, first=first)
            ids = buffer.add(step)
            expected = [
                (lane << 44) | (rows_before if opens else rows_before - 1)
                for lane, rows_before, opens in zip(chosen, before, step.is_first, strict=True)
            ]
            assert ids.tolist() == expected
        yield buffer, twin


def write_back(buffer, twin, number):
    """Rewrite the carry of every other stored step that has one."""
    ids = twin.carried()[number % 2 :: 2]
    values = [-1.0 - number - 0.5 * i for i in range(len(ids))]
    twin.written_back |= dict(zip(ids, values, strict=True))
    buffer.update(np.array(ids, np.int64), carry=np.array(values, np.float32)[:, None])


@settings(max_examples=30, deadline=None)
@given(histories())
def test_buffer_any_history_equals_twin(history):
    """B9, B12, B29, B51, (g): n-step sums and windows of one episode, at the write head and at every kind of end."""
    size, options, events, units = history
    for number, (buffer, twin) in enumerate(play(size, options, events)):
        assert len(buffer) == len(twin)
        stats = buffer.stats()
        assert stats.rows == sum(len(lane.live()) for lane in twin.lanes)
        assert stats.episodes == len(twin.starts(Episode()))
        if number % 9 == (len(events) - 1) % 9:
            for unit in units:
                # At the end more than two blocks of 64, which is how the kernels go through a batch.
                check_unit(buffer, twin, unit, 150 if number == len(events) - 1 else 16)
