"""Stand-ins for other people's environments, with the conventions that the real ones were seen to have."""

import warnings

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from rlfeed.testing import IdentifiableEnv


class FakePool(VectorEnv, gymnasium.Env):
    """EnvPool 1.2.5: an Env and a VectorEnv at once, whose plain spaces are those of one environment.

    Rewards are float32, truncation hides termination, the step after an end resets (reward 0, elapsed_step 0), a seed
    given to reset is a warning, infos have no "_key" masks, and the spec has no id.
    """

    metadata = {"render_modes": ["rgb_array"], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, envs, batch_size=None, players=1):
        self.envs, self.spec = envs, object()
        self.config = {"num_envs": len(envs), "batch_size": batch_size or len(envs), "max_num_players": players}
        self.elapsed, self.over = np.zeros(len(envs), np.int32), np.zeros(len(envs), bool)
        self.observation_space = self.single_observation_space = envs[0].observation_space
        self.action_space = self.single_action_space = envs[0].action_space
        self.closed = False

    @property
    def num_envs(self):
        return len(self.envs)

    @property
    def all_env_ids(self):
        return np.arange(self.num_envs, dtype=np.int32)

    def async_reset(self):
        raise AssertionError("this pool is not asynchronous")

    def reset(self, env_id=None, *, seed=None, options=None):
        if seed is not None:
            warnings.warn("EnvPool seeds are fixed when the environment is created.", stacklevel=2)
        self.elapsed[:], self.over[:] = 0, False
        return np.stack([env.reset()[0] for env in self.envs]), self.infos()

    def step(self, action, env_id=None):
        rows = [self.step_one(row, action[row]) for row in range(self.num_envs)]
        observations, rewards, terminated, truncated = map(np.array, zip(*rows, strict=True))
        self.over = terminated | truncated
        return observations, rewards.astype(np.float32), terminated & ~truncated, truncated, self.infos()

    def step_one(self, row, action):
        if self.over[row]:
            self.elapsed[row] = 0
            return self.envs[row].reset()[0], 0.0, False, False
        self.elapsed[row] += 1
        return self.envs[row].step(action)[:4]

    def infos(self):
        return {
            "env_id": self.all_env_ids,
            "players": {"env_id": self.all_env_ids},
            "elapsed_step": self.elapsed.copy(),
        }

    def close(self, **kwargs):
        self.closed = True


class FakeAtari(VectorEnv):
    """ale-py 0.12.1: one seed for each row at a reset, int32 rewards, final observations batched for all rows.

    It writes its mode into the metadata that every vector environment inherits.
    """

    def __init__(self, num_envs=1, *, autoreset_mode=AutoresetMode.NEXT_STEP, batch_size=0, lengths=(3, 1, 2)):
        self.envs = [IdentifiableEnv(env, lengths=lengths) for env in range(num_envs)]
        self.ale, self.spec = object(), None
        self.num_envs, self.batch_size = num_envs, batch_size or num_envs
        self.single_observation_space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata["autoreset_mode"] = self.autoreset_mode
        self.over, self.seeds = [False] * num_envs, []

    def reset(self, *, seed=None, options=None):
        assert isinstance(seed, np.ndarray)
        assert seed.shape == (self.num_envs,)
        self.seeds.append(seed.tolist())
        self.over = [False] * self.num_envs
        return np.stack([env.reset()[0] for env in self.envs]), {}

    def step(self, actions):
        same = self.autoreset_mode is AutoresetMode.SAME_STEP
        results = [
            (env.reset()[0], 0.0, False, False, {}) if over else env.step(action)
            for env, action, over in zip(self.envs, actions, self.over, strict=True)
        ]
        observations, rewards, terminated, truncated = (np.array([r[i] for r in results]) for i in range(4))
        ended, infos = terminated | truncated, {"lives": np.zeros(self.num_envs, np.int32)}
        if same and ended.any():
            infos["final_obs"] = observations.copy()
            for row in np.flatnonzero(ended):
                observations[row] = self.envs[row].reset()[0]
        self.over = [False] * self.num_envs if same else ended.tolist()
        return observations, rewards.astype(np.int32), terminated, truncated, infos


class Troop:
    """A parallel environment as PettingZoo's, whose agents leave after ``lives`` steps: the first after the first.

    Observations are float32 ``[copy, agent, episode, step]``, rewards ``1000 copy + 100 agent + 10 episode + step``.
    An odd agent leaves truncated, an even one terminated. Agent a comes at step ``comes[a]``.
    """

    metadata = {"name": "troop_v0"}  # noqa: RUF012

    def __init__(self, copy=0, *, lives=(1, 3, 2), comes=(0, 0, 0), masked=False):
        self.copy, self.lives, self.comes, self.masked = copy, lives, comes, masked
        self.possible_agents = [f"walker_{i}" for i in range(len(lives))]
        self.agents, self.episode, self.t, self.seeds, self.actions = [], -1, 0, [], []
        self.render_mode = None
        self.spaces = spaces.Box(-np.inf, np.inf, (4,), np.float32), spaces.Discrete(3)

    @property
    def unwrapped(self):
        return self

    def observation_space(self, agent):
        return self.spaces[0]

    def action_space(self, agent):
        return self.spaces[1]

    def reset(self, seed=None, options=None):
        self.episode, self.t = self.episode + 1, 0
        self.seeds.append(seed)
        self.agents = self.there()
        return self.observe(self.agents), self.infos(self.agents)

    def step(self, actions):
        assert sorted(actions) == sorted(self.agents), (actions, self.agents)  # of nobody else, and of all
        self.actions.append(dict(actions))
        self.t += 1
        acted, numbers = self.agents, {agent: i for i, agent in enumerate(self.possible_agents)}
        over = {agent: self.t == self.comes[numbers[agent]] + self.lives[numbers[agent]] for agent in acted}
        rewards = {a: 1000.0 * self.copy + 100 * numbers[a] + 10 * self.episode + self.t for a in acted}
        self.agents = self.there()
        everybody = [*acted, *(agent for agent in self.agents if agent not in acted)]
        return (
            self.observe(everybody),
            rewards,
            {agent: over[agent] and numbers[agent] % 2 == 0 for agent in acted},
            {agent: over[agent] and numbers[agent] % 2 == 1 for agent in acted},
            self.infos(everybody),
        )

    def there(self):
        ages = [(agent, self.t - come, life) for agent, come, life in zip(self.possible_agents, self.comes, self.lives)]  # noqa: B905
        return [agent for agent, age, life in ages if 0 <= age < life]

    def observe(self, agents):
        numbers = {agent: i for i, agent in enumerate(self.possible_agents)}
        return {a: np.array([self.copy, numbers[a], self.episode, self.t], np.float32) for a in agents}

    def infos(self, agents):
        return {a: {"action_mask": np.arange(3) == self.t % 3} if self.masked else {} for a in agents}

    def close(self):
        self.agents = []
