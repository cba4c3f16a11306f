"""Hindsight relabelling against an oracle, with several lanes, wraps and partly overwritten episodes (trap 19)."""

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from rlfeed.errors import ConfigError, FieldError, NotEnoughDataError, SpaceError
from rlfeed.replay import Hindsight, ReplayBuffer, Transition
from rlfeed.types import Step

GOAL = Box(-np.inf, np.inf, (3,), np.float32)
SPACE = Dict(observation=Box(-np.inf, np.inf, (1,), np.float32), achieved_goal=GOAL, desired_goal=GOAL)
LENGTHS = (3, 5, 1, 4, 7, 2)  # of the episodes, in turn
ROWS = 25
SHIFT = 44


def distance(reached, wanted):
    """A reward that names both of its goals."""
    return (reached @ [1.0, 10.0, 100.0]) - 0.25 * (wanted @ [1.0, 10.0, 100.0])


class Lane:
    """All rows that a lane ever had: (episode, index, whether closing)."""

    def __init__(self, steps, offset):
        self.rows, episode, index = [], 0, 0
        for _ in range(steps):
            self.rows.append((episode, index, False))
            index += 1
            if index == LENGTHS[(episode + offset) % len(LENGTHS)]:
                self.rows.append((episode, index, True))
                episode, index = episode + 1, 0
        if index:
            self.rows.append((episode, index, False))
        self.tail = max(0, len(self.rows) - ROWS)

    def end(self, row):
        closing = [i for i, (episode, _, closes) in enumerate(self.rows) if closes and episode == self.rows[row][0]]
        return closing[0] if closing else None

    def goals(self, row, strategy):
        end = self.end(row)
        first = row - self.rows[row][1]
        return {
            "future": range(row + 1, end + 1),
            "final": [end],
            "episode": range(max(first + 1, self.tail), end + 1),
        }[strategy]


def goal_of(lane, row):
    return [float(lane), float(row[0]), float(row[1])]


def filled(steps=40, **options):
    """Two lanes whose achieved goal names lane, episode and index; ends alternate between the two flags."""
    buffer = ReplayBuffer(SPACE, Discrete(2), capacity=2 * ROWS, num_envs=2, storage="private", **options)
    for number in range(steps):
        lanes = [Lane(number + 1, offset) for offset in (0, 1)]
        here = [lane.rows[-2] for lane in lanes]
        there = [lane.rows[-1] for lane in lanes]

        def observe(rows):
            goals = np.array([goal_of(i, row) for i, row in enumerate(rows)], np.float32)
            return {
                "observation": np.array([[row[1]] for row in rows], np.float32),
                "achieved_goal": goals,
                "desired_goal": np.full((2, 3), -1, np.float32),
            }

        ends = np.array([row[2] for row in there])
        even = np.array([row[0] % 2 == 0 for row in here])
        step = (np.zeros(2, np.int64), np.full(2, 0.5, np.float32), observe(there), ends & even, ends & ~even)
        buffer.add(Step(observe(here), *step, is_first=np.array([row[1] == 0 for row in here])))
    return buffer, [Lane(steps, offset) for offset in (0, 1)]


def starts_of(lanes):
    return {
        (i << SHIFT) | row
        for i, lane in enumerate(lanes)
        for row in range(lane.tail, len(lane.rows))
        if not lane.rows[row][2] and lane.end(row) is not None
    }


@pytest.mark.parametrize("steps", [12, 21, 40, 75])
@pytest.mark.parametrize("strategy", ["future", "final", "episode"])
@pytest.mark.parametrize("n_step", [1, 3])
def test_hindsight_goals_rewards_and_ends_equal_the_oracle(strategy, n_step, steps):
    buffer, lanes = filled(steps)
    unit = Transition(n_step, gamma=0.5, relabel=Hindsight(strategy, 0.7, distance))
    stored = buffer._storage.memory.bytes[buffer._storage.heads_offset :]  # behind the counters of draws
    before = stored.copy()
    batch = buffer.sample(1500, unit)
    assert np.array_equal(stored, before)  # rows are never changed
    assert set(batch.ids.tolist()) == starts_of(lanes)
    relabelled = 0
    for i, identity in enumerate(batch.ids.tolist()):
        number, row = identity >> SHIFT, identity & ((1 << SHIFT) - 1)
        lane = lanes[number]
        end = lane.end(row)
        count = min(n_step, end - row)
        assert batch.observation["achieved_goal"][i].tolist() == goal_of(number, lane.rows[row])
        assert batch.next_observation["achieved_goal"][i].tolist() == goal_of(number, lane.rows[row + count])
        goal = batch.observation["desired_goal"][i].tolist()
        assert batch.next_observation["desired_goal"][i].tolist() == goal
        reached = [0.5] * count
        if goal != [-1.0] * 3:
            relabelled += 1
            assert goal in [goal_of(number, lane.rows[g]) for g in lane.goals(row, strategy)]
            after = np.array([goal_of(number, lane.rows[row + 1 + t]) for t in range(count)])
            reached = distance(after, np.array([goal] * count)).tolist()
        assert batch.reward[i].item() == pytest.approx(sum(0.5**t * r for t, r in enumerate(reached)))
        ended = row + count == end
        terminated = ended and lane.rows[row][0] % 2 == 0
        assert (batch.terminated[i], batch.truncated[i]) == (terminated, ended and not terminated)
        assert batch.discount[i].item() == pytest.approx(0.0 if terminated else 0.5**count)
    assert abs(relabelled - 0.7 * 1500) < 5 * np.sqrt(1500 * 0.21)  # 5 standard deviations


