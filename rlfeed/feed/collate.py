"""Padded collation: samples in, one `Batch` out."""

from collections.abc import Mapping
from dataclasses import fields as fields_of
from typing import Any, Literal, get_args

import numpy as np
import torch

from rlfeed.errors import ConfigError, FieldError, suggest
from rlfeed.feed.dataset import Handle, unbatch
from rlfeed.layout import Layout
from rlfeed.nest import Nest, Path, describe, leaves, map_nest
from rlfeed.ragged import PER_STEP
from rlfeed.types import Batch

Arrangement = Literal["padded", "packed"]
Sample = Mapping[str, Nest]

# What a sample may have: not what says how several rows lie together.
_FIELDS = frozenset(f.name for f in fields_of(Batch) if f.init) - {"cu_lengths", "final_observation", "final_index"}


def pad_collate(
    samples: list[Any],
    *,
    padding_value: float | Mapping[str, float] = 0.0,
    pad_to_multiple_of: int | None = None,
    layout: Arrangement = "padded",
) -> Batch:
    """Collate samples into a padded batch, or a packed one.

    B consecutive samples of one `ReplayDataset` are gathered together, once, straight into the batch's memory. Anything
    else (episodes of a rollout, mappings of arrays) is stacked, and padded where lengths differ. The options are those
    of `Batch.padded` and `Batch.packed`, which do the same where batches do not pass through here:
    ``transform=lambda batch: batch.padded(multiple_of=32)``. Give them with `functools.partial`.

    Args:
        samples: Samples of a `ReplayDataset`, batches of one, or mappings with the fields of `Batch`. Mappings with
            observations one longer than their rewards are sequences.
        padding_value: What stands past the lengths: a number, or numbers by field; see `Batch.padded`.
        pad_to_multiple_of: T becomes the next multiple of it, observations T+1; >= 1. None: the longest sample.
        layout: ``"packed"``: sequences end to end, without padding; see `Batch.packed`.

    Returns:
        ``[B, ...]``, or ``[B, T, ...]`` with ``mask`` and ``lengths``, or ``[S, ...]`` with ``cu_lengths``.

    Raises:
        ConfigError: If an option is wrong.
        FieldError: If the samples do not have the same fields, shapes and dtypes, or no step at all.
    """
    if layout == "padded" and pad_to_multiple_of is None and padding_value == 0.0:
        return _collate(samples)  # as it was gathered: nothing here costs more than the gather
    if layout == "padded":
        multiple_of = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        return _collate(samples).padded(multiple_of=multiple_of, padding_value=padding_value)
    if layout not in get_args(Arrangement):
        raise ConfigError(f"pad_collate: layout is {layout!r}; expected one of {get_args(Arrangement)}.")
    if pad_to_multiple_of is not None or padding_value != 0.0:
        raise ConfigError(
            f"pad_collate: layout is 'packed', with pad_to_multiple_of={pad_to_multiple_of} and padding_value="
            f"{padding_value}; expected neither, for what is packed has no padding. Use layout='padded'."
        )
    return _collate(samples).packed()


