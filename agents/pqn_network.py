"""The network of PQN, normalised at every layer and in the unit of its values, and the policy that acts with it."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Float, Int64
from torch import Tensor, nn

from agents.networks import Encoder, Recurrent, linear, mlp
from rlfeed.nest import Nest, leaves, map_nest
from rlfeed.types import PolicyContext, PolicyOutput

Core = Literal["none", "lstm", "gru"]
RATE = 0.05  # of a block in the running mean and variance of targets
FLOOR = 1e-2  # least deviation of targets, as a part of their mean: equal ones have none
LEAST = 1e-4  # least deviation of all
MASK = "action_mask"  # the column of the policy's extras


class PQNetwork(nn.Module):
    """Estimate the value of every discrete action, over sequences.

        observation ──► encoder ──► layers with LayerNorm ──► core with LayerNorm, or none ──► values
                                            previous action ──┘

    Args:
        observation_space: The Gymnasium space of one observation.
        actions: How many actions there are, at least 1.
        widths: Units of the fully connected layers after the encoder.
        core: What remembers.
        core_width: Units of each of its layers.
        core_layers: Its layers.
        generator: Where the weights come from.

    Raises:
        SpaceError: If a part of the observation space is not supported; the message names the part.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        actions: int,
        widths: Sequence[int],
        *,
        core: Core,
        core_width: int,
        core_layers: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        encoder = Encoder(observation_space, generator)
        features, learned = encoder.features, any(True for _ in encoder.parameters())
        norm = nn.LayerNorm(features) if learned else nn.Identity()
        self.trunk = nn.Sequential(encoder, norm, mlp(features, widths, generator, layer_norm=True))
        features = widths[-1] if widths else features
        self.actions, self.core = actions, None
        if core != "none":
            self.core = Recurrent(features + actions + 1, core_width, generator, kind=core, layers=core_layers)
            self.core_norm, features = nn.LayerNorm(core_width), core_width
        self.head = linear(features, actions, 1.0, generator)
        self.mean: Tensor
        self.variance: Tensor
        self.deviation: Tensor
        self.seen: Tensor
        for name, value in (("mean", 0.0), ("variance", 0.0), ("deviation", 1.0), ("seen", 0.0)):
            self.register_buffer(name, torch.tensor(value))

    def initial_carry(self, rows: int) -> Nest:
        """Give the carry with which episodes begin.

        Args:
            rows: How many.

        Returns:
            ``[rows, ...]`` per leaf; ``()`` without a core.
        """
        return () if self.core is None else self.core.initial_carry(rows)

    def forward(
        self, observation: Nest, previous: Int64[Tensor, "B T"] | None = None, carry: Nest = ()
    ) -> tuple[Float[Tensor, "B T actions"], Nest]:
        """Estimate the value of each action at each step of sequences, no episode of which begins but at step 0.

        Args:
            observation: ``[B, T, ...]`` per leaf.
            previous: For a core: 1 + the action before; 0 where an episode begins.
            carry: For a core: before the first step.

        Returns:
            Values in the unit of a discounted return, and the carry after the last step.
        """
        shape = next(leaf for _, leaf in leaves(observation)).shape[:2]
        features = self.trunk(map_nest(lambda leaf: leaf.flatten(0, 1), observation)).unflatten(0, shape)
        if self.core is not None and previous is not None:
            before = nn.functional.one_hot(previous, self.actions + 1)
            features, carry = self.core(torch.cat([features, before], dim=-1), carry)
            features = self.core_norm(features)
        return self.head(features) * self.deviation + self.mean, carry

    def step(
        self, observation: Nest, previous: Int64[Tensor, " B"], carry: Nest
    ) -> tuple[Float[Tensor, "B actions"], Nest]:
        """Estimate the value of each action at one step.

        Args:
            observation: ``[B, ...]`` per leaf.
            previous: 1 + the action before; 0 where an episode begins.
            carry: Before it.

        Returns:
            Values in the unit of a discounted return, and the next carry.
        """
        value, carry = self(map_nest(lambda leaf: leaf.unsqueeze(1), observation), previous.unsqueeze(1), carry)
        return value.squeeze(1), carry

    def first(self, observation: Nest) -> Float[Tensor, "B actions"]:
        """Estimate the value of each action where an episode begins.

        Args:
            observation: ``[B, ...]`` per leaf.

        Returns:
            Values in the unit of a discounted return.
        """
        rows = next(leaf for _, leaf in leaves(observation)).shape[0]
        previous = torch.zeros(rows, dtype=torch.int64, device=self.mean.device)
        return self.step(observation, previous, self.initial_carry(rows))[0]

    @torch.no_grad()
    def adopt(self, target: Float[Tensor, " S"]) -> None:
        """Count targets, and take their running mean and deviation as the unit of the head; no value changes.

        Args:
            target: At least one.

        Source:
            van Hasselt et al. 2016 (Learning values across many orders of magnitude), equations 4 to 9.
        """
        self.seen.lerp_(torch.ones_like(self.seen), RATE)
        share = RATE / self.seen  # 1 for the first block: there is nothing before it
        variance, mean = torch.var_mean(target, correction=0)
        old_mean, old_deviation, apart = self.mean.clone(), self.deviation.clone(), mean - self.mean
        self.variance.copy_((1 - share) * (self.variance + share * apart.square()) + share * variance)
        self.mean.add_(share * apart)
        self.deviation.copy_(torch.maximum(self.variance.sqrt(), FLOOR * self.mean.abs()).clamp(min=LEAST))
        self.head.weight.mul_(old_deviation / self.deviation)
        self.head.bias.mul_(old_deviation).add_(old_mean - self.mean).div_(self.deviation)


class Greedy:
    """Choose the action of the highest value: a `Policy`, whose carry is the core's.

    Args:
        network: Gives values.
        first_action: The number of the first action.
        device: Where the network is.
    """

    def __init__(self, network: PQNetwork, first_action: int, device: torch.device) -> None:
        self.network, self.first_action, self.device = network, first_action, device

    def initial_carry(self, num_envs: int) -> Nest:
        """Give the carry with which episodes begin; see `Policy`."""
        return self.network.initial_carry(num_envs)

    @torch.inference_mode()
    def __call__(self, observation: Nest, carry: Nest, context: PolicyContext) -> PolicyOutput:
        """Choose for every row, among the allowed actions where a mask says so, and keep the mask; see `Policy`."""
        before: Any = context.prev_action
        previous = np.where(context.is_first, 0, before.astype(np.int64) - self.first_action + 1)
        seen = map_nest(lambda leaf: torch.from_numpy(leaf).to(self.device), observation)
        values, carry = self.network.step(seen, torch.from_numpy(previous).to(self.device), carry)
        mask, extras = context.action_mask, {}
        if mask is not None:
            values, extras = values.masked_fill(torch.from_numpy(~mask).to(self.device), -torch.inf), {MASK: mask}
        return PolicyOutput(values.argmax(dim=-1).cpu().numpy() + self.first_action, carry, extras)
