"""PQN: Q(lambda) on the steps that many environments have just taken; no replay, no target network.

For a block of N x T steps the targets are computed once, by the network that took the steps; then they are learned
from in some epochs of minibatches. With v(s) = max_a Q(s, a), over the allowed actions where an action mask says so:

    target_t = r_t + gamma ((1 - lam) v(s_t+1) + lam target_t+1)    where the next column is the episode's next step
    target_t = r_t + gamma v(s_t+1)                                 where the episode was truncated or the block ends
    target_t = r_t                                                  where the episode terminated
    loss     = mean of (Q(s_t, a_t) - target_t)^2 / 2, in units of the targets' deviation

s_t+1 is always what step t led to, never what the next episode began with. LayerNorm after every layer is what keeps
this stable without a target network. Sources: Gallici et al. 2024 (Simplifying deep temporal difference learning,
algorithm 1 and the Q(lambda) targets of section 4), Liu et al. 2020 (On the variance of the adaptive learning rate and
beyond, algorithm 2: RAdam), van Hasselt et al. 2016 (Learning values across many orders of magnitude, equations 4 to 9:
Pop-Art).

Departs from Gallici et al.: truncated episodes bootstrap from their true final observation; values are learned in units
of the targets' deviation around their mean (Pop-Art), where the authors scale the rewards of each task by hand; with a
core (`pqn_rnn`) the previous action is an input too, and a block begins with the carry that its first steps were taken
with, so that no steps are spent on warming up. Convolutions are normalised once, after the last of them. RAdam's
rectification is a factor on the learning rate of fused Adam, 0 in the first five updates.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from agents.common import clip_gradients
from agents.config import AgentConfig, BlockTrainConfig, EnvConfig, check
from agents.networks import flatten_parameters
from agents.pqn_network import MASK, Core, Greedy, PQNetwork
from rlfeed.errors import SpaceError
from rlfeed.feed.rollouts import Pieces
from rlfeed.nest import Nest, map_nest
from rlfeed.replay import Episode
from rlfeed.returns import continuing, lambda_returns, masked_mean, successors
from rlfeed.rollout import EpsilonGreedy
from rlfeed.train.agent import BlockAgent, Counter, Learned
from rlfeed.train.schedule import Linear
from rlfeed.types import Batch

BETA = 0.999  # Adam's for squared gradients


@dataclass(frozen=True, kw_only=True)
class PQNConfig(AgentConfig):
    """Hold PQN's settings.

    Args:
        lr: Learning rate of RAdam at the first env step.
        lr_end: Learning rate at the last env step; in between it falls in a straight line.
        gamma: Discount per step, 0 to 1.
        lam: How far targets look ahead: 0 (one step, then values) to 1 (all rewards of the block).
        epochs: How often a block is gone over.
        minibatches: Updates in each epoch: parts of the block's steps, or with a core of its episodes.
        widths: Units of the fully connected layers after the encoder.
        core: What remembers: none, lstm or gru.
        core_width: Units of each of its layers.
        core_layers: Layers of the core, one upon the other.
        max_grad_norm: The gradient's norm is scaled down to this.
        epsilon_start: Probability of a random action at the first env step, 0 to 1.
        epsilon_end: Probability of a random action once exploration has fallen, 0 to 1.
        epsilon_fraction: Part of the run's env steps in which exploration falls, above 0 to 1.
    """

    lr: float = 2.5e-4
    lr_end: float = 0.0
    gamma: float = 0.99
    lam: float = 0.95
    epochs: int = 4
    minibatches: int = 16
    widths: tuple[int, ...] = (128, 128)
    core: Core = "none"
    core_width: int = 128
    core_layers: int = 1
    max_grad_norm: float = 10.0
    epsilon_start: float = 1.0
    epsilon_end: float = 0.2
    epsilon_fraction: float = 0.2

    def __post_init__(self) -> None:
        check(self, {
            "lr": (self.lr > 0, "above 0"),
            "lr_end": (self.lr_end >= 0, "0 or more"),
            "gamma": (0 <= self.gamma <= 1, "0 to 1"),
            "lam": (0 <= self.lam <= 1, "0 to 1"),
            "epochs": (self.epochs >= 1, "at least 1"),
            "minibatches": (self.minibatches >= 1, "at least 1"),
            "widths": (all(width >= 1 for width in self.widths), "at least 1 unit each"),
            "core": (self.core in get_args(Core), f"one of {get_args(Core)}"),
            "core_width": (self.core_width >= 1, "at least 1 unit"),
            "core_layers": (self.core_layers >= 1, "at least 1"),
            "max_grad_norm": (self.max_grad_norm > 0, "above 0"),
            "epsilon_start": (0 <= self.epsilon_start <= 1, "0 to 1"),
            "epsilon_end": (0 <= self.epsilon_end <= 1, "0 to 1"),
            "epsilon_fraction": (0 < self.epsilon_fraction <= 1, "above 0 and at most 1"),
        })  # fmt: skip

    def findings(self, run: Any) -> list[str]:
        """Say what is wrong with these settings beside those of the run; see `AgentConfig.findings`."""
        num_envs, steps, parts = run.env.num_envs, run.env.num_envs * run.block_length, self.minibatches
        if self.core == "none" and steps % parts:
            return [
                f"agent.minibatches: is {parts} for blocks of {num_envs} x {run.block_length} = {steps} steps; "
                "expected a number that divides them. Change it, env.num_envs or block_length."
            ]
        if self.core != "none" and parts > num_envs:
            return [
                f"agent.minibatches: is {parts} for {num_envs} environments; expected at most as many: a minibatch "
                "has whole episodes. Lower it or have more environments."
            ]
        return []

    def build(
        self,
        observation_space: Any,
        action_space: Any,
        *,
        total_steps: int,
        seed: int,
        device: torch.device,
        num_envs: int = 1,
    ) -> "PQN":
        """Make the agent; see `AgentConfig.build`."""
        return PQN(self, observation_space, action_space, total_steps=total_steps, seed=seed, device=device)


def pqn() -> BlockTrainConfig:
    """Give settings for tasks whose observations show all there is to know.

    Returns:
        A whole run: environment, agent and budget.
    """
    return BlockTrainConfig(
        env=EnvConfig(num_envs=32),
        agent=PQNConfig(),
        total_steps=300_000,
        block_length=64,
        eval_every=50_000,
        checkpoint_every=50_000,
        log_every=5_000,
    )


def pqn_rnn() -> BlockTrainConfig:
    """Give settings for tasks in which something must be remembered.

    Returns:
        A whole run: environment, agent and budget.
    """
    return BlockTrainConfig(
        env=EnvConfig(id="rlfeed.testing.masked:MaskedVelocityCartPole", num_envs=32),
        agent=PQNConfig(
            core="gru", core_width=64, widths=(64,), lr=1e-3, lam=0.8, minibatches=8, epsilon_end=0.05,
            epsilon_fraction=0.1,
        ),
        total_steps=300_000,
        block_length=32,
        eval_every=50_000,
        checkpoint_every=50_000,
        log_every=5_000,
    )


class PQN(BlockAgent):
    """Learn action values from blocks of steps, and act on them.

    Args:
        config: The settings.
        observation_space: The Gymnasium space of one environment's observations.
        action_space: The Gymnasium space of one environment's actions: Discrete.
        total_steps: Environment steps of the whole run, the end of both schedules.
        seed: Seeds the network's weights and the order of minibatches.
        device: Where to learn and act.

    Raises:
        SpaceError: If the actions are not Discrete, or a part of the observation space is not supported.
    """

    def __init__(
        self,
        config: PQNConfig,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        total_steps: int,
        seed: int,
        device: torch.device,
    ) -> None:
        if not isinstance(action_space, spaces.Discrete):
            raise SpaceError(
                f"action_space: is {action_space}; PQN plays Discrete ones only. Use ppo or sac for continuous "
                "actions, ppo for several at once, or map a Discrete space onto this one in a wrapper."
            )
        self.config, self.device, self._actions = config, device, action_space
        self.first_action = int(action_space.start)
        self.generator = torch.Generator().manual_seed(seed)
        self.network = PQNetwork(
            observation_space,
            int(action_space.n),
            config.widths,
            core=config.core,
            core_width=config.core_width,
            core_layers=config.core_layers,
            generator=self.generator,
        ).to(device)
        self.trained = torch.compile(self.network) if config.compile else self.network
        self._weights, self._gradient = flatten_parameters(self.network)
        self.optimizer = torch.optim.Adam([self._weights], lr=config.lr, betas=(0.9, BETA), fused=True)
        self.lr = Linear(config.lr, config.lr_end, total_steps)
        self.epsilon = Linear(
            config.epsilon_start, config.epsilon_end, max(1, round(config.epsilon_fraction * total_steps))
        )
        self.updates = Counter()
        self.policy = self.actor(0, 1)[0]

    def parts(self) -> Mapping[str, Any]:
        """Name everything that learning changes; see `Agent.parts`."""
        return {
            "network": self.network, "optimizer": self.optimizer, "updates": self.updates, "generator": self.generator,
        }  # fmt: skip

    def actor(self, number: int, count: int) -> tuple[EpsilonGreedy, nn.Module]:
        """Give what an actor process acts with; see `Agent.actor`."""
        greedy = Greedy(self.network, self.first_action, self.device)
        return EpsilonGreedy(greedy, self.epsilon, self._actions), self.network

    def scalars(self, env_steps: int) -> dict[str, float]:
        """Say where the schedules stand; see `Agent.scalars`."""
        return {"rollout/exploration_rate": self.epsilon(env_steps), "train/learning_rate": self.lr(env_steps)}

    @torch.no_grad()
    def values(self, observation: Nest) -> Float[Tensor, " B"]:
        """Estimate what the best action is worth, with a core as the first thing that is seen in an episode.

        Args:
            observation: ``[B, ...]`` per leaf, on the agent's device.

        Returns:
            Discounted returns.
        """
        return self.network.first(observation).amax(dim=-1)

    def learn(self, batch: Batch, *, env_steps: int) -> Learned:
        """Go over a block in epochs of minibatches.

        Args:
            batch: A block of a rollout, ``[N, T]``, on the agent's device.
            env_steps: Steps taken before it, the clock of the learning rate.

        Returns:
            Curves, means over the updates; see `Agent.learn`.
        """
        config, network = self.config, self.network
        if network.core is not None:
            batch = episodes(batch)
        target, mask = self.targets(batch)
        network.adopt(target[mask])
        rows = self._rows(batch, target, mask)
        sums = torch.zeros(3, device=self.device)
        for _ in range(config.epochs):
            order = torch.randperm(len(rows[2]), generator=self.generator).to(self.device)
            for part in order.tensor_split(config.minibatches):
                loss, q_mean = self.loss(*map_nest(lambda leaf, part=part: leaf[part], rows))
                sums += torch.stack([loss.detach(), q_mean, self._step(loss, env_steps)])
        updates = config.epochs * config.minibatches
        loss, q_mean, grad_norm = sums / updates
        return Learned({"train/loss": loss, "train/q_mean": q_mean, "train/grad_norm": grad_norm}, updates=updates)

    def loss(
        self, inputs: Nest, action: Int64[Tensor, "B T"], target: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Compute the loss of some rows.

        Args:
            inputs: What the network takes: ``[B, T, ...]``, or with a core ``[B, T+1, ...]``.
            action: The actions taken, from 0.
            target: What their values are trained towards.
            mask: Where.

        Returns:
            Half the mean squared error, in units of the targets' deviation, and the mean of the values.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bfloat16):
            values = self.trained(*inputs)[0]
        value = values[:, : action.shape[1]].gather(2, action.unsqueeze(2)).squeeze(2).float()
        error = (value - target) / self.network.deviation
        return masked_mean(0.5 * error.square(), mask), masked_mean(value.detach(), mask)

    @torch.no_grad()
    def targets(self, batch: Batch) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
        """Compute what the values are trained towards: Q(lambda) returns.

        Args:
            batch: ``[B, T]``: a block, or with a core its episodes.

        Returns:
            The targets, and where there is one: at every step, but for those whose successor's action mask is unknown.
        """
        q, mask = self.network(*self._inputs(batch))[0], batch.mask
        mask = torch.ones_like(batch.terminated) if mask is None else mask
        value, continues = q.amax(dim=-1), continuing(batch)
        allowed = batch.extras.get(MASK)
        if allowed is not None:
            value[:, :-1] = q[:, :-1].masked_fill(~allowed, -torch.inf).amax(dim=-1)
            # A mask is known where the policy acted: neither at the end of a block nor where an episode was truncated.
            known = continues | batch.terminated
            continues[:, :-1] &= known[:, 1:]
            mask = mask & known
        next_value = successors(value)
        if batch.final_index is not None and len(batch.final_index):
            final_value = self.network.first(batch.final_observation).amax(dim=-1)
            next_value = successors(value, final_value, batch.final_index)
        discount = torch.where(batch.terminated, 0.0, self.config.gamma)
        target = lambda_returns(batch.reward, discount, next_value, continues, lam=self.config.lam)
        return torch.where(mask, target, 0.0), mask

    def _inputs(self, batch: Batch) -> Nest:
        """Give what the network sees at every step of a batch and at what the last one led to."""
        if self.network.core is None:
            return (batch.observation,)
        before: Any = batch.prev_action
        begins: Any = batch.is_first
        previous = torch.cat([before.unsqueeze(1), batch.action], dim=1).long() - self.first_action + 1
        previous.clamp_(min=0)[:, 0] *= ~begins[:, 0]  # padding is zeros, wherever actions begin
        return batch.observation, previous, batch.carry

    def _rows(self, batch: Batch, target: Tensor, mask: Tensor) -> Nest:
        """Give what minibatches are made of, a row each: single steps, or with a core whole episodes."""
        rows = ((batch.action.long() - self.first_action).clamp(min=0), target, mask)
        if self.network.core is not None:
            return self._inputs(batch), *rows
        steps = mask.flatten().nonzero().squeeze(1)
        observation = map_nest(lambda leaf: leaf[:, :-1], batch.observation)
        observation, *rows = map_nest(lambda leaf: leaf.flatten(0, 1)[steps].unsqueeze(1), (observation, *rows))
        return (observation,), *rows

    def _step(self, loss: Float[Tensor, ""], env_steps: int) -> Float[Tensor, ""]:
        """Take one optimiser step; gives the gradient's norm."""
        self._gradient.zero_()
        loss.backward()
        grad_norm = clip_gradients([self._weights], self.config.max_grad_norm)
        self.updates.value += 1
        self.optimizer.param_groups[0]["lr"] = self.lr(env_steps) * rectification(self.updates.value)
        self.optimizer.step()
        return grad_norm


def episodes(block: Batch) -> Batch:
    """Cut a block where its episodes end, so that a core may go over each part in one piece.

    Args:
        block: ``[N, T]``.

    Returns:
        ``[P, L]``, padded to the longest part: an episode's final observation follows its last step, and the carry
        before the first step is the actor's own, or zeros where an episode begins.
    """
    pieces = Pieces(block, Episode())
    return pieces.gather(np.arange(len(pieces.lengths)))


def rectification(updates: int) -> float:
    """Give the factor on Adam's learning rate that makes it RAdam.

    Args:
        updates: Optimiser steps, the one to come included.

    Returns:
        0 to 1; 0 in the first five updates, where RAdam's variance cannot be told.

    Source:
        Liu et al. 2020 (On the variance of the adaptive learning rate and beyond), algorithm 2.
    """
    longest = 2 / (1 - BETA) - 1
    length = longest - 2 * updates * BETA**updates / (1 - BETA**updates)
    if length <= 5:
        return 0.0
    return math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
