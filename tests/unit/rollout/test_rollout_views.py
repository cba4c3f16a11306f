"""Collect, episodes and blocks: views on the one loop."""

import itertools
import tracemalloc
from dataclasses import fields

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from support.batches import assert_same
from support.known_streams import AUTORESETS, act, expected_stream, identifiable_envs

from rlfeed.envs import SerialEnvs
from rlfeed.errors import ConfigError, PolicyError
from rlfeed.feed import DeviceFeed
from rlfeed.nest import leaves
from rlfeed.rollout import Rollout
from rlfeed.testing import IdentifiableEnv
from rlfeed.types import Batch, PolicyOutput

ENDS = ("terminated", "truncated", "both")


class ListBuffer:
    def __init__(self):
        self.steps = []

    def add(self, step):
        self.steps.append(step)


class Recurrent:
    """Counts steps in its carry, and tells them as an extra."""

    def initial_carry(self, num_envs):
        return (np.zeros((num_envs, 2), np.float32),)

    def __call__(self, observation, carry, context):
        return PolicyOutput(act(observation), (carry[0] + 1,), {"count": carry[0][:, 0]})


@pytest.mark.parametrize("layout", ["serial", "same_step", "disabled"])
def test_collect_stores_exactly_the_steps_asked_for_and_goes_on_after_them(layout):
    """B12."""
    buffer, rollout = ListBuffer(), Rollout(identifiable_envs(layout, 3), act)
    assert [rollout.collect(buffer, steps=n) for n in (3, 30, 9)] == [3, 30, 9]
    assert (rollout.env_steps, sum(map(len, buffer.steps))) == (42, 42)
    same = Rollout(identifiable_envs(layout, 3), act)
    for step, again in zip(buffer.steps, itertools.islice(same, 14), strict=True):
        np.testing.assert_array_equal(step.observation, again.observation)


def test_collect_environments_out_of_step_stops_at_the_first_step_that_reaches_the_number():
    buffer, rollout = ListBuffer(), Rollout(identifiable_envs("next_step", 3, lengths=(1, 2, 3, 4)), act)
    for _ in range(5):
        before = rollout.env_steps
        stored = rollout.collect(buffer, steps=9)
        assert 9 <= stored < 12
        assert rollout.env_steps - before == stored
    assert rollout.env_steps == sum(map(len, buffer.steps))


@pytest.mark.parametrize(("steps", "take"), [(7, "Take 9"), (1, "Take 3"), (0, "at least 1"), (2.0, "is 2.0")])
def test_collect_number_that_does_not_divide_is_refused_with_one_that_does(steps, take):
    with pytest.raises(ConfigError, match=take):
        Rollout(identifiable_envs("serial", 3), act).collect(ListBuffer(), steps=steps)


@pytest.mark.parametrize("layout", AUTORESETS)
def test_episodes_are_whole_and_the_quota_holds_for_each_environment(layout):
    lengths = (3, 1, 5)
    rollout = Rollout(identifiable_envs(layout, 2, lengths=lengths, observation="dict"), act)
    batches = list(rollout.episodes(3))
    played = {0: [], 1: []}
    for batch in batches:
        vector = batch.observation["vector"][0].numpy()
        env, episode, length = int(vector[0, 0]), int(vector[0, 1]), len(batch.reward[0])
        played[env].append(episode)
        stream = [s for s in expected_stream(env, lengths, ENDS, 9) if s["observation"][1] == episode]
        observations = [s["observation"] for s in stream] + [stream[-1]["next_observation"]]
        assert vector.astype(int).tolist() == [list(o) for o in observations]
        assert batch.observation["image"].shape == (1, length + 1, 8, 8, 1)
        assert batch.observation["image"].dtype == torch.uint8
        assert batch.action[0].tolist() == [s["action"] for s in stream]
        assert batch.reward[0].tolist() == [float(s["reward"]) for s in stream]
        assert batch.terminated[0].tolist() == [s["terminated"] for s in stream]
        assert batch.truncated[0].tolist() == [s["truncated"] for s in stream]
        assert batch.is_first[0].tolist() == [True] + [False] * (length - 1)
        assert (batch.lengths.tolist(), batch.mask.tolist()) == ([length], [[True] * length])
        assert (batch.prev_action.tolist(), batch.prev_reward.tolist()) == ([0], [0.0])
    assert played == {0: [0, 1, 2], 1: [0, 1, 2]}


