"""Distributions of actions.

An action has ``axes`` axes behind the batch's, which may be ``[B]`` or ``[B, T]``; log-probabilities and entropies are
of the whole action, one number a row. Nothing draws from torch's global random state: a ``source`` is a generator of
NumPy (such as a policy's ``context.generator``) or of torch, or the noise itself.
"""

import math
from typing import Any, Self

import numpy as np
import torch
from gymnasium import spaces
from jaxtyping import Bool, Float, Int64, Integer
from torch import Tensor, nn

from rlfeed.errors import PolicyError, SpaceError, UnsupportedError
from rlfeed.nest import describe

Source = np.random.Generator | torch.Generator | Tensor
LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)
LEAST_NOISE = 1e-30  # an exponential's least value, whose log is finite


class Categorical:
    """Choose one of A actions, for each of the action's components on its own.

    What the mask forbids has probability 0 exactly and neither entropy nor gradient. Where it forbids everything, as in
    padding, it is left out of account; `sample` and `mode` refuse that.

    Args:
        logits: ``[..., *components, A]``, unnormalised log-probabilities.
        mask: True = allowed, of the shape of ``logits`` or one that extends to it; None: everything is.
        start: The first action, one number or ``[*components]``.
        axes: How many axes the action's components have: 0 for Discrete, 1 for a vector of them.
    """

    def __init__(
        self,
        logits: Float[Tensor, "... A"],
        mask: Bool[Tensor, "... A"] | None = None,
        *,
        start: int | Tensor = 0,
        axes: int = 0,
    ) -> None:
        self.start, self.axes, self._mask = start, axes, mask
        if mask is not None:
            logits = torch.where(mask | ~mask.any(-1, keepdim=True), logits, -math.inf)
        self.log_probs = logits.log_softmax(-1)

    @property
    def probs(self) -> Float[Tensor, "... A"]:
        """Give the probability of every action.

        Returns:
            ``[..., *components, A]``, 0 where forbidden.
        """
        return self.log_probs.exp()

    @property
    def mode(self) -> Int64[Tensor, "..."]:
        """Give the most probable action, the first among equals.

        Returns:
            ``[..., *components]`` int64.

        Raises:
            PolicyError: If the mask forbids every action of a row.
        """
        self._check_some_allowed()
        return self.log_probs.argmax(-1) + self.start

    def sample(self, source: Source) -> Int64[Tensor, "..."]:
        """Draw an action for every row.

        Args:
            source: A generator, or noise that is exponentially distributed, of the shape of the logits.

        Returns:
            ``[..., *components]`` int64.

        Raises:
            PolicyError: If the mask forbids every action of a row.

        Source:
            Maddison et al. 2014 (A* sampling): the largest of log p - log e has probability p.
        """
        self._check_some_allowed()
        noise = draw_exponential(self.log_probs.shape, source, self.log_probs.device)
        return (self.log_probs - noise.clamp(min=LEAST_NOISE).log()).argmax(-1) + self.start

    def log_prob(self, action: Integer[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Give the log-probability of an action.

        Args:
            action: ``[..., *components]``, of any integer type.

        Returns:
            ``[...]``: joint over the components.
        """
        index = (action.long() - self.start).unsqueeze(-1)
        return _joint(self.log_probs.gather(-1, index).squeeze(-1), self.axes)

    def entropy(self) -> Float[Tensor, "..."]:
        """Give the entropy.

        Returns:
            ``[...]``, in nats: the sum over the components.
        """
        return _joint(-(self.probs * self._finite()).sum(-1), self.axes)

    def kl(self, other: Self) -> Float[Tensor, "..."]:
        """Give the Kullback-Leibler divergence from this distribution to another.

        Args:
            other: Of the same shape; where it forbids what this one allows, the divergence is infinite.

        Returns:
            ``[...]``, in nats, 0 or more.
        """
        apart = torch.where(self.log_probs > -math.inf, self.log_probs - other.log_probs, 0.0)
        return _joint((self.probs * apart).sum(-1), self.axes)

    def _finite(self) -> Tensor:
        """Give log-probabilities, 0 in place of -inf: times a probability of 0 that is NaN, in the gradient too."""
        return torch.where(self.log_probs > -math.inf, self.log_probs, 0.0)

    def _check_some_allowed(self) -> None:
        if self._mask is not None and not bool((allowed := self._mask.any(-1)).all()):
            row = tuple((~allowed).nonzero()[0].tolist())
            raise PolicyError(
                f"Categorical: the mask forbids every action in row {row}; expected one that is allowed. "
                "Mend the environment's mask."
            )


class DiagonalGaussian:
    """Choose real numbers, each normally distributed on its own.

    Args:
        mean: ``[..., D]``, or ``[..., *shape]`` with as many axes as said.
        log_std: Log of the standard deviations, of that shape or one that extends to it, such as ``[D]``.
        axes: How many axes the action has.
    """

    def __init__(self, mean: Float[Tensor, "..."], log_std: Float[Tensor, "..."], *, axes: int = 1) -> None:
        self.mean, self.log_std, self.axes = mean, log_std, axes

    @property
    def mode(self) -> Float[Tensor, "..."]:
        """Give the most probable action.

        Returns:
            The mean.
        """
        return self.mean

    def sample(self, source: Source) -> Float[Tensor, "..."]:
        """Draw an action for every row; gradients flow to mean and deviation.

        Args:
            source: A generator, or standard normal noise of the mean's shape.

        Returns:
            ``[..., *shape]``.
        """
        return self.mean + self.log_std.exp() * draw_normal(self.mean.shape, source, self.mean.device)

    def log_prob(self, action: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Give the log-density of an action.

        Args:
            action: ``[..., *shape]``.

        Returns:
            ``[...]``: joint over the numbers of the action.
        """
        apart = (action - self.mean) * (-self.log_std).exp()
        return _joint(-0.5 * apart * apart - self.log_std - LOG_SQRT_2PI, self.axes)

    def entropy(self) -> Float[Tensor, "..."]:
        """Give the entropy.

        Returns:
            ``[...]``, in nats: the sum over the numbers of the action.
        """
        return _joint(self.log_std.expand_as(self.mean) + (0.5 + LOG_SQRT_2PI), self.axes)

    def kl(self, other: "DiagonalGaussian") -> Float[Tensor, "..."]:
        """Give the Kullback-Leibler divergence from this distribution to another.

        Args:
            other: Of the same shape.

        Returns:
            ``[...]``, in nats, 0 or more.
        """
        wider, apart = self.log_std - other.log_std, (self.mean - other.mean) * (-other.log_std).exp()
        return _joint(0.5 * ((2 * wider).exp() + apart * apart - 1) - wider, self.axes)


class TanhGaussian(DiagonalGaussian):
    """Choose numbers in -1 .. 1: the tanh of normally distributed ones.

    `sample`, `mode` and `log_prob` are of the number u *before* the tanh, which is what to keep: u cannot be had back
    from an action that rounds to 1. The action is ``u.tanh()``; `sample_action` gives both at once.
    """

    def sample_action(self, source: Source) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
        """Draw an action for every row; gradients flow to mean and deviation.

        Args:
            source: A generator, or standard normal noise of the mean's shape.

        Returns:
            The action ``[..., *shape]`` in -1 .. 1, and its log-density ``[...]`` there.
        """
        u = self.sample(source)
        return u.tanh(), self.log_prob(u)

    def log_prob(self, action: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Give the log-density of tanh(u), in the unit of actions in -1 .. 1.

        Args:
            action: u, ``[..., *shape]``, before the tanh.

        Returns:
            ``[...]``: joint over the numbers of the action.

        Source:
            Haarnoja et al. 2018 (Soft actor-critic algorithms and applications), equation 26; there
            log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)), which stays exact where tanh(u) rounds to 1.
        """
        correction = 2 * (math.log(2) - action - nn.functional.softplus(-2 * action))
        return super().log_prob(action) - _joint(correction, self.axes)

    def entropy(self) -> Float[Tensor, "..."]:
        """Refuse: it has no closed form.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            "TanhGaussian.entropy: has no closed form; expected an estimate. Take the mean of -log_prob of samples."
        )


