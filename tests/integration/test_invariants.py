"""I1, I2, I3, I8 and I9 over the whole path: every autoreset mode, a buffer wrapped several times, a DataLoader."""

import itertools

import numpy as np
import pytest
import torch
from support.known_streams import AUTORESETS, act, identifiable_envs
from torch.utils.data import DataLoader

from rlfeed import Episode, ReplayBuffer, ReplayDataset, Rollout, Transition, pad_collate

LENGTHS, ENDS = (3, 1, 5, 2), ("terminated", "truncated", "both")
ROWS = 41  # per lane
STEPS = 150  # per environment: the lane is overwritten more than four times


def collected(layout, num_envs, observation):
    envs = identifiable_envs(layout, num_envs, lengths=LENGTHS, ends=ENDS, observation=observation)
    buffer = ReplayBuffer(envs.observation_space, envs.action_space, capacity=ROWS * num_envs, num_envs=num_envs)
    rollout = Rollout(envs, act)
    counts = np.zeros(num_envs, int)
    for step in rollout:
        keep = counts[step.env_ids] < STEPS
        counts[step.env_ids] += keep
        buffer.add(step)
        if (counts == STEPS).all() or not keep.all():
            break
    rollout.close()
    return buffer


def stored_steps(env):
    """The (episode, step) of every step that a lane of ROWS rows still holds, by counting rows backwards."""
    rows, steps, episode = [], 0, 0
    while steps < STEPS:
        length = min(LENGTHS[episode % 4], STEPS - steps)
        rows += [(episode, t) for t in range(length)]
        rows.append(None)  # the closing row, or the open one
        steps += length
        episode += 1
    return {row for row in rows[-ROWS:] if row is not None}


def check_step(vector, successor, action, reward, terminated, truncated):
    """Everything that a step of environment e, episode k, step t must be, from its observation alone."""
    env, episode, t, _ = (int(x) for x in vector)
    over = t + 1 == LENGTHS[episode % 4]
    end = ENDS[episode % 3]
    assert action == (episode + t) % 5
    assert [int(x) for x in successor] == [env, episode, t + 1, action]
    assert reward == np.float32(1000.0 * env + 10.0 * episode + (t + 1) / 100)
    assert terminated == (over and end != "truncated")
    assert truncated == (over and end != "terminated")
    return env, episode, t


def part(observation, name="vector"):
    return observation[name] if isinstance(observation, dict) else observation


@pytest.mark.parametrize("observation", ["box", "dict"])
@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("layout", AUTORESETS)
def test_every_stored_step_arrives_exactly_as_the_environment_gave_it(layout, num_envs, observation):
    """B5, B6, B14, B48: true successors although observations are stored once, each reward with its own step."""
    buffer = collected(layout, num_envs, observation)
    expected = {(env, *step) for env in range(num_envs) for step in stored_steps(env)}
    assert (buffer.stats().inserted, len(buffer)) == (STEPS * num_envs, len(expected))

    loader = DataLoader(ReplayDataset(buffer, Transition(gamma=0.9)), batch_size=64, collate_fn=pad_collate)
    seen = set()
    for batch in itertools.islice(loader, 12 * num_envs):
        for i in range(64):
            vectors = part(batch.observation)[i], part(batch.next_observation)[i]
            flags = batch.terminated[i].item(), batch.truncated[i].item()
            seen.add(check_step(*vectors, batch.action[i].item(), batch.reward[i].numpy(), *flags))
        assert torch.equal(batch.discount, torch.where(batch.terminated, 0.0, torch.tensor(0.9)))
        if observation == "dict":
            numbers = part(batch.next_observation).long()
            image = (31 * numbers[:, 0] + 7 * numbers[:, 1] + numbers[:, 2]) % 251
            assert torch.equal(batch.next_observation["image"], image.byte()[:, None, None, None].expand(-1, 8, 8, 1))
    assert seen == expected


@pytest.mark.parametrize("layout", AUTORESETS)
def test_n_step_sums_stop_at_either_end_and_bootstrap_at_truncation_only(layout):
    """B7, B8, B9, B11: the discount is gamma^k of the k steps summed; the last steps begin sums too."""
    buffer = collected(layout, 2, "box")
    batch = buffer.sample(512, Transition(n_step=3, gamma=0.5))
    for i in range(512):
        env, episode, t, _ = (int(x) for x in batch.observation[i])
        length, end = LENGTHS[episode % 4], ENDS[episode % 3]
        count = min(3, length - t)
        rewards = [1000.0 * env + 10.0 * episode + (t + j + 1) / 100 for j in range(count)]
        assert batch.reward[i].item() == pytest.approx(sum(0.5**j * r for j, r in enumerate(rewards)), rel=1e-6)
        assert batch.next_observation[i, :3].tolist() == [env, episode, t + count]
        over = t + count == length
        assert batch.discount[i].item() == (0.0 if over and end != "truncated" else 0.5**count)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("layout", AUTORESETS)
def test_episodes_are_whole_and_padded_with_zeros(layout, num_workers):
    buffer = collected(layout, 2, "dict")
    dataset = ReplayDataset(buffer, Episode(gamma=0.9))
    loader = DataLoader(dataset, batch_size=16, collate_fn=pad_collate, num_workers=num_workers)
    iterator = iter(loader)
    for batch in itertools.islice(iterator, 6):
        assert batch.mask.sum(1).tolist() == batch.lengths.tolist()
        assert part(batch.observation).shape[1] == batch.reward.shape[1] + 1
        for i, length in enumerate(batch.lengths.tolist()):
            vectors = part(batch.observation)[i]
            env, episode = int(vectors[0, 0]), int(vectors[0, 1])
            assert length == LENGTHS[episode % 4]
            assert vectors[: length + 1, 2].tolist() == list(range(length + 1))
            assert (vectors[: length + 1, 0] == env).all()
            for t in range(length):
                check_step(
                    vectors[t], vectors[t + 1], batch.action[i, t].item(), batch.reward[i, t].numpy(),
                    batch.terminated[i, t].item(), batch.truncated[i, t].item(),
                )  # fmt: skip
            assert not vectors[length + 1 :].any()
            assert not part(batch.observation, "image")[i, length + 1 :].any()
            assert not batch.reward[i, length:].any()
            assert not batch.discount[i, length:].any()
            assert batch.is_first[i].tolist() == [t == 0 for t in range(batch.reward.shape[1])]
    del iterator
