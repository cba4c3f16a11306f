"""An environment that breaks by plan, in any space, and what a pool of them must give: computed the slow way."""

import os
import signal

import numpy as np
from gymnasium import Env, spaces

from rlfeed.envs import episode_seed

ENVS, EPISODES, LENGTH = 6, 60, 5
SEEDS = {episode_seed(0, env, episode): (env, episode) for env in range(ENVS) for episode in range(EPISODES)}
RAISING = ("raise", "exit call", "interrupt", "no text", "nan", "shape", "flag", "values")
DEADLY = ("kill", "exit")
ACTIONS = 5


class NoTextError(Exception):
    """Cannot be pickled, and raises when somebody reads it."""

    def __init__(self):
        super().__init__(lambda: None)

    def __str__(self):
        raise RuntimeError("no text")


class BreakingEnv(Env):
    """Show (env, episode, step, last action) in every observation, and break where the plan says.

    Args:
        plan: ``{(env, episode, step): fault}``; step 0 is the reset, step -1 (of episode 0) the constructor of all.
        nested: Whether observations are nested.
        masked: Whether infos hold masks: the action must have the parity of the step.
    """

    action_space = spaces.Discrete(ACTIONS)

    def __init__(self, plan=(), nested=False, masked=False):
        self.plan, self.nested, self.masked = dict(plan), nested, masked
        vector = spaces.Box(-1e6, 1e6, (4,), np.float32)
        image = spaces.Box(0, 255, (3, 2), np.uint8)
        parts = spaces.Dict(a=vector, b=spaces.Tuple([image, spaces.Discrete(99)]))
        self.observation_space = parts if nested else vector
        self.at = self.last = 0

    def reset(self, *, seed=None, options=None):
        self.env, self.episode = SEEDS[seed]
        self.at, self.last = 0, -1
        self.fault()
        return self.observation(), self.info()

    def step(self, action):
        if self.masked:
            assert action % 2 == self.at % 2
        self.at, self.last = self.at + 1, int(action)
        fault = self.fault()
        observation = self.observation(np.nan if fault == "nan" else 0.0, 3 if fault == "shape" else 4)
        flag = None if fault == "flag" else self.at == LENGTH
        result = (observation, self.at / 8, flag, False, self.info())
        return result[:4] if fault == "values" else result

    def observation(self, error=0.0, size=4):
        vector = (np.array([self.env, self.episode, self.at, self.last]) + error).astype(np.float32)[:size]
        image = np.full((3, 2), (31 * self.env + 7 * self.episode + self.at) % 251, np.uint8)
        return {"a": vector, "b": (image, self.at)} if self.nested else vector

    def info(self):
        return {"action_mask": np.arange(ACTIONS) % 2 == self.at % 2} if self.masked else {}

    def fault(self):
        fault = self.plan.get((self.env, self.episode, self.at))
        if fault == "raise":
            raise ZeroDivisionError("the wheel came off")
        if fault == "exit call":
            raise SystemExit(3)
        if fault == "interrupt":
            raise KeyboardInterrupt
        if fault == "no text":
            raise NoTextError
        if fault == "hang":
            signal.pause()
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "exit":
            os._exit(7)
        return fault


class Twin:
    """Say what becomes of the environments of one worker, step by step.

    Args:
        rows: Its environments.
        plan: See `BreakingEnv`.
    """

    def __init__(self, rows, plan):
        self.rows, self.plan = list(rows), plan
        self.episode = dict.fromkeys(self.rows, 0)
        self.at = dict.fromkeys(self.rows, 0)
        self.faults = self.deaths = 0
        self.settle(self.begin(self.rows))

    def kind(self, row):
        fault = self.plan.get((row, self.episode[row], self.at[row]))
        return "dead" if fault in (*DEADLY, "hang") else "broken" if fault else None

    def begin(self, rows):
        """Reset rows; give what went wrong: rows that broke, and the row that took the process with it."""
        broken = []
        for row in rows:
            self.at[row] = 0
            kind = self.kind(row)
            if kind == "dead":
                return broken, row
            broken += [row] * (kind == "broken")
        return broken, None

    def settle(self, wrong):
        """Begin anew until all have begun; tell whether the process was replaced."""
        (broken, guilty), replaced = wrong, False
        while broken or guilty is not None:
            if guilty is None:
                self.faults += len(broken)
                for row in broken:
                    self.episode[row], self.at[row] = self.episode[row] + 1, 0
                broken, guilty = self.begin(broken)
                continue
            self.deaths += 1
            replaced = True
            for row in self.rows:
                self.episode[row] += self.at[row] > 0 or row == guilty
                self.at[row] = 0
            broken, guilty = self.begin(self.rows)
        return replaced

    def step(self):
        """Take a step; give (episode, step, fate) of every row; the fate is '', 'ended', 'lost' or 'cut'."""
        broken, guilty, fates = [], None, dict.fromkeys(self.rows, "")
        for row in self.rows:
            self.at[row] += 1
        for row in self.rows:
            kind = self.kind(row)
            if kind == "dead":
                guilty = row
                fates.update({other: "lost" for other in self.rows if other >= row})
                break
            if kind == "broken":
                broken.append(row)
                fates[row] = "lost"
            elif self.at[row] == LENGTH:
                fates[row] = "ended"
        told = {row: (self.episode[row], self.at[row]) for row in self.rows}
        over = [row for row in self.rows if fates[row] == "ended"]
        for row in over:
            self.episode[row] += 1
            self.at[row] = 0
        if guilty is None:
            later, guilty = self.begin(over)
            broken = sorted([*broken, *later])
        if self.settle((broken, guilty)):
            fates = {row: fate or "cut" for row, fate in fates.items()}
        return {row: (*told[row], fates[row]) for row in self.rows}
