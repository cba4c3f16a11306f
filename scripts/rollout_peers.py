"""Rollouts by other libraries, each used as its own documents and scripts do."""
# The peers are an extra; where they are not installed there is nothing to check their use against:
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import itertools
import logging
from typing import Any

import gymnasium
import numpy as np
import torch
from contestants import NotServedError
from gymnasium.spaces import Discrete
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from rollout_contestants import UNITS, Load, RolloutContestant, Run, draw_actions, network, spaces_of
from torch import Tensor, nn
from torch.distributions import Categorical


def require_discrete(env_id: str) -> int:
    """Check that actions have numbers.

    Args:
        env_id: The environment.

    Returns:
        How many there are.

    Raises:
        NotServedError: If not.
    """
    action = spaces_of(env_id)[1]
    if not isinstance(action, Discrete):
        raise NotServedError("written for numbered actions")
    return int(action.n)


class CleanRL(RolloutContestant):
    """Of CleanRL, which is no package but single files: the loop of its ``ppo.py``, call by call."""

    name = "CleanRL's loop"

    def blocks(self, load: Load) -> Run:
        """Collect blocks; see `RolloutContestant.blocks`."""
        require_discrete(load.env_id)
        agent = CleanAgent(load.env_id)
        recorded = gymnasium.wrappers.RecordEpisodeStatistics
        envs = self._keep(SyncVectorEnv([lambda: recorded(gymnasium.make(load.env_id))] * load.num_envs))
        obs = torch.zeros((load.length, load.num_envs, *envs.single_observation_space.shape))
        actions = torch.zeros((load.length, load.num_envs, *envs.single_action_space.shape))
        logprobs, rewards, over, values = (torch.zeros((load.length, load.num_envs)) for _ in range(4))
        next_obs, next_over = torch.Tensor(envs.reset(seed=1)[0]), torch.zeros(load.num_envs)

        def run() -> None:
            nonlocal next_obs, next_over
            for step in range(load.length):
                obs[step], over[step] = next_obs, next_over
                with torch.no_grad():
                    action, logprob, _, value = agent.get_action_and_value(next_obs)
                    values[step] = value.flatten()
                actions[step], logprobs[step] = action, logprob
                observation, reward, terminations, truncations, _ = envs.step(action.cpu().numpy())
                ended = np.logical_or(terminations, truncations)
                rewards[step] = torch.tensor(reward).view(-1)
                next_obs, next_over = torch.Tensor(observation), torch.Tensor(ended)

        return run


class CleanAgent(nn.Module):
    """Act as the agent of CleanRL's ``ppo.py`` does.

    Args:
        env_id: The environment.
    """

    def __init__(self, env_id: str) -> None:
        super().__init__()
        inputs = spaces_of(env_id)[0].shape[0]
        self.critic, self.actor = network(inputs, 1), network(inputs, require_discrete(env_id))

    def get_action_and_value(self, x: Tensor) -> tuple[Tensor, ...]:
        """Draw actions.

        Args:
            x: Observations.

        Returns:
            Actions, log-probabilities, entropies and values.
        """
        probs = Categorical(logits=self.actor(x))
        action = probs.sample()
        return action, probs.log_prob(action), probs.entropy(), self.critic(x)


class StableBaselines3(RolloutContestant):
    """Of Stable-Baselines3: `collect_rollouts` of its PPO, and of its DQN where a replay buffer is filled.

    Args:
        workers: Whether each environment has a process of its own.
    """

    name = "stable-baselines3"

    def __init__(self, *, workers: bool = False) -> None:
        super().__init__()
        from stable_baselines3 import DQN, PPO
        from stable_baselines3.common.env_util import make_vec_env
        from stable_baselines3.common.type_aliases import TrainFreq, TrainFrequencyUnit
        from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

        self._dqn, self._ppo, self._make = DQN, PPO, make_vec_env
        self._frequency = lambda length: TrainFreq(length, TrainFrequencyUnit.STEP)
        self._kind, self._kwargs = (SubprocVecEnv, {"start_method": "fork"}) if workers else (DummyVecEnv, {})
        self.name = f"stable-baselines3, {self._kind.__name__}"

    def _learner(self, kind: Any, load: Load, **kwargs: Any) -> tuple[Any, Any]:
        env = self._keep(self._make(load.env_id, load.num_envs, vec_env_cls=self._kind, vec_env_kwargs=self._kwargs))
        widths = {"net_arch": [UNITS, UNITS]}
        learner = kind("MlpPolicy", env, policy_kwargs=widths, device="cpu", **kwargs)
        _, callback = learner._setup_learn(10**9, None)
        callback.on_training_start({}, {})
        return learner, callback

    def blocks(self, load: Load) -> Run:
        """Collect blocks; see `RolloutContestant.blocks`."""
        learner, callback = self._learner(self._ppo, load, n_steps=load.length)
        return lambda: learner.collect_rollouts(learner.env, callback, learner.rollout_buffer, load.length)

    def store(self, load: Load, rows: int) -> Run:
        """Collect steps of a DQN; see `RolloutContestant.store`. It has no log-probabilities."""
        require_discrete(load.env_id)
        explore = {"exploration_fraction": 1e-9, "exploration_initial_eps": 0.05, "exploration_final_eps": 0.05}
        learner, callback = self._learner(
            self._dqn, load, buffer_size=rows, learning_starts=0, train_freq=load.length, **explore
        )
        learner.exploration_rate = 0.05
        frequency = self._frequency(load.length)
        return lambda: learner.collect_rollouts(learner.env, callback, frequency, learner.replay_buffer, None, 0)