def test_episodes_short_ones_are_not_preferred():
    envs = [IdentifiableEnv(0, lengths=(1,)), IdentifiableEnv(1, lengths=(20,))]
    rollout = Rollout(SerialEnvs(envs), act)
    lengths = [int(batch.lengths) for batch in rollout.episodes(4, per_env=False)]
    assert sorted(lengths) == [1, 1, 20, 20]
    assert sorted(int(b.lengths) for b in rollout.episodes(3, per_env=False)) == [1, 1, 20]


def test_episodes_in_the_middle_of_others_begin_anew():
    rollout = Rollout(identifiable_envs("serial", 2, lengths=(4,)), act)
    for _ in itertools.islice(rollout, 6):
        pass
    batch = next(rollout.episodes(1))
    assert batch.observation[0, :, 2].tolist() == [0, 1, 2, 3, 4]
    assert batch.observation[0, 0, 1] == 2  # the second episode was cut


def test_episodes_hold_carry_and_extras_of_the_policy():
    batch = next(Rollout(identifiable_envs("serial", 2, lengths=(4,)), Recurrent()).episodes(1))
    assert batch.carry[0].tolist() == [[0.0, 0.0]]
    assert batch.extras["count"].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("layout", ["serial", "same_step", "disabled"])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_blocks_hold_every_step_once_with_the_true_final_observations(layout, num_envs):
    """B13, B14, B19."""
    lengths = (3, 1, 5)
    rollout = Rollout(identifiable_envs(layout, num_envs, lengths=lengths), Recurrent())
    streams = [expected_stream(env, lengths, ENDS, 24) for env in range(num_envs)]
    last = None
    for number, batch in enumerate(itertools.islice(rollout.blocks(6), 4)):
        finals = dict(zip(map(tuple, batch.final_index.tolist()), batch.final_observation.tolist(), strict=True))
        for env in range(num_envs):
            for t, step in enumerate(streams[env][6 * number : 6 * number + 6]):
                assert batch.observation[env, t].tolist() == list(step["observation"])
                assert int(batch.action[env, t]) == step["action"]
                assert float(batch.reward[env, t]) == float(step["reward"])
                assert bool(batch.is_first[env, t]) == step["is_first"]
                ended = step["terminated"] or step["truncated"]
                successor = finals.pop((env, t)) if ended else batch.observation[env, t + 1].tolist()
                assert successor == list(step["next_observation"])
        assert finals == {}
        assert batch.mask.all()
        assert batch.lengths.tolist() == [6] * num_envs
        np.testing.assert_array_equal(batch.carry[0][:, 0], batch.observation[:, 0, 2])
        np.testing.assert_array_equal(batch.extras["count"], batch.observation[:, :-1, 2])
        first = batch.is_first[:, 0]
        np.testing.assert_array_equal(batch.prev_action, np.where(first, 0, batch.observation[:, 0, 3]))
        if last is not None:
            np.testing.assert_array_equal(batch.observation[:, 0], last.observation[:, -1])
            np.testing.assert_array_equal(batch.prev_reward, np.where(first, 0, last.reward[:, -1]))
        last = batch


def test_blocks_without_an_end_have_empty_finals():
    batch = next(Rollout(identifiable_envs("serial", 2, lengths=(9,), observation="dict"), act).blocks(3))
    assert batch.final_index.shape == (0, 2)
    assert batch.final_observation["image"].shape == (0, 8, 8, 1)


def test_blocks_environments_out_of_step_are_padded_behind_their_steps():
    makers = [lambda: IdentifiableEnv(0, lengths=(2,)), lambda: IdentifiableEnv(1, lengths=(9,))]
    rollout = Rollout(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP), Recurrent())
    streams = [expected_stream(0, (2,), ENDS, 20), expected_stream(1, (9,), ENDS, 20)]
    at = [0, 0]
    for batch in itertools.islice(rollout.blocks(4), 3):
        assert batch.lengths[1] == 4
        assert batch.lengths[0] < 4
        for env, stream in enumerate(streams):
            steps = stream[at[env] : at[env] + int(batch.lengths[env])]
            assert batch.observation[env, : len(steps), 2].tolist() == [s["observation"][2] for s in steps]
            # What its last step led to, or, where that ended an episode and its reset is known, the next first one.
            upcoming = (steps[-1]["next_observation"], stream[at[env] + len(steps)]["observation"])
            assert tuple(batch.observation[env, len(steps)].tolist()) in upcoming
            assert batch.mask[env].tolist() == [True] * len(steps) + [False] * (4 - len(steps))
            at[env] += len(steps)


