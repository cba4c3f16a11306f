"""The buffer's own rules: what it refuses and says, what it keeps, what it saves."""

import multiprocessing
import pickle
import re

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiBinary, MultiDiscrete, Tuple
from support.batches import assert_same
from support.replay_twin import ReplayTwin, make_step

from rlfeed import errors
from rlfeed.replay import Episode, ReplayBuffer, Sequence, Transition
from rlfeed.types import Step

SPACE = gymnasium.spaces.Dict(vector=Box(-np.inf, np.inf, (3,), np.float32), image=Box(0, 255, (40, 40), np.uint8))
LINE = Box(-np.inf, np.inf, (2,), np.float32)


def filled(steps=40, lanes=2, rows=30, **options):
    buffer = ReplayBuffer(SPACE, Discrete(11), capacity=lanes * rows, num_envs=lanes, **options)
    twin = ReplayTwin(lanes, rows)
    for i in range(steps):
        buffer.add(make_step(twin, list(range(lanes)), [(i % 5 == 4, False)] * lanes, rewards=[float(i)] * lanes))
    return buffer, twin


def line_step(value, *, first=False, terminated=False, **changes):
    fields = {
        "observation": np.full((1, 2), value, np.float32),
        "action": np.array([value % 3]),
        "reward": np.array([value], np.float32),
        "next_observation": np.full((1, 2), value + 1, np.float32),
        "terminated": np.array([terminated]),
        "truncated": np.array([False]),
        "is_first": np.array([first]),
    }
    return Step(**(fields | changes))


def line_buffer(**options):
    return ReplayBuffer(LINE, Discrete(3), **({"capacity": 100, "storage": "private"} | options))


@pytest.mark.parametrize("kind", ["shared", "private", "memmap"])
def test_storage_kinds_same_steps_give_same_batches(kind, tmp_path):
    reference, _ = filled()
    path = tmp_path / "replay.bin" if kind == "memmap" else None
    buffer, _ = filled(storage=kind, path=path)
    for unit in (Transition(n_step=2), Episode(), Sequence(3)):
        expected, batch = reference.sample(16, unit), buffer.sample(16, unit)
        assert torch.equal(batch.ids, expected.ids)
        assert torch.equal(batch.observation["image"], expected.observation["image"])


def test_dtypes_nested_spaces_are_kept():
    space = gymnasium.spaces.Dict(
        camera=Box(0, 255, (2, 3), np.uint8), arm=Tuple((Box(-1, 1, (2,), np.float64), MultiBinary(3)))
    )
    buffer = ReplayBuffer(space, MultiDiscrete([3, 4]), capacity=10, extras={"log_prob": Box(-9, 9, (), np.float16)})
    observation = {"camera": np.full((1, 2, 3), 7, np.uint8), "arm": (np.full((1, 2), 0.1), np.ones((1, 3), np.int8))}
    step = Step(
        observation, np.array([[2, 3]]), np.array([1.5]), observation, np.array([True]), np.array([False]),
        is_first=np.array([True]), extras={"log_prob": np.array([-0.5], np.float16)},
    )  # fmt: skip
    buffer.add(step)
    batch = buffer.sample(1, Transition())
    assert batch.observation["camera"].dtype == torch.uint8
    assert batch.observation["arm"][0].tolist() == [[0.1, 0.1]]
    assert batch.next_observation["arm"][1].dtype == torch.int8
    assert batch.action.tolist() == [[2, 3]]
    assert batch.extras["log_prob"].tolist() == [-0.5]
    assert batch.extras["log_prob"].dtype == torch.float16


def test_fields_of_a_batch_are_dense_aligned_and_in_one_block():
    batch = filled()[0].sample(7, Episode())
    tensors = [*batch.observation.values(), batch.action, batch.reward, batch.mask, batch.ids]
    begin, end = batch._block.data_ptr(), batch._block.data_ptr() + batch._block.numel()
    for tensor in tensors:
        assert tensor.is_contiguous()
        assert (tensor.data_ptr() - begin) % 64 == 0
        assert begin <= tensor.data_ptr() < end


