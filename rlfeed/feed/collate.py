"""Padded collation: samples in, one `Batch` out."""

from collections.abc import Mapping
from dataclasses import fields as fields_of
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlfeed.errors import FieldError
from rlfeed.feed.dataset import Handle, unbatch
from rlfeed.nest import Nest, Path, build, describe, leaves
from rlfeed.types import Batch

_PER_STEP = ("action", "reward", "terminated", "truncated", "discount", "mask", "loss_mask", "is_first", "extras")


def pad_collate(samples: list[Any]) -> Batch:
    """Collate samples into a padded batch.

    B consecutive samples of one `ReplayDataset` are gathered together, once, straight into the batch's memory. Anything
    else (episodes of a rollout, mappings of arrays) is stacked, and padded with zeros where lengths differ.

    Args:
        samples: Samples of a `ReplayDataset`, batches of one, or mappings with the fields of `Batch`. Mappings with
            observations one longer than their rewards are sequences.

    Returns:
        ``[B, ...]``, or ``[B, T, ...]`` with ``mask`` and ``lengths``.

    Raises:
        FieldError: If the samples do not have the same fields, shapes and dtypes.
    """
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
    return _pad([unbatch(s) if isinstance(s, Batch) else s for s in samples])


def _pad(samples: list[Mapping[str, Nest]]) -> Batch:
    for i, sample in enumerate(samples):
        if not isinstance(sample, Mapping):
            raise FieldError(f"pad_collate: sample {i} is a {type(sample).__name__}; expected a mapping of arrays.")
        if sample.keys() != samples[0].keys():
            raise FieldError(f"pad_collate: sample {i} has {sorted(sample)}; expected {sorted(samples[0])}.")
    unknown = samples[0].keys() - {f.name for f in fields_of(Batch) if f.init}
    if unknown:
        raise FieldError(f"pad_collate: the samples have {sorted(unknown)}; expected those of Batch. Use extras.")
    missing = {"observation", "action", "reward"} - samples[0].keys()
    if missing:
        raise FieldError(f"pad_collate: the samples have no {sorted(missing)}; expected the fields of Batch.")
    # Only true steps are padded: what an earlier padding added is dropped again.
    lengths = [int(sample["lengths"]) if "lengths" in sample else _length(sample["reward"]) for sample in samples]
    sequences = np.ndim(samples[0]["reward"]) > 0
    fields: dict[str, Any] = {}
    for name in samples[0]:
        nests = [dict(leaves(sample[name])) for sample in samples]
        for i, nest in enumerate(nests):
            if nest.keys() != nests[0].keys():
                raise FieldError(f"pad_collate: sample {i}: {name} has {list(nest)}; expected {list(nests[0])}.")
        pairs: list[tuple[Path, Tensor]] = []
        for path in nests[0]:
            parts = [_tensor(nest[path]) for nest in nests]
            extra = 1 if name == "observation" else 0
            if sequences and name in (*_PER_STEP, "observation"):
                exact = "lengths" not in samples[0]  # else they are padded already, and longer
                rows = [n + extra for n in lengths]
                pairs.append((path, _pad_rows(describe(name, path), parts, rows, exact)))
            else:
                shapes = [(tuple(part.shape), part.dtype) for part in parts]
                if len(set(shapes)) > 1:
                    raise FieldError(f"pad_collate: {describe(name, path)} has {shapes}; expected one shape and dtype.")
                pairs.append((path, torch.stack(parts)))
        fields[name] = build(pairs)
    fields["reward"] = fields["reward"].float()
    if sequences:
        fields["lengths"] = torch.tensor(lengths, dtype=torch.int64)
        inside = torch.arange(max(lengths)) < fields["lengths"][:, None]
        fields.setdefault("mask", inside)  # windows that cross the ends of episodes are masked inside, too
        fields.setdefault("loss_mask", inside)
    blank = torch.zeros_like(fields["reward"], dtype=torch.bool)
    return Batch(**{"terminated": blank, "truncated": blank, **fields})


def _tensor(value: Any) -> Tensor:
    if isinstance(value, np.ndarray) and not value.flags.writeable:
        value = value.copy()  # torch would warn
    return torch.as_tensor(value)


def _length(reward: Any) -> int:
    return int(np.shape(reward)[0]) if np.ndim(reward) else 1


def _pad_rows(name: str, parts: list[Tensor], rows: list[int], exact: bool) -> Tensor:
    tail, dtype = parts[0].shape[1:], parts[0].dtype
    out = torch.zeros((len(parts), max(rows), *tail), dtype=dtype)
    for i, (part, count) in enumerate(zip(parts, rows, strict=True)):
        short = len(part) < count or (exact and len(part) > count)
        if part.shape[1:] != tail or part.dtype != dtype or short:
            raise FieldError(
                f"pad_collate: sample {i}: {name} has shape {tuple(part.shape)} and dtype {part.dtype}; expected "
                f"({count}, {', '.join(map(str, tail))}) and {dtype}."
            )
        out[i, :count] = part[:count]
    return out
