"""Saving a rollout: environments come back where they can, or restart at their next episode; the rest goes on."""

import itertools

import numpy as np
import pytest

from rlfeed.durable import load_state, save_state
from rlfeed.envs import episode_seed, make_envs
from rlfeed.errors import CheckpointError
from rlfeed.rollout import Rollout
from rlfeed.testing import IdentifiableEnv

pytestmark = pytest.mark.filterwarnings("ignore:.*open episodes did not come back:RuntimeWarning")


class Seeds(IdentifiableEnv):
    """Shows the seed of the episode in place of its number; it counts its resets, so no episode comes back."""

    seed = 0

    def reset(self, *, seed=None, options=None):
        self.seed = seed
        observation, info = super().reset(seed=seed)
        info["seed"] = seed
        return observation, info

    def step(self, action):
        observation, _, *rest = super().step(action)
        return observation, float(self.seed % 1000), *rest


def build(num_envs=2, seed=5, mode="random"):
    return Rollout(make_envs(Seeds, num_envs, kwargs={"lengths": (4,)}), lambda o: 1 / 0, seed=seed, mode=mode)


def read(rollout, count):
    return [
        (step.action.tolist(), step.reward.tolist(), step.is_first.tolist())
        for step in itertools.islice(rollout, count)
    ]


def seeds_of(episode):
    return [float(episode_seed(5, env, episode) % 1000) for env in range(2)]


def test_rollout_resumed_begins_the_next_episode_with_the_seed_it_would_have_had():
    rollout = build()
    read(rollout, 6)  # two steps into episode 1
    state = rollout.state_dict()
    assert state["environments"] == "re-enacted"
    assert state["next_episodes"].tolist() == [2, 2]
    resumed = build()
    with pytest.warns(RuntimeWarning, match="2 of 2 open episodes did not come back and are cut. env 0: restarted"):
        resumed.load_state_dict(state)
    assert all(way.startswith("restarted (played again it was another one") for way in resumed.comebacks)
    steps = read(resumed, 5)
    assert [step[1] for step in steps] == [seeds_of(2)] * 4 + [seeds_of(3)]
    assert [step[2] for step in steps] == [[True] * 2, [False] * 2, [False] * 2, [False] * 2, [True] * 2]
    assert resumed.env_steps == 12 + 10


def test_rollout_resumed_between_episodes_equals_the_uninterrupted_run():
    whole = build()
    steps = read(whole, 20)
    first = build()
    assert read(first, 8) == steps[:8]
    second = build()
    second.load_state_dict(first.state_dict())
    assert read(second, 12) == steps[8:]
    assert second.statistics.window == whole.statistics.window
    assert second.env_steps == whole.env_steps


def test_rollout_resumed_twice_plays_the_same_steps(tmp_path):
    rollout = build()
    read(rollout, 7)
    save_state(tmp_path / "rollout", rollout.state_dict())
    runs = []
    for _ in range(2):
        resumed = build()
        resumed.load_state_dict(load_state(tmp_path / "rollout"))
        runs.append((read(resumed, 30), list(resumed.statistics.window)))
    assert runs[0] == runs[1]


def test_rollout_state_is_not_changed_by_what_follows():
    rollout = build()
    read(rollout, 3)
    state = rollout.state_dict()
    generator = np.random.Generator(np.random.Philox())
    generator.bit_generator.state = state["generator"]
    read(rollout, 9)
    again = np.random.Generator(np.random.Philox())
    again.bit_generator.state = state["generator"]
    assert again.random() == generator.random()
    assert state["next_episodes"].tolist() == [1, 1]
    assert state["env_steps"] == 6


def test_rollout_loaded_in_mid_run_leaves_its_own_episodes():
    rollout = build()
    read(rollout, 3)
    state = rollout.state_dict()
    read(rollout, 10)
    rollout.load_state_dict(state)
    assert read(rollout, 1)[0][1:] == (seeds_of(1), [True, True])


@pytest.mark.parametrize("other", [{"seed": 6}, {"num_envs": 3}])
def test_rollout_state_of_another_run_is_refused(other):
    with pytest.raises(CheckpointError, match="Make it with the recorded ones"):
        build(**other).load_state_dict(build().state_dict())


def test_rollout_restart_cuts_episodes_and_their_statistics():
    rollout = build()
    read(rollout, 2)
    rollout.restart()
    steps = read(rollout, 4)
    assert steps[0][1:] == (seeds_of(1), [True, True])
    assert [record.length for record in rollout.statistics.window] == [4, 4]
