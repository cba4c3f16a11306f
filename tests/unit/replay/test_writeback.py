"""update: the learner's recurrent state beside the actor's, never torn, never of another step; carry_every."""

import multiprocessing
import os
import time

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete

from rlfeed.errors import CapacityError, FieldError
from rlfeed.replay import ReplayBuffer, Sequence
from rlfeed.replay import kernels as k
from rlfeed.types import Step

LINE = Box(-np.inf, np.inf, (1,), np.float32)


def make_buffer(width=1, **options):
    options = {"capacity": 40, "extras": {"carry": Box(-1e9, 1e9, (width,), np.float32)}} | options
    return ReplayBuffer(LINE, Discrete(3), **options)


def add(buffer, number, t, *, last=False, lane=0, carry=None):
    carry = np.full((1, 1), number, np.float32) if carry is None else carry
    return buffer.add(
        Step(
            np.full((1, 1), number, np.float32), np.array([0]), np.zeros(1, np.float32),
            np.full((1, 1), number + 1, np.float32), np.array([last]), np.array([False]), is_first=np.array([t == 0]),
            env_ids=np.array([lane]), carry=carry,
        )
    )  # fmt: skip


def filled(episodes, length, **options):
    """Episodes whose observations and carries are the number of the step."""
    buffer = make_buffer(**options)
    ids = [int(add(buffer, length * e + t, t, last=t == length - 1)[0]) for e in range(episodes) for t in range(length)]
    return buffer, np.array(ids)


def carries(buffer, unit=Sequence(2, stride=2), draws=300):  # noqa: B008 - frozen
    """Carries by the number of the step they are the state before."""
    batch = buffer.sample(draws, unit)
    return dict(zip(batch.observation[:, 0, 0].tolist(), batch.carry[:, 0].tolist(), strict=True))


def test_update_written_back_state_wins_where_its_step_is():
    buffer, ids = filled(2, 6)
    assert buffer.update(ids[[2, 10]], carry=np.array([[70.0], [80.0]], np.float32)) == 2
    assert carries(buffer) == {0: 0, 2: 70, 4: 4, 6: 0, 8: 8, 10: 80}
    assert buffer.update(torch.tensor(ids[[2]]), carry=torch.tensor([[71.0]])) == 1
    assert carries(buffer)[2] == 71


def test_update_first_steps_keep_their_zeros_and_the_last_of_a_duplicate_stays():
    """Trap 18, and 27 for what is written back."""
    buffer, ids = filled(1, 6)
    assert buffer.update(ids[[0, 2, 2]], carry=np.array([[5.0], [6.0], [7.0]], np.float32)) == 2
    assert carries(buffer) == {0: 0, 2: 7, 4: 4}


def test_update_of_steps_that_were_overwritten_is_dropped_and_counted():
    """Trap 20 (I5): the place of an old step never gets the state of a new one."""
    buffer, ids = filled(20, 6)
    stale, live = ids[:5], ids[-4]
    assert buffer.update(np.append(stale, live), carry=np.full((6, 1), 9.0, np.float32)) == 1
    assert buffer.stats().stale_updates == 5
    assert [carry for carry in carries(buffer).values() if carry == 9] == [9]
    for t in range(6):
        add(buffer, 500 + t, t, last=t == 5)
    for e in range(10):  # the same places, of new steps
        for t in range(6):
            add(buffer, 600 + 6 * e + t, t, last=t == 5)
    assert 9 not in carries(buffer).values()


def test_overlay_takes_no_memory_before_the_first_update():
    buffer, ids = filled(2, 6, capacity=4000, storage="shared")

    def allocated():
        return os.fstat(buffer._storage.memory._fd).st_blocks * 512

    assert allocated() == buffer.stats().nbytes
    carries(buffer)  # who reads a hole gets a page of its own
    assert allocated() == buffer.stats().nbytes
    buffer.update(ids[[2]], carry=np.array([[1.0]], np.float32))
    assert allocated() - buffer.stats().nbytes == buffer._storage.overlay_bytes >= 4000 * 24


