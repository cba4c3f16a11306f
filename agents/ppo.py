"""PPO: many small steps on what the policy has just done, none of them far from it.

What it computes for a block of steps, A from generalised advantage estimation and normalised in each minibatch:

    ratio  = pi(a | s) / pi_old(a | s)
    loss   = mean of -min(ratio A, clip(ratio, 1 - c, 1 + c) A) + v (V(s) - G)^2 / 2 - e entropy,    G = A + V_old(s)

`impala` learns from actors that act beside the learner, with weights of a while ago (mu): advantages and G are those of
V-trace, which corrects for pi_old / mu, and pi_old is the learner's policy when a block reaches it.

Sources: Schulman et al. 2017 (Proximal policy optimization algorithms, equations 7 and 9), Schulman et al. 2016
(generalised advantage estimation, equation 16), Espeholt et al. 2018 (IMPALA, equation 1 and section 4.2),
Andrychowicz et al. 2021 (What matters for on-policy deep actor-critic methods).

Departs from Schulman et al. 2017: advantages are estimated anew before each pass over a block, with the values learnt
meanwhile (Andrychowicz et al., section 3.6); truncated episodes bootstrap from their true final observation; inputs
and value targets are normalised inside the network (`ActorCritic`); Adam's learning rate falls to `lr_end`.

`ppo_rnn` remembers: an LSTM or GRU reads observation, previous action and previous reward. Its minibatches are made of
whole sequences, none of which holds steps of two episodes (`agents/blocks.py`).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from gymnasium import spaces
from jaxtyping import Float
from torch import Tensor, nn

from agents.actor_critic import CORES, ActorCritic, ActorCriticPolicy, CoreKind, Inputs
from agents.blocks import Block, Minibatch, cut, minibatches
from agents.common import ActionHead
from agents.config import AgentConfig, BlockTrainConfig, EnvConfig, check
from agents.networks import flatten_parameters
from rlfeed.nest import Nest, leaves, map_nest
from rlfeed.returns import continuing, gae, standardize, successors, vtrace
from rlfeed.rollout.actions import MASK
from rlfeed.specs import from_space, zeros
from rlfeed.train.agent import BlockAgent, Counter, Learned
from rlfeed.train.schedule import Linear
from rlfeed.types import Batch, Policy


@dataclass(frozen=True, kw_only=True)
class PPOConfig(AgentConfig):
    """Hold PPO's settings.

    Args:
        lr: Learning rate of Adam at the first env step.
        lr_end: Learning rate at the last env step; in between it falls in a straight line.
        gamma: Discount per step, 0 to 1.
        lam: Weight of long returns against estimated values, 0 to 1.
        estimator: Of advantages: gae, or vtrace, which corrects for a policy that acted and is not the learner's.
        rho_clip: Of vtrace: ratios of the two policies count up to this.
        clip: How far the ratio may move from 1 before the policy's loss stops pulling.
        clip_end: The same at the last env step.
        epochs: Passes over each block.
        minibatches: Updates in each pass; they divide the steps of a block.
        recompute: Estimate advantages anew before each pass; otherwise before the first alone.
        normalize_advantage: Bring the advantages of each minibatch to mean 0 and deviation 1.
        value_weight: Weight of the value's loss.
        value_clip: How far values may move from what they were before the block, in deviations; 0: as far as they like.
        entropy_weight: Weight of the entropy of actions, which keeps exploration up.
        max_grad_norm: The gradient's norm is scaled down to this.
        target_kl: A block is left once an update's policy is 1.5 times this far from that of the block; 0: never.
        widths: Units of the fully connected layers of policy and value, each of its own.
        normalize_observation: Bring observations of floats to mean 0 and variance 1, inside the network.
        core: What remembers: none, lstm or gru.
        core_width: Units of each layer of the core.
        core_layers: Layers of the core.
    """

    lr: float = 1e-3
    lr_end: float = 0.0
    gamma: float = 0.99
    lam: float = 0.95
    estimator: Literal["gae", "vtrace"] = "gae"
    rho_clip: float = 1.0
    clip: float = 0.2
    clip_end: float = 0.2
    epochs: int = 10
    minibatches: int = 8
    recompute: bool = True
    normalize_advantage: bool = True
    value_weight: float = 0.5
    value_clip: float = 0.0
    entropy_weight: float = 0.0
    max_grad_norm: float = 0.5
    target_kl: float = 0.0
    widths: tuple[int, ...] = (64, 64)
    normalize_observation: bool = True
    core: CoreKind = "none"
    core_width: int = 64
    core_layers: int = 1

    def __post_init__(self) -> None:
        check(self, {
            "lr": (self.lr > 0, "above 0"),
            "lr_end": (self.lr_end >= 0, "0 or more"),
            "gamma": (0 <= self.gamma <= 1, "0 to 1"),
            "lam": (0 <= self.lam <= 1, "0 to 1"),
            "estimator": (self.estimator in ("gae", "vtrace"), "gae or vtrace"),
            "rho_clip": (self.rho_clip > 0, "above 0"),
            "clip": (self.clip > 0, "above 0"),
            "clip_end": (self.clip_end >= 0, "0 or more"),
            "epochs": (self.epochs >= 1, "at least 1"),
            "minibatches": (self.minibatches >= 1, "at least 1"),
            "value_weight": (self.value_weight >= 0, "0 or more"),
            "value_clip": (self.value_clip >= 0, "0 or more"),
            "entropy_weight": (self.entropy_weight >= 0, "0 or more"),
            "max_grad_norm": (self.max_grad_norm > 0, "above 0"),
            "target_kl": (self.target_kl >= 0, "0 or more"),
            "widths": (all(width >= 1 for width in self.widths), "at least 1 unit each"),
            "core": (self.core in CORES, f"one of {', '.join(CORES)}"),
            "core_width": (self.core_width >= 1, "at least 1"),
            "core_layers": (self.core_layers >= 1, "at least 1"),
        })  # fmt: skip

    def findings(self, run: Any) -> list[str]:
        """Say what is wrong with these settings beside those of the run; see `AgentConfig.findings`."""
        rows, found = run.env.num_envs * max(run.actors, 1), []
        if (steps := run.block_length * rows) % self.minibatches:
            found.append(
                f"agent.minibatches: is {self.minibatches}, which does not divide the {steps} steps of a block "
                f"(block_length {run.block_length} x {rows} environments); expected a divisor. Change one of the three."
            )
        if run.actors and self.estimator != "vtrace":
            found.append(
                f"agent.estimator: is {self.estimator!r} with {run.actors} actors, who act with old weights; expected "
                "vtrace, which corrects for that. Set it, or --actors 0."
            )
        return found

    def build(
        self,
        observation_space: Any,
        action_space: Any,
        *,
        total_steps: int,
        seed: int,
        device: torch.device,
        num_envs: int = 1,
    ) -> "PPO":
        """Make the agent; see `AgentConfig.build`."""
        return PPO(self, observation_space, action_space, total_steps=total_steps, seed=seed, device=device)


def ppo() -> BlockTrainConfig:
    """Give settings for small problems of any kind, with discrete or continuous actions.

    Returns:
        A whole run: environments, agent and budget.
    """
    return BlockTrainConfig(env=EnvConfig(num_envs=8), total_steps=100_000, block_length=128, agent=PPOConfig())


def ppo_rnn() -> BlockTrainConfig:
    """Give settings for problems in which one observation does not tell enough.

    Returns:
        A whole run: environments, agent and budget.
    """
    return BlockTrainConfig(
        env=EnvConfig(num_envs=8),
        total_steps=100_000,
        block_length=128,
        agent=PPOConfig(core="lstm", minibatches=4),
    )


def impala() -> BlockTrainConfig:
    """Give settings for actors in processes of their own.

    Returns:
        A whole run: environments, agent and budget.
    """
    agent = PPOConfig(estimator="vtrace", epochs=2, minibatches=4, recompute=False)
    run = BlockTrainConfig(env=EnvConfig(num_envs=4), total_steps=200_000, block_length=32, agent=agent)
    return replace(run, actors=2, actors_ahead=1_024, publish_every=1)


class PPO(BlockAgent):
    """Learn a policy and its values from blocks of steps, and act.

    Args:
        config: The settings.
        observation_space: The Gymnasium space of one environment's observations.
        action_space: The Gymnasium space of one environment's actions.
        total_steps: Environment steps of the whole run, the end of the schedules.
        seed: Seeds the network's weights and the order of minibatches.
        device: Where to learn and act.

    Raises:
        SpaceError: If a part of a space is not supported; the message names the part.
    """

    def __init__(
        self,
        config: PPOConfig,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        total_steps: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.config, self.device = config, device
        self.network = ActorCritic(
            observation_space,
            action_space,
            head=ActionHead(action_space, device),
            widths=config.widths,
            core=config.core,
            core_width=config.core_width,
            core_layers=config.core_layers,
            normalize=config.normalize_observation,
            generator=torch.Generator().manual_seed(seed),
        ).to(device)
        weights, self._gradient = flatten_parameters(self.network)
        self.optimizer = torch.optim.Adam([weights], lr=config.lr, eps=1e-5, fused=True)
        self.lr = Linear(config.lr, config.lr_end, total_steps)
        self.clip = Linear(config.clip, config.clip_end, total_steps)
        self.order = torch.Generator().manual_seed(seed)  # of minibatches, on the CPU: the same on every device
        self.updates = Counter()
        self._judge = torch.compile(self.loss) if config.compile else self.loss
        self.policy = ActorCriticPolicy(self.network, device)
        columns: dict[str, Any] = {"log_prob": spaces.Box(-math.inf, math.inf, ())}
        if self.network.core is not None:
            columns["carry"] = self.network.core.carry_space
        if isinstance(observation_space, spaces.Dict) and MASK in observation_space.spaces:
            columns[MASK] = spaces.MultiBinary(observation_space[MASK].shape or 1)
        self.columns = columns
        if isinstance(action_space, spaces.Box):
            self.actions = "rescale" if action_space.is_bounded() else "clip"

    def parts(self) -> Mapping[str, Any]:
        """Name everything that learning changes; see `Agent.parts`."""
        return {"network": self.network, "optimizer": self.optimizer, "order": self.order, "updates": self.updates}

    def actor(self, number: int, count: int) -> tuple[Policy, nn.Module]:
        """Give what an actor acts with; see `Agent.actor`."""
        return self.policy, self.network

    def scalars(self, env_steps: int) -> dict[str, float]:
        """Say where the schedules stand; see `Agent.scalars`."""
        scalars = {"train/learning_rate": self.lr(env_steps), "train/clip_range": self.clip(env_steps)}
        if self.network.log_std is not None:
            scalars["train/std"] = self.network.log_std.detach().exp().mean().item()
        return scalars

    @torch.inference_mode()
    def values(self, observation: Nest) -> Float[Tensor, " B"]:
        """Estimate the returns that follow observations; with a core, where these are the first of their episodes.

        Args:
            observation: ``[B, ...]`` per leaf, in the dtypes of the space.

        Returns:
            Values in the unit of rewards.
        """
        observation = map_nest(lambda leaf: torch.as_tensor(leaf, device=self.device), observation)
        rows = len(next(leaf for _, leaf in leaves(observation)))
        first, nothing = torch.ones(rows, dtype=torch.bool, device=self.device), torch.zeros(rows, device=self.device)
        action = torch.from_numpy(zeros(from_space(self.network.action_space), rows)).to(self.device)
        inputs = Inputs(self.network.normalized(observation), first, action, nothing)
        return self.network.values(self.network.step(inputs, self.network.initial_carry(rows))[0])

    def learn(self, batch: Batch, *, env_steps: int) -> Learned:
        """Go over a block, minibatch by minibatch.

        Args:
            batch: ``[N, T]``, a block of a rollout, with the policy's extras.
            env_steps: Steps taken before it, the clock of the schedules.

        Returns:
            Curves, means over the updates; see `Agent.learn`.
        """
        config, network = self.config, self.network
        self.optimizer.param_groups[0]["lr"] = self.lr(env_steps)
        clip = torch.tensor(self.clip(env_steps), device=self.device)  # a number would be compiled anew each time
        block = cut(batch, network.normalized, sequences=network.core is not None)
        estimates = self.estimate(block)
        told = self._count(block, estimates)
        rows, scalars = [], {}
        for minibatch in self._passes(block, estimates):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bfloat16):
                loss, found = self._judge(minibatch, clip)
            if config.target_kl and found["train/approx_kl"] > 1.5 * config.target_kl:
                break
            scalars = found
            self._gradient.zero_()
            loss.backward()
            scalars["train/grad_norm"] = norm = torch.linalg.vector_norm(self._gradient)
            self._gradient.mul_((config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
            self.optimizer.step()
            rows.append(torch.stack(list(scalars.values())))
        network.count(map_nest(lambda leaf: leaf[:, :-1][block.mask], block.batch.observation))
        self.updates.value += len(rows)
        if rows:
            told |= dict(zip(scalars, torch.stack(rows).mean(dim=0), strict=True))
        return Learned(told, updates=len(rows))

    def _passes(self, block: Block, estimates: dict[str, Tensor]) -> Iterator[Minibatch]:
        """Go over a block as often as the settings say."""
        for number in range(self.config.epochs):
            if number > 0 and self.config.recompute:
                estimates = self.estimate(block)
            yield from minibatches(block, estimates, self.config.minibatches, self.order)

    def _count(self, block: Block, estimates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Count the targets of a block, and tell how much of them the values of before explain."""
        value, targets = estimates["value"][block.mask], estimates["target"][block.mask]
        self.network.count_targets(targets)
        spread = targets.var(correction=0)
        explained = torch.where(spread > 0, 1 - (targets - value).var(correction=0) / spread, 0.0)
        return {"train/explained_variance": explained.clamp(min=-1.0)}

    @torch.no_grad()
    def estimate(self, block: Block) -> dict[str, Float[Tensor, "B T"]]:
        """Estimate values, what they are to become, and advantages of the actions.

        Args:
            block: What to estimate them for.

        Returns:
            ``value``, ``target`` and ``advantage``, ``[B, T]``, in the unit of rewards; with V-trace ``log_prob`` too,
            of the learner's policy as it is.
        """
        batch, network, config = block.batch, self.network, self.config
        features = network.unroll(block.inputs, batch.carry)
        value = network.values(features)
        finals = places = None
        if batch.final_index is not None and len(batch.final_index):  # sequences have theirs behind their last steps
            places = batch.final_index
            finals = network.values(network.step(Inputs(network.normalized(batch.final_observation)), ())[0])
        following = successors(value, finals, places)
        value, discount, continues = value[:, :-1], config.gamma * ~batch.terminated, continuing(batch)
        if config.estimator == "gae":
            advantage = gae(batch.reward, discount, value, following, continues, lam=config.lam)
            return {"value": value, "target": value + advantage, "advantage": advantage}
        mask, acted, log_prob = block.mask, batch.extras["log_prob"], torch.zeros_like(value)
        allowed = batch.extras[MASK][mask] if MASK in batch.extras else None
        log_prob[mask] = network.distribution(features[:, :-1][mask], allowed).log_prob(batch.action[mask])
        log_rho = torch.where(mask, log_prob - acted, 0.0)
        target, advantage = vtrace(
            log_rho, batch.reward, discount, value, following, continues,
            lam=config.lam, rho_bar=config.rho_clip, c_bar=config.rho_clip, pg_rho_bar=config.rho_clip,
        )  # fmt: skip
        return {"value": value, "target": target, "advantage": advantage, "log_prob": log_prob}

    def loss(
        self, minibatch: Minibatch, clip: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Compute the loss of a minibatch.

        Args:
            minibatch: Steps.
            clip: How far the ratio may move from 1.

        Returns:
            The loss, and what there is to tell of it, by tag.

        Source:
            Schulman et al. 2017, equations 7 and 9; Schulman 2020 (Approximating KL divergence), k3, for the KL.
        """
        config, network, steps = self.config, self.network, minibatch.steps
        if minibatch.mask is None:
            features = network.step(minibatch.inputs, ())[0]
        else:
            features = network.unroll(minibatch.inputs, minibatch.carry)[minibatch.mask]
        distribution = network.distribution(features, steps.get("action_mask"))
        log_ratio = distribution.log_prob(steps["action"]) - steps["log_prob"]
        ratio = log_ratio.exp()
        advantage = standardize(steps["advantage"], None) if config.normalize_advantage else steps["advantage"]
        policy_loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
        deviation = network.value_moments.deviation
        before, target = steps["value"], steps["target"]
        value = network.values(features)
        value_loss = ((value - target) / deviation).square()
        if config.value_clip:
            reach = config.value_clip * deviation
            near = before + (value - before).clamp(-reach, reach)
            value_loss = torch.maximum(value_loss, ((near - target) / deviation).square())
        value_loss = value_loss.mean()
        entropy_loss = -distribution.entropy().mean()
        loss = policy_loss + config.value_weight * value_loss + config.entropy_weight * entropy_loss
        with torch.no_grad():
            scalars = {
                "train/loss": loss,
                "train/policy_gradient_loss": policy_loss,
                "train/value_loss": value_loss,
                "train/entropy_loss": entropy_loss,
                "train/approx_kl": (log_ratio.expm1() - log_ratio).mean(),
                "train/clip_fraction": ((ratio - 1).abs() > clip).float().mean(),
            }
        return loss, {tag: scalar.detach() for tag, scalar in scalars.items()}
