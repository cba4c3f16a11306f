"""Environments that do what a script says, in any order of readiness; they remember what happened, plainly."""

import numpy as np
from gymnasium.spaces import Box, Discrete

from rlfeed.envs import Outcome, Ready

EVENTS = ("step", "step", "terminated", "truncated", "both", "lost", "cut")


class ScriptedEnvs:
    """Give ``[env, episode, step, last action]`` and the reward ``100 env + 10 episode + step``.

    ``script`` is asked with (call, env) for what becomes of an action: one of EVENTS, or "wait": not ready yet. Where
    all would wait, the first comes back with a plain step. ``log[env]`` lists what really happened, step by step.
    """

    name = "Scripted"
    observation_space = Box(-np.inf, np.inf, (4,), np.float32)
    action_space = Discrete(5)

    def __init__(self, num_envs, script):
        self.num_envs, self.script = num_envs, script
        self.log = [[] for _ in range(num_envs)]
        self.calls = 0
        self.raises = False

    def reset(self, seed, first_episodes):
        self.place = [[episode, 0, -1] for episode in first_episodes]
        self.waiting = [None] * self.num_envs
        self.ready = np.arange(self.num_envs)
        return self._ready(self.ready)

    def step(self, action):
        if self.raises:
            self.raises = False
            raise RuntimeError("broken")
        self.calls += 1
        for env, act in zip(self.ready, action, strict=True):
            self.waiting[env] = int(act)
        underway = [env for env in range(self.num_envs) if self.waiting[env] is not None]
        events = {env: self.script(self.calls, env) for env in underway}
        came = [env for env in underway if events[env] != "wait"] or underway[:1]
        rows = [self._step(env, events[env] if events[env] != "wait" else "step") for env in came]
        columns = [np.array(column) for column in zip(*rows, strict=True)]
        acted, self.ready = self.ready, np.array(came)
        lost, cut = columns[4], columns[5]
        plain = not any(column.any() for column in columns[2:])
        successor = columns[0].astype(np.float32)
        return Outcome(
            successor,
            columns[1].astype(np.float64),
            columns[2],
            columns[3],
            Ready(self.ready, successor) if plain else self._ready(self.ready),
            lost=lost if lost.any() else None,
            cut=cut if cut.any() else None,
            env_ids=None if np.array_equal(acted, self.ready) and len(underway) == len(came) else self.ready,
        )

    def close(self):
        pass

    def _observe(self, env):
        return (env, *self.place[env])

    def _ready(self, ids):
        return Ready(ids, np.array([self._observe(env) for env in ids], np.float32))

    def _step(self, env, event):
        before, act = self._observe(env), self.waiting[env]
        episode, t, _ = self.place[env]
        self.waiting[env], self.place[env] = None, [episode, t + 1, act]
        after = self._observe(env) if event != "lost" else (-1, -1, -1, -1)
        flags = (event in ("terminated", "both"), event in ("truncated", "both"), event == "lost", event == "cut")
        reward = 100.0 * env + 10.0 * episode + t
        self.log[env].append((before, act, reward, after, *flags))
        if event != "step":
            self.place[env] = [episode + 1, 0, -1]
        return (after, reward, *flags)