def _collate(samples: list[Any]) -> Batch:
    if not isinstance(samples, list | tuple):
        raise FieldError(
            f"pad_collate: got a {type(samples).__name__}; expected a list of samples. Give the DataLoader a "
            "batch_size, or give it to the dataset and leave pad_collate out."
        )
    if not samples:
        raise FieldError("pad_collate: got no samples; expected at least one.")
    first = samples[0]
    if type(first) is Handle:
        size = len(samples)
        stream, start = first.stream, first.index
        if start % size == 0 and all(
            type(h) is Handle and h.stream is stream and h.index == start + i and h.sample is None
            for i, h in enumerate(samples)
        ):
            return stream.batch(start // size, size)
    return _joined([_sample(s) if isinstance(s, Batch) else s for s in samples])


def _sample(batch: Batch) -> Sample:
    if batch.final_index is not None:
        raise FieldError(
            "pad_collate: got a block of a rollout as a sample; expected single episodes, windows or transitions. A "
            "block is a batch already: leave pad_collate out."
        )
    return unbatch(batch.padded())


def _joined(samples: list[Sample]) -> Batch:
    """Join samples that lie apart: one block, into which every array is copied once."""
    _check_fields(samples)
    exact = "lengths" not in samples[0]  # else they are padded already: what is beyond their lengths is dropped
    samples, lengths = _with_defaults(samples)
    lines, copies = [], []
    for name in samples[0]:
        counts = [length + (name == "observation") for length in lengths] if name in PER_STEP else []
        for path, parts in _arrays(name, samples):
            dtype = _check(describe(name, path), parts, counts, exact)
            tail, axes = parts[0].shape, (len(parts), max(counts)) if counts else (len(parts),)
            lines.append((name, path, torch.float32 if name == "reward" else dtype, (*axes, *tail[len(axes) - 1 :])))
            copies.append((parts, counts))
    layout = Layout.of(lines)
    batch = Batch.carve(torch.zeros(layout.nbytes, dtype=torch.uint8), layout, plain=True)
    for slot, (parts, counts) in zip(layout.slots, copies, strict=True):
        _copy(parts, counts, dict(leaves(getattr(batch, slot.name)))[slot.path].numpy())
    return batch


def _copy(parts: list[np.ndarray], counts: list[int], out: np.ndarray) -> None:
    if not counts:
        np.stack(parts, out=out)
        return
    for i, (part, count) in enumerate(zip(parts, counts, strict=True)):
        out[i, :count] = part[:count]  # by whole rows: twice as fast as torch's pad_sequence


def _check_fields(samples: list[Sample]) -> None:
    for i, sample in enumerate(samples):
        if not isinstance(sample, Mapping):
            raise FieldError(f"pad_collate: sample {i} is a {type(sample).__name__}; expected a mapping of arrays.")
        if sample.keys() != samples[0].keys():
            raise FieldError(
                f"pad_collate: sample {i} has {sorted(sample)}; expected {sorted(samples[0])}, as sample 0 has. All "
                "samples of a batch come from one unit."
            )
    if unknown := sorted(samples[0].keys() - _FIELDS):
        hint = suggest(unknown[0], _FIELDS) or " Use extras."
        raise FieldError(f"pad_collate: the samples have {unknown}; expected those of Batch.{hint}")
    if missing := sorted({"observation", "action", "reward"} - samples[0].keys()):
        raise FieldError(f"pad_collate: the samples have no {missing}; expected the fields of Batch.")
    axes = [np.ndim(sample["reward"]) for sample in samples]
    for odd in (i for i, n in enumerate(axes) if n != axes[0] or n > 1):
        raise FieldError(
            f"pad_collate: sample {odd}: reward has {axes[odd]} axes, that of sample 0 {axes[0]}; expected 0 of all "
            "(transitions) or 1 of all (sequences). All samples of a batch come from one unit."
        )


def _with_defaults(samples: list[Sample]) -> tuple[list[Sample], list[int]]:
    """Give the samples with the fields that follow from the others, and the lengths of sequences."""
    if np.ndim(samples[0]["reward"]) == 0:
        return [{"terminated": np.False_, "truncated": np.False_, **sample} for sample in samples], []
    lengths = [int(sample["lengths"] if "lengths" in sample else len(sample["reward"])) for sample in samples]
    if min(lengths) < 0 or not any(lengths):
        raise FieldError(
            f"pad_collate: the lengths of all {len(lengths)} samples are {min(lengths)} .. {max(lengths)}; expected "
            "0 or more, and at least one step."
        )
    yes, no = np.ones(max(lengths), bool), np.zeros(max(lengths), bool)
    filled: list[Sample] = []
    for sample, n in zip(samples, lengths, strict=True):
        filled.append(
            {"terminated": no[:n], "truncated": no[:n], "mask": yes[:n], "loss_mask": yes[:n], "lengths": n, **sample}
        )
    return filled, lengths


def _arrays(name: str, samples: list[Sample]) -> list[tuple[Path, list[np.ndarray]]]:
    """Give the arrays of a field, leaf by leaf, one of each sample."""
    first, found = samples[0][name], []

    def add(*parts: Any) -> None:
        found.append([part if type(part) is np.ndarray else _array(name, part) for part in parts])

    if isinstance(first, dict | tuple):
        for i, sample in enumerate(samples):
            map_nest(lambda *_: None, first, sample[name], where=f"pad_collate: sample {i}: {name}")
    map_nest(add, *(sample[name] for sample in samples))
    return list(zip([path for path, _ in leaves(first)], found, strict=True))


def _array(name: str, value: Any) -> np.ndarray:
    if isinstance(value, np.generic):
        return np.asarray(value)
    try:
        return torch.as_tensor(value).numpy(force=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FieldError(f"pad_collate: {name} has {value!r:.60}; expected arrays that NumPy can hold.") from error


def _check(where: str, parts: list[np.ndarray], counts: list[int], exact: bool) -> torch.dtype:
    """Check that arrays have one dtype and, but for their lengths, one shape."""
    first = parts[0]
    tail = first.shape[1:] if counts else first.shape
    for i, part in enumerate(parts):
        fits = part.dtype == first.dtype and part.shape[1 if counts else 0 :] == tail
        if counts and fits:
            fits = part.ndim > 0 and (len(part) == counts[i] or (not exact and len(part) > counts[i]))
        if not fits:
            shape = (counts[i], *tail) if counts else tail
            raise FieldError(
                f"pad_collate: sample {i}: {where} has shape {part.shape} and dtype {part.dtype}; expected {shape} and "
                f"{first.dtype}."
            )
    try:
        return torch.from_numpy(first[..., None].ravel()[:0]).dtype
    except (TypeError, ValueError) as error:
        raise FieldError(f"pad_collate: {where} has dtype {first.dtype}; expected numbers torch has.") from error