class ActionHead:
    """Say what a network is to put out for actions of a space, and make distributions of that.

    Args:
        space: Discrete, MultiDiscrete, MultiBinary, or a Box of floats.
        device: Where the outputs will lie.

    Raises:
        SpaceError: If the space is another; the message names the part.
    """

    def __init__(self, space: spaces.Space, device: torch.device | str = "cpu") -> None:
        _check_playable(space)
        self.shape = tuple(space.shape or ())
        self.is_continuous = isinstance(space, spaces.Box)
        if self.is_continuous:
            self.outputs = math.prod(self.shape)
            return
        if isinstance(space, spaces.MultiDiscrete):
            sizes, start = space.nvec, space.start
        elif isinstance(space, spaces.MultiBinary):
            sizes, start = np.full(self.shape, 2), np.zeros(self.shape, np.int64)
        else:
            sizes, start = np.array(space.n), np.array(space.start)  # pyright: ignore[reportAttributeAccessIssue]
        self.outputs, self._most = int(sizes.sum()), int(sizes.max())
        self._start = torch.from_numpy(start.astype(np.int64)).to(device) if start.any() else 0
        self._filled = None
        if self.outputs != sizes.size * self._most:
            # Components of fewer actions than the largest are filled up with outputs that are chosen away.
            place, begin = np.arange(self._most), (np.cumsum(sizes) - sizes.ravel()).reshape(*self.shape, 1)
            exists = place < sizes[..., None]
            index = np.where(exists, begin + place, 0)
            self._filled = torch.from_numpy(index).to(device), torch.from_numpy(exists).to(device)

    def __call__(
        self,
        outputs: Float[Tensor, "... outputs"],
        *,
        mask: Bool[Tensor, "... outputs"] | None = None,
        log_std: Float[Tensor, "... outputs"] | None = None,
    ) -> Categorical | DiagonalGaussian:
        """Make the distribution of the actions.

        Args:
            outputs: ``[..., outputs]``: logits, those of a MultiDiscrete's components side by side; or means.
            mask: ``[..., outputs]``, True = allowed, as in `PolicyContext`; None: everything is.
            log_std: For a Box: log of the standard deviations, ``[outputs]`` or ``[..., outputs]``; None: zeros.

        Returns:
            A `Categorical` or `DiagonalGaussian` of actions as the space has them.
        """
        if self.is_continuous:
            deviation = torch.zeros_like(outputs) if log_std is None else log_std
            mean, deviation = (part.unflatten(-1, self.shape or (1,)) for part in (outputs, deviation))
            if not self.shape:
                mean, deviation = mean.squeeze(-1), deviation.squeeze(-1)
            return DiagonalGaussian(mean, deviation, axes=len(self.shape))
        shape = (*self.shape, self._most)
        if self._filled is None:
            logits, allowed = outputs.unflatten(-1, shape), None if mask is None else mask.unflatten(-1, shape)
        else:
            index, exists = self._filled
            logits = torch.where(exists, outputs[..., index], -math.inf)
            allowed = None if mask is None else mask[..., index] & exists
        return Categorical(logits, allowed, start=self._start, axes=len(self.shape))


