"""Blocks of a rollout as on-policy learners go over them: in minibatches of single steps, or of whole sequences.

For a network with a core the block is cut at the ends of episodes: no sequence holds steps of two, and each begins with
the carry that it had when its steps were taken. A minibatch is padded to its longest sequence; what else is known of
its steps comes without padding, which thus never reaches a loss.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from agents.actor_critic import Inputs
from rlfeed.feed import epoch
from rlfeed.nest import Nest, map_nest
from rlfeed.replay import Episode
from rlfeed.types import Batch

EXTRAS = ("log_prob", "action_mask")  # of the policy's, those that learners need


class Block(NamedTuple):
    """Hold what is learned from: ``[B, T]`` steps, a row for each environment or each sequence.

    Args:
        batch: The steps.
        inputs: What the policy saw, ``[B, T+1, ...]``; the observations alone where there are no sequences.
        mask: ``[B, T]``, True where there is a step.
        lengths: ``[B]`` on the CPU, steps of each sequence; None where there are no sequences.
    """

    batch: Batch
    inputs: Inputs
    mask: Bool[Tensor, "B T"]
    lengths: Int64[Tensor, " B"] | None = None


class Minibatch(NamedTuple):
    """Hold what one update learns from.

    Args:
        inputs: What the policy saw, ``[n, ...]``; of sequences ``[R, L, ...]``.
        steps: What else is known of the n steps, by name, ``[n, ...]``.
        mask: Of sequences: ``[R, L]``, which of the inputs are the n steps.
        carry: Of sequences: before their first inputs, ``[R, ...]``.
    """

    inputs: Inputs
    steps: dict[str, Tensor]
    mask: Bool[Tensor, "R L"] | None = None
    carry: Nest = ()


def cut(batch: Batch, normalize: Callable[[Nest], Nest], *, sequences: bool) -> Block:
    """Make a block of a rollout ready to be gone over.

    Args:
        batch: ``[N, T]``, as `Rollout.blocks` gives it.
        normalize: Makes of observations what the network takes in.
        sequences: Whether to cut it into sequences.

    Returns:
        The block. What follows the last step of a sequence is its true successor.
    """
    if not sequences:
        mask = torch.ones_like(batch.terminated) if batch.mask is None else batch.mask
        return Block(batch, Inputs(normalize(batch.observation)), mask)
    pieces: Any = next(epoch(batch, Episode(), batch.reward.numel(), shuffle=False))
    is_first = torch.nn.functional.pad(pieces.is_first, (0, 1))  # behind its last step no episode begins
    action, reward = (
        torch.cat([before.unsqueeze(1), steps], dim=1)
        for before, steps in ((pieces.prev_action, pieces.action), (pieces.prev_reward, pieces.reward))
    )
    inputs = Inputs(normalize(pieces.observation), is_first, action, reward)
    return Block(pieces, inputs, pieces.mask, pieces.lengths.cpu())


def minibatches(
    block: Block, estimates: Mapping[str, Float[Tensor, "B T"]], count: int, generator: torch.Generator
) -> Iterator[Minibatch]:
    """Go once over a block in random order: each step is in one minibatch, and all are about as large.

    Args:
        block: What to go over.
        estimates: What was estimated of its steps, by name.
        count: How many minibatches; fewer where there are fewer steps or sequences.
        generator: Of the order, on the CPU.

    Returns:
        The minibatches.
    """
    batch, mask = block.batch, block.mask
    steps = {
        "action": batch.action,
        **{name: batch.extras[name] for name in EXTRAS if name in batch.extras},
        **estimates,
    }
    inputs = map_nest(lambda leaf: leaf[:, :-1], block.inputs)
    if block.lengths is None:
        places = mask.flatten().nonzero().squeeze(1)
        order = places
        if count > 1:
            order = places[torch.randperm(len(places), generator=generator).to(places.device)]
        shuffled = map_nest(lambda leaf: leaf.flatten(0, 1)[order], (inputs, steps))
        edges = [len(order) * part // count for part in range(count + 1)]
        for part in map(slice, edges, edges[1:]):
            if part.start < part.stop:
                yield Minibatch(*map_nest(lambda leaf, part=part: leaf[part], shuffled))
        return
    order = torch.randperm(len(block.lengths), generator=generator)
    ends = block.lengths[order].cumsum(0)
    for part in range(count):
        rows = order[(ends - 1) * count // ends[-1] == part]
        if len(rows):
            yield _of(rows, int(block.lengths[rows].max()), inputs, steps, mask, batch.carry)


def _of(
    rows: Int64[Tensor, " R"], longest: int, inputs: Inputs, steps: dict[str, Tensor], mask: Tensor, carry: Nest
) -> Minibatch:
    """Pick sequences."""
    rows = rows.to(mask.device)
    valid = mask[rows, :longest]
    inputs, steps = map_nest(lambda leaf: leaf[rows, :longest], (inputs, steps))
    return Minibatch(
        inputs, {name: leaf[valid] for name, leaf in steps.items()}, valid, map_nest(lambda leaf: leaf[rows], carry)
    )
