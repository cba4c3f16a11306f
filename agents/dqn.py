"""DQN and Rainbow: Q-learning on replayed transitions.

What DQN computes, for a transition over k <= n steps with return R = r_1 + gamma r_2 + ...:

    target = R + gamma^k Q'(s', argmax_a Q(s', a))        0 in place of the last term where s' is terminal
    loss   = mean of w * huber(Q(s, a) - target)          priority = |Q(s, a) - target|

Q is the network and Q' the target network. Rainbow learns the distribution of returns over atoms z_i in place of its
mean, and a' is the action whose mean is greatest:

    target = projection of R + gamma^k z_i with p'_i(s', a') onto the atoms
    loss   = mean of w * cross_entropy(target, p(s, a))   priority = the cross entropy

Sources: Mnih et al. 2015 (DQN, algorithm 1), van Hasselt et al. 2016 (double Q-learning, equation 4), Wang et al. 2016
(dueling networks, equation 9), Sutton 1988 (n-step returns), Schaul et al. 2016 (prioritized replay, algorithm 1),
Bellemare et al. 2017 (C51, algorithm 1), Fortunato et al. 2018 (noisy networks, equations 9 to 11), Hessel et al. 2018
(Rainbow), Farebrother et al. 2024 (HL-Gauss, equations 6 and 7), Horgan et al. 2018 (Ape-X, section 4.1).

Departs from Mnih et al.: double estimates and n-step returns by default; truncated episodes bootstrap from their true
final observation; Adam, whose learning rate falls linearly to `lr_end`; the gradient's norm is clipped, and each error
by the Huber loss; rewards are not clipped. Departs from Hessel et al.: epsilon-greedy unless `noisy`; both streams of
the dueling network begin after all layers; weights are divided by the greatest of their batch. Departs from Horgan et
al.: a new step has the greatest priority that is stored, not one that its actor computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from agents.common import Support, polyak
from agents.config import AgentConfig, EnvConfig, ReplayTrainConfig, check
from agents.networks import QNetwork, flatten_parameters
from rlfeed.errors import FieldError, SpaceError
from rlfeed.nest import Nest, map_nest
from rlfeed.replay import Prioritized, Transition, Uniform
from rlfeed.rollout import EpsilonGreedy
from rlfeed.rollout.actions import MASK
from rlfeed.train.agent import Counter, Learned, ReplayAgent
from rlfeed.train.schedule import Linear
from rlfeed.types import Batch, Policy, PolicyContext, PolicyOutput

Noise = Sequence[Tensor | None]

_LEAST_PRIORITY = 1e-6  # a step whose error is 0 can still be drawn
_SILENT: Noise = (None, None, None)


@dataclass(frozen=True, kw_only=True)
class DQNConfig(AgentConfig):
    """Hold DQN's and Rainbow's settings.

    Args:
        lr: Learning rate of Adam at the first env step.
        lr_end: Learning rate at the last env step; in between it falls in a straight line.
        adam_eps: Added to the root of Adam's second moment.
        gamma: Discount per step, 0 to 1.
        n_step: Steps of reward summed before the value of what follows is used, at least 1.
        double: Choose the next action by the network, value it by the target network.
        dueling: Estimate a state value and advantages in place of action values.
        noisy: Explore by noise in the network, whose scale is learned, in place of random actions.
        atoms: Atoms of the distribution of returns, at least 2; 1 learns their mean alone.
        v_min: The least return of the distribution, in the unit of a discounted sum of rewards.
        v_max: The greatest return of the distribution.
        hl_gauss: Learn the mean as a histogram, smoothed by a Gaussian, in place of the distribution.
        priority_exponent: Samples are drawn in proportion to their priority to this power; 0 draws uniformly.
        beta: Exponent of importance weights at the first env step; it rises in a straight line to 1 at the last.
        widths: Units of the fully connected layers after the encoder.
        target_every: Updates between copies of the network into the target network.
        max_grad_norm: The gradient's norm is scaled down to this.
        epsilon_start: Probability of a random action at the first env step, 0 to 1.
        epsilon_end: Probability of a random action once exploration has fallen, 0 to 1.
        epsilon_fraction: Part of the run's env steps in which exploration falls, above 0 to 1.
        epsilon_power: Environment i of the n of all actors explores with epsilon ** (1 + epsilon_power * i / (n - 1));
            0 makes all alike. Horgan et al. 2018 have 7, with an epsilon of 0.4.
    """

    lr: float = 2e-3
    lr_end: float = 0.0
    adam_eps: float = 1e-8
    gamma: float = 0.99
    n_step: int = 5
    double: bool = True
    dueling: bool = False
    noisy: bool = False
    atoms: int = 1
    v_min: float = -200.0
    v_max: float = 200.0
    hl_gauss: bool = False
    priority_exponent: float = 0.0
    beta: float = 0.4
    widths: tuple[int, ...] = (128, 128)
    target_every: int = 200
    max_grad_norm: float = 10.0
    epsilon_start: float = 1.0
    epsilon_end: float = 0.04
    epsilon_fraction: float = 0.16
    epsilon_power: float = 0.0

    def __post_init__(self) -> None:
        check(self, {
            "lr": (self.lr > 0, "above 0"),
            "lr_end": (self.lr_end >= 0, "0 or more"),
            "adam_eps": (self.adam_eps > 0, "above 0"),
            "gamma": (0 <= self.gamma <= 1, "0 to 1"),
            "n_step": (self.n_step >= 1, "at least 1"),
            "atoms": (self.atoms >= 1, "at least 2, or 1 for plain values"),
            "v_min": (self.v_min < self.v_max, f"less than v_max, which is {self.v_max}"),
            "hl_gauss": (not self.hl_gauss or self.atoms > 1, "False where agent.atoms is 1"),
            "priority_exponent": (self.priority_exponent >= 0, "0 or more"),
            "beta": (0 <= self.beta <= 1, "0 to 1"),
            "widths": (all(width >= 1 for width in self.widths), "at least 1 unit each"),
            "target_every": (self.target_every >= 1, "at least 1 update"),
            "max_grad_norm": (self.max_grad_norm > 0, "above 0"),
            "epsilon_start": (0 <= self.epsilon_start <= 1, "0 to 1"),
            "epsilon_end": (0 <= self.epsilon_end <= 1, "0 to 1"),
            "epsilon_fraction": (0 < self.epsilon_fraction <= 1, "above 0 and at most 1"),
            "epsilon_power": (self.epsilon_power >= 0, "0 or more"),
        })  # fmt: skip

    def build(self, observation_space: Any, action_space: Any, **run: Any) -> "DQN":
        """Make the agent; see `AgentConfig.build`."""
        return DQN(self, observation_space, action_space, **run)


def dqn() -> ReplayTrainConfig:
    """Give the settings that solve CartPole and suit other small problems.

    Returns:
        A whole run: environment, agent and budget.
    """
    return ReplayTrainConfig(total_steps=50_000, agent=DQNConfig())


def rainbow() -> ReplayTrainConfig:
    """Give the settings of Rainbow for vectors and small grids.

    Returns:
        A whole run: environment, agent and budget.
    """
    agent = DQNConfig(dueling=True, atoms=101, priority_exponent=0.5, lr=5e-4, adam_eps=1.5e-4, n_step=3)
    return ReplayTrainConfig(train_every=4, updates_per_round=1, batch_size=128, agent=agent)


def apex() -> ReplayTrainConfig:
    """Give the settings of Ape-X: Rainbow, fed by actors in processes of their own, each environment with its epsilon.

    Returns:
        A whole run: environment, agent and budget.
    """
    run = rainbow()
    agent = replace(run.agent, epsilon_start=0.4, epsilon_end=0.4, epsilon_power=7.0)
    return replace(run, agent=agent, env=EnvConfig(num_envs=4), actors=2)


class DQN(ReplayAgent):
    """Learn action values from transitions, and act on them.

    Args:
        config: The settings.
        observation_space: Of one environment. An entry ``"action_mask"`` of a Dict says which actions are allowed:
            others are neither played nor taken for the best in targets.
        action_space: Of one environment: Discrete.
        total_steps: Environment steps of the whole run, the end of every schedule.
        seed: Seeds the network's weights and its noise.
        device: Where to learn and act.
        num_envs: Environments of one actor; they share out what `epsilon_power` spreads.

    Raises:
        SpaceError: If the actions are not Discrete, or a part of the observation space is not supported.
    """

    def __init__(
        self,
        config: DQNConfig,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        total_steps: int, seed: int, device: torch.device, num_envs: int = 1,
    ) -> None:  # fmt: skip
        if not isinstance(action_space, spaces.Discrete):
            other = "sac or ppo" if isinstance(action_space, spaces.Box) else "ppo"
            raise SpaceError(
                f"action_space: is {action_space}; DQN plays Discrete ones only. Use {other}, which plays this one, or "
                "map a Discrete space onto it in a wrapper."
            )
        self.config, self.device, self.num_envs = config, device, num_envs
        self.first_action, self._actions = int(action_space.start), action_space
        self.unit = Transition(n_step=config.n_step, gamma=config.gamma)
        self._prioritized = config.priority_exponent > 0
        self.sampler = Prioritized(config.priority_exponent, config.beta) if self._prioritized else Uniform()
        self.support = Support(config.v_min, config.v_max, config.atoms, device) if config.atoms > 1 else None
        self.network, self.target = (
            QNetwork(
                observation_space,
                int(action_space.n),
                config.widths,
                dueling=config.dueling,
                atoms=config.atoms,
                noisy=config.noisy,
                generator=torch.Generator().manual_seed(seed),
            ).to(device)
            for _ in range(2)
        )
        self.target.requires_grad_(False)
        weights, self._gradient = flatten_parameters(self.network)
        self.optimizer = torch.optim.Adam([weights], lr=config.lr, eps=config.adam_eps, fused=True)
        self.noise = torch.Generator(device).manual_seed(seed + 1)
        self.updates = Counter()
        self.lr = Linear(config.lr, config.lr_end, total_steps)
        self._beta = Linear(config.beta, 1.0, total_steps)
        falling = max(1, round(config.epsilon_fraction * total_steps))
        self.epsilon = Linear(config.epsilon_start, config.epsilon_end, falling)
        self._judge = torch.compile(self._errors) if config.compile else self._errors
        self.policy = self.actor(0, 1)[0]

    def actor(self, number: int, count: int) -> tuple[Policy, nn.Module]:
        """Give what an actor acts with; see `Agent.actor`."""
        greedy = GreedyQ(self.network, self.support, self.first_action, self.device)
        if self.config.noisy:
            return greedy, self.network
        if not self.config.epsilon_power:
            return EpsilonGreedy(greedy, self.epsilon, self._actions), self.network
        rungs = np.linspace(0.0, 1.0, count * self.num_envs)[number * self.num_envs :][: self.num_envs]
        powers = 1.0 + self.config.epsilon_power * rungs
        return EpsilonGreedy(greedy, lambda env_steps: self.epsilon(env_steps) ** powers, self._actions), self.network

    def learn(self, batch: Batch, *, env_steps: int) -> Learned:
        """Take one optimiser step; see `Agent.learn`.

        Raises:
            FieldError: If these are no transitions.
        """
        if batch.discount is None or batch.next_observation is None:
            raise FieldError("DQN: the batch has no discount or next_observation; expected batches of Transition.")
        action = batch.action.long() - self.first_action
        seen = batch.observation, action, batch.reward, batch.discount, batch.next_observation
        losses, priorities, values = self._judge(*seen, self._noise())
        loss = (batch.weights * losses if self._prioritized else losses).mean()

        self._gradient.zero_()
        loss.backward()
        grad_norm = torch.linalg.vector_norm(self._gradient)
        self._gradient.mul_((self.config.max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0))
        self.optimizer.param_groups[0]["lr"] = self.lr(env_steps)
        self.optimizer.step()
        self.updates.value += 1
        if self.updates.value % self.config.target_every == 0:
            polyak(self.target, self.network, 1.0)
        scalars = {"train/loss": loss.detach(), "train/q_mean": values.mean(), "train/grad_norm": grad_norm}
        return Learned(scalars, priorities)

    def _errors(
        self,
        observation: Nest,
        action: Int64[Tensor, " B"],
        reward: Float[Tensor, " B"],
        discount: Float[Tensor, " B"],
        next_observation: Nest,
        noise: Noise,
    ) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"] | None, Float[Tensor, " B"]]:
        """Give losses and priorities, both before importance weights, and the values of the actions taken."""
        taken = _of(action, self._outputs(self.network, observation, noise[0]))
        target = self.targets(reward, discount, next_observation, noise)
        if self.support is None:
            losses = nn.functional.smooth_l1_loss(taken, target, reduction="none")
            errors, values = taken.detach() - target, taken.detach()
        else:
            logs = taken.log_softmax(dim=-1)
            losses = -(target * logs).sum(dim=-1)
            errors, values = losses.detach(), self.support.mean(logs.detach().exp())
        return losses, errors.abs() + _LEAST_PRIORITY if self._prioritized else None, values

    @torch.no_grad()
    def targets(
        self, reward: Float[Tensor, " B"], discount: Float[Tensor, " B"], next_observation: Nest, noise: Noise = _SILENT
    ) -> Float[Tensor, "B ..."]:
        """Compute what the values, or their distributions, are trained towards.

        Args:
            reward: Sums over k steps.
            discount: gamma^k, 0 where terminated.
            next_observation: ``[B, ...]`` per leaf, after k steps.
            noise: Of the values, which is not used here, of the targets, and of the choice.

        Returns:
            R + discount * Q'(s', a') where a' is greedy in Q (double) or in Q', or its distribution.
        """
        outputs = self._outputs(self.target, next_observation, noise[1])
        chooser = self._outputs(self.network, next_observation, noise[2]) if self.config.double else outputs
        following = _of(_greedy(_means(chooser, self.support), _mask_in(next_observation)), outputs)
        # where, not a product alone: 0 * inf from a terminal observation's value would be nan.
        goes_on = discount > 0
        if self.support is None:
            return torch.where(goes_on, torch.addcmul(reward, discount, following), reward)
        if self.config.hl_gauss:
            following = self.support.mean(following.softmax(dim=-1))
            return self.support.hl_gauss(torch.where(goes_on, torch.addcmul(reward, discount, following), reward))
        following = torch.where(goes_on.unsqueeze(1), following, 0.0).softmax(dim=-1)
        return self.support.project(following, reward, discount)

    @torch.no_grad()
    def values(self, observation: Nest) -> Float[Tensor, " B"]:
        """Estimate what the best action is worth, ``[B, ...]`` per leaf of the observation."""
        return _means(self.network(observation), self.support).amax(dim=-1)

    def beta(self, env_steps: int) -> float | None:
        """Give the exponent of importance weights; see `ReplayAgent.beta`."""
        return self._beta(env_steps) if self._prioritized else None

    def scalars(self, env_steps: int) -> dict[str, float]:
        """Say where the schedules stand; see `Agent.scalars`."""
        rate = 0.0 if self.config.noisy else self.epsilon(env_steps)
        return {"rollout/exploration_rate": rate, "train/learning_rate": self.lr(env_steps)}

    def parts(self) -> dict[str, Any]:
        """Name what learning changes; see `Agent.parts`."""
        networks = {"network": self.network, "target": self.target}
        return {**networks, "optimizer": self.optimizer, "noise": self.noise, "updates": self.updates}

    def _outputs(self, network: QNetwork, observation: Nest, noise: Tensor | None) -> Float[Tensor, "B ..."]:
        if not self.config.bfloat16:
            return network(observation, noise)
        with torch.autocast(self.device.type, torch.bfloat16):
            return network(observation, noise).float()

    def _noise(self) -> Noise:
        if not self.config.noisy:
            return _SILENT
        size = sum(self.network.noise_sizes)
        return tuple(torch.randn(3, size, generator=self.noise, device=self.device))


class GreedyQ:
    """Choose the action of the highest value: a stateless `Policy`.

    Noise in the network, where there is some, is drawn anew for every step while exploring, and silent otherwise.

    Args:
        network: Gives ``[k, actions]`` values, or ``[k, actions, atoms]`` logits, of ``[k, ...]`` observations.
        support: The atoms, or None.
        first_action: The number of the first action.
        device: Where the network is.
    """

    def __init__(self, network: QNetwork, support: Support | None, first_action: int, device: torch.device) -> None:
        self.network, self.support, self.first_action, self.device = network, support, first_action, device
        self._noise_size = sum(network.noise_sizes)

    def initial_carry(self, num_envs: int) -> Nest:
        """Give the empty carry; see `Policy`."""
        return ()

    @torch.inference_mode()
    def __call__(self, observation: Nest, carry: Nest, context: PolicyContext) -> PolicyOutput:
        """Choose for every row, among the allowed actions where a mask says so; see `Policy`."""
        noise = None
        if self._noise_size and context.mode == "explore":
            noise = self._moved(context.generator.standard_normal(self._noise_size, np.float32))
        values = _means(self.network(map_nest(self._moved, observation), noise), self.support)
        mask = None if context.action_mask is None else self._moved(context.action_mask)
        return PolicyOutput(_greedy(values, mask).cpu().numpy() + self.first_action)

    def _moved(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def _means(outputs: Float[Tensor, "B actions *atoms"], support: Support | None) -> Float[Tensor, "B actions"]:
    """Give the values that a network's outputs stand for."""
    return outputs if support is None else support.mean(outputs.softmax(dim=-1))


def _greedy(values: Float[Tensor, "B actions"], mask: Bool[Tensor, "B actions"] | None) -> Int64[Tensor, " B"]:
    return (values if mask is None else values.masked_fill(~mask, -torch.inf)).argmax(dim=-1)


def _of(action: Int64[Tensor, " B"], outputs: Float[Tensor, "B actions *atoms"]) -> Float[Tensor, "B ..."]:
    index = action.view(-1, *[1] * (outputs.dim() - 1)).expand(-1, 1, *outputs.shape[2:])
    return outputs.gather(1, index).squeeze(1)


def _mask_in(observation: Nest) -> Bool[Tensor, "B actions"] | None:
    mask = observation.get(MASK) if isinstance(observation, dict) else None
    return mask.bool() if isinstance(mask, Tensor) else None