def test_update_without_room_is_refused_with_the_numbers(monkeypatch):
    buffer, ids = filled(2, 6)
    monkeypatch.setattr("rlfeed.memory.available_bytes", lambda path: 100)
    with pytest.raises(CapacityError, match=r"carries that are written back need 4.1 KB, but 100 bytes are free"):
        buffer.update(ids[[2]], carry=np.array([[1.0]], np.float32))
    monkeypatch.undo()
    assert carries(buffer) == {0: 0, 2: 2, 4: 4, 6: 0, 8: 8, 10: 10}
    assert buffer.update(ids[[2]], carry=np.array([[1.0]], np.float32)) == 1


GOOD = np.zeros((2, 1), np.float32)
WRONG = [
    ({"carry": np.zeros((2, 2), np.float32)}, r"carry has shape \(2, 2\); expected \(2, 1\)"),
    ({"carry": GOOD.astype(np.float64)}, "carry has dtype float64; expected float32"),
    ({"carry": GOOD + np.nan}, "carry has values that are not finite"),
    ({"carry": {"h": GOOD}}, r"carry is missing; carry\[\"h\"\] is not declared"),
    ({"carry": GOOD, "reward": GOOD}, r"got \['carry', 'reward'\]; expected what a learner may write \(carry\)"),
    ({}, "got no column"),
]


@pytest.mark.parametrize(("columns", "message"), WRONG, ids=[message for _, message in WRONG])
def test_update_wrong_columns_are_refused(columns, message):
    buffer, ids = filled(1, 6)
    with pytest.raises(FieldError, match=message):
        buffer.update(ids[:2], **columns)
    assert buffer.stats().stale_updates == 0


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([2, 6], r"ids has 6 \(lane 0, row 6\), which is no step"),  # a closing row
        ([2, 7], "row 7.*no step of this buffer"),  # not written yet
        ([-1, 2], "ids has -1 "),
        ([2, 1 << 44], "lane 1, row 0"),
        ([[1], [2]], r"ids has shape \(2, 1\)"),
        ([1.0, 2.0], "dtype float64"),
    ],
)
def test_update_ids_of_no_step_are_refused_before_anything_is_written(ids, message):
    buffer, _ = filled(1, 6)
    with pytest.raises(FieldError, match=message):
        buffer.update(np.array(ids), carry=np.full((2, 1), 9, np.float32))
    assert 9 not in carries(buffer).values()


def test_update_of_a_buffer_without_carry_is_refused():
    buffer = make_buffer(extras={})
    with pytest.raises(FieldError, match=r"\(none: extras has no 'carry'\)"):
        buffer.update(np.array([0]), carry=np.zeros((1, 1), np.float32))


@pytest.mark.parametrize("every", [2, 3, 7])
def test_carry_every_stored_states_are_those_of_their_steps_through_wraps(every):
    """Every length of episode, several wraps: no two live rows of a lane share a place."""
    generator, number = np.random.default_rng(every), 0
    buffer, unit = make_buffer(capacity=53, carry_every=every), Sequence(every, stride=every)
    for _ in range(60):
        length = int(generator.integers(1, 20))
        for t in range(length):
            add(buffer, number, t, last=t == length - 1)
            number += 1
        firsts = buffer.sample(100, unit)
        begins = firsts.observation[:, 0, 0]
        assert torch.equal(firsts.carry[:, 0], torch.where(firsts.is_first[:, 0], 0.0, begins))
    add(buffer, 0, 0)
    off_grid = add(buffer, 1, 1)
    add(buffer, 2, 2)
    with pytest.raises(FieldError, match=f"at which no carry is stored.*multiple of carry_every={every}"):
        buffer.update(off_grid, carry=np.zeros((1, 1), np.float32))