@pytest.mark.parametrize("steps", [21, 75])
@pytest.mark.parametrize("strategy", ["future", "episode"])
def test_hindsight_goals_are_uniform_over_the_allowed_ones(strategy, steps):
    """Chi-square over every pair of a start and one of its goals: 100 draws each on average."""
    buffer, lanes = filled(steps)
    starts = sorted(starts_of(lanes))
    batch = buffer.sample(600 * len(starts), Transition(relabel=Hindsight(strategy, 1.0, distance)))
    ids, goals = batch.ids.numpy(), batch.observation["desired_goal"].numpy()
    for identity in starts:
        number, row = identity >> SHIFT, identity & ((1 << SHIFT) - 1)
        allowed = [goal_of(number, lanes[number].rows[g]) for g in lanes[number].goals(row, strategy)]
        found = goals[ids == identity]
        counts = np.array([(found == goal).all(1).sum() for goal in allowed])
        assert counts.sum() == len(found)
        chi_square, freedom = ((counts - counts.mean()) ** 2 / counts.mean()).sum(), len(allowed) - 1
        assert chi_square <= freedom + 6 * np.sqrt(2 * freedom) + 6


def test_hindsight_fraction_zero_is_the_plain_sample_of_ended_episodes():
    buffer, _ = filled(40)
    batch = buffer.sample(200, Transition(relabel=Hindsight("future", 0.0, lambda reached, wanted: 1 / 0)))
    assert (batch.observation["desired_goal"] == -1).all()
    assert (batch.reward == 0.5).all()


def test_hindsight_without_an_ended_episode_says_what_is_missing():
    buffer, _ = filled(2)
    buffer.sample(4, Transition())
    with pytest.raises(NotEnoughDataError, match="expected an episode that has ended or was cut"):
        buffer.sample(4, Transition(relabel=Hindsight("final", 0.5, distance)))
    buffer.cut()
    buffer.sample(4, Transition(relabel=Hindsight("final", 0.5, distance)))


def test_hindsight_same_draws_give_same_goals_whatever_the_batch_size():
    buffer, _ = filled(40)
    sampler = buffer.unit_sampler(Transition(relabel=Hindsight("future", 0.5, distance)))
    whole = sampler.gather(sampler.draw(3, 0, 64))
    parts = [sampler.gather(sampler.draw(3, number, 16)) for number in range(0, 64, 16)]
    for name in ("observation", "next_observation"):
        goals = np.concatenate([getattr(part, name)["desired_goal"] for part in parts])
        assert np.array_equal(goals, getattr(whole, name)["desired_goal"])
    assert np.array_equal(np.concatenate([part.reward for part in parts]), whole.reward)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("latest", 0.5, distance), "strategy is 'latest'; expected one of"),
        (("future", 1.5, distance), "fraction is 1.5; expected 0 .. 1"),
        (("future", 0.5, None), "reward_fn is None; expected a function"),
    ],
)
def test_hindsight_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Hindsight(*arguments)


def test_transition_relabel_that_is_no_hindsight_is_refused():
    with pytest.raises(ConfigError, match="relabel is 'future'; expected None or a Hindsight"):
        Transition(relabel="future")


@pytest.mark.parametrize(
    ("reward_fn", "message"),
    [
        (lambda reached, wanted: 0.0, r"gave shape \(\) .* expected \(\d+,\)"),
        (lambda reached, wanted: np.full(len(reached), np.nan), "gave nan, first for step 0"),
    ],
)
def test_hindsight_wrong_rewards_are_refused(reward_fn, message):
    buffer, _ = filled(40)
    with pytest.raises(FieldError, match=message):
        buffer.sample(8, Transition(relabel=Hindsight("future", 1.0, reward_fn)))


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        (GOAL, {}, r"has no \['observation', 'achieved_goal', 'desired_goal'\]"),
        (Dict(observation=GOAL, achieved_goal=GOAL), {}, r"has no \['desired_goal'\]"),
        (Dict(observation=GOAL, achieved_goal=GOAL, desired_goal=Discrete(3)), {}, "expected two arrays of one shape"),
        (SPACE, {"frame_stack": 2}, "frame_stack stacks"),
    ],
)
def test_hindsight_observation_without_goals_is_refused(space, options, message):
    buffer = ReplayBuffer(space, Discrete(2), capacity=20, storage="private", **options)
    with pytest.raises(SpaceError, match=message):
        buffer.sample(1, Transition(relabel=Hindsight("final", 1.0, distance)))
