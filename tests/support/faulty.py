"""Environments that break when they are told to: the last digit that an action names, or the step they are at."""

import os
import signal
import time

import numpy as np
from gymnasium import spaces

from rlfeed.testing import IdentifiableEnv

FAULTS = ("raise", "nan", "shape", "dtype", "outside", "reward", "flag", "values", "hang", "kill", "exit", "segfault")
IN_PROCESS = FAULTS[:8]


class FaultyEnv(IdentifiableEnv):
    """An `IdentifiableEnv` that breaks at some steps of some episodes.

    Args:
        env: Its number.
        plan: ``{(episode, step): fault}``; step 0 is the reset. The episode is told by the seed it begins with.
        seeds: Which seed belongs to which (env, episode).
    """

    def __init__(self, env=0, plan=(), seeds=None, lengths=(6,), **kwargs):
        super().__init__(env, lengths=lengths, ends=("terminated",), **kwargs)
        self.plan, self.seeds = dict(plan), seeds or {}
        self.observation_space = spaces.Box(-1e6, 1e6, (4,), np.float32)

    def reset(self, *, seed=None, options=None):
        _, info = super().reset(seed=seed)
        self.env, self.episode = self.seeds.get(seed, (self.env, self.episode))
        self.break_at(0)
        return self._observation(), info

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        fault = self.break_at(self.step_in_episode)
        if fault == "nan":
            observation = np.full(4, np.nan, np.float32)
        elif fault == "shape":
            observation = observation[:3]
        elif fault == "dtype":
            observation = observation.astype(object)
        elif fault == "outside":
            observation = np.full(4, 1e9, np.float32)
        elif fault == "reward":
            reward = float("inf")
        elif fault == "flag":
            terminated = None
        elif fault == "values":
            return observation, reward, terminated, info
        return observation, reward, terminated, truncated, info

    def break_at(self, step):
        fault = self.plan.get((self.env, self.episode, step))
        if fault == "raise":
            raise ZeroDivisionError("the wheel came off")
        if fault == "hang":
            time.sleep(3600)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if fault == "exit":
            os._exit(7)
        return fault
