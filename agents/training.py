"""Put a run together from its configuration: environments, agent, replay, source of steps, and the loop."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from agents.config import BlockTrainConfig, EnvConfig, ReplayTrainConfig, TrainConfig
from rlfeed.envs import Envs, NormalizedEnvs, make_envs
from rlfeed.errors import ConfigError
from rlfeed.feed.device import choose_device
from rlfeed.replay import ReplayBuffer, Uniform
from rlfeed.replay.in_order import InOrder
from rlfeed.rollout import Actors, Rollout, Weights
from rlfeed.rollout.acting import VERSION_COLUMN
from rlfeed.specs import ArraySpec
from rlfeed.train.agent import Agent, BlockAgent, ReplayAgent
from rlfeed.train.block_loop import BlockLoop
from rlfeed.train.collectors import ActorBlocks
from rlfeed.train.evaluate import Evaluation, evaluate
from rlfeed.train.loop import Loop
from rlfeed.train.replay_loop import ReplayLoop
from rlfeed.types import Logger, Policy

EVALUATION_ENVS = 5  # at most: enough to share the cost of a policy's calls


@dataclass(frozen=True)
class Parts:
    """Hold what a run is built of before anything is written.

    Args:
        envs: To train on.
        evaluation_envs: To evaluate on.
        agent: What learns.
        device: Where.
        why: It is that device.
    """

    envs: Envs
    evaluation_envs: Envs
    agent: Agent
    device: torch.device
    why: str

    def close(self) -> None:
        """Close the environments."""
        self.envs.close()
        self.evaluation_envs.close()


class Silence:
    """Take curves and drop them: a `Logger`."""

    def scalar(self, tag: str, value: float, env_steps: int) -> None:
        """Drop a value; see `Logger`."""

    def flush(self) -> None:
        """Do nothing; see `Logger`."""

    def close(self) -> None:
        """Do nothing; see `Logger`."""


def train(config: TrainConfig, *, env: Any = None, logger: Logger | None = None) -> tuple[Agent, Evaluation]:
    """Train as a configuration says, in memory: no run directory, no checkpoints.

    Args:
        config: The run.
        env: Makes one environment, where it has no name: a function without arguments; default the one of ``config``.
        logger: Receives the curves.

    Returns:
        The trained agent, and what its last evaluation found.

    Raises:
        ConfigError: If the run ended without an evaluation.
    """
    torch.set_num_threads(1)  # as scripts/train.py has it
    parts = build_parts(config, env)
    buffer = new_buffer(config, parts)
    source = new_source(config, parts, buffer, env)
    try:
        loop = new_loop(config, parts, source, buffer, logger=logger or Silence())
        loop.run()
    finally:
        source.close()
        parts.close()
    if loop.evaluation is None:
        raise ConfigError("train: the run ended without an evaluation; expected at least one.")
    return parts.agent, loop.evaluation


def build_envs(config: EnvConfig, num_envs: int, *, env: Any = None, first_env_id: int = 0) -> Envs:
    """Make the environments of a run, wrapped and normalised as its settings say.

    Args:
        config: The settings.
        num_envs: How many.
        env: Makes one, in place of the settings' id.
        first_env_id: The number of the first one.

    Returns:
        The environments.
    """
    envs = make_envs(
        config.id if env is None else env,
        num_envs,
        kwargs=config.kwargs,
        wrappers=config.wrappers,
        mode=config.mode,
        layout=config.layout if num_envs == config.num_envs else "auto",  # evaluations have fewer
        on_fault=config.on_fault,
        max_restarts=config.max_restarts,
        step_timeout_s=config.step_timeout_s,
        first_env_id=first_env_id,
    )
    if not (config.normalize_observation or config.normalize_reward):
        return envs
    return NormalizedEnvs(envs, observation=config.normalize_observation, reward=config.normalize_reward)


def build_parts(config: TrainConfig, env: Any = None) -> Parts:
    """Make environments and agent.

    Args:
        config: The run.
        env: Makes one environment, in place of the configuration's id.

    Returns:
        The parts.

    Raises:
        SpaceError: If the agent cannot play these spaces.
    """
    device, why = choose_device(config.device)
    if config.actors:  # their environments are made in their processes; here one shows the spaces
        envs = build_envs(replace(config.env, mode="serial", layout="auto"), 1, env=env)
    else:
        envs = build_envs(config.env, config.env.num_envs, env=env)
    evaluation_envs = build_envs(config.env, min(config.eval_episodes, EVALUATION_ENVS), env=env)
    if isinstance(envs, NormalizedEnvs) and isinstance(evaluation_envs, NormalizedEnvs):
        evaluation_envs = envs.evaluation(evaluation_envs.envs)
    try:
        agent = build_agent(config, envs.observation_space, envs.action_space, device, _rows(config, envs))
    except BaseException:
        envs.close()
        evaluation_envs.close()
        raise
    return Parts(envs, evaluation_envs, agent, device, why)


def build_agent(
    config: TrainConfig, observation_space: Any, action_space: Any, device: torch.device, num_envs: int
) -> Agent:
    """Make the agent.

    Args:
        config: The run.
        observation_space: Of one environment.
        action_space: Of one environment.
        device: Where it learns and acts.
        num_envs: Environments that step together.

    Returns:
        The agent, untrained.
    """
    return config.agent.build(
        observation_space,
        action_space,
        total_steps=config.total_steps,
        seed=config.seed,
        device=device,
        num_envs=num_envs,
    )


def new_buffer(config: TrainConfig, parts: Parts, storage: Any = "shared") -> ReplayBuffer | None:
    """Make the replay of a run.

    Args:
        config: The run.
        parts: Its environments and agent.
        storage: Where rows lie, as `ReplayBuffer` has it.

    Returns:
        The replay; for blocks what actors write and the learner reads once, and None without actors.
    """
    agent: Any = parts.agent
    run: Any = config
    versions = {VERSION_COLUMN: ArraySpec((), np.dtype(np.int64))} if config.actors else {}
    rows = _rows(config, parts.envs) * max(config.actors, 1)
    if isinstance(config, ReplayTrainConfig):
        capacity, sampler = config.capacity, agent.sampler
    elif config.actors:
        # One lane may have all that actors may be ahead by, in episodes of one step, which take two rows each.
        capacity, sampler = rows * 2 * (config.actors_ahead + rows + run.block_length + 1), Uniform()
    else:
        return None
    return ReplayBuffer(
        parts.envs.observation_space,
        parts.envs.action_space,
        capacity=capacity,
        num_envs=rows,
        sampler=sampler,
        extras={**agent.columns, **versions},
        storage=storage,
        seed=config.seed,
    )


def new_source(config: TrainConfig, parts: Parts, buffer: ReplayBuffer | None, env: Any = None) -> Rollout | Actors:
    """Make what steps: a rollout in this process, or actors in theirs.

    Args:
        config: The run.
        parts: Its environments and agent.
        buffer: Where actors store their steps.
        env: Makes one environment, in place of the configuration's id.

    Returns:
        The source of steps.
    """
    if not config.actors or buffer is None:
        return Rollout(parts.envs, parts.agent.policy, seed=config.seed, actions=parts.agent.actions)
    spaces = parts.envs.observation_space, parts.envs.action_space
    return Actors(
        partial(_actor_envs, config.env, env),
        partial(_actor_policy, config, *spaces),
        buffer,
        Weights(parts.agent.actor(0, 1)[1]),
        num_actors=config.actors,
        envs_per_actor=_rows(config, parts.envs),
        seed=config.seed,
        actions=parts.agent.actions,
        step_timeout_s=2 * config.env.step_timeout_s,  # a pool in an actor sees to its own environments first
    )


def new_loop(
    config: TrainConfig, parts: Parts, source: Rollout | Actors, buffer: ReplayBuffer | None, **rest: Any
) -> Loop:
    """Make the loop.

    Args:
        config: The run.
        parts: Its environments and agent.
        source: What steps.
        buffer: The replay; None where the agent learns from blocks.
        **rest: ``logger``, and what else `Loop` takes: checkpoints, advance, stop.

    Returns:
        The loop, with evaluations on environments of their own.
    """

    def play(policy: Policy) -> Evaluation:
        return evaluate(
            parts.evaluation_envs,
            policy,
            episodes=config.eval_episodes,
            seed=config.seed,
            actions=parts.agent.actions,
        )

    rest = {"device": parts.device, "evaluate": play, **rest}
    agent: Any = parts.agent
    if isinstance(config, ReplayTrainConfig) and isinstance(agent, ReplayAgent) and buffer is not None:
        return ReplayLoop(config, agent, source, buffer, seed=config.seed, **rest)
    if not isinstance(config, BlockTrainConfig) or not isinstance(agent, BlockAgent):
        raise ConfigError(
            f"agent: is a {type(agent).__name__} in a {type(config).__name__}; expected a ReplayAgent in a "
            "ReplayTrainConfig, or a BlockAgent in a BlockTrainConfig."
        )
    if isinstance(source, Rollout):
        return BlockLoop(config, agent, source, **rest)
    if buffer is None:
        raise ConfigError("new_loop: there are actors and no replay; expected the one of new_buffer. Hand it over.")
    reader, module = InOrder(buffer, config.block_length), agent.actor(0, 1)[1]
    blocks = ActorBlocks(source, module, reader, count=buffer.num_envs, ahead=config.actors_ahead)
    return BlockLoop(config, agent, blocks, **rest)


def _rows(config: TrainConfig, envs: Envs) -> int:
    """Count the rows of one process: more than environments, where each has several agents."""
    return config.env.num_envs * envs.num_envs if config.actors else envs.num_envs


def _actor_envs(config: EnvConfig, env: Any, first_env_id: int) -> Envs:
    # An actor is a process of its own already: a pool in it is for those who ask for one.
    mode = "serial" if config.mode == "auto" and config.layout == "auto" else config.mode
    on_fault = config.on_fault or "restart"
    settled = replace(config, mode=mode, on_fault=on_fault)
    return build_envs(settled, config.num_envs, env=env, first_env_id=first_env_id)


def _actor_policy(
    config: TrainConfig, observation_space: Any, action_space: Any, actor: int, num_actors: int
) -> tuple[Any, nn.Module]:
    cpu = torch.device("cpu")
    agent = build_agent(config, observation_space, action_space, cpu, config.env.num_envs)
    return agent.actor(actor, num_actors)
