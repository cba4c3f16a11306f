"""Sequences of unequal lengths in one batch: padded to one T, or packed end to end without padding."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

from rlfeed.errors import ConfigError, FieldError, suggest
from rlfeed.layout import Layout
from rlfeed.nest import Nest, Path, describe, leaves, map_nest

VALUES = ("observation", "next_observation", "action", "reward", "discount", "extras")
FLAGS = ("terminated", "truncated", "is_first")
MASKS = ("mask", "loss_mask")
PER_STEP = frozenset({*VALUES, *FLAGS, *MASKS})


class Ragged:
    """Pad and pack: the part of `Batch` that knows about time.

    A *padded* batch of sequences is ``[B, T, ...]``. A *packed* one is ``[S, ...]``, S the sum of its lengths: row
    after row, told apart by ``cu_lengths``. Its observations are ``[S+B, ...]``: behind the last step of each row lies
    the successor of that step. What has one entry a row (lengths, ids, weights, carry, ...) is the same in both.
    """

    carve: ClassVar[Callable[..., Any]]  # makes a batch whose fields are views of one block; see `Batch.carve`
    reward: Tensor
    mask: Tensor | None
    lengths: Tensor | None
    cu_lengths: Tensor | None
    ids: Tensor | None

    @property
    def key_padding_mask(self) -> Bool[Tensor, "B T"] | None:
        """Give the mask as torch's attention wants it.

        Returns:
            ``[B, T]``, True = ignore, the inverse of ``mask``; None where nothing is padding: transitions, packed ones.
        """
        return None if self.mask is None or self.cu_lengths is not None else ~self.mask

    @property
    def cu_observations(self) -> Int32[Tensor, " B1"]:
        """Give where the observations of each row of a packed batch begin.

        Returns:
            ``[B+1]`` int32: those of row b lie at ``cu_observations[b] : cu_observations[b + 1]``.

        Raises:
            FieldError: If the batch is not packed.
        """
        cu = self._packed_starts("cu_observations")
        return cu + torch.arange(len(cu), dtype=cu.dtype, device=cu.device)

    @property
    def step_index(self) -> Int64[Tensor, " S"]:
        """Give where ``observation`` of a packed batch has what each step acted on; the step's successor is next to it.

        Returns:
            ``[S]`` int64: ``observation[step_index]`` and ``observation[step_index + 1]`` go with ``reward``.

        Raises:
            FieldError: If the batch is not packed.
        """
        lengths, steps = self._packed_starts("step_index").diff(), len(self.reward)
        rows = torch.arange(len(lengths), device=lengths.device)
        return torch.arange(steps, device=lengths.device) + rows.repeat_interleave(lengths, output_size=steps)

    def jagged(self, name: str) -> Nest:
        """See a field of a packed batch as nested tensors of torch (a prototype there); nothing is copied.

        Args:
            name: A field with one entry a step, such as ``"action"``; or ``"observation"``.

        Returns:
            ``torch.nested`` tensors of jagged layout, ``[B, *, ...]``, in the nest that the field is.

        Raises:
            FieldError: If the batch is not packed, or has no such field.
        """
        cu = self._packed_starts(f"jagged({name!r})")
        named = [field for field in sorted(PER_STEP) if getattr(self, field) is not None]
        if name not in named:
            raise FieldError(f"Batch.jagged: name is {name!r}; expected one of {named}.{suggest(name, named)}")
        offsets = self.cu_observations if _extra(name) else cu
        return map_nest(lambda leaf: torch.nested.nested_tensor_from_jagged(leaf, offsets), getattr(self, name))

    def padded(self, *, multiple_of: int = 1, padding_value: float | Mapping[str, float] = 0.0) -> Self:
        """Pad on, so that few shapes occur; or pad what is packed.

        Args:
            multiple_of: T becomes the next multiple of it (observations: T+1), >= 1. For compilers and CUDA graphs, for
                which every T is a program of its own.
            padding_value: What stands past the lengths. A number is for observations, actions, rewards, discounts and
                extras; a mapping names fields, or leaves of them: ``{"reward": -1.0, "observation.camera": 255}``. What
                it does not name is zero. Masks are False there, whatever is said.

        Returns:
            ``[B, T, ...]`` in one block; the batch itself where nothing is to be done, as for transitions.

        Raises:
            ConfigError: If an argument is wrong; all findings at once.
            FieldError: If the fields do not fit the lengths, or all lengths are 0.
        """
        fills = self._fills(multiple_of, padding_value)
        packed = self.cu_lengths is not None
        if not packed and (self.reward.ndim < 2 or (self.reward.shape[1] % multiple_of == 0 and not fills)):
            return self
        lengths = self._row_lengths()
        steps = int(lengths.max()) if packed else self.reward.shape[1]
        longest = -(-steps // multiple_of) * multiple_of
        places = []
        for extra in (0, 1):  # of steps, and of observations
            ends, step = lengths + extra, torch.arange(longest + extra, device=lengths.device)
            begin = ends.cumsum(0) - ends if packed else torch.arange(len(ends), device=ends.device) * (steps + extra)
            places.append(torch.where(step < ends[:, None], begin[:, None] + step + 1, 0))
        return self._regathered(places, fills)

    def packed(self) -> Self:
        """Pack sequences end to end: their padding is gone; `padded` is the inverse.

        ``cu_lengths`` is int32, as ``torch.nn.attention.varlen`` and FlashAttention want it.

        Returns:
            ``[S, ...]`` in one block, observations ``[S+B, ...]``; the batch itself where it is packed already.

        Raises:
            FieldError: If these are no sequences, their fields do not fit the lengths, or all lengths are 0.
        """
        if self.cu_lengths is not None:
            return self
        if self.reward.ndim < 2:
            raise FieldError("Batch.packed: the batch has transitions; expected sequences or episodes, [B, T, ...].")
        lengths, places = self._row_lengths(), []
        for steps, ends in ((self.reward.shape[1], lengths), (self.reward.shape[1] + 1, lengths + 1)):
            places.append((torch.arange(steps, device=ends.device) < ends[:, None]).flatten().nonzero()[:, 0])
        return self._regathered(places, None, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int())

    def _regathered(
        self, places: list[Tensor], fills: Mapping[tuple[str, Path], float] | None, cu: Tensor | None = None
    ) -> Self:
        """Gather steps and observations from other places, into one block; with fills, place 0 is padding.

        A gather from values with a padding before them is the fastest that torch has for every dtype: faster than
        `index_copy_` to zeros, and several times faster than `masked_fill_`.
        """
        found = [leaf for leaf in self._leaves() if leaf[0] != "cu_lengths" and leaf[2].device == self.reward.device]
        axes = self.reward.ndim
        lines = []
        for name, path, leaf in found:
            shape = tuple(leaf.shape)
            if name in PER_STEP:
                self._check_axes(name, path, shape)
                shape = (*places[_extra(name)].shape, *shape[axes:])
            lines.append((name, path, leaf.dtype, shape))
        if cu is not None:
            lines.append(("cu_lengths", (), cu.dtype, tuple(cu.shape)))
        layout = Layout.of(lines)
        block = torch.empty(layout.nbytes, dtype=torch.uint8, device=self.reward.device)
        apart = self.ids if self.ids is not None and self.ids.device != block.device else None  # ids stay on the CPU
        batch = self.carve(block, layout, apart)
        into = {(name, path): leaf for name, path, leaf in batch._leaves()}
        for name, path, leaf in found:
            out = into[name, path]
            if name not in PER_STEP:
                out.copy_(leaf)
                continue
            values = leaf.flatten(0, axes - 1)
            if fills is not None:
                padding = values.new_full((1, *values.shape[1:]), fills.get((name, path), 0))
                values = torch.cat([padding, values])
            torch.index_select(values, 0, places[_extra(name)].flatten(), out=out.view(-1, *values.shape[1:]))
        if cu is not None:
            into["cu_lengths", ()].copy_(cu)
        return batch

    def _check_axes(self, name: str, path: Path, shape: tuple[int, ...]) -> None:
        more = _extra(name) * (1 if self.cu_lengths is None else len(self.cu_lengths) - 1)
        expected = (*self.reward.shape[:-1], self.reward.shape[-1] + more)
        if shape[: len(expected)] != expected:
            raise FieldError(f"Batch: {describe(name, path)} has shape {shape}; expected {expected} first.")

    def _row_lengths(self) -> Tensor:
        """Give the lengths of the rows, checked."""
        if self.cu_lengths is not None:
            lengths = self.cu_lengths.diff().long()
        else:
            rows, steps = self.reward.shape
            lengths = torch.full((rows,), steps, device=self.reward.device) if self.lengths is None else self.lengths
            if lengths.shape != (rows,) or bool(((lengths < 0) | (lengths > steps)).any()):
                raise FieldError(f"Batch: lengths are {lengths.tolist()}; expected {rows} of them, each 0 .. {steps}.")
            past = torch.arange(steps, device=lengths.device) >= lengths[:, None]
            if self.mask is not None and bool((self.mask & past).any()):
                raise FieldError("Batch: mask is True past lengths; expected lengths that reach a row's last step.")
        if not bool(lengths.any()):
            raise FieldError(f"Batch: the lengths of all {len(lengths)} rows are 0; expected at least one step.")
        return lengths

    def _fills(self, multiple_of: int, padding_value: float | Mapping[str, float]) -> dict[tuple[str, Path], float]:
        """Give the padding of the leaves that are named, checked."""
        wrong = []
        if not isinstance(multiple_of, int) or multiple_of < 1:
            wrong.append(f"multiple_of is {multiple_of!r}; expected an int >= 1")
        named, fills = padding_value, {}
        if not isinstance(named, Mapping):
            named = {} if named == 0 else {name: named for name in VALUES if getattr(self, name) not in (None, {})}
        present = [leaf for leaf in self._leaves() if leaf[0] in PER_STEP.difference(MASKS)] if named else []
        for asked, value in sorted(named.items(), key=lambda item: item[0].count(".")):  # a leaf goes before its field
            meant = [leaf for leaf in present if f"{_dotted(*leaf)}.".startswith(f"{asked}.")]
            if not meant:
                names = sorted({_dotted(*leaf) for leaf in present} | {name for name, _, _ in present})
                wrong.append(f"padding_value names {asked!r}; expected one of {names}.{suggest(asked, names)}")
            for name, path, leaf in meant:
                fills[name, path] = value
                if not _fits(value, leaf.dtype):
                    wrong.append(f"padding_value of {describe(name, path)} is {value!r}; expected one of {leaf.dtype}")
        if wrong:
            raise ConfigError(f"Batch.padded: {'; '.join(wrong)}.")
        return fills

    def _packed_starts(self, where: str) -> Tensor:
        if self.cu_lengths is None:
            raise FieldError(f"Batch.{where}: the batch is not packed; expected a packed one. Call packed() first.")
        return self.cu_lengths

    def _leaves(self) -> Iterator[tuple[str, Path, Tensor]]:
        for field in fields(self):  # pyright: ignore[reportArgumentType]  # Batch is a dataclass
            if field.init and (nest := getattr(self, field.name)) is not None:
                yield from ((field.name, path, leaf) for path, leaf in leaves(nest))


def _extra(name: str) -> int:
    """Give how many entries a field has in each row beside those of the steps."""
    return 1 if name == "observation" else 0


def _dotted(name: str, path: Path, _: Tensor) -> str:
    return ".".join([name, *map(str, path)])


def _fits(value: Any, dtype: torch.dtype) -> bool:
    if not isinstance(value, int | float | np.integer | np.floating):
        return False
    if dtype.is_floating_point or dtype.is_complex:
        return not math.isfinite(value) or bool(abs(value) <= torch.finfo(dtype).max)
    low, high = (0, 1) if dtype is torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return math.isfinite(value) and bool(value == int(value) and low <= value <= high)
