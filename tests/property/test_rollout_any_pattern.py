"""Random episode patterns through every autoreset mode: the streams are the true ones, and every step counts once."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.known_streams import AUTORESETS, act, expected_stream, identifiable_envs, read_streams

from rlfeed.rollout import Rollout

LAYOUTS = (*AUTORESETS, "envpool")


def told(layout, ends):
    """EnvPool tells of the truncation only, where both fall together."""
    return ["truncated" if layout == "envpool" and end == "both" else end for end in ends]


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    num_envs=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    ends=st.lists(st.sampled_from(["terminated", "truncated", "both"]), min_size=1, max_size=3),
)
def test_rollout_any_episode_pattern_gives_the_true_steps(layout, num_envs, lengths, ends):
    """rollout 3A.1, 3A.3, 3A.4: every step once, its true successor, and none that joins two episodes."""
    rollout = Rollout(identifiable_envs(layout, num_envs, lengths=lengths, ends=ends), act)
    ends = told(layout, ends)
    assert read_streams(rollout, 25) == [expected_stream(env, lengths, ends, 25) for env in range(num_envs)]


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from(LAYOUTS),
    num_envs=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    count=st.integers(1, 40),
)
def test_rollout_statistics_any_episode_pattern_equal_a_hand_count(layout, num_envs, lengths, count):
    """rollout 3A.8, 3A.9"""
    rollout = Rollout(identifiable_envs(layout, num_envs, lengths=lengths), act)
    running = np.zeros((num_envs, 2))
    finished = []
    steps = 0
    for _ in range(count):
        step = next(rollout)
        steps += len(step)
        for row, env in enumerate(step.env_ids):
            # The environments' own float64 rewards, which float32 steps only approximate.
            episode, t = step.next_observation[row][1], step.next_observation[row][2]
            reward = 1000.0 * env + 10.0 * float(episode) + float(t) / 100
            running[env] += (float(np.float32(reward)) if layout == "envpool" else reward, 1)
            if step.terminated[row] or step.truncated[row]:
                finished.append((env, *running[env]))
                running[env] = 0
    statistics = rollout.statistics
    assert rollout.env_steps == steps == sum(length for _, _, length in finished) + running[:, 1].sum()
    assert statistics.episodes == len(finished)
    assert [(r.env_id, r.total_reward, r.length) for r in statistics.window] == finished[-100:]
