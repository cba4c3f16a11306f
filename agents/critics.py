"""Networks of `agents/sac.py`: several multilayer perceptrons at once, with batch normalisation and unit weights."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from gymnasium import spaces
from jaxtyping import Float
from torch import Tensor, nn

from agents.networks import Encoder, linear
from rlfeed.nest import Nest

Norm = Literal["none", "renorm", "batch"]


class Linears(nn.Module):
    """Apply one linear layer for each member, in one batched product.

    Args:
        members: E, how many layers there are, each with weights of its own.
        inputs: Features in.
        outputs: Features out.
        gain: Scale of the orthogonal weights.
        bias: Whether to add one.
        generator: Where the weights come from.
    """

    def __init__(
        self, members: int, inputs: int, outputs: int, gain: float, *, bias: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        drawn = [linear(inputs, outputs, gain, generator).weight.detach().T for _ in range(members)]
        self.weight = nn.Parameter(torch.stack(drawn).contiguous())
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs)) if bias else None

    def forward(self, x: Float[Tensor, "E B inputs"]) -> Float[Tensor, "E B outputs"]:
        """Apply every layer to its rows.

        Args:
            x: Inputs of each member.

        Returns:
            Outputs of each member.
        """
        return torch.bmm(x, self.weight) if self.bias is None else torch.baddbmm(self.bias, x, self.weight)

    @torch.no_grad()
    def project(self) -> None:
        """Scale the weights of every output unit to norm 1, as XQC does after each optimiser step."""
        self.weight.div_(self.weight.norm(dim=1, keepdim=True))


class BatchRenorm(nn.Module):
    """Normalise features by their batch while learning, by running statistics otherwise.

    Without ``warmup`` this is batch normalisation. With it, a batch is corrected towards the running statistics once
    they have seen that many batches:

        y = scale * ((x - m) / s * r + d) + shift,    r = s / s_run in 1/3 .. 3,    d = (m - m_run) / s_run in -5 .. 5

    Args:
        members: E.
        features: Of each row.
        warmup: Batches before the correction begins; None: it never does.
        momentum: Part of the running statistics that each batch replaces.

    Source:
        Ioffe and Szegedy 2015, algorithm 1; Ioffe 2017, Batch Renormalization, algorithm 1.
    """

    EPSILON, MAX_SCALE, MAX_SHIFT = 1e-3, 3.0, 5.0

    def __init__(self, members: int, features: int, warmup: int | None = None, momentum: float = 0.01) -> None:
        super().__init__()
        self.warmup, self.momentum = warmup, momentum
        self.scale = nn.Parameter(torch.ones(members, 1, features))
        self.shift = nn.Parameter(torch.zeros(members, 1, features))
        self.mean: Tensor
        self.variance: Tensor
        self.batches: Tensor
        self.register_buffer("mean", torch.zeros(members, 1, features))
        self.register_buffer("variance", torch.ones(members, 1, features))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Float[Tensor, "E B features"], learning: bool) -> Float[Tensor, "E B features"]:
        """Normalise every feature.

        Args:
            x: Features of each member.
            learning: Whether to use the batch's statistics, and to count them.

        Returns:
            Features of the same shape.
        """
        x = x.to(self.scale.dtype)  # statistics of bfloat16 would be useless
        if not learning:
            gain = self.scale * (self.variance + self.EPSILON).rsqrt()
            return torch.addcmul(self.shift - self.mean * gain, x, gain)
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        gain, shift = self.scale * (variance + self.EPSILON).rsqrt(), self.shift
        if self.warmup is not None:
            ratio, moved = self._correction(mean.detach(), variance.detach(), self.batches >= self.warmup)
            gain, shift = gain * ratio, shift + self.scale * moved
        with torch.no_grad():
            self.mean.lerp_(mean, self.momentum)
            self.variance.lerp_(variance, self.momentum)
            self.batches.add_(1)
        return torch.addcmul(shift - mean * gain, x, gain)

    def _correction(self, mean: Tensor, variance: Tensor, warm: Tensor) -> tuple[Tensor, Tensor]:
        """Give r and d; torch.where in place of a branch, which would wait for the device."""
        running = (self.variance + self.EPSILON).rsqrt()
        ratio = ((variance + self.EPSILON).sqrt() * running).clamp(1 / self.MAX_SCALE, self.MAX_SCALE)
        moved = ((mean - self.mean) * running).clamp(-self.MAX_SHIFT, self.MAX_SHIFT)
        return torch.where(warm, ratio, 1.0), torch.where(warm, moved, 0.0)


class Perceptrons(nn.Module):
    """Evaluate E multilayer perceptrons of one shape together.

    Args:
        members: E.
        inputs: Features in.
        widths: Units of each layer.
        outputs: Features out.
        norm: ``"renorm"``: normalise what each layer gets, as CrossQ does. ``"batch"``: normalise the inputs, and
            every layer before its activation, as XQC does.
        warmup: Of `BatchRenorm`, with ``"renorm"``.
        gain: Scale of the last layer's weights.
        generator: Where the weights come from.
    """

    def __init__(
        self,
        members: int,
        inputs: int,
        widths: Sequence[int],
        outputs: int,
        *,
        norm: Norm,
        warmup: int,
        gain: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()

        def norms(features: int) -> list[nn.Module]:
            return [] if norm == "none" else [BatchRenorm(members, features, warmup if norm == "renorm" else None)]

        layers = norms(inputs)
        for width in widths:
            bias = norm != "batch"  # which the normalisation that follows would take away again
            layers.append(Linears(members, inputs, width, math.sqrt(2), bias=bias, generator=generator))
            relu = nn.ReLU(inplace=True)  # what it overwrites, no gradient needs; 5 percent of an update of SAC
            layers += [*norms(width), relu] if norm == "batch" else [relu, *norms(width)]
            inputs = width
        layers.append(Linears(members, inputs, outputs, gain, bias=True, generator=generator))
        self.layers = nn.ModuleList(layers)

    @property
    def dtype(self) -> torch.dtype:
        """Give the numbers' type, which that of the outputs is too."""
        return next(self.parameters()).dtype

    def forward(self, x: Float[Tensor, "E B inputs"], learning: bool) -> Float[Tensor, "E B outputs"]:
        """Evaluate every member.

        Args:
            x: Inputs of each member.
            learning: Of `BatchRenorm`.

        Returns:
            Outputs of each member.
        """
        for layer in self.layers:
            x = layer(x, learning) if isinstance(layer, BatchRenorm) else layer(x)
        return x.to(self.dtype)  # under autocast too

    def project(self) -> None:
        """Scale the weights of every unit to norm 1; see `Linears.project`."""
        for layer in self.layers:
            if isinstance(layer, Linears):
                layer.project()


