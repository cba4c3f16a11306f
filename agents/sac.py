"""SAC: off-policy learning of a stochastic policy for continuous actions; and CrossQ and XQC, which grew out of it.

What it computes, for a transition over k <= n steps with return R, and a' drawn from the policy at s':

    target = R + gamma^k (min Q'(s', a') - alpha log pi(a'|s'))     R alone where s' is terminal
    critic = sum over both critics of mean 1/2 (Q(s, a) - target)^2
    actor  = mean of alpha log pi(a|s) - min Q(s, a)                a drawn anew, by reparametrisation
    alpha  = mean of -log alpha (log pi(a|s) + H)                   H the target entropy

Sources: Haarnoja et al. 2018 (Soft actor-critic algorithms and applications, equations 5, 7 and 18; gradients of the
last by log alpha in place of alpha, which has the same fixed point). `crossq`: Bhatt et al. 2024 (CrossQ: one pass
through the critics for (s, a) and (s', a') together, whose batch statistics are those of both; no target networks).
`xqc`: Palenicek et al. 2026 (XQC: batch normalisation before activations, weights of norm 1, critics that are
categorical distributions over returns and learn by cross entropy, rewards divided by the deviation of the return).

Departs from them: truncated episodes bootstrap from their true final observation; exploration may be correlated in
time (`noise_correlation`); orthogonal initial weights; XQC's rewards are divided by no less than 2 / v_max of the
return's root mean square, so that a return that never varies stays on the support. Actions are in -1 .. 1 everywhere
in here, whatever the environment's bounds are, so neither log pi nor H depends on them.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float
from torch import Tensor, nn

from agents.common import Support, TanhGaussian, polyak
from agents.config import AgentConfig, EnvConfig, ReplayTrainConfig, check
from agents.critics import Actor, Critics, Norm, ReturnScale
from rlfeed.errors import FieldError, SpaceError
from rlfeed.nest import Nest, map_nest
from rlfeed.replay import Transition
from rlfeed.train.agent import Counter, Learned, ReplayAgent
from rlfeed.train.schedule import Linear
from rlfeed.types import Batch, PolicyContext, PolicyOutput

PAST = "past_return"  # column of the replay: the discounted return of the episode before a step


@dataclass(frozen=True, kw_only=True)
class SACConfig(AgentConfig):
    """Hold the settings of SAC, CrossQ and XQC.

    Args:
        lr: Learning rate of Adam at the first env step, for actor and critics.
        lr_end: Learning rate at the last env step; in between it changes in a straight line.
        adam_beta1: Decay of Adam's mean of gradients, 0 to below 1.
        gamma: Discount per step, 0 to 1.
        n_step: Steps of reward summed before the value of what follows is used, at least 1.
        actor_widths: Units of the actor's fully connected layers after the encoder.
        critic_widths: Units of the critics' layers.
        tau: Part of the critics that moves into their targets at each update, 0 to 1; 0: there are no targets.
        policy_delay: Updates of the critics for each of actor and temperature.
        alpha: Temperature, the weight of entropy against reward, above 0; the first one where it is learned.
        learn_alpha: Whether the temperature is learned or stays as it begins.
        alpha_lr: Learning rate of its logarithm, in multiples of lr.
        target_entropy: Entropy that the temperature is learned for, per number of an action, in nats.
        norm: Normalisation in actor and critics: none, renorm (CrossQ's) or batch (XQC's).
        norm_warmup: Updates before renorm corrects batches towards the running statistics.
        unit_weights: Whether weights are scaled to norm 1 after each update.
        atoms: Atoms of the critics' distributions over returns, at least 2; 1: critics are plain numbers.
        v_min: The lowest atom of the categorical critic.
        v_max: The highest atom of the categorical critic.
        scale_rewards: Whether rewards are divided by the deviation of the discounted return.
        noise_correlation: Correlation of exploration noise from one step to the next, 0 to below 1. The policy's
            distribution at each step stays what it is; what is tried is kept up for about 1 / (1 - correlation) steps.
    """

    lr: float = 1e-3
    lr_end: float = 1e-3
    adam_beta1: float = 0.9
    gamma: float = 0.99
    n_step: int = 1
    actor_widths: tuple[int, ...] = (256, 256)
    critic_widths: tuple[int, ...] = (256, 256)
    tau: float = 0.005
    policy_delay: int = 1
    alpha: float = 1.0
    learn_alpha: bool = True
    alpha_lr: float = 0.3
    target_entropy: float = -1.0
    norm: Norm = "none"
    norm_warmup: int = 100_000
    unit_weights: bool = False
    atoms: int = 1
    v_min: float = -5.0
    v_max: float = 5.0
    scale_rewards: bool = False
    noise_correlation: float = 0.8

    def __post_init__(self) -> None:
        check(self, {
            "lr": (self.lr > 0, "above 0"),
            "lr_end": (self.lr_end >= 0, "0 or more"),
            "adam_beta1": (0 <= self.adam_beta1 < 1, "0 to below 1"),
            "gamma": (0 <= self.gamma <= 1, "0 to 1"),
            "n_step": (self.n_step >= 1, "at least 1"),
            "actor_widths": (all(width >= 1 for width in self.actor_widths), "at least 1 unit each"),
            "critic_widths": (all(width >= 1 for width in self.critic_widths), "at least 1 unit each"),
            "tau": (0 <= self.tau <= 1, "0 to 1"),
            "policy_delay": (self.policy_delay >= 1, "at least 1 update"),
            "alpha": (self.alpha > 0, "above 0"),
            "alpha_lr": (self.alpha_lr > 0, "above 0"),
            "norm_warmup": (self.norm_warmup >= 0, "0 or more"),
            "atoms": (self.atoms >= 1, "at least 1"),
            "v_min": (self.v_min < self.v_max, f"below v_max, which is {self.v_max}"),
            "noise_correlation": (0 <= self.noise_correlation < 1, "0 to below 1"),
        })  # fmt: skip

    def build(
        self,
        observation_space: Any,
        action_space: Any,
        *,
        total_steps: int,
        seed: int,
        device: torch.device,
        num_envs: int = 1,
    ) -> "SAC":
        """Make the agent; see `AgentConfig.build`."""
        return SAC(self, observation_space, action_space, total_steps=total_steps, seed=seed, device=device)


def sac() -> ReplayTrainConfig:
    """Give the settings of SAC that suit small and middling continuous problems.

    Returns:
        A whole run.
    """
    env, agent = EnvConfig(id="Pendulum-v1"), SACConfig()
    loop = ReplayTrainConfig(env=env, agent=agent, total_steps=20_000, learning_starts=5_000, capacity=300_000)
    return replace(loop, train_every=1, updates_per_round=1)


def crossq() -> ReplayTrainConfig:
    """Give the settings of CrossQ: batch renormalisation in place of target networks.

    Returns:
        A whole run.
    """
    agent = SACConfig(norm="renorm", tau=0.0, adam_beta1=0.5, policy_delay=3, alpha_lr=1.0)
    return replace(sac(), agent=replace(agent, critic_widths=(1024, 1024)))


def xqc() -> ReplayTrainConfig:
    """Give the settings of XQC: two updates per env step of well-conditioned, categorical critics.

    Returns:
        A whole run.
    """
    agent = SACConfig(norm="batch", unit_weights=True, atoms=101, scale_rewards=True, critic_widths=(512,) * 4)
    agent = replace(agent, actor_widths=(256,) * 4, policy_delay=3, alpha=0.01, alpha_lr=1.0)
    return replace(sac(), agent=replace(agent, target_entropy=-0.5, lr=3e-4, lr_end=3e-5), updates_per_round=2)


class SAC(ReplayAgent):
    """Learn a policy and two critics from transitions, and act by the policy.

    Args:
        config: The settings.
        observation_space: The Gymnasium space of one environment's observations.
        action_space: The Gymnasium space of one environment's actions: a bounded Box of floats.
        total_steps: Environment steps of the whole run, the end of the schedule.
        seed: Seeds the weights, and the actions that are drawn in learning.
        device: Where to learn and act.

    Raises:
        SpaceError: If the actions are not a bounded Box, or a part of the observation space is not supported.
    """

    actions = "rescale"

    def __init__(
        self,
        config: SACConfig,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        total_steps: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.config, self.device, self.shape = config, device, _shape_of(action_space)
        numbers = math.prod(self.shape)
        self.unit = Transition(n_step=config.n_step, gamma=config.gamma)
        self.columns = {PAST: spaces.Box(-np.inf, np.inf, (), np.float32)} if config.scale_rewards else {}

        norm = {"norm": config.norm, "warmup": config.norm_warmup, "generator": torch.Generator().manual_seed(seed)}
        self.policy_net = Actor(observation_space, numbers, config.actor_widths, **norm).to(device)
        self.critics = Critics(observation_space, numbers, config.critic_widths, config.atoms, **norm).to(device)
        if config.unit_weights:
            self.policy_net.perceptrons.project()
            self.critics.perceptrons.project()
        self.target = deepcopy(self.critics).requires_grad_(False) if config.tau else None
        self.log_alpha = nn.Parameter(torch.tensor(math.log(config.alpha), device=device))
        self.target_entropy = config.target_entropy * numbers
        self.support = Support(config.v_min, config.v_max, config.atoms, device) if config.atoms > 1 else None
        self.scale = ReturnScale(config.v_max).to(device) if config.scale_rewards else None

        self._acting = [*self.policy_net.parameters(), *([self.log_alpha] if config.learn_alpha else [])]
        settings = {"lr": config.lr, "betas": (config.adam_beta1, 0.999), "fused": True}
        groups = [{"params": self.policy_net.parameters()}, {"params": [self.log_alpha]}]
        self.policy_optimizer = torch.optim.Adam(groups, **settings)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), **settings)
        self.lr = Linear(config.lr, config.lr_end, total_steps)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.updates = Counter()
        self.policy, _ = self.actor(0, 1)
        wrapped = torch.compile if config.compile else lambda function: function
        self.critics_loss, self.actor_loss = wrapped(self._critics_loss), wrapped(self._actor_loss)

    def learn(self, batch: Batch, *, env_steps: int) -> Learned:
        """Take one step of the critics, and of actor and temperature when it is their turn; see `Agent.learn`."""
        if batch.discount is None or batch.next_observation is None:
            raise FieldError("SAC: the batch has no discount or next_observation; expected batches of Transition.")
        action, reward = batch.action.flatten(1).float(), batch.reward
        if self.scale is not None:
            reward = self.scale(reward, self.config.gamma * batch.extras[PAST] + reward)
        lr = self.lr(env_steps)
        self.policy_optimizer.param_groups[0]["lr"] = self.critic_optimizer.param_groups[0]["lr"] = lr
        self.policy_optimizer.param_groups[1]["lr"] = lr * self.config.alpha_lr
        self.updates.value += 1

        step = (batch.observation, action, reward, batch.discount, batch.next_observation)
        with self._autocast():
            loss, value = self.critics_loss(*step, self._noise(action))
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        if self.config.unit_weights:
            self.critics.perceptrons.project()
        scalars = {"train/critic_loss": loss.detach(), "train/q_mean": value}

        if self.updates.value % self.config.policy_delay == 0:
            with self._autocast():
                loss, alpha_loss = self.actor_loss(batch.observation, self._noise(action))
            scalars |= {"train/actor_loss": loss.detach(), "train/ent_coef_loss": alpha_loss.detach()}
            scalars["train/ent_coef"] = self.log_alpha.detach().exp()
            self.policy_optimizer.zero_grad()
            # To these parameters alone: the critics' gradients would cost as much again, and nobody would use them.
            (loss + alpha_loss).backward(inputs=self._acting)
            self.policy_optimizer.step()
            if self.config.unit_weights:
                self.policy_net.perceptrons.project()
        if self.target is not None:
            polyak(self.target, self.critics, self.config.tau)
        return Learned(scalars)

    def _critics_loss(
        self,
        observation: Nest,
        action: Float[Tensor, "B actions"],
        reward: Float[Tensor, " B"],
        discount: Float[Tensor, " B"],
        next_observation: Nest,
        noise: Float[Tensor, "B actions"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Give what both critics are to lower, and the mean value; the noise is that of the next actions."""
        with torch.no_grad():
            next_action, next_log_prob = self._draw(next_observation, noise)
            bonus = -self.log_alpha.exp() * next_log_prob
        if self.target is not None and self.config.norm == "none":
            value = self.critics(observation, action)
            with torch.no_grad():
                following = self.target(next_observation, next_action)
        else:
            # One pass for both: normalised apart, what is and what follows would be measured on different scales.
            both = map_nest(lambda x, y: torch.cat([x, y]), observation, next_observation)
            actions = torch.cat([action, next_action])
            value, following = self.critics(both, actions, learning=True).chunk(2, dim=1)
            with torch.no_grad():
                following = following if self.target is None else self.target(both, actions, True).chunk(2, dim=1)[1]
        # where, not a product: 0 * inf from a terminal observation's value would be nan.
        alive = discount > 0
        if self.support is None:
            value, following = value.squeeze(2), following.detach().squeeze(2).amin(dim=0)
            target = reward + torch.where(alive, discount * (following + bonus), 0.0)
            return 0.5 * (value - target).square().mean(dim=1).sum(), value.detach().mean()
        with torch.no_grad():
            chances = following.softmax(dim=2)
            lowest = self.support.mean(chances).argmin(dim=0)
            chances = chances[lowest, torch.arange(len(lowest), device=lowest.device)]
            target = self.support.project(chances, reward + torch.where(alive, discount * bonus, 0.0), discount)
            mean = self.support.mean(value.softmax(dim=2)).mean()
        return -(target * value.log_softmax(dim=2)).sum(dim=2).mean(dim=1).sum(), mean

    def _actor_loss(self, observation: Nest, noise: Tensor) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Give what the actor is to lower, and what log alpha is to."""
        action, log_prob = self._draw(observation, noise, learning=True)
        loss = (self.log_alpha.detach().exp() * log_prob - self._lower(observation, action)).mean()
        return loss, -(self.log_alpha * (log_prob.detach() + self.target_entropy)).mean()

    @torch.no_grad()
    def values(self, observation: Nest) -> Float[Tensor, " B"]:
        """Estimate what the mean action earns: rewards from here on, and the entropy of what is done afterwards.

        Args:
            observation: ``[B, ...]`` per leaf, on the agent's device.

        Returns:
            The lower critic's value, in the unit of rewards.
        """
        value = self._lower(observation, self.policy_net(observation)[0].tanh())
        return value if self.scale is None else value * self.scale.deviation()

    def actor(self, number: int, count: int) -> tuple["SquashedGaussian", nn.Module]:
        """Give what an actor acts with; see `Agent.actor`."""
        return SquashedGaussian(self.policy_net, self.config, self.shape, self.device), self.policy_net

    def scalars(self, env_steps: int) -> Mapping[str, float]:
        """Say where the schedule stands; see `Agent.scalars`."""
        return {"train/learning_rate": self.lr(env_steps)}

    def parts(self) -> Mapping[str, Any]:
        """Name everything that learning changes; see `Agent.parts`."""
        parts = {
            "actor": self.policy_net,
            "critics": self.critics,
            "target": self.target,
            "temperature": nn.ParameterList([self.log_alpha]),
            "scale": self.scale,
            "policy_optimizer": self.policy_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "generator": self.generator,
            "updates": self.updates,
        }
        return {name: part for name, part in parts.items() if part is not None}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bfloat16)

    def _noise(self, action: Float[Tensor, "B actions"]) -> Float[Tensor, "B actions"]:
        return torch.empty_like(action).normal_(generator=self.generator)

    def _draw(self, observation: Nest, noise: Tensor, learning: bool = False) -> tuple[Tensor, Float[Tensor, " B"]]:
        return TanhGaussian(*self.policy_net(observation, learning)).sample_action(noise)

    def _lower(self, observation: Nest, action: Float[Tensor, "B actions"]) -> Float[Tensor, " B"]:
        value = self.critics(observation, action)
        return (value.squeeze(2) if self.support is None else self.support.mean(value.softmax(dim=2))).amin(dim=0)


class SquashedGaussian:
    """Act by the actor: tanh of a Gaussian sample, or of its mean in mode ``"greedy"``; a `Policy`.

    Its carry holds the last noise, where that is correlated, and the return so far, where rewards are scaled.

    Args:
        network: The actor, on ``device``.
        config: The agent's settings.
        shape: Of one action.
        device: Where to act.
    """

    def __init__(self, network: Actor, config: SACConfig, shape: tuple[int, ...], device: torch.device) -> None:
        self.network, self.config, self.shape, self.device = network, config, shape, device

    def initial_carry(self, num_envs: int) -> Nest:
        """Give the carry with which episodes begin; see `Policy`."""
        carry = {}
        if self.config.noise_correlation:
            carry["noise"] = np.zeros((num_envs, math.prod(self.shape)), np.float32)
        if self.config.scale_rewards:
            carry[PAST] = np.zeros(num_envs, np.float32)
        return carry or ()

    @torch.inference_mode()
    def __call__(self, observation: Nest, carry: Nest, context: PolicyContext) -> PolicyOutput:
        """Choose for every row; see `Policy`."""
        mean, log_std = self.network(map_nest(lambda leaf: torch.from_numpy(leaf).to(self.device), observation))
        carry, extras = dict(carry), {}
        if context.mode != "greedy":
            noise = context.generator.standard_normal(tuple(mean.shape), np.float32)
            if along := self.config.noise_correlation:
                # Of variance 1 at every step, the first one included.
                mixed = along * carry["noise"] + math.sqrt(1 - along**2) * noise
                carry["noise"] = noise = np.where(context.is_first[:, None], noise, mixed).astype(np.float32)
            mean = mean + log_std.exp() * torch.from_numpy(noise).to(self.device)
        if self.config.scale_rewards:
            past = self.config.gamma * carry[PAST] + context.prev_reward
            carry[PAST] = extras[PAST] = past.astype(np.float32)
        return PolicyOutput(mean.tanh().cpu().numpy().reshape(-1, *self.shape), carry or (), extras)


def _shape_of(space: spaces.Space) -> tuple[int, ...]:
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating) and math.prod(space.shape):
        if np.isfinite(space.low).all() and np.isfinite(space.high).all():
            return space.shape
        raise SpaceError(f"action_space: is {space}; SAC plays bounded Boxes only. Bound it in a wrapper, or use ppo.")
    others = {spaces.Discrete: "Use dqn, rainbow, r2d2, pqn or ppo.", spaces.MultiDiscrete: "Use ppo."}
    advice = others.get(type(space), "Map it onto a single Box in a wrapper.")
    raise SpaceError(f"action_space: is {space}; SAC plays a Box of floats only. {advice}")