def test_batches_never_alias_storage():
    """B10."""
    buffer, twin = filled(steps=10)
    batch = buffer.sample(32, Transition())
    before = batch.observation["vector"].clone()
    for i in range(60):
        buffer.add(make_step(twin, [0, 1], [(i % 5 == 4, False)] * 2, rewards=[0.0, 0.0]))
    assert torch.equal(batch.observation["vector"], before)


def test_carry_is_the_state_before_the_first_observation_and_zeros_where_that_opens_an_episode():
    """B27, B28. Trap 18."""
    buffer = line_buffer(extras={"carry": Box(-1e9, 1e9, (1,), np.float32)})
    for i in range(6):
        buffer.add(line_step(i, first=i == 0, terminated=i == 5, carry=np.full((1, 1), 10.0 + i, np.float32)))
    batch = buffer.sample(20, Sequence(2, burn_in=1))
    begins = batch.observation[:, 0, 0]
    assert set(begins.tolist()) == {0.0, 1.0, 2.0, 3.0, 4.0}
    assert torch.equal(batch.carry[:, 0], torch.where(begins == 0, 0.0, begins + 10))


def test_add_lost_row_cuts_its_episode_and_stores_nothing():
    buffer = line_buffer()
    buffer.add(line_step(0, first=True))
    assert buffer.add(line_step(1, lost=np.array([True]))).tolist() == [-1]
    assert len(buffer) == 1
    batch = buffer.sample(1, Episode())
    assert (batch.lengths.item(), batch.terminated.any().item(), batch.truncated.any().item()) == (1, False, False)
    assert batch.discount.tolist() == [[pytest.approx(0.99)]]
    assert buffer.add(line_step(7, first=True)).tolist() == [2]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (line_step(0), "is_first False, but no episode is open"),
        (line_step(0, first=True, env_ids=np.array([3])), r"env_ids has 3; expected 0 \.\. 0"),
    ],
)
def test_add_step_that_continues_nothing_is_refused(step, message):
    buffer = line_buffer()
    with pytest.raises(errors.LaneError, match=message):
        buffer.add(step)
    assert len(buffer) == 0
    assert buffer.stats().rows == 0


def test_add_same_lane_twice_is_refused_before_anything_is_written():
    buffer, twin = filled(steps=3)
    step = make_step(ReplayTwin(2, 30), [0, 1], [(False, False)] * 2, rewards=[0.0, 0.0])
    with pytest.raises(errors.LaneError, match="row 1: env_ids has 0 twice"):
        buffer.add(Step(**{n: getattr(step, n) for n in Step.__slots__} | {"env_ids": np.array([0, 0])}))
    assert len(buffer) == len(twin)


def test_add_wrong_fields_are_all_named_at_once():
    wrong = {
        "observation": np.zeros((1, 3), np.float32),
        "action": np.array([0.5]),
        "truncated": np.array([1]),
    }
    with pytest.raises(errors.FieldError) as caught:
        line_buffer().add(line_step(0, first=True, **wrong))
    text = str(caught.value)
    assert "observation has shape (1, 3); expected (1, 2)" in text
    assert "action has dtype float64; expected int64" in text
    assert "truncated has dtype int64; expected bool" in text
    assert "Nothing was stored." in text


def test_add_safe_casts_are_made():
    buffer = line_buffer()
    buffer.add(line_step(0, first=True, action=np.array([2], np.int8), observation=np.zeros((1, 2), np.float16)))
    assert buffer.sample(1, Transition()).action.tolist() == [2]


def test_add_missing_key_is_named():
    buffer, _ = filled(steps=0)
    step = make_step(ReplayTwin(2, 30), [0], [(False, False)], rewards=[0.0])
    broken = {name: getattr(step, name) for name in Step.__slots__} | {"next_observation": {"vector": np.zeros((1, 3))}}
    with pytest.raises(errors.FieldError, match=re.escape('next_observation["image"] is missing')):
        buffer.add(Step(**broken))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity is 0; expected an int >= 1"),
        ({"capacity": 7, "num_envs": 2, "storage": "tape"}, "storage is 'tape'"),
        ({"capacity": 3}, "expected at least 4"),
        ({"capacity": 10, "storage": "memmap"}, "expected a path"),
    ],
)
def test_buffer_wrong_arguments_are_refused(options, message):
    with pytest.raises(errors.ConfigError, match=message):
        ReplayBuffer(LINE, Discrete(2), **options)


