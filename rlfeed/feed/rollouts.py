"""A rollout's batch as samples that hold each of its steps once: padded minibatches for on-policy learners."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlfeed.errors import FieldError, UnsupportedError
from rlfeed.nest import leaves, map_nest
from rlfeed.replay.readers import Allocate, allocate_private
from rlfeed.replay.units import Episode, Transition, Unit
from rlfeed.types import Batch

LANE_SHIFT = 44


class Pieces:
    """Cut a batch ``[N, T]`` of steps, such as a block of a rollout, at the ends of its episodes.

    `Episode` gives the pieces, padded: each begins at step 0, with the carry that the batch has there, or where an
    episode begins, with zeros. `Transition` gives single steps. Whatever ``extras`` holds by step (log_prob, value,
    advantage) comes along. ``ids`` name the first step: row << 44 | step.

    Args:
        batch: ``[N, T]``; what ``mask`` leaves out is no step.
        unit: ``Episode()`` or ``Transition()``.

    Raises:
        FieldError: If the batch has no axis of steps, or no step.
        UnsupportedError: If the unit is another one.
    """

    def __init__(self, batch: Batch, unit: Unit) -> None:
        whole = isinstance(unit, Episode) and unit.max_length is None
        if not whole and unit != Transition(gamma=unit.gamma):
            raise UnsupportedError(
                f"epoch: unit is {unit} for a Batch; expected Episode() or Transition(): a rollout keeps the carry "
                "before its first step alone. Collect shorter blocks where sequences are to be shorter."
            )
        if batch.reward.ndim != 2:
            raise FieldError(
                f"epoch: the batch's reward has shape {tuple(batch.reward.shape)}; expected [N, T]. Give a block of "
                "Rollout.blocks, or pad_collate the episodes of Rollout.episodes."
            )
        self._batch, self._unit, self._whole = batch, unit, whole
        ended = (batch.terminated | batch.truncated).cpu().numpy()
        mask = np.ones(ended.shape, bool) if batch.mask is None else batch.mask.cpu().numpy()
        opens = np.ones(ended.shape, bool)
        if whole:
            opens[:, 1:] = ended[:, :-1] | ~mask[:, :-1]
            if batch.is_first is not None:
                opens |= batch.is_first.cpu().numpy()
        opens &= mask
        self._rows, self._begins = np.nonzero(opens)
        self.lengths = np.bincount(np.cumsum(opens)[mask.ravel()] - 1, minlength=len(self._rows))
        if not len(self._rows):
            raise FieldError("epoch: the batch's mask is False everywhere; expected at least one step.")
        self._finals = np.full(ended.shape, -1)
        if batch.final_index is not None:
            at = batch.final_index.cpu().numpy()
            self._finals[at[:, 0], at[:, 1]] = np.arange(len(at))

    def gather(self, picked: np.ndarray, allocate: Allocate = allocate_private) -> Batch:
        """Gather pieces.

        Args:
            picked: ``[B]`` int64, which ones.
            allocate: Not asked: a rollout's batch is gathered by torch, wherever it lies.

        Returns:
            ``[B, L]``, padded with zeros to the longest; ``[B]`` for `Transition`.
        """
        batch, rows, begins, lengths = self._batch, self._rows[picked], self._begins[picked], self.lengths[picked]
        cut = _Cut(batch.reward.device, rows, begins, lengths, int(lengths.max()))
        last = self._finals[rows, begins + lengths - 1]
        observation = map_nest(lambda leaf: cut.steps(leaf, 1), batch.observation)
        if batch.final_observation is not None:
            for (_, leaf), (_, final) in zip(leaves(observation), leaves(batch.final_observation), strict=True):
                leaf[last >= 0, lengths[last >= 0]] = final[last[last >= 0]]
        fields: dict[str, Any] = {
            name: map_nest(cut.steps, getattr(batch, name)) for name in ("action", "reward", "terminated", "truncated")
        }
        fields["extras"] = map_nest(cut.steps, batch.extras)
        fields["discount"] = (~fields["terminated"] & cut.mask).float() * self._unit.gamma
        if not self._whole:
            fields = map_nest(lambda leaf: leaf[:, 0], fields)
            fields["next_observation"] = map_nest(lambda leaf: leaf[:, 1], observation)
            observation = map_nest(lambda leaf: leaf[:, 0], observation)
        else:
            fields["mask"], fields["lengths"] = cut.mask, torch.from_numpy(lengths).to(cut.device)
            fields["loss_mask"] = cut.mask.clone() if batch.loss_mask is None else cut.steps(batch.loss_mask)
            if batch.is_first is not None:
                fields["is_first"] = cut.steps(batch.is_first)
            for name in ("carry", "prev_action", "prev_reward"):
                if (before := getattr(batch, name)) is not None:
                    fields[name] = map_nest(cut.before, before)
        ids = torch.from_numpy((rows << LANE_SHIFT) | begins)
        return Batch(observation=observation, ids=ids, **fields)


class _Cut:
    """Cut pieces out of leaves ``[N, T, ...]``."""

    def __init__(
        self, device: torch.device, rows: np.ndarray, begins: np.ndarray, lengths: np.ndarray, longest: int
    ) -> None:
        self.device, self._lengths, self._begins = device, torch.from_numpy(lengths), torch.from_numpy(begins)
        self._rows, self._longest = torch.from_numpy(rows).to(device), longest
        self.mask = self._inside(0)

    def _inside(self, extra: int) -> Tensor:
        return (torch.arange(self._longest + extra) < self._lengths[:, None] + extra).to(self.device)

    def steps(self, leaf: Tensor, extra: int = 0) -> Tensor:
        """Take each piece's steps, and so many more rows behind; zeros behind those."""
        at = self._begins[:, None] + torch.arange(self._longest + extra)
        cut = leaf[self._rows[:, None], at.clamp_(max=leaf.shape[1] - 1).to(self.device)]
        cut[~self._inside(extra)] = 0
        return cut

    def before(self, leaf: Tensor) -> Tensor:
        """Take what came before a piece that begins at step 0; zeros where an episode begins."""
        cut = leaf[self._rows]
        cut[(self._begins > 0).to(self.device)] = 0
        return cut
