"""What agents share beside networks: distributions of actions, categorical values, target networks, exploration."""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from agents.distributions import ActionHead, Categorical, DiagonalGaussian, TanhGaussian
from rlfeed.errors import ConfigError

__all__ = [
    "ActionHead",
    "Categorical",
    "DiagonalGaussian",
    "Support",
    "TanhGaussian",
    "clip_gradients",
    "epsilon_ladder",
    "polyak",
]


class Support:
    """Hold the atoms of categorical values: evenly spaced numbers, a distribution over which stands for a return.

    Args:
        v_min: The first atom, in the unit of returns.
        v_max: The last atom, above ``v_min``.
        atoms: How many, at least 2.
        device: Where they lie.

    Raises:
        ConfigError: If an argument is wrong; all findings at once.
    """

    def __init__(self, v_min: float, v_max: float, atoms: int = 51, device: torch.device | str = "cpu") -> None:
        wrong = []
        if not (math.isfinite(v_min) and math.isfinite(v_max) and v_min < v_max):
            wrong.append(f"v_min is {v_min} and v_max {v_max}; expected numbers, v_min below v_max")
        if atoms < 2:
            wrong.append(f"atoms is {atoms}; expected at least 2")
        if wrong:
            raise ConfigError(f"Support: {'. '.join(wrong)}.")
        self.v_min, self.v_max, self.count = v_min, v_max, atoms
        self.width = (v_max - v_min) / (atoms - 1)
        self.atoms = torch.linspace(v_min, v_max, atoms, device=device)

    def mean(self, probs: Float[Tensor, "... N"]) -> Float[Tensor, "..."]:
        """Give the expected value.

        Args:
            probs: ``[..., N]``, of the atoms.

        Returns:
            ``[...]``.
        """
        return (probs * self.atoms).sum(-1)

    def project(
        self, probs: Float[Tensor, "... N"], reward: Float[Tensor, "..."], discount: Float[Tensor, "..."]
    ) -> Float[Tensor, "... N"]:
        """Bring the distribution of r + d Z back onto the atoms: each share goes to the two beside it.

        Args:
            probs: ``[..., N]``, of Z.
            reward: r, ``[...]``.
            discount: d, ``[...]``: 0 where the episode terminated.

        Returns:
            ``[..., N]``; values outside the support count as its ends.

        Source:
            Bellemare et al. 2017 (A distributional perspective on reinforcement learning), equation 7.
        """
        # In units of atoms, so that r = 0 and d = 1 leave everything exactly where it is.
        shift = (reward - (1 - discount) * self.v_min) / self.width
        numbers = torch.arange(self.count, dtype=probs.dtype, device=probs.device)
        return self._spread(shift.unsqueeze(-1) + discount.unsqueeze(-1) * numbers, probs)

    def two_hot(self, value: Float[Tensor, "..."]) -> Float[Tensor, "... N"]:
        """Give the distribution over the two atoms beside a value, whose mean it is.

        Args:
            value: ``[...]``.

        Returns:
            ``[..., N]``; values outside the support count as its ends.

        Source:
            Schrittwieser et al. 2020 (MuZero), appendix F.
        """
        place = ((value - self.v_min) / self.width).unsqueeze(-1)
        return self._spread(place, torch.ones_like(place))

    def hl_gauss(self, value: Float[Tensor, "..."], *, sigma: float = 0.75) -> Float[Tensor, "... N"]:
        """Give the normal distribution around a value, cut to the support, as shares of bins around the atoms.

        Args:
            value: ``[...]``.
            sigma: The standard deviation, in widths of a bin, above 0.

        Returns:
            ``[..., N]``; values outside the support count as its ends.

        Source:
            Farebrother et al. 2024 (Stop regressing), equations 6 and 7.
        """
        edges = torch.arange(self.count + 1, dtype=value.dtype, device=value.device) - 0.5
        place = ((value - self.v_min) / self.width).clamp(0, self.count - 1)
        below = torch.special.ndtr((edges - place.unsqueeze(-1)) / sigma)
        return below.diff(dim=-1) / (below[..., -1:] - below[..., :1])

    def _spread(self, place: Float[Tensor, "... M"], shares: Float[Tensor, "... M"]) -> Float[Tensor, "... N"]:
        """Share out what lies at a place between atoms; at an atom, all of it is that one's."""
        place = place.clamp(0, self.count - 1)  # in float32 the last one may be beyond, by rounding
        below = place.nan_to_num().long()  # NaN is no index: it spreads through the shares, to be found in the loss
        part = place - below
        spread = shares.new_zeros(*shares.shape[:-1], self.count)
        spread = spread.scatter_add(-1, below, shares * (1 - part))
        return spread.scatter_add(-1, (below + 1).clamp(max=self.count - 1), shares * part)


@torch.no_grad()
def polyak(target: nn.Module, online: nn.Module, tau: float) -> None:
    """Move a target network towards the network; buffers, such as the statistics of normalisation, are copied.

    Args:
        target: Changed in place: every parameter p' becomes (1 - tau) p' + tau p.
        online: The network, of the same structure.
        tau: Above 0 to 1; 1 copies.

    Source:
        Lillicrap et al. 2016 (DDPG), algorithm 1.
    """
    torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
        list(target.parameters()), list(online.parameters()), tau
    )
    for copy, buffer in zip(target.buffers(), online.buffers(), strict=True):
        copy.copy_(buffer)


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Float[Tensor, ""]:
    """Scale gradients down to a norm: ``torch.nn.utils.clip_grad_norm_`` at a third of its time for small networks.

    Args:
        parameters: On one device; those without a gradient are passed over.
        max_norm: Of all gradients as one vector, above 0.

    Returns:
        The norm before, a 0-dim tensor on the device.

    Source:
        Pascanu et al. 2013 (On the difficulty of training recurrent neural networks), algorithm 1.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    torch._foreach_mul_(  # pyright: ignore[reportPrivateImportUsage]
        gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0)
    )
    return norm


def epsilon_ladder(count: int, base: float = 0.4, power: float = 7.0) -> list[float]:
    """Give each of several actors or environments an epsilon of its own, evenly spaced on a log scale.

    Args:
        count: How many, at least 1.
        base: The first and largest, above 0 to 1.
        power: The last is base ** (1 + power).

    Returns:
        Probabilities of random actions, falling.

    Source:
        Horgan et al. 2018 (Distributed prioritized experience replay), section 4.1.
    """
    return [base ** (1 + power * number / max(count - 1, 1)) for number in range(count)]