def test_buffer_larger_than_memory_is_refused_with_the_numbers():
    with pytest.raises(errors.CapacityError, match=r"needs [\d.]+ TB, but [\d.]+ GB are free in memory"):
        ReplayBuffer(Box(0, 255, (210, 160, 3), np.uint8), Discrete(2), capacity=10**8)


def test_buffer_unsupported_space_names_the_part():
    space = gymnasium.spaces.Dict(arm=LINE, words=gymnasium.spaces.Text(5))
    with pytest.raises(errors.SpaceError, match=r'observation_space\["words"\]: is Text'):
        ReplayBuffer(space, Discrete(2), capacity=10)


def test_sample_lane_shorter_than_a_sample_is_refused():
    with pytest.raises(errors.ConfigError, match="touches 21 rows, but a lane has 10"):
        line_buffer(capacity=10).sample(1, Transition(n_step=20))


def test_sample_before_n_steps_says_what_is_needed():
    buffer = line_buffer()
    for i in range(2):
        buffer.add(line_step(i, first=i == 0))
    with pytest.raises(errors.NotEnoughDataError, match=r"holds 2 steps.*expected an episode's end, or 5 steps"):
        buffer.sample(1, Transition(n_step=5))


def test_sample_episode_longer_than_max_length_is_an_error():
    buffer, _ = filled()
    with pytest.raises(errors.ConfigError, match="max_length is 4, but an episode of 5 steps"):
        buffer.sample(1, Episode(max_length=4))


def test_private_storage_refuses_another_process():
    with pytest.raises(errors.UnsupportedError, match="storage='private' cannot be sent"):
        pickle.dumps(line_buffer())


def add_more(buffer, steps):
    for i in range(steps):
        buffer.add(line_step(i, first=i == 0, terminated=i == steps - 1))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_shared_storage_written_by_another_process_is_seen_here(method):
    buffer = line_buffer(storage="shared")
    process = multiprocessing.get_context(method).Process(target=add_more, args=(buffer, 9))
    process.start()
    process.join(60)
    assert (process.exitcode, len(buffer)) == (0, 9)
    assert buffer.sample(1, Episode()).reward.tolist() == [[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]]


def test_stats_say_what_fits_at_the_episode_lengths_seen():
    buffer, _ = filled(steps=50)
    stats = buffer.stats()
    assert (stats.capacity_rows, stats.rows, stats.steps) == (60, 60, 50)
    assert stats.capacity_steps == 50
    assert (stats.inserted, stats.episodes) == (100, 10)
    assert "room for about 50 steps" in repr(buffer)


def test_add_same_lane_twice_out_of_order_is_refused():
    buffer, _ = filled(steps=3)
    step = make_step(ReplayTwin(2, 30), [1, 0], [(False, False)] * 2, rewards=[0.0, 0.0])
    rows = np.array([0, 1, 0])
    tripled = {name: getattr(step, name) for name in Step.__slots__}
    for name in ("action", "reward", "terminated", "truncated", "is_first", "env_ids"):
        tripled[name] = tripled[name][rows]
    for name in ("observation", "next_observation"):
        tripled[name] = {key: value[rows] for key, value in tripled[name].items()}
    with pytest.raises(errors.LaneError, match="row 2: env_ids has 1 twice"):
        buffer.add(Step(**tripled))


class Lazy(dict):
    """A container that makes its arrays when they are asked for, and keeps none."""

    def __getitem__(self, key):
        return super().__getitem__(key).copy()


