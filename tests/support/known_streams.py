"""The steps that identifiable environments must give, said slowly and plainly; and how to read them off a rollout."""

import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from support.foreign_envs import FakePool

from rlfeed.envs import SerialEnvs, VectorEnvs, as_envs
from rlfeed.testing import IdentifiableEnv

AUTORESETS = ("serial", "same_step", "next_step", "disabled")


def act(observation):
    """Choose an action that differs between neighbouring steps: (episode + step) % 5."""
    vector = observation["vector"] if isinstance(observation, dict) else observation
    return ((vector[:, 1] + vector[:, 2]) % 5).astype(np.int64)


def expected_stream(env, lengths, ends, count):
    """List the first steps of one environment as plain tuples."""
    steps = []
    episode = 0
    while len(steps) < count:
        length, end = lengths[episode % len(lengths)], ends[episode % len(ends)]
        last_action = -1
        for t in range(length):
            action = (episode + t) % 5
            over = t + 1 == length
            steps.append(
                {
                    "observation": (env, episode, t, last_action),
                    "action": action,
                    "reward": np.float32(1000.0 * env + 10.0 * episode + (t + 1) / 100),
                    "next_observation": (env, episode, t + 1, action),
                    "terminated": over and end != "truncated",
                    "truncated": over and end != "terminated",
                    "is_first": t == 0,
                }
            )
            last_action = action
        episode += 1
    return steps[:count]


def read_streams(rollout, count):
    """Take steps until every environment has given ``count``, and sort them by environment."""
    streams = [[] for _ in range(rollout.num_envs)]
    while min(map(len, streams)) < count:
        step = next(rollout)
        for row, env in enumerate(step.env_ids):
            vector, successor = step.observation, step.next_observation
            if isinstance(vector, dict):
                vector, successor = vector["vector"], successor["vector"]
            streams[env].append(
                {
                    "observation": tuple(int(x) for x in vector[row]),
                    "action": int(step.action[row]),
                    "reward": step.reward[row],
                    "next_observation": tuple(int(x) for x in successor[row]),
                    "terminated": bool(step.terminated[row]),
                    "truncated": bool(step.truncated[row]),
                    "is_first": bool(step.is_first[row]),
                }
            )
    return [stream[:count] for stream in streams]


def identifiable_envs(layout, num_envs, **kwargs):
    """Make numbered identifiable environments in one of the layouts of AUTORESETS, or as EnvPool's ("envpool")."""
    if layout == "envpool":
        return as_envs(FakePool([IdentifiableEnv(env, **kwargs) for env in range(num_envs)]))
    if layout == "serial":
        return SerialEnvs([IdentifiableEnv(env, **kwargs) for env in range(num_envs)])
    makers = [lambda env=env: IdentifiableEnv(env, **kwargs) for env in range(num_envs)]
    modes = {
        "same_step": AutoresetMode.SAME_STEP,
        "next_step": AutoresetMode.NEXT_STEP,
        "disabled": AutoresetMode.DISABLED,
    }
    return VectorEnvs(SyncVectorEnv(makers, autoreset_mode=modes[layout]))