class StableBaselines3PPO(StableBaselines3):
    """Of Stable-Baselines3: its PPO, whose buffer is no replay, where others fill one."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "stable-baselines3, PPO's buffer"

    def store(self, load: Load, rows: int) -> Run:
        """Collect blocks; see `RolloutContestant.store`."""
        return self.blocks(load)


class Tianshou(RolloutContestant):
    """Of Tianshou: its collector on environments in this process."""

    name = "tianshou"

    def __init__(self) -> None:
        super().__init__()
        from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
        from tianshou.data import Collector, VectorReplayBuffer
        from tianshou.env import DummyVectorEnv
        from tianshou.utils.net.common import Net
        from tianshou.utils.net.discrete import DiscreteActor

        self._policy, self._collector, self._buffer = ProbabilisticActorPolicy, Collector, VectorReplayBuffer
        self._vector, self._net, self._actor = DummyVectorEnv, Net, DiscreteActor
        logging.getLogger("tianshou").setLevel(logging.ERROR)

    def store(self, load: Load, rows: int) -> Run:
        """Collect steps; see `RolloutContestant.store`. It stores no log-probabilities."""
        count, (observation, action) = require_discrete(load.env_id), spaces_of(load.env_id)
        net = self._net(state_shape=observation.shape, hidden_sizes=[UNITS, UNITS], activation=nn.Tanh)
        policy = self._policy(
            actor=self._actor(preprocess_net=net, action_shape=count, softmax_output=False),
            dist_fn=lambda logits: Categorical(logits=logits),
            action_space=action,
            action_scaling=False,
            action_bound_method=None,
        )
        envs = self._keep(self._vector([lambda: gymnasium.make(load.env_id)] * load.num_envs))
        collector = self._collector(policy, envs, self._buffer(rows, load.num_envs))
        collector.reset()
        return lambda: collector.collect(n_step=load.steps)


class TorchRL(RolloutContestant):
    """Of TorchRL: its collector on Gymnasium's synchronous vector environment, the fastest of its kinds here."""

    name = "torchrl"

    def __init__(self) -> None:
        super().__init__()
        from tensordict.nn import TensorDictModule
        from torchrl.collectors import Collector
        from torchrl.data import LazyTensorStorage, ReplayBuffer
        from torchrl.envs import GymEnv
        from torchrl.envs.utils import ExplorationType
        from torchrl.modules import OneHotCategorical, ProbabilisticActor

        self._module, self._actor, self._distribution = TensorDictModule, ProbabilisticActor, OneHotCategorical
        self._random, self._env, self._collector = ExplorationType.RANDOM, GymEnv, Collector
        self._buffer = lambda rows: ReplayBuffer(storage=LazyTensorStorage(rows), batch_size=256)

    def store(self, load: Load, rows: int) -> Run:
        """Collect steps; see `RolloutContestant.store`."""
        net = network(spaces_of(load.env_id)[0].shape[0], require_discrete(load.env_id))
        policy = self._actor(
            self._module(net, ["observation"], ["logits"]),
            in_keys=["logits"],
            distribution_class=self._distribution,
            return_log_prob=True,
            default_interaction_type=self._random,
        )
        env = self._env(load.env_id) if load.num_envs == 1 else self._env(load.env_id, num_envs=load.num_envs)
        collector = self._collector(env, policy, frames_per_batch=load.steps, total_frames=-1)
        self._open.append(Shutdown(collector))
        batches, buffer = iter(collector), self._buffer(rows)
        return lambda: buffer.extend(next(batches).reshape(-1))


class Shutdown:
    """Close a collector of TorchRL.

    Args:
        collector: Which.
    """

    def __init__(self, collector: Any) -> None:
        self._collector = collector

    def close(self) -> None:
        """Shut it down."""
        self._collector.shutdown()


class Gymnasium(RolloutContestant):
    """Of Gymnasium: its vector environments, a process for each environment or none.

    Args:
        workers: Whether each environment has a process of its own.
    """

    def __init__(self, *, workers: bool) -> None:
        super().__init__()
        self._kind = AsyncVectorEnv if workers else SyncVectorEnv
        self.name = f"gymnasium, {self._kind.__name__}"

    def step(self, load: Load) -> Run:
        """Step environments; see `RolloutContestant.step`. The step after an end is none, and counts."""
        envs = self._keep(self._kind([lambda: gymnasium.make(load.env_id)] * load.num_envs))
        return stepping(envs, draw_actions(load), load.length)


class EnvPool(RolloutContestant):
    """Of EnvPool, which has environments of its own in C++.

    Args:
        threads: That step them.
    """

    name = "envpool"

    def __init__(self, threads: int) -> None:
        super().__init__()
        import envpool

        self._library, self._threads, self.name = envpool, threads, f"envpool, {threads} threads"

    def step(self, load: Load) -> Run:
        """Step environments; see `RolloutContestant.step`. The step after an end is none, and counts."""
        if load.env_id not in self._library.list_all_envs():
            raise NotServedError(f"it has no {load.env_id}")
        envs = self._keep(self._library.make_gymnasium(load.env_id, num_envs=load.num_envs, num_threads=self._threads))
        discrete = isinstance(spaces_of(load.env_id)[1], Discrete)
        return stepping(envs, draw_actions(load, dtype=np.int32 if discrete else np.float64), load.length)


def stepping(envs: Any, actions: list[np.ndarray], length: int) -> Run:
    """Step a vector environment.

    Args:
        envs: The environments.
        actions: To cycle through.
        length: Steps a run.

    Returns:
        Takes them.
    """
    envs.reset()
    drawn = itertools.cycle(actions)

    def run() -> None:
        for action in itertools.islice(drawn, length):
            envs.step(action)

    return run