def test_add_arrays_that_live_only_while_they_are_looked_at_are_stored_right():
    buffer, twin = filled(steps=0)
    for i in range(20):
        step = make_step(twin, [0, 1], [(False, False)] * 2, rewards=[float(i)] * 2)
        lazy = {name: getattr(step, name) for name in Step.__slots__}
        buffer.add(Step(**(lazy | {n: Lazy(lazy[n]) for n in ("observation", "next_observation")})))
    batch = buffer.sample(64, Transition())
    assert torch.equal(batch.next_observation["vector"], batch.observation["vector"] + torch.tensor([0.0, 0.0, 1.0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extras": {"value": np.zeros(1, np.float32)}}, r"extras\['value'\] is not declared"),
        ({"reward": np.array(["a"])}, "reward has dtype <U1"),
        ({"reward": np.array([1e300])}, "reward is .*expected finite numbers that float32 can hold"),
        ({"reward": np.array([np.nan])}, "reward is .nan.; expected finite"),
    ],
)
def test_add_what_could_not_be_stored_is_refused(changes, message):
    with pytest.raises(errors.FieldError, match=message):
        line_buffer().add(line_step(0, first=True, **changes))


def test_add_reward_without_rows_is_refused():
    step = line_step(0, first=True)
    step.reward = 1.0
    with pytest.raises(errors.FieldError, match=r"reward is 1.0; expected shape \(k,\)"):
        line_buffer().add(step)


def test_add_observation_with_an_entry_too_many_is_refused():
    buffer, _ = filled(steps=0)
    step = make_step(ReplayTwin(2, 30), [0], [(False, False)], rewards=[0.0])
    step.observation["depth"] = np.zeros(1)
    with pytest.raises(errors.FieldError, match="observation has 3 entries; expected 2"):
        buffer.add(step)


def test_buffer_more_lanes_than_an_id_can_name_is_refused():
    with pytest.raises(errors.ConfigError, match="expected fewer than 524288 lanes"):
        ReplayBuffer(LINE, Discrete(2), capacity=1 << 22, num_envs=1 << 19)


def test_sample_what_is_no_unit_is_refused():
    with pytest.raises(errors.ConfigError, match=r"expected Transition\(...\), Sequence"):
        line_buffer().sample(1, Transition)


def test_memmap_never_takes_a_file_that_is_there_or_in_use(tmp_path):
    path = tmp_path / "replay.bin"
    buffer, _ = filled(storage="memmap", path=path)
    with pytest.raises(errors.ConfigError, match="exists; expected a new file"):
        filled(storage="memmap", path=path)
    buffer.save(tmp_path / "saved")
    with pytest.raises(errors.ConfigError, match="is in use by another buffer"):
        ReplayBuffer.load(tmp_path / "saved")
    expected = buffer.sample(8, Transition())
    buffer._drawn = 0
    del buffer
    assert_same(ReplayBuffer.load(tmp_path / "saved").sample(8, Transition()), expected)


COMMITTED, RESERVED, EPISODES = 0, 1, 2  # lines of Storage.heads


@pytest.mark.parametrize("ahead", [{EPISODES: 1}, {RESERVED: 1}, {RESERVED: 2}, {RESERVED: 2, EPISODES: 1}], ids=str)
@pytest.mark.parametrize("steps", [5, 29, 200])
def test_reads_beside_a_writer_that_has_not_committed_yet_see_the_state_before(ahead, steps):
    """The states in which a writer may be paused, or killed: reserved but not committed, an episode just begun."""
    buffer, twin = filled(steps=steps, lanes=1)
    for line, change in ahead.items():
        buffer._storage.heads()[line] += change
    twin.lanes[0].capacity -= max(0, ahead.get(RESERVED, 0))  # what is reserved is no longer readable ...
    if steps == 5:
        twin.lanes[0].capacity = 30  # ... unless the lane has never been full
    assert len(buffer) == len(twin)
    for unit in (Episode(), Transition(n_step=2), Sequence(2, burn_in=1)):
        starts = twin.starts(unit)
        if starts:
            assert set(buffer.sample(200, unit).ids.tolist()) <= starts
        assert buffer.stats().episodes == len(twin.starts(Episode()))


def test_ordinals_beyond_32_bits_lead_to_the_same_samples():
    """Records keep the low 32 bits of an episode's ordinal; the count supplies the rest."""
    plain, _ = filled(steps=0)
    late, _ = filled(steps=0)
    late._storage.heads()[EPISODES] = 2**32 - 3 + (-(2**32 - 3)) % late._storage.entries  # the same directory places
    twins = ReplayTwin(2, 30), ReplayTwin(2, 30)
    for i in range(60):
        for buffer, twin in zip((plain, late), twins, strict=True):
            buffer.add(make_step(twin, [0, 1], [(i % 4 == 3, False)] * 2, rewards=[float(i)] * 2))
        assert len(plain) == len(late)
        assert plain.stats().episodes == late.stats().episodes
        units = [Transition(n_step=3)] if i > 3 else [Transition()]
        for unit in [*units, *([Episode()] if i > 3 else [])]:
            assert_same(late.sample(4, unit), plain.sample(4, unit))


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize(
    "unit",
    [Transition(), Transition(n_step=3), Sequence(2, burn_in=2), Sequence(4, boundary="cross", stride=2), Episode()],
    ids=str,
)
def test_rows_overwritten_between_draw_and_copy_are_drawn_again(unit, frames):
    """Also where only an older row that the sample touches was: burn-in, the step before, a frame of a stack."""
    buffer, twin = filled(steps=40, lanes=1, frame_stack={"image": frames})
    twin.frames["image"] = frames
    sampler, count = buffer.unit_sampler(unit), 100
    draws = sampler.draw(1, 0, count)
    old = draws.ids.copy()
    for i in range(12):
        buffer.add(make_step(twin, [0], [(i % 5 == 4, False)], rewards=[0.0]))
    live = twin.starts(unit)
    redrawn = []

    def again(rows):
        redrawn.extend(rows.tolist())
        for row in rows.tolist():
            assert sampler.drawer.draw(draws.one(row), 7 << 16)

    batch = sampler.reader.collect(draws, again, torch.empty(0, dtype=torch.uint8).new_empty)
    dead = [row for row in range(count) if old[row] not in live]
    assert dead
    assert set(dead) <= set(redrawn)
    assert set(batch.ids[dead].tolist()) <= live
    kept = [row for row in range(count) if row not in redrawn]
    assert np.array_equal(batch.ids.numpy()[kept], old[kept])


def test_draws_where_few_starts_are_valid_are_uniform_over_those():
    """With 3 of 400 rows valid, rejection gives up and counts: still each as likely as the others."""
    buffer, twin = ReplayBuffer(SPACE, Discrete(11), capacity=500, storage="private"), ReplayTwin(1, 500)
    for length in [1] * 60 + [12] + [1] * 60:
        for t in range(length):
            buffer.add(make_step(twin, [0], [(t == length - 1, False)], rewards=[0.0]))
    unit = Sequence(10, boundary="strict")
    starts = sorted(twin.starts(unit))
    assert len(starts) == 3
    counts = np.bincount(np.searchsorted(starts, buffer.sample(3000, unit).ids.numpy()), minlength=3)
    assert np.abs(counts - 1000).max() < 130  # five standard deviations


def test_add_what_is_no_step_is_refused():
    with pytest.raises(errors.FieldError, match="got a dict; expected a Step"):
        line_buffer().add({"reward": 1.0})


def test_sample_from_lanes_too_short_for_the_episodes_says_so():
    buffer = line_buffer(capacity=5)
    for i in range(20):
        buffer.add(line_step(i, first=i == 0))
    with pytest.raises(errors.NotEnoughDataError, match="Its 1 lanes of 5 rows are full: raise capacity"):
        buffer.sample(1, Episode())


def test_rows_that_a_writer_has_reserved_since_the_draw_are_drawn_again():
    """A writer announces what it will overwrite before it does: the announcement counts, not its commit."""
    buffer, twin = filled(steps=200, lanes=1)
    sampler, count = buffer.unit_sampler(Transition()), 300
    draws = sampler.draw(1, 0, count)
    buffer._storage.heads()[RESERVED] += 2
    lost = np.flatnonzero((draws.ids & (2**44 - 1)) < twin.lanes[0].tail + 2)
    assert len(lost)
    redrawn = []

    def again(rows):
        redrawn.extend(rows.tolist())
        for row in rows.tolist():
            sampler.drawer.draw(draws.one(row), 9 << 16)

    sampler.reader.collect(draws, again, torch.empty(0, dtype=torch.uint8).new_empty)
    assert redrawn == lost.tolist()