def test_blocks_lie_in_one_piece_of_memory_of_their_own():
    rollout = Rollout(identifiable_envs("serial", 2, lengths=(3, 1), observation="dict"), Recurrent())
    first, second = itertools.islice(rollout.blocks(4), 2)
    block, layout = first.block_and_layout()
    assert all(slot.offset % 64 == 0 for slot in layout.slots)
    assert len(block) == layout.nbytes
    named = {f.name for f in fields(Batch) if f.init and list(leaves(getattr(first, f.name))) not in ([], [((), None)])}
    assert {slot.name for slot in layout.slots} == named
    assert second.block_and_layout()[0].data_ptr() != block.data_ptr()
    before = first.observation["vector"].clone()
    next(rollout.blocks(4))
    assert torch.equal(first.observation["vector"], before)


def test_blocks_copy_each_observation_once(monkeypatch):
    monkeypatch.setattr("rlfeed.envs.resume.Diary.note", lambda *step: None)  # it holds on to the last megabyte
    # What is alive at a time: the block, and the arrays of a few steps. A list of steps and its stack would be twice.
    rollout = Rollout(identifiable_envs("serial", 4, lengths=(1000,), observation="dict"), act)
    blocks = rollout.blocks(400)
    next(blocks)
    tracemalloc.start()
    batch = next(blocks)
    _, peak = tracemalloc.get_traced_memory()  # torch's own memory, which holds the block, is not counted
    tracemalloc.stop()
    assert peak < 0.25 * batch.block_and_layout()[1].nbytes


def test_blocks_through_a_device_feed_are_the_blocks():
    batches = list(itertools.islice(Rollout(identifiable_envs("serial", 3), Recurrent()).blocks(5), 3))
    feed = DeviceFeed(Rollout(identifiable_envs("serial", 3), Recurrent()).blocks(5), "cpu")
    for batch in batches:
        assert_same(next(feed), batch)


def test_blocks_go_on_after_an_error_of_the_policy():
    wrong = iter([False] * 4 + [True] + [False] * 20)
    rollout = Rollout(
        identifiable_envs("serial", 2), lambda o: np.zeros(3, np.int64) if next(wrong) else act(o)
    )
    blocks = rollout.blocks(3)
    first = next(blocks)
    with pytest.raises(PolicyError, match=r"has shape \(3,\)"):
        next(blocks)
    same = Rollout(identifiable_envs("serial", 2), act).blocks(3)
    assert_same(first, next(same))
    assert_same(next(blocks), next(same))


@pytest.mark.parametrize("extras", [{}, {"value": np.zeros((2, 2))}, {"value": np.zeros(2, np.float32)}])
def test_blocks_extras_that_change_are_refused_by_name(extras):
    given = iter([{"value": np.zeros(2)}, extras])

    class Changing:
        def initial_carry(self, num_envs):
            return ()

        def __call__(self, observation, carry, context):
            return PolicyOutput(act(observation), (), next(given))

    with pytest.raises(PolicyError, match=r'extras\["value"\] is .*; expected float64 of shape \(k,\)'):
        next(Rollout(identifiable_envs("serial", 2), Changing()).blocks(3))


def test_blocks_restarted_inside_keep_what_the_last_steps_led_to():
    rollout = Rollout(identifiable_envs("serial", 2, lengths=(9,)), act)
    blocks = rollout.blocks(4)

    calls = iter(range(100))
    decide = rollout.policy

    class Twice:
        def initial_carry(self, num_envs):
            return ()

        def __call__(self, observation, carry, context):
            if next(calls) == 2:
                raise KeyboardInterrupt
            return decide(observation, carry, context)

    rollout.policy = Twice()
    with pytest.raises(KeyboardInterrupt):
        next(blocks)
    rollout.restart()
    batch = next(blocks)
    assert batch.observation[0, :, 1:3].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]
    assert batch.final_index.tolist() == [[0, 1], [1, 1]]
    assert batch.final_observation[:, :3].tolist() == [[0, 0, 2], [1, 0, 2]]
    assert not (batch.terminated | batch.truncated).any()


@pytest.mark.parametrize("call", [lambda r: r.blocks(0), lambda r: r.episodes(0), lambda r: r.episodes(True)])
def test_views_numbers_that_are_not_positive_are_refused_at_once(call):
    with pytest.raises(ConfigError, match="expected an integer of at least 1"):
        call(Rollout(identifiable_envs("serial", 2), act))