def test_carry_places_of_rows_that_may_be_live_together_differ():
    """The claim of `carry_entry`, for every distance of stored rows and every phase."""
    plan = np.zeros(k.PLAN_SIZE, np.int64)
    for rows in range(4, 40):
        for every in range(2, rows + 3):
            plan[k.CARRY_EVERY], plan[k.CARRY_ENTRIES] = every, (rows - 1) // every + 2
            for row in range(5 * every):
                others = range(row + every, row + rows)
                places = {k.carry_entry(plan, 0, other) for other in others}
                assert k.carry_entry(plan, 0, row) not in places, (rows, every, row)


def rewrite(buffer, ids, width, stop):
    generator = np.random.default_rng(0)
    while not stop.is_set():
        values = generator.integers(0, 1000, len(ids)).astype(np.float32)
        h, c = np.repeat(values[:, None], width, axis=1), np.repeat(-values[:, None], 3, axis=1)
        buffer.update(ids, carry=(h, c))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_update_again_and_again_no_reader_sees_a_torn_state(method):
    """A version word and the row, both: the row alone lets torn values through where an entry is rewritten."""
    width = 700
    spaces = (Box(-1e9, 1e9, (width,), np.float32), Box(-1e9, 1e9, (3,), np.float32))
    buffer = make_buffer(capacity=16, extras={"carry": spaces})
    ids = []
    for t in range(8):
        zeros = (np.zeros((1, width), np.float32), np.zeros((1, 3), np.float32))
        ids.append(int(add(buffer, t, t, last=t == 7, carry=zeros)[0]))
    context = multiprocessing.get_context(method)
    stop = context.Event()
    process = context.Process(target=rewrite, args=(buffer, np.array(ids[1:]), width, stop), daemon=True)
    process.start()
    try:
        seen, deadline = set(), time.monotonic() + 100
        while len(seen) < 500 and time.monotonic() < deadline:
            h, c = buffer.sample(64, Sequence(1)).carry
            assert torch.equal(h, h[:, :1].expand(-1, width))
            assert torch.equal(c, -h[:, :1].expand(-1, 3))  # leaves of one state belong together
            seen |= set(h[:, 0].tolist())
        assert len(seen) >= 500  # it really was rewritten meanwhile
    finally:
        stop.set()
        process.join(30)
        process.kill()


def test_state_of_a_learner_that_was_killed_while_writing_is_passed_over():
    """Trap 28 for what is written back: readers wait no longer than a moment, and the next update mends it."""
    buffer, ids = filled(1, 6)
    buffer.update(ids[[2]], carry=np.array([[50.0]], np.float32))
    versions = buffer._storage.overlay()
    versions[2, 0] += 1  # odd: as a writer leaves it that is killed in the middle
    assert carries(buffer, draws=20)[2] == 2
    assert buffer.update(ids[[2]], carry=np.array([[51.0]], np.float32)) == 1
    assert carries(buffer)[2] == 51


def test_update_of_a_nested_carry_reaches_every_leaf():
    spaces = Dict(h=Box(-9, 9, (2,), np.float32), c=Box(-9, 9, (300,), np.float64))
    buffer = make_buffer(extras={"carry": spaces}, carry_every=2)
    zeros = {"c": np.zeros((1, 300)), "h": np.zeros((1, 2), np.float32)}
    ids = [int(add(buffer, t, t, last=t == 5, carry=zeros)[0]) for t in range(6)]
    values = {"h": torch.full((1, 2), 3.0), "c": torch.full((1, 300), 4.0, dtype=torch.float64)}
    assert buffer.update(np.array(ids[2:3]), carry=values) == 1
    batch = buffer.sample(50, Sequence(2, stride=2))
    chosen = batch.observation[:, 0, 0] == 2
    assert batch.carry["h"][chosen].unique().tolist() == [3]
    assert batch.carry["c"][chosen].unique().tolist() == [4]
    assert not batch.carry["h"][~chosen].any()
