"""Networks for nested observations: one encoder for vectors, images and categories, and the heads on top of it.

Every weight comes from a generator the caller hands in; torch's global random state is left alone.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float, Integer, Shaped
from torch import Tensor, nn

from rlfeed import specs
from rlfeed.errors import SpaceError
from rlfeed.nest import Nest, Path, describe, leaves, map_nest

IMAGE_CHANNELS = (32, 64, 64)  # of the strided convolutions, the last one repeated
SIGMA = 0.5  # of noisy layers at first, over the square root of their inputs


def linear(inputs: int, outputs: int, gain: float, generator: torch.Generator) -> nn.Linear:
    """Make a linear layer with orthogonal weights and zero bias.

    Args:
        inputs: Features in, at least 1.
        outputs: Features out, at least 1.
        gain: Scale of the weights: sqrt(2) before a ReLU, 1 for values, 0.01 for policies.
        generator: Where the weights come from.

    Returns:
        The layer, on the CPU.

    Source:
        Saxe et al. 2014, Exact solutions to the nonlinear dynamics of learning in deep linear neural networks.
    """
    return _initialise(nn.utils.skip_init(nn.Linear, inputs, outputs), gain, generator)


def mlp(
    inputs: int,
    widths: Sequence[int],
    generator: torch.Generator,
    *,
    activation: type[nn.Module] = nn.ReLU,
    layer_norm: bool = False,
) -> nn.Sequential:
    """Make a multilayer perceptron with an activation after every layer.

    Args:
        inputs: Features in, at least 1.
        widths: Units of each layer; may be empty.
        generator: Where the weights come from.
        activation: After each layer.
        layer_norm: Whether each layer is normalised before its activation (Ba et al. 2016, Layer normalization).

    Returns:
        The network, ``[..., inputs]`` to ``[..., widths[-1]]``.
    """
    layers: list[nn.Module] = []
    for width in widths:
        layers.append(linear(inputs, width, math.sqrt(2), generator))
        layers += [nn.LayerNorm(width), activation()] if layer_norm else [activation()]
        inputs = width
    return nn.Sequential(*layers)


class Recurrent(nn.Module):
    """Remember what came before: an LSTM or a GRU whose carry begins with zeros in every episode.

    The carry is what a `Policy` has: one tensor, or two for an LSTM, of ``[rows, layers, width]``.

    Args:
        inputs: Features in, at least 1.
        width: Features out, at least 1.
        generator: Where the weights come from.
        kind: ``"lstm"`` or ``"gru"``.
        layers: One upon the other, at least 1.

    Source:
        Hochreiter and Schmidhuber 1997, Long short-term memory; Cho et al. 2014, Learning phrase representations using
        RNN encoder-decoder.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        generator: torch.Generator,
        *,
        kind: Literal["lstm", "gru"] = "lstm",
        layers: int = 1,
    ) -> None:
        super().__init__()
        self.kind, self.width, self.layers = kind, width, layers
        make = nn.LSTM if kind == "lstm" else nn.GRU
        # Made without weights first: its own would come from torch's global random state.
        self.core = make(inputs, width, num_layers=layers, batch_first=True, device="meta").to_empty(device="cpu")
        for name, parameter in self.core.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.orthogonal_(parameter, generator=generator)

    @property
    def carry_space(self) -> spaces.Space:
        """Say what the carry of one environment is, to a replay that stores it.

        Returns:
            A Box ``[layers, width]``; a Tuple of two for an LSTM.
        """
        box = spaces.Box(-math.inf, math.inf, (self.layers, self.width), np.float32)
        return spaces.Tuple((box, box)) if self.kind == "lstm" else box

    def initial_carry(self, rows: int) -> Nest:
        """Give the carry with which episodes begin.

        Args:
            rows: How many.

        Returns:
            Zeros, ``[rows, layers, width]`` per leaf, on the module's device.
        """
        zeros = torch.zeros(rows, self.layers, self.width, device=next(self.parameters()).device)
        return (zeros, zeros.clone()) if self.kind == "lstm" else zeros

    def forward(
        self, features: Float[Tensor, "B T inputs"], carry: Nest, is_first: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T width"], Nest]:
        """Go over sequences.

        Args:
            features: What comes in.
            carry: Before the first step, ``[B, layers, width]`` per leaf.
            is_first: True where an episode begins, and the carry is zeros again; None: nowhere inside.

        Returns:
            What comes out at each step, and the carry after the last one.
        """
        if is_first is None:
            return self._run(features, carry)
        outputs, began = [], 0
        # Between two resets of any row all rows go on together, in one call of the core.
        for t in [*is_first.any(dim=0).nonzero().flatten().tolist(), features.shape[1]]:
            if t > began:
                output, carry = self._run(features[:, began:t], carry)
                outputs.append(output)
            if t < features.shape[1]:
                first = is_first[:, t, None, None]
                carry = map_nest(lambda leaf, first=first: torch.where(first, 0.0, leaf), carry)
            began = t
        return torch.cat(outputs, dim=1), carry

    def step(self, features: Float[Tensor, "B inputs"], carry: Nest) -> tuple[Float[Tensor, "B width"], Nest]:
        """Take one step; whoever acts resets the carry, as `Rollout` does.

        Args:
            features: What comes in.
            carry: ``[B, layers, width]`` per leaf.

        Returns:
            What comes out, and the next carry.
        """
        output, carry = self._run(features.unsqueeze(1), carry)
        return output.squeeze(1), carry

    def _run(self, features: Tensor, carry: Nest) -> tuple[Tensor, Nest]:
        # torch keeps layers before rows, whatever batch_first says.
        turned = map_nest(lambda leaf: leaf.transpose(0, 1).contiguous(), carry)
        output, carry = self.core(features, turned)
        return output, map_nest(lambda leaf: leaf.transpose(0, 1), carry)


class Encoder(nn.Module):
    """Turn a nested observation into one vector of features per row.

    A leaf is read by its space: a uint8 Box ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]`` is an image, scaled to [0, 1]
    by its upper bound and reduced by strided convolutions, and so is a bool Box of three axes; any other Box and
    MultiBinary are flattened; Discrete and MultiDiscrete become one-hot vectors.

    Args:
        space: The Gymnasium space of one observation: these kinds, and Dict and Tuple of them, nested.
        generator: Where the weights come from.

    Raises:
        SpaceError: If a part of the space is of another kind or empty; the message names the part.
    """

    def __init__(self, space: spaces.Space, generator: torch.Generator) -> None:
        super().__init__()
        specs.from_space(space, "observation_space")  # refuses by name what has no array of one shape
        parts = list(_leaf_spaces(space))
        self.paths = [path for path, _ in parts]
        self.parts = nn.ModuleList(_part(part, describe("observation_space", path), generator) for path, part in parts)
        self.features = sum(int(part.features) for part in self.parts)  # pyright: ignore[reportArgumentType]

    def forward(self, observation: Nest) -> Float[Tensor, "B features"]:
        """Encode a batch.

        Args:
            observation: ``[B, ...]`` per leaf, in the dtypes of the space.

        Returns:
            The features of every leaf side by side, in the order of the leaves.
        """
        values = dict(leaves(observation))
        encoded = [part(values[path]) for path, part in zip(self.paths, self.parts, strict=True)]
        return encoded[0] if len(encoded) == 1 else torch.cat(encoded, dim=-1)


class NoisyLinear(nn.Module):
    """Map features linearly by weights that carry noise whose scale is learned.

    With noise e of its inputs and outputs and f(e) = sign(e) sqrt|e|, the weights are ``mean + sigma f(e_out) f(e_in)``
    and the bias is ``mean + sigma f(e_out)``. Who calls the layer draws the noise; without any the means are used,
    whatever ``training`` says.

    Args:
        inputs: Features in, at least 1.
        outputs: Features out, at least 1.
        gain: Scale of the means; see `linear`.
        generator: Where the means come from.

    Source:
        Fortunato et al. 2018, Noisy networks for exploration, equations 9 to 11 and section 3.2.
    """

    def __init__(self, inputs: int, outputs: int, gain: float, generator: torch.Generator) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.mean = linear(inputs, outputs, gain, generator)
        self.weight_sigma = nn.Parameter(torch.full((outputs, inputs), SIGMA / math.sqrt(inputs)))
        self.bias_sigma = nn.Parameter(torch.full((outputs,), SIGMA / math.sqrt(inputs)))

    def forward(
        self, features: Float[Tensor, "B inputs"], noise: Float[Tensor, " inputs_and_outputs"] | None = None
    ) -> Float[Tensor, "B outputs"]:
        """Map a batch.

        Args:
            features: ``[B, inputs]``.
            noise: Standard normal, one number per input and then one per output; None for the means alone.

        Returns:
            ``[B, outputs]``.
        """
        if noise is None:
            return self.mean(features)
        noise_in, noise_out = (noise.sign() * noise.abs().sqrt()).split([self.inputs, self.outputs])
        weight = torch.addcmul(self.mean.weight, self.weight_sigma, torch.outer(noise_out, noise_in))
        return nn.functional.linear(features, weight, torch.addcmul(self.mean.bias, self.bias_sigma, noise_out))


class QNetwork(nn.Module):
    """Estimate the value of every discrete action, or the distribution of its return.

    Args:
        observation_space: The Gymnasium space of one observation.
        actions: How many actions there are, at least 1.
        widths: Units of the fully connected layers after the encoder.
        dueling: Estimate a state value and mean-centred advantages in place of the values themselves; with atoms, for
            every atom.
        atoms: Logits per action; 1 for plain values.
        noisy: Make the layers after the encoder `NoisyLinear`.
        generator: Where the weights come from.

    Raises:
        SpaceError: If a part of the observation space is not supported; the message names the part.

    Source:
        Wang et al. 2016, Dueling network architectures for deep reinforcement learning, equation 9; Bellemare et al.
        2017, A distributional perspective on reinforcement learning, section 4.1.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        actions: int,
        widths: Sequence[int],
        *,
        dueling: bool,
        atoms: int = 1,
        noisy: bool = False,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        layer = NoisyLinear if noisy else linear
        self.shape = (-1, actions) if atoms == 1 else (-1, actions, atoms)
        self.encoder = Encoder(observation_space, generator)
        inputs = [self.encoder.features, *widths]
        self.trunk = nn.ModuleList(layer(a, b, math.sqrt(2), generator) for a, b in pairwise(inputs))
        self.advantage = layer(inputs[-1], actions * atoms, 1.0, generator)
        self.value = layer(inputs[-1], atoms, 1.0, generator) if dueling else None
        noisy_layers = [part for part in self.modules() if isinstance(part, NoisyLinear)]
        self.noise_sizes = [part.inputs + part.outputs for part in noisy_layers]

    def forward(
        self, observation: Nest, noise: Float[Tensor, " noise"] | None = None
    ) -> Float[Tensor, "B actions *atoms"]:
        """Estimate the value of each action.

        Args:
            observation: ``[B, ...]`` per leaf.
            noise: Standard normal, ``sum(noise_sizes)`` numbers for the noisy layers; None for their means.

        Returns:
            One value per action, in the unit of a discounted return; with atoms the logits of each.
        """
        parts = iter(() if noise is None else noise.split(self.noise_sizes))
        features = self.encoder(observation)
        for layer in self.trunk:
            features = _mapped(layer, features, parts).relu()
        advantage = _mapped(self.advantage, features, parts).view(self.shape)
        if self.value is None:
            return advantage
        value = _mapped(self.value, features, parts).view(self.shape[0], 1, *self.shape[2:])
        return value + advantage - advantage.mean(dim=1, keepdim=True)


def _mapped(layer: nn.Module, features: Tensor, noise: Iterator[Tensor]) -> Tensor:
    return layer(features, next(noise, None)) if isinstance(layer, NoisyLinear) else layer(features)


def flatten_parameters(module: nn.Module) -> tuple[nn.Parameter, Float[Tensor, " weights"]]:
    """Lay a module's parameters side by side in one tensor, and their gradients in another.

    An optimiser, a norm or a copy of the one tensor is one kernel instead of one per layer: for small networks these
    took as long as the layers themselves. A backward pass adds to the gradients: zero them in place before.

    Args:
        module: On the device where it stays. Its parameters become views: write into them, do not replace them.

    Returns:
        The parameters as one, for an optimiser, and their gradients.
    """
    parameters = list(module.parameters())
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = gradient = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, data, grad in zip(parameters, flat.detach().split(sizes), gradient.split(sizes), strict=True):
        parameter.data, parameter.grad = data.view_as(parameter), grad.view_as(parameter)
    return flat, gradient


class _Flat(nn.Module):
    """Flatten numbers; uint8 is scaled to [0, 1], as it is in images."""

    def __init__(self, space: spaces.Space) -> None:
        super().__init__()
        self.features = math.prod(space.shape or ())
        self.scale = _scale(space) if space.dtype == "uint8" else 1.0

    def forward(self, value: Tensor) -> Float[Tensor, "B features"]:
        flat = value.reshape(len(value), self.features).float()
        return flat if self.scale == 1.0 else flat * self.scale


class _OneHot(nn.Module):
    """Encode categories, of Discrete or of every entry of a MultiDiscrete, as one-hot vectors side by side."""

    def __init__(self, sizes: list[int], starts: list[int]) -> None:
        super().__init__()
        self.features = sum(sizes)
        first = torch.tensor([0, *sizes[:-1]]).cumsum(0)  # where each category's vector begins
        self.offset: Tensor
        self.register_buffer("offset", first - torch.tensor(starts), persistent=False)

    def forward(self, value: Integer[Tensor, "B ..."]) -> Float[Tensor, "B features"]:
        index = value.reshape(len(value), len(self.offset)).long() + self.offset
        return torch.zeros(len(value), self.features, device=value.device).scatter_(1, index, 1.0)


class _Image(nn.Module):
    """Reduce an image by strided convolutions until its shorter side has at most 6 pixels."""

    def __init__(self, space: spaces.Box, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = _scale(space)
        self.shape = space.shape if len(space.shape) == 3 else (*space.shape, 1)
        # The channels are the shorter of the outer axes; Gymnasium's own order, last, where they are equal.
        self.channels_last = self.shape[2] <= self.shape[0]
        channels, height, width = (self.shape[2], *self.shape[:2]) if self.channels_last else self.shape
        layers: list[nn.Module] = []
        for outputs in _channels(min(height, width)):
            conv = nn.utils.skip_init(nn.Conv2d, channels, outputs, kernel_size=3, stride=2, padding=1)
            layers += [_initialise(conv, math.sqrt(2), generator), nn.ReLU()]
            channels, height, width = outputs, (height + 1) // 2, (width + 1) // 2
        self.convolutions = nn.Sequential(*layers)
        self.features = channels * height * width

    def forward(self, value: Shaped[Tensor, "B ..."]) -> Float[Tensor, "B features"]:
        image = value.reshape(len(value), *self.shape).float() * self.scale
        if self.channels_last:
            image = image.permute(0, 3, 1, 2)
        return self.convolutions(image).flatten(1)


def _scale(space: Any) -> float:
    """Scale to [0, 1] by the upper bound: a grid of zeros and ones in uint8 would vanish if divided by 255."""
    return 1 / max(float(space.high.max()), 1.0)


def _channels(side: int) -> list[int]:
    found = [IMAGE_CHANNELS[0]]
    while (side := (side + 1) // 2) > 6:
        found.append(IMAGE_CHANNELS[min(len(found), len(IMAGE_CHANNELS) - 1)])
    return found


def _initialise(layer: Any, gain: float, generator: torch.Generator) -> Any:
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def _leaf_spaces(space: spaces.Space, path: Path = ()) -> list[tuple[Path, spaces.Space]]:
    if isinstance(space, spaces.Dict):
        return [leaf for key, part in space.spaces.items() for leaf in _leaf_spaces(part, (*path, key))]
    if isinstance(space, spaces.Tuple):
        return [leaf for index, part in enumerate(space.spaces) for leaf in _leaf_spaces(part, (*path, index))]
    return [(path, space)]


def _part(space: spaces.Space, where: str, generator: torch.Generator) -> nn.Module:
    if isinstance(space, spaces.Discrete):
        return _OneHot([int(space.n)], [int(space.start)])
    if isinstance(space, spaces.MultiDiscrete):
        return _OneHot([int(n) for n in space.nvec.flat], [int(n) for n in space.start.flat])
    shape = space.shape or ()
    if math.prod(shape) == 0:
        raise SpaceError(f"{where}: has shape {shape}, no numbers at all; expected at least one. Leave it out.")
    dimensions = {"uint8": (2, 3), "bool": (3,)}.get(str(space.dtype), ())  # of an image; a flat bool one is a table
    if isinstance(space, spaces.Box) and len(shape) in dimensions:
        return _Image(space, generator)
    return _Flat(space)
