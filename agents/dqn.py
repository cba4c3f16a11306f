"""DQN: Q-learning on replayed transitions, with the corrections that cost nothing.

What it computes, for a transition over k <= n steps with return R = r_1 + gamma r_2 + ...:

    target = R + gamma^k Q'(s', argmax_a Q(s', a))        0 in place of the last term where s' is terminal
    loss   = mean of w * huber(Q(s, a) - target)

Q is the network and Q' the target network. Sources: Mnih et al. 2015 (Human-level control through deep reinforcement
learning, algorithm 1), van Hasselt et al. 2016 (Deep reinforcement learning with double Q-learning, equation 4), Wang
et al. 2016 (dueling networks, equation 9), Sutton 1988 (n-step returns).

Departs from Mnih et al.: double estimates and n-step returns by default; truncated episodes bootstrap from their true
final observation; Adam, whose learning rate falls linearly to `lr_end`; the gradient's norm is clipped, and each error
by the Huber loss; rewards are not clipped.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gymnasium import spaces
from jaxtyping import Float
from torch import Tensor, nn

from agents.config import AgentConfig, ReplayTrainConfig, check
from agents.networks import QNetwork
from rlfeed.errors import FieldError, SpaceError
from rlfeed.nest import Nest, map_nest
from rlfeed.replay import Transition
from rlfeed.rollout import EpsilonGreedy
from rlfeed.train.agent import Counter, Learned, ReplayAgent
from rlfeed.train.schedule import Linear
from rlfeed.types import Batch, PolicyContext, PolicyOutput


@dataclass(frozen=True, kw_only=True)
class DQNConfig(AgentConfig):
    """Hold DQN's settings.

    Args:
        lr: Learning rate of Adam at the first env step.
        lr_end: Learning rate at the last env step; in between it falls in a straight line.
        gamma: Discount per step, 0 to 1.
        n_step: Steps of reward summed before the value of what follows is used, at least 1.
        double: Choose the next action by the network, value it by the target network.
        dueling: Estimate a state value and advantages in place of action values.
        widths: Units of the fully connected layers after the encoder.
        target_every: Updates between copies of the network into the target network.
        max_grad_norm: The gradient's norm is scaled down to this.
        epsilon_start: Probability of a random action at the first env step, 0 to 1.
        epsilon_end: Probability of a random action once exploration has fallen, 0 to 1.
        epsilon_fraction: Part of the run's env steps in which exploration falls, above 0 to 1.
        epsilon_power: Actor i of n explores with epsilon ** (1 + epsilon_power * i / (n - 1)); 0 makes all alike.
            Horgan et al. 2018 (Distributed prioritized experience replay) have 7, and an epsilon of 0.4.
    """

    lr: float = 2e-3
    lr_end: float = 0.0
    gamma: float = 0.99
    n_step: int = 5
    double: bool = True
    dueling: bool = False
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
            "gamma": (0 <= self.gamma <= 1, "0 to 1"),
            "n_step": (self.n_step >= 1, "at least 1"),
            "widths": (all(width >= 1 for width in self.widths), "at least 1 unit each"),
            "target_every": (self.target_every >= 1, "at least 1 update"),
            "max_grad_norm": (self.max_grad_norm > 0, "above 0"),
            "epsilon_start": (0 <= self.epsilon_start <= 1, "0 to 1"),
            "epsilon_end": (0 <= self.epsilon_end <= 1, "0 to 1"),
            "epsilon_fraction": (0 < self.epsilon_fraction <= 1, "above 0 and at most 1"),
            "epsilon_power": (self.epsilon_power >= 0, "0 or more"),
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
    ) -> "DQN":
        """Make the agent; see `AgentConfig.build`."""
        return DQN(self, observation_space, action_space, total_steps=total_steps, seed=seed, device=device)


def dqn() -> ReplayTrainConfig:
    """Give the settings that solve CartPole and suit other small problems.

    Returns:
        A whole run: environment, agent and budget.
    """
    return ReplayTrainConfig(total_steps=60_000, agent=DQNConfig())


class DQN(ReplayAgent):
    """Learn action values from transitions, and act on them.

    Args:
        config: The settings.
        observation_space: The Gymnasium space of one environment's observations.
        action_space: The Gymnasium space of one environment's actions: Discrete.
        total_steps: Environment steps of the whole run, the end of both schedules.
        seed: Seeds the network's weights.
        device: Where to learn and act.

    Raises:
        SpaceError: If the actions are not Discrete, or a part of the observation space is not supported.
    """

    def __init__(
        self,
        config: DQNConfig,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        total_steps: int,
        seed: int,
        device: torch.device,
    ) -> None:
        if not isinstance(action_space, spaces.Discrete):
            raise SpaceError(
                f"action_space: is {action_space}; DQN plays Discrete ones only. Use an agent for continuous actions, "
                "or map a Discrete space onto this one in a wrapper."
            )
        self.config, self.device = config, device
        self.first_action, self._actions = int(action_space.start), action_space
        self.unit = Transition(n_step=config.n_step, gamma=config.gamma)
        self.network, self.target = (
            QNetwork(
                observation_space,
                int(action_space.n),
                config.widths,
                dueling=config.dueling,
                generator=torch.Generator().manual_seed(seed),
            ).to(device)
            for _ in range(2)
        )
        self.target.requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.lr, fused=True)
        self.lr = Linear(config.lr, config.lr_end, total_steps)
        self.epsilon = Linear(
            config.epsilon_start, config.epsilon_end, max(1, round(config.epsilon_fraction * total_steps))
        )
        self.policy = self.actor(0, 1)[0]
        self.updates = Counter()

    def parts(self) -> Mapping[str, Any]:
        """Name everything that learning changes; see `Agent.parts`."""
        return {
            "network": self.network, "target": self.target, "optimizer": self.optimizer, "updates": self.updates,
        }  # fmt: skip

    def actor(self, number: int, count: int) -> tuple[EpsilonGreedy, nn.Module]:
        """Give what an actor acts with; see `Agent.actor`."""
        greedy, power = GreedyQ(self.network, self.first_action, self.device), self.config.epsilon_power
        exponent = 1 + power * number / max(count - 1, 1)
        return EpsilonGreedy(greedy, lambda env_steps: self.epsilon(env_steps) ** exponent, self._actions), self.network

    def learn(self, batch: Batch, *, env_steps: int) -> Learned:
        """Take one optimiser step.

        Args:
            batch: Transitions, on the agent's device.
            env_steps: Steps taken so far, the clock of the learning rate.

        Returns:
            Curves; see `Agent.learn`.
        """
        action = (batch.action.long() - self.first_action).unsqueeze(1)
        value = self.network(batch.observation).gather(1, action).squeeze(1)
        target = self.targets(batch)
        error = nn.functional.huber_loss(value, target, reduction="none")
        loss = error.mean() if batch.weights is None else (batch.weights * error).mean()

        self.optimizer.param_groups[0]["lr"] = self.lr(env_steps)
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.updates.value += 1
        if self.updates.value % self.config.target_every == 0:
            self.target.load_state_dict(self.network.state_dict())
        scalars = {"train/loss": loss.detach(), "train/q_mean": value.detach().mean(), "train/grad_norm": grad_norm}
        return Learned(scalars)

    @torch.no_grad()
    def targets(self, batch: Batch) -> Float[Tensor, " B"]:
        """Compute what the values are trained towards.

        Args:
            batch: Transitions, on the agent's device.

        Returns:
            R + discount * Q'(s', a'), where a' is greedy in Q (double) or in Q'.

        Raises:
            FieldError: If these are no transitions.
        """
        if batch.discount is None or batch.next_observation is None:
            raise FieldError("DQN: the batch has no discount or next_observation; expected batches of Transition.")
        next_values = self.target(batch.next_observation)
        chooser = self.network(batch.next_observation) if self.config.double else next_values
        bootstrap = next_values.gather(1, chooser.argmax(dim=1, keepdim=True)).squeeze(1)
        # where, not a product: 0 * inf from a terminal observation's value would be nan.
        return batch.reward + torch.where(batch.discount > 0, batch.discount * bootstrap, 0.0)

    def scalars(self, env_steps: int) -> dict[str, float]:
        """Say where the schedules stand.

        Args:
            env_steps: Steps taken so far.

        Returns:
            Scalars by tag.
        """
        return {"rollout/exploration_rate": self.epsilon(env_steps), "train/learning_rate": self.lr(env_steps)}


class GreedyQ:
    """Choose the action of the highest value: a stateless `Policy`.

    Args:
        network: Gives ``[k, actions]`` values of ``[k, ...]`` observations.
        first_action: The number of the first action.
        device: Where the network is.
    """

    def __init__(self, network: nn.Module, first_action: int, device: torch.device) -> None:
        self.network, self.first_action, self.device = network, first_action, device

    def initial_carry(self, num_envs: int) -> Nest:
        """Give the empty carry; see `Policy`."""
        return ()

    @torch.inference_mode()
    def __call__(self, observation: Nest, carry: Nest, context: PolicyContext) -> PolicyOutput:
        """Choose for every row, among the allowed actions where a mask says so; see `Policy`."""
        values = self.network(map_nest(lambda leaf: torch.from_numpy(leaf).to(self.device), observation))
        if context.action_mask is not None:
            allowed = torch.from_numpy(context.action_mask).to(self.device)
            values = values.masked_fill(~allowed, -torch.inf)
        action = values.argmax(dim=-1).cpu().numpy()
        return PolicyOutput(action + self.first_action)

