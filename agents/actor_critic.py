"""The network of actor-critic agents, and the policy that acts with it.

    observation ──► moments ──► encoder ──► core (LSTM, GRU or none) ──┬──► policy trunk and head
                                   ▲                                   └──► value trunk and head
    previous action and reward ────┘ with a core

Observations and values are normalised inside: agents meet any scale, and everything outside (values, checkpoints,
actors, evaluations) sees true units. The statistics change between blocks alone, so that the policy which learns from
a block is at first the very one that took its steps.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from gymnasium import spaces
from jaxtyping import Bool, Float
from torch import Tensor, nn

from agents.common import ActionHead, Categorical, DiagonalGaussian
from agents.networks import Encoder, Recurrent, linear, mlp
from rlfeed.nest import Nest, leaves, map_nest
from rlfeed.returns import rescale
from rlfeed.types import PolicyContext, PolicyOutput

CoreKind = Literal["none", "lstm", "gru"]
CORES = ("none", "lstm", "gru")
CLIP = 10.0  # deviations beyond which normalised observations are cut off
EPSILON = 1e-8  # added to variances


class Moments(nn.Module):
    """Keep mean and variance of the rows seen so far, and bring rows to mean 0 and variance 1.

    Args:
        shape: Of one row.

    Source:
        Chan, Golub and LeVeque 1979, Updating formulae and a pairwise algorithm for computing sample variances.
    """

    def __init__(self, shape: Sequence[int] = ()) -> None:
        super().__init__()
        self.count: Tensor
        self.mean: Tensor
        self.variance: Tensor
        self.deviation: Tensor
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(tuple(shape)))
        self.register_buffer("variance", torch.ones(tuple(shape)))
        self.register_buffer("deviation", torch.ones(tuple(shape)))  # never 0

    def forward(self, rows: Tensor) -> Tensor:
        """Normalise rows.

        Args:
            rows: ``[..., *shape]``.

        Returns:
            The same shape, within 10 deviations.
        """
        return ((rows - self.mean) / self.deviation).clamp(-CLIP, CLIP)

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Count rows.

        Args:
            rows: ``[n, *shape]``, n at least 1.
        """
        variance, mean = torch.var_mean(rows.float(), dim=0, correction=0)
        total = self.count + len(rows)
        share, apart = len(rows) / total, mean - self.mean
        before = torch.where(self.count > 0, self.variance, 0.0)
        self.variance.copy_(before * (1 - share) + variance * share + apart.square() * share * (1 - share))
        self.mean.add_(apart * share)
        self.deviation.copy_((self.variance + EPSILON).sqrt())
        self.count.copy_(total)


class Inputs(NamedTuple):
    """Hold what a policy sees: ``[B, ...]``, or ``[B, T, ...]`` of sequences.

    Args:
        observation: What to act on, normalised.
        is_first: Whether an episode begins there; the other two count where it does not.
        prev_action: What was done before.
        prev_reward: What came of it.
    """

    observation: Nest
    is_first: Any = ()
    prev_action: Nest = ()
    prev_reward: Any = ()


