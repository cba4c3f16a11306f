"""I1, I2, I3 where steps are born: the same steps in every autoreset mode, and they are the true ones."""

import itertools

import numpy as np
import pytest
from support.known_streams import AUTORESETS, act, expected_stream, identifiable_envs, read_streams

from rlfeed.envs import episode_seed, make_envs
from rlfeed.rollout import Rollout
from rlfeed.testing import IdentifiableEnv

LENGTHS = (3, 1, 5, 1, 1, 2)
ENDS = ("terminated", "truncated", "both")


@pytest.mark.parametrize("observation", ["box", "dict"])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("layout", AUTORESETS)
def test_rollout_any_autoreset_mode_gives_the_true_steps(layout, num_envs, observation):
    """B25."""
    envs = identifiable_envs(
        layout, num_envs, lengths=LENGTHS, ends=ENDS, observation=observation, reuse_arrays=layout == "serial"
    )
    streams = read_streams(Rollout(envs, act), 40)
    assert streams == [expected_stream(env, LENGTHS, ENDS, 40) for env in range(num_envs)]


def test_rollout_next_step_mode_leaves_resetting_rows_out_of_the_step():
    # Env 0 ends every second step, env 1 never within the test: while env 0 is reset only env 1 steps.
    """B25."""
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    makers = [lambda: IdentifiableEnv(0, lengths=(2,)), lambda: IdentifiableEnv(1, lengths=(50,))]
    rollout = Rollout(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP), act)
    ids = [step.env_ids.tolist() for step in itertools.islice(rollout, 6)]
    assert ids == [[0, 1], [0, 1], [1], [0, 1], [0, 1], [1]]
    assert rollout.env_steps == 10


def test_rollout_steps_kept_are_not_written_again():
    """B10."""
    rollout = Rollout(identifiable_envs("serial", 2, lengths=(2, 3), reuse_arrays=True), act)
    kept = list(itertools.islice(rollout, 12))
    then = [(s.observation.copy(), s.action.copy(), s.reward.copy(), s.next_observation.copy()) for s in kept]
    for _ in itertools.islice(rollout, 12):
        pass
    for step, (observation, action, reward, successor) in zip(kept, then, strict=True):
        np.testing.assert_array_equal(step.observation, observation)
        np.testing.assert_array_equal(step.action, action)
        np.testing.assert_array_equal(step.reward, reward)
        np.testing.assert_array_equal(step.next_observation, successor)


def test_vector_envs_that_reuse_their_arrays_give_steps_that_stay():
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

    makers = [lambda env=env: IdentifiableEnv(env, lengths=(4, 2)) for env in range(2)]
    envs = SyncVectorEnv(makers, copy=False, autoreset_mode=AutoresetMode.SAME_STEP)
    assert read_streams(Rollout(envs, act), 20) == [expected_stream(env, (4, 2), ENDS, 20) for env in range(2)]


@pytest.mark.parametrize("autoreset", ["same_step", "next_step", "disabled"])
def test_make_envs_any_mode_plays_the_same_seeded_episodes(autoreset):
    def streams(**layout):
        envs = make_envs(IdentifiableEnv, 3, kwargs={"lengths": ()}, **layout)
        return read_streams(Rollout(envs, act, seed=7), 30)

    serial = streams(mode="serial")
    lengths = [[s["next_observation"][2] for s in stream if s["terminated"] or s["truncated"]] for stream in serial]
    assert lengths[0] != lengths[1]
    expected = [int(np.random.default_rng(episode_seed(7, 2, episode)).integers(1, 7)) for episode in range(5)]
    assert lengths[2][:5] == expected
    assert streams(mode="sync", autoreset=autoreset) == serial


def test_make_envs_async_processes_play_the_same_episodes_from_a_file(tmp_path):
    file = tmp_path / "drawn.py"
    file.write_text(
        "from rlfeed.testing import IdentifiableEnv\n"
        "class Drawn(IdentifiableEnv):\n"
        "    def __init__(self): super().__init__(lengths=())\n"
    )
    streams = []
    for layout in ({"mode": "serial"}, {"mode": "async", "autoreset": "next_step"}):
        rollout = Rollout(make_envs(f"{file}:Drawn", 2, **layout), act, seed=3)
        streams.append(read_streams(rollout, 15))
        rollout.close()
    assert streams[0] == streams[1]


def test_episode_seed_other_run_environment_or_episode_gives_another_seed():
    seeds = {episode_seed(*key) for key in itertools.product(range(3), range(3), range(3))}
    assert len(seeds) == 27
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_rollout_environments_number_of_others_does_not_change_an_episode():
    """(h)."""
    few = read_streams(Rollout(make_envs(IdentifiableEnv, 1, kwargs={"lengths": ()}), act), 20)
    many = read_streams(Rollout(make_envs(IdentifiableEnv, 3, kwargs={"lengths": ()}), act), 20)
    assert many[0] == few[0]
