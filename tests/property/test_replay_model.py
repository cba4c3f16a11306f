"""The buffer against its slow twin: random episodes, lanes, cuts, wraps and units (I1, I2, I8, I9)."""

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.replay_twin import ReplayTwin, image, make_step

from rlfeed.errors import NotEnoughDataError
from rlfeed.replay import Episode, ReplayBuffer, Sequence, Transition

UNITS = [
    Transition(),
    Transition(n_step=3, gamma=0.9),
    Episode(gamma=0.8),
    Sequence(3),
    Sequence(2, burn_in=2, gamma=0.7),
    Sequence(2, burn_in=1, boundary="strict"),
    Sequence(3, stride=2),
    Sequence(2, stride=5, boundary="strict"),
    Sequence(3, burn_in=2, boundary="cross", gamma=0.6),
    Sequence(4, boundary="cross", stride=3),
]
SPACE = gymnasium.spaces.Dict(
    vector=gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32),
    image=gymnasium.spaces.Box(0, 255, (40, 40), np.uint8),
)


def make_buffer(lanes, rows):
    return ReplayBuffer(SPACE, gymnasium.spaces.Discrete(11), capacity=rows * lanes, num_envs=lanes, storage="private")


@st.composite
def histories(draw):
    lanes = draw(st.integers(1, 3))
    rows = draw(st.integers(8, 14))
    ends = st.sampled_from([(False, False)] * 5 + [(True, False), (False, True), (True, True)])
    events = []
    for _ in range(draw(st.integers(1, 60))):
        chosen = draw(st.permutations(range(lanes)))[: draw(st.integers(1, lanes))]
        kind = draw(st.sampled_from(["step"] * 12 + ["cut", "abandon"]))
        events.append((kind, list(chosen), [draw(ends) for _ in chosen]))
    return lanes, rows, events


def play(lanes, rows, events):
    buffer, twin = make_buffer(lanes, rows), ReplayTwin(lanes, rows)
    for number, (kind, chosen, ends) in enumerate(events):
        if kind == "cut":
            open_lanes = sum(twin.lanes[lane].open for lane in chosen)
            for lane in chosen:
                twin.lanes[lane].cut()
            assert buffer.cut(chosen) == open_lanes
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


def check_transitions(batch, twin, unit):
    for i, identity in enumerate(batch.ids.tolist()):
        expected = twin.transition(identity, unit)
        assert batch.observation["vector"][i].tolist() == list(expected["observation"])
        assert batch.next_observation["vector"][i].tolist() == list(expected["next_observation"])
        assert np.array_equal(batch.next_observation["image"][i], image(expected["next_observation"]))
        assert np.array_equal(batch.observation["image"][i], image(expected["observation"]))
        assert batch.action[i] == expected["action"]
        assert batch.reward[i].item() == pytest.approx(expected["reward"], rel=1e-6)
        assert batch.terminated[i] == expected["terminated"]
        assert batch.truncated[i] == expected["truncated"]
        assert batch.discount[i].item() == pytest.approx(expected["discount"], rel=1e-6)


def check_windows(batch, twin, unit):
    longest = batch.reward.shape[1]
    if isinstance(unit, Sequence) and unit.boundary == "cross":
        assert longest == unit.burn_in + unit.length
    for i, identity in enumerate(batch.ids.tolist()):
        expected = twin.window(identity, unit)
        n = len(expected["reward"])
        assert batch.lengths[i] == n
        assert batch.observation["vector"][i, : n + 1].tolist() == [list(o) for o in expected["observation"]]
        for t, vector in enumerate(expected["observation"]):
            assert np.array_equal(batch.observation["image"][i, t], image(vector))
        for name in ("action", "reward", "terminated", "truncated", "is_first", "mask", "loss_mask"):
            assert getattr(batch, name)[i, :n].tolist() == expected[name], name
        assert batch.discount[i, :n].tolist() == pytest.approx(expected["discount"], rel=1e-6)
        assert batch.burn_in[i] == expected["burn_in"]
        assert (batch.prev_action[i], batch.prev_reward[i]) == (expected["prev_action"], expected["prev_reward"])
        for name in ("action", "reward", "terminated", "truncated", "is_first", "mask", "loss_mask", "discount"):
            assert not getattr(batch, name)[i, n:].any(), name
        assert not batch.observation["vector"][i, n + 1 :].any()
        assert not batch.observation["image"][i, n + 1 :].any()


@settings(max_examples=25, deadline=None)
@given(histories())
def test_buffer_any_history_equals_twin(history):
    lanes, rows, events = history
    for number, (buffer, twin) in enumerate(play(lanes, rows, events)):
        assert len(buffer) == len(twin)
        stats = buffer.stats()
        assert stats.rows == sum(len(lane.live()) for lane in twin.lanes)
        assert stats.episodes == len(twin.starts(Episode()))
        if number % 9 == (len(events) - 1) % 9:
            for unit in UNITS:
                # At the end more than two blocks of 64, which is how the kernels go through a batch.
                check_unit(buffer, twin, unit, 150 if number == len(events) - 1 else 16)


def check_unit(buffer, twin, unit, batch_size):
    starts = twin.starts(unit)
    if not starts:
        with pytest.raises(NotEnoughDataError):
            buffer.sample(1, unit)
        return
    batch = buffer.sample(batch_size, unit)
    assert set(batch.ids.tolist()) <= starts
    (check_transitions if isinstance(unit, Transition) else check_windows)(batch, twin, unit)


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_draws_many_cover_every_start_uniformly(unit):
    """Chi-square over all valid starts, first and last included, at fill levels from one row to three wraps (I8)."""
    generator = np.random.default_rng(5)
    buffer, twin = make_buffer(2, 30), ReplayTwin(2, 30)
    tested = 0
    for number in range(100):
        draws = generator.random(2)
        ends = [(d < 0.12, 0.08 < d < 0.2) for d in draws.tolist()]
        buffer.add(make_step(twin, [0, 1], ends, rewards=[float(number)] * 2))
        starts = sorted(twin.starts(unit))
        if number in (0, 1, 4, 11, 25, 40, 70, 99) and starts:
            per_start = 200
            counts = np.zeros(len(starts))
            ids = buffer.sample(per_start * len(starts), unit).ids.numpy()
            np.add.at(counts, np.searchsorted(starts, ids), 1)
            assert set(ids.tolist()) == set(starts)
            chi_square = ((counts - per_start) ** 2 / per_start).sum()
            freedom = len(starts) - 1
            assert chi_square <= freedom + 5 * np.sqrt(2 * freedom) + 5  # 5 standard deviations
            tested += 1
    assert tested >= 4