class ActorCritic(nn.Module):
    """Give the parameters of a distribution of actions, and values; its trunks share encoder and core alone.

    Args:
        observation_space: The Gymnasium space of one observation.
        action_space: The Gymnasium space of one action.
        head: Makes distributions of actions of what the policy's trunk puts out.
        widths: Units of the layers of each trunk.
        core: What remembers.
        core_width: Units of each of its layers.
        core_layers: Its layers.
        normalize: Whether the floats of observations are brought to mean 0 and variance 1.
        generator: Where the weights come from.

    Raises:
        SpaceError: If a part of the observation space is not supported; the message names the part.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        head: ActionHead,
        widths: Sequence[int],
        core: CoreKind = "none",
        core_width: int = 64,
        core_layers: int = 1,
        normalize: bool = True,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(observation_space, generator)
        self._moments = _moments_of(observation_space) if normalize else None
        self.moments = nn.ModuleList(part for _, part in leaves(self._moments or ()))
        self.value_moments = Moments()
        self.core: Recurrent | None = None
        features = self.encoder.features
        if core != "none":
            self.prev_action = Encoder(action_space, generator)
            inputs = features + self.prev_action.features + 1
            self.core = Recurrent(inputs, core_width, generator, kind=core, layers=core_layers)
            features = core_width
        last = widths[-1] if widths else features
        self.policy, self.value = (
            nn.Sequential(mlp(features, widths, generator, activation=nn.Tanh), linear(last, size, gain, generator))
            for size, gain in ((head.outputs, 0.01), (1, 1.0))
        )
        self.head, self.action_space = head, action_space
        self.log_std = nn.Parameter(torch.zeros(head.outputs)) if head.is_continuous else None

    def initial_carry(self, num_envs: int) -> Nest:
        """Give the core's state with which episodes begin.

        Args:
            num_envs: Rows.

        Returns:
            ``[num_envs, ...]`` per leaf; ``()`` without a core.
        """
        return () if self.core is None else self.core.initial_carry(num_envs)

    def normalized(self, observation: Nest) -> Nest:
        """Normalise observations: what `step` and `unroll` take in.

        Args:
            observation: ``[..., *shape]`` per leaf.

        Returns:
            The same shapes.
        """
        if self._moments is None:
            return observation
        return map_nest(lambda part, leaf: part(leaf), self._moments, observation)

    def step(self, inputs: Inputs, carry: Nest) -> tuple[Float[Tensor, "B F"], Nest]:
        """Take in one step.

        Args:
            inputs: ``[B, ...]``.
            carry: Before it.

        Returns:
            What both trunks read, and the carry after it.
        """
        encoded = self._encode(inputs)
        return (encoded, carry) if self.core is None else self.core.step(encoded, carry)

    def unroll(self, inputs: Inputs, carry: Nest) -> Float[Tensor, "B T F"]:
        """Take in sequences, with the result of `step` at each of their steps.

        Args:
            inputs: ``[B, T, ...]``.
            carry: Before the first steps, ``[B, ...]``.

        Returns:
            What both trunks read.
        """
        rows = len(next(leaf for _, leaf in leaves(inputs.observation)))
        encoded = self._encode(map_nest(lambda leaf: leaf.flatten(0, 1), inputs)).unflatten(0, (rows, -1))
        return encoded if self.core is None else self.core(encoded, carry)[0]

    def count(self, observation: Nest) -> None:
        """Count observations for the statistics that normalise them.

        Args:
            observation: ``[n, ...]`` per leaf, n at least 1.
        """
        if self._moments is not None:
            map_nest(
                lambda part, leaf: part.update(leaf) if isinstance(part, Moments) else None, self._moments, observation
            )

    def distribution(
        self, features: Float[Tensor, "*batch F"], mask: Bool[Tensor, "*batch A"] | None = None
    ) -> Categorical | DiagonalGaussian:
        """Give the distribution of actions.

        Args:
            features: As `step` and `unroll` give them.
            mask: True = allowed; None: everything is.

        Returns:
            The distribution.
        """
        outputs = self.policy(features)
        if isinstance(self.action_space, spaces.Discrete):  # without the head's detour for several components
            return Categorical(outputs, mask, start=int(self.action_space.start))
        return self.head(outputs, mask=mask, log_std=self.log_std)

    def values(self, features: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch"]:
        """Estimate returns.

        Args:
            features: As `step` and `unroll` give them.

        Returns:
            Values in the unit of rewards.
        """
        return self.value(features).squeeze(-1) * self.value_moments.deviation + self.value_moments.mean

    @torch.no_grad()
    def count_targets(self, targets: Float[Tensor, " n"]) -> None:
        """Count targets for the statistics that values are normalised by; what `values` gives stays as it is.

        Args:
            targets: In the unit of rewards, n at least 1.

        Source:
            van Hasselt et al. 2016, Learning values across many orders of magnitude, equation 5 (PopArt).
        """
        moments = self.value_moments
        last: Any = self.value[-1]
        mean, deviation = moments.mean.clone(), moments.deviation.clone()
        moments.update(targets)
        last.weight.mul_(deviation / moments.deviation)
        last.bias.mul_(deviation).add_(mean - moments.mean).div_(moments.deviation)

    def _encode(self, inputs: Inputs) -> Float[Tensor, "B F"]:
        encoded = self.encoder(inputs.observation)
        if self.core is None:
            return encoded
        goes_on = ~inputs.is_first.unsqueeze(-1)
        action = inputs.prev_action
        if (start := getattr(self.action_space, "start", None)) is not None:
            # Zeros, where an episode begins, may be no action of the space: take any, what it becomes is blanked.
            action = action.maximum(torch.as_tensor(start, device=action.device))
        action = self.prev_action(action)
        return torch.cat([encoded, action * goes_on, rescale(inputs.prev_reward).unsqueeze(-1) * goes_on], dim=-1)


class ActorCriticPolicy:
    """Act: a `Policy` that gives the log-probability of what it drew, and the mask of what was allowed.

    Args:
        network: What decides.
        device: Where it is.
    """

    def __init__(self, network: ActorCritic, device: torch.device) -> None:
        self.network, self.device = network, device

    def initial_carry(self, num_envs: int) -> Nest:
        """Give the carry with which episodes begin; see `Policy`."""
        return self.network.initial_carry(num_envs)

    @torch.inference_mode()
    def __call__(self, observation: Nest, carry: Nest, context: PolicyContext) -> PolicyOutput:
        """Draw an action for every row, or in greedy mode take the most probable; see `Policy`."""
        network = self.network
        inputs = Inputs(network.normalized(map_nest(self._tensor, observation)))
        if network.core is not None:
            before = context.is_first, context.prev_action, context.prev_reward
            inputs = Inputs(inputs.observation, *(self._tensor(part) for part in before))
        features, carry = network.step(inputs, carry)
        mask = None if context.action_mask is None else self._tensor(context.action_mask)
        distribution = network.distribution(features, mask)
        if context.mode == "greedy":
            return PolicyOutput(distribution.mode.cpu().numpy(), carry)
        action = distribution.sample(context.generator)
        extras: dict[str, Any] = {"log_prob": distribution.log_prob(action).cpu().numpy()}
        if context.action_mask is not None:
            extras["action_mask"] = context.action_mask
        return PolicyOutput(action.cpu().numpy(), carry, extras)

    def _tensor(self, leaf: Any) -> Tensor:
        return torch.from_numpy(leaf).to(self.device)


def _moments_of(space: Any) -> Nest:
    if isinstance(space, spaces.Dict):
        return {key: _moments_of(part) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_moments_of(part) for part in space.spaces)
    if isinstance(space, spaces.Box) and space.dtype.kind == "f":
        return Moments(space.shape)
    return nn.Identity()
