"""The sum tree against a dictionary of masses: random steps, ends, cuts, wraps and updates (traps 20 to 27)."""

import math

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.replay_twin import ReplayTwin, make_step

from rlfeed.errors import NotEnoughDataError
from rlfeed.replay import Episode, Prioritized, ReplayBuffer, Sequence, Transition

UNITS = [Transition(), Transition(n_step=3), Sequence(3, stride=1), Sequence(2, burn_in=2, stride=1), Episode()]
SPACE = gymnasium.spaces.Dict(
    vector=gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32),
    image=gymnasium.spaces.Box(0, 255, (40, 40), np.uint8),
)
SHIFT, MASK = 44, (1 << 44) - 1


class MassTwin:
    """Every start's mass by id, kept by the rules in words: a new start has the greatest mass of those still stored."""

    def __init__(self, twin, unit, alpha):
        self.twin, self.unit, self.alpha = twin, unit, alpha
        self.masses = {}

    def fold(self):
        self.masses = {identity: mass for identity, mass in self.masses.items() if self.is_stored(identity)}
        newest = max(self.masses.values(), default=0.0) or 1.0
        for identity in self.twin.starts(self.unit):
            self.masses.setdefault(identity, newest)

    def is_stored(self, identity):
        lane = self.twin.lanes[identity >> SHIFT]
        return lane.tail <= identity & MASK < len(lane.rows)

    def update(self, ids, values):
        self.fold()
        for identity, value in zip(ids, values, strict=True):
            if identity in self.masses:
                self.masses[identity] = value**self.alpha if value > 0 else 0.0
        return sum(self.is_stored(identity) for identity in ids)


def check_tree(tree, masses, rows):
    leaves = tree.nodes[: tree.levels[0, 1]]
    expected = np.zeros(len(leaves))
    for identity, mass in masses.items():
        expected[(identity >> SHIFT) * rows + (identity & MASK) % rows] = mass
    np.testing.assert_allclose(leaves, expected, rtol=1e-12)
    assert tree.total() == pytest.approx(math.fsum(leaves), rel=1e-12)
    assert tree.least() == min((mass for mass in masses.values() if mass > 0), default=math.inf)


@st.composite
def histories(draw):
    lanes, rows = draw(st.integers(1, 3)), draw(st.integers(8, 20))
    ends = st.sampled_from([(False, False)] * 5 + [(True, False), (False, True)])
    events = []
    for _ in range(draw(st.integers(5, 60))):
        kind = draw(st.sampled_from(["step"] * 8 + ["cut", "update", "update", "fold"]))
        chosen = draw(st.permutations(range(lanes)))[: draw(st.integers(1, lanes))]
        events.append((kind, list(chosen), [draw(ends) for _ in chosen]))
    return lanes, rows, events, draw(st.integers(0, 2**32))


@settings(max_examples=60, deadline=None)
@given(histories(), st.sampled_from(UNITS), st.sampled_from([0.0, 0.6, 1.0]))
def test_tree_holds_the_masses_that_the_rules_give(history, unit, alpha):
    lanes, rows, events, seed = history
    generator = np.random.default_rng(seed)
    sampler = Prioritized(alpha=alpha, beta=1.0, scale="buffer")
    buffer = ReplayBuffer(
        SPACE, gymnasium.spaces.Discrete(11), capacity=rows * lanes, num_envs=lanes, storage="private", sampler=sampler
    )
    twin = ReplayTwin(lanes, rows)
    masses = MassTwin(twin, unit, alpha)
    tree = buffer.unit_sampler(unit).drawer.tree
    given_out = []
    for kind, chosen, ends in events:
        if kind == "step":
            given_out += buffer.add(make_step(twin, chosen, ends, rewards=[0.0] * len(chosen))).tolist()
        elif kind == "cut":
            buffer.cut(chosen)
            for lane in chosen:
                twin.lanes[lane].cut()
        elif kind == "update" and given_out:
            ids = generator.choice(given_out, 6)  # some overwritten since, some twice
            values = np.round(generator.uniform(0, 3, 6), 1)
            assert buffer.update_priorities(ids, values) == masses.update(ids.tolist(), values.tolist())
        tree.fold()
        masses.fold()
        check_tree(tree, masses.masses, rows)
    live = {identity: masses.masses[identity] for identity in twin.starts(unit) if masses.masses[identity] > 0}
    if not live:
        with pytest.raises(NotEnoughDataError):
            buffer.sample(4, unit)
        return
    batch = buffer.sample(64, unit)
    assert set(batch.ids.tolist()) <= live.keys()
    raw = np.array([1.0 / live[identity] for identity in batch.ids.tolist()])
    least = min(mass for mass in masses.masses.values() if mass > 0)
    np.testing.assert_allclose(batch.weights.numpy(), raw * least, rtol=1e-5)


@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("steps", [9, 40, 150])
def test_draws_are_in_proportion_to_the_masses(unit, steps):
    """Chi-square over every valid start, before the buffer is full, and wrapped more than three times."""
    buffer = ReplayBuffer(
        SPACE, gymnasium.spaces.Discrete(11), capacity=80, num_envs=2, storage="private", sampler=Prioritized(alpha=1.0)
    )
    twin, generator = ReplayTwin(2, 40), np.random.default_rng(steps)
    lengths = [4, 7]
    for i in range(steps):
        ends = [(i % length == length - 1, False) for length in lengths]
        buffer.add(make_step(twin, [0, 1], ends, rewards=[0.0, 0.0]))
    starts = np.array(sorted(twin.starts(unit)))
    values = generator.uniform(0.2, 3.0, len(starts))
    values[0] = 0.0  # never drawn
    buffer.unit_sampler(unit)
    assert buffer.update_priorities(starts, values) == len(starts)
    count = 40_000
    ids = buffer.sample(count, unit).ids.numpy()
    counts = np.bincount(np.searchsorted(starts, ids), minlength=len(starts))
    expected = values / values.sum() * count
    assert counts[0] == 0
    statistic = ((counts[1:] - expected[1:]) ** 2 / expected[1:]).sum()
    freedom = len(starts) - 2
    assert statistic < freedom + 5 * math.sqrt(2 * max(freedom, 1)) + 10
