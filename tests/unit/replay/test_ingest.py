"""extend: whole episodes, recorded elsewhere, into lanes that are free."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete

from rlfeed.errors import CapacityError, FieldError, LaneError
from rlfeed.replay import Episode, ReplayBuffer, Sequence
from rlfeed.types import Batch, Step

SPACE = Dict(vector=Box(-np.inf, np.inf, (2,), np.float32), image=Box(0, 255, (40, 40), np.uint8))
CARRY = {"carry": Box(-1e9, 1e9, (1,), np.float32)}


def make_buffer(lanes=2, rows=30, **options):
    return ReplayBuffer(SPACE, Discrete(7), capacity=lanes * rows, num_envs=lanes, storage="private", **options)


def padded(numbers, lengths, ends=None, longest=None, **changes):
    """Episodes whose values name the episode and the step; padding is rubbish that must not be seen."""
    rows, longest = len(lengths), longest or max(lengths)
    step, number = np.arange(longest + 1, dtype=np.float32), np.array(numbers, np.float32)[:, None]
    vector = np.stack(np.broadcast_arrays(number, step), axis=2)
    inside = step[:-1] < np.array(lengths)[:, None]
    flags = np.zeros((2, rows, longest), bool)
    for i, (terminated, truncated) in enumerate(ends or [(True, False)] * rows):
        flags[:, i, lengths[i] - 1] = terminated, truncated
    flags[:, ~inside] = True
    image = np.broadcast_to((vector.sum(axis=2) % 251)[..., None, None], (rows, longest + 1, 40, 40)).astype(np.uint8)
    fields = {
        "observation": {"vector": torch.from_numpy(vector.copy()), "image": torch.from_numpy(image)},
        "action": torch.from_numpy(((number + step[:-1]) % 7).astype(np.int64)),
        "reward": torch.from_numpy(np.where(inside, 100 * number + step[:-1], np.nan).astype(np.float32)),
        "terminated": torch.from_numpy(flags[0]),
        "truncated": torch.from_numpy(flags[1]),
        "lengths": torch.tensor(lengths),
    }
    return Batch(**(fields | changes))


def stored(buffer, draws=400):
    """Whole episodes of a buffer by id: number, length, flags of the last step; every value is checked."""
    batch, found = buffer.sample(draws, Episode()), {}
    for i, identity in enumerate(batch.ids.tolist()):
        n, number = int(batch.lengths[i]), batch.observation["vector"][i, 0, 0].item()
        steps = np.arange(n)
        assert np.array_equal(batch.observation["vector"][i, : n + 1, 0], np.full(n + 1, number))
        assert np.array_equal(batch.observation["vector"][i, : n + 1, 1], np.arange(n + 1))
        assert np.array_equal(batch.observation["image"][i, : n + 1, 7, 9], (number + np.arange(n + 1)) % 251)
        assert np.array_equal(batch.reward[i, :n], 100 * number + steps)
        assert np.array_equal(batch.action[i, :n], (number + steps) % 7)
        assert not batch.terminated[i, : n - 1].any()
        assert not batch.truncated[i, : n - 1].any()
        assert batch.is_first[i].nonzero().tolist() == [[0]]
        found[identity] = (int(number), n, bool(batch.terminated[i, n - 1]), bool(batch.truncated[i, n - 1]))
    return found


def test_extend_episodes_come_back_as_they_were():
    buffer = make_buffer()
    ends = [(True, False), (False, True), (False, False), (True, True)]
    ids = buffer.extend(padded([3, 4, 5, 6], [2, 5, 1, 7], ends))
    assert ids.tolist() == [0, 1 << 44, 3, 5]  # 0 and 0 rows are there, then 3 and 0, 3 and 6, 5 and 6
    expected = {(n, length, *end) for n, length, end in zip([3, 4, 5, 6], [2, 5, 1, 7], ends, strict=True)}
    assert set(stored(buffer).values()) == expected
    stats = buffer.stats()
    assert (stats.steps, stats.episodes, stats.inserted, stats.rows) == (15, 4, 15, 19)


def test_extend_any_episodes_equal_their_slow_twin():
    """Lanes by the rule said slowly; wraps: exactly the newest rows stay (trap 38)."""
    generator = np.random.default_rng(0)
    buffer, lanes, number = make_buffer(lanes=3, rows=20), [[], [], []], 0
    for _ in range(30):
        lengths = generator.integers(1, 9, generator.integers(1, 6)).tolist()
        ends = [(bool(e & 1), bool(e & 2)) for e in generator.integers(0, 4, len(lengths))]
        numbers = list(range(number, number + len(lengths)))
        ids = buffer.extend(padded(numbers, lengths, ends, longest=9)).tolist()
        for episode, length, end, identity in zip(numbers, lengths, ends, ids, strict=True):
            lane = min(range(3), key=lambda i: len(lanes[i]))
            assert identity == (lane << 44) | len(lanes[lane])
            lanes[lane] += [(episode, length, *end)] * (length + 1)
        number += len(lengths)
        live = {}
        for lane, rows in enumerate(lanes):
            tail = max(0, len(rows) - 20)
            begins = [row for row in range(tail, len(rows)) if row == 0 or rows[row] != rows[row - 1]]
            live |= {(lane << 44) | row: rows[row] for row in begins}
        assert stored(buffer, 40).items() <= live.items()
        assert buffer.stats().episodes == len(live)
    assert stored(buffer, 800) == live


@pytest.mark.parametrize("said", [{"lengths": None}, {"mask": "right"}, {"lengths": None, "mask": "right"}])
def test_extend_lengths_or_mask_or_neither_say_how_long(said):
    lengths = [3, 3] if said == {"lengths": None} else [1, 3]
    batch = padded([1, 2], lengths)
    mask = torch.arange(3) < torch.tensor(lengths)[:, None]
    buffer = make_buffer()
    buffer.extend(replace(batch, **{name: mask if value == "right" else None for name, value in said.items()}))
    assert set(stored(buffer).values()) == {(1, lengths[0], True, False), (2, lengths[1], True, False)}


def one_step(lane, *, last):
    return Step(
        {"vector": np.zeros((1, 2), np.float32), "image": np.zeros((1, 40, 40), np.uint8)}, np.array([0]),
        np.zeros(1, np.float32), {"vector": np.zeros((1, 2), np.float32), "image": np.zeros((1, 40, 40), np.uint8)},
        np.array([last]), np.array([False]), is_first=np.array([True]), env_ids=np.array([lane]),
    )  # fmt: skip


def test_extend_passes_lanes_that_are_open_or_claimed():
    buffer = make_buffer(lanes=4)
    writer = buffer.writer([0])
    buffer.add(one_step(1, last=False))
    buffer.add(one_step(2, last=True))
    assert (buffer.extend(padded([1, 2, 3], [3, 1, 1])) >> 44).tolist() == [3, 2, 2]
    assert (writer.extend(padded([4], [1])) >> 44).tolist() == [0]
    buffer.release([0])
    with pytest.raises(LaneError, match=r"none of the lanes \[0\] is free"):
        writer.extend(padded([4], [1]))


def test_extend_all_lanes_open_is_refused():
    buffer = make_buffer(lanes=2)
    for lane in (0, 1):
        buffer.add(one_step(lane, last=False))
    with pytest.raises(LaneError, match=r"none of the lanes \[0, 1\] is free: each has an open episode"):
        buffer.extend(padded([1], [1]))


def test_extend_longer_than_a_lane_is_refused_with_the_numbers():
    buffer = make_buffer(rows=8)
    with pytest.raises(CapacityError, match=r"episode of 8 steps, which takes 9 rows; expected at most 8.*at least 18"):
        buffer.extend(padded([1, 2], [3, 8]))
    assert buffer.stats().rows == 0
    buffer.extend(padded([1], [7]))


def changed(name, at, value):
    batch = padded([1, 2], [2, 4])
    tensor = getattr(batch, name).clone()
    tensor[at] = value
    return replace(batch, **{name: tensor})


ENDS = {name: torch.zeros(1, dtype=torch.bool) for name in ("terminated", "truncated")}
WRONG = [
    (changed("truncated", (1, 2), True), "row 1: ends at step 2 of 4"),
    (changed("reward", (0, 1), np.inf), "reward has values that are not finite"),
    (changed("lengths", 0, 0), r"row 0: has 0 steps; expected 1 \.\. 4"),
    (changed("lengths", 1, 5), r"row 1: has 5 steps; expected 1 \.\. 4"),
    (padded([1], [2], mask=torch.tensor([[False, True]])), "mask has gaps"),
    (padded([1], [2], is_first=torch.tensor([[False, True]])), "row 0: another episode begins at step 1"),
    (padded([1], [2], action=torch.zeros(1, 3, dtype=torch.int64)), r"action has shape \(1, 3\); expected \(1, 2\)"),
    (padded([1], [2], action=torch.zeros(1, 2)), "action has dtype float32; expected int64"),
    (padded([1], [2], extras={"value": torch.zeros(1, 2)}), r'extras\["value"\] is not declared'),
    (padded([1], [2], observation={"vector": torch.zeros(1, 3, 2)}), r'observation\["image"\] is missing'),
    (padded([1], [2], reward=torch.zeros(1), **ENDS), r"reward has shape \(1,\); expected \(B, T\)"),
]


@pytest.mark.parametrize(("batch", "message"), WRONG, ids=[message for _, message in WRONG])
def test_extend_what_is_no_whole_episode_is_refused(batch, message):
    buffer = make_buffer()
    with pytest.raises(FieldError, match=message):
        buffer.extend(batch)
    assert buffer.stats().rows == 0


@pytest.mark.parametrize("every", [1, 3])
def test_extend_carry_of_every_step_is_stored(every):
    buffer = make_buffer(extras=CARRY, carry_every=every)
    with pytest.raises(FieldError, match=r"carry has shape \(2, 1\); expected \(2, 9, 1\) \(the state before every"):
        buffer.extend(padded([1, 2], [9, 4], carry=torch.zeros(2, 1)))
    carry = torch.arange(18.0).reshape(2, 9, 1) + 1
    buffer.extend(padded([1, 2], [9, 4], carry=carry))
    batch = buffer.sample(100, Sequence(3, stride=3))
    starts = batch.observation["vector"][:, 0]
    expected = torch.where(starts[:, 1] == 0, 0.0, 9 * (starts[:, 0] - 1) + starts[:, 1] + 1)
    assert torch.equal(batch.carry[:, 0], expected)
    assert set(starts[:, 1].tolist()) >= {0.0, 3.0}


def test_extend_priority_is_checked():
    buffer = make_buffer(extras={"priority": Box(0, 9, (), np.float32)})
    buffer.extend(padded([1], [2], extras={"priority": torch.ones(1, 2)}))
    with pytest.raises(FieldError, match=r"extras\['priority'\] has negative"):
        buffer.extend(padded([1], [2], extras={"priority": -torch.ones(1, 2)}))


def test_extend_what_episode_samples_gave_is_the_same_again():
    first, second = make_buffer(), make_buffer()
    first.extend(padded([1, 2, 3], [4, 2, 6], [(True, False), (False, False), (False, True)]))
    second.extend(first.sample(3, Episode()))
    assert set(stored(second).values()) <= set(stored(first).values())