class Critics(nn.Module):
    """Estimate the value of an action several times, by networks that share nothing.

    Args:
        observation_space: The Gymnasium space of one observation.
        actions: Numbers in one action.
        widths: Units of each layer.
        outputs: Numbers that each member gives: 1, or the atoms of a distribution.
        norm: See `Perceptrons`.
        warmup: See `Perceptrons`.
        members: E.
        generator: Where the weights come from.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        actions: int,
        widths: Sequence[int],
        outputs: int = 1,
        *,
        norm: Norm,
        warmup: int,
        members: int = 2,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.members = members
        encoders = [Encoder(observation_space, generator) for _ in range(members)]
        plain = next(encoders[0].parameters(), None) is None  # nothing to learn: one encoding is every member's
        self.encoders = nn.ModuleList(encoders[:1] if plain else encoders)
        self.perceptrons = Perceptrons(
            members, encoders[0].features + actions, widths, outputs,
            norm=norm, warmup=warmup, gain=1.0, generator=generator,
        )  # fmt: skip

    def forward(
        self, observation: Nest, action: Float[Tensor, "B actions"], learning: bool = False
    ) -> Float[Tensor, "E B outputs"]:
        """Estimate the value of each row's action.

        Args:
            observation: ``[B, ...]`` per leaf.
            action: In -1 .. 1.
            learning: Of `BatchRenorm`.

        Returns:
            What each member says.
        """
        rows = [torch.cat([encoder(observation), action], dim=-1) for encoder in self.encoders]
        x = rows[0].expand(self.members, -1, -1) if len(rows) == 1 else torch.stack(rows)
        return self.perceptrons(x, learning)


class Actor(nn.Module):
    """Give the means and log deviations of a Gaussian over actions before they are squashed.

    Args:
        observation_space: The Gymnasium space of one observation.
        actions: Numbers in one action.
        widths: Units of each layer.
        norm: See `Perceptrons`.
        warmup: See `Perceptrons`.
        generator: Where the weights come from.
    """

    LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0

    def __init__(
        self,
        observation_space: spaces.Space,
        actions: int,
        widths: Sequence[int],
        *,
        norm: Norm,
        warmup: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(observation_space, generator)
        self.perceptrons = Perceptrons(
            1, self.encoder.features, widths, 2 * actions, norm=norm, warmup=warmup, gain=0.01, generator=generator
        )

    def forward(
        self, observation: Nest, learning: bool = False
    ) -> tuple[Float[Tensor, "B actions"], Float[Tensor, "B actions"]]:
        """Say how to act.

        Args:
            observation: ``[B, ...]`` per leaf.
            learning: Of `BatchRenorm`.

        Returns:
            Means, and logarithms of standard deviations within their bounds.
        """
        mean, log_std = self.perceptrons(self.encoder(observation).unsqueeze(0), learning).squeeze(0).chunk(2, dim=-1)
        return mean, log_std.clamp(self.LOG_STD_MIN, self.LOG_STD_MAX)


class ReturnScale(nn.Module):
    """Divide rewards by the deviation of the discounted return, as batches from the replay show it.

    Args:
        v_max: The highest atom: the deviation counts as no less than 2 / v_max of the root mean square, so that a
            return that never varies lies halfway to it.

    Source:
        Palenicek et al. 2026 (XQC), appendix; there the return is followed while acting.
    """

    RATE = 1e-3  # of each batch once there were a thousand; until then all count alike

    def __init__(self, v_max: float) -> None:
        super().__init__()
        self.least = (2 / v_max) ** 2
        self.moments: Tensor
        self.batches: Tensor
        self.register_buffer("moments", torch.zeros(2))
        self.register_buffer("batches", torch.zeros(()))

    @torch.no_grad()
    def forward(self, reward: Float[Tensor, " B"], returns: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
        """Count a batch, and scale its rewards.

        Args:
            reward: Of each transition.
            returns: Discounted rewards of its episode up to and with it.

        Returns:
            The scaled rewards.
        """
        self.batches.add_(1)
        now = torch.stack([returns.mean(), returns.square().mean()])
        self.moments.lerp_(now, (1 / self.batches).clamp(min=self.RATE))
        return reward / self.deviation()

    def deviation(self) -> Float[Tensor, ""]:
        """Give what rewards are divided by."""
        mean, square = self.moments.unbind()
        return torch.maximum(square - mean.square(), self.least * square).clamp(min=1e-12).sqrt()