def draw_normal(shape: torch.Size, source: Source, device: torch.device) -> Float[Tensor, "..."]:
    """Draw standard normal numbers.

    Args:
        shape: Of the result.
        source: A generator, or the numbers themselves.
        device: Where the numbers go.

    Returns:
        float32 of that shape, the same for one state of the generator whatever the device.
    """
    if isinstance(source, Tensor):
        return source
    if isinstance(source, np.random.Generator):
        return torch.from_numpy(source.standard_normal(shape, np.float32)).to(device)
    return torch.empty(shape, device=source.device).normal_(generator=source).to(device)


def draw_exponential(shape: torch.Size, source: Source, device: torch.device) -> Float[Tensor, "..."]:
    """Draw exponentially distributed numbers of mean 1.

    Args:
        shape: Of the result.
        source: A generator, or the numbers themselves.
        device: Where the numbers go.

    Returns:
        float32 of that shape, 0 or more.
    """
    if isinstance(source, Tensor):
        return source
    if isinstance(source, np.random.Generator):
        return torch.from_numpy(source.standard_exponential(shape, np.float32)).to(device)
    return torch.empty(shape, device=source.device).exponential_(generator=source).to(device)


def _joint(terms: Tensor, axes: int) -> Tensor:
    return terms.flatten(terms.ndim - axes).sum(-1) if axes else terms


def _check_playable(space: Any) -> None:
    kinds = "Discrete, MultiDiscrete, MultiBinary or a Box of floats"
    parts = getattr(space, "spaces", None)
    if parts is not None:
        names = list(parts) if isinstance(parts, dict) else range(len(parts))
        named = ", ".join(describe("action_space", (name,)) for name in names)
        raise SpaceError(
            f"action_space: is a {type(space).__name__} of {named}; expected {kinds}. No agent here plays actions in "
            "parts: put them into one MultiDiscrete or Box in a wrapper."
        )
    floats = isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)
    if not floats and not isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        raise SpaceError(
            f"action_space: is {space}; expected {kinds}. No agent here plays it: map one of these onto it in a "
            "wrapper, such as a MultiDiscrete onto a Box of integers."
        )
    if 0 in (space.shape or ()):
        raise SpaceError(f"action_space: is {space}, no numbers at all; expected at least one.")
