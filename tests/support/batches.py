"""Compare batches field by field."""

from dataclasses import fields

import torch

from rlfeed.nest import leaves
from rlfeed.types import Batch


def tensors(batch):
    """Every tensor of a batch, by field and path."""
    named = {f.name: getattr(batch, f.name) for f in fields(Batch) if f.init}
    return {(name, path): leaf for name, nest in named.items() if nest is not None for path, leaf in leaves(nest)}


def assert_same(batch, expected):
    """Both have the same fields, dtypes, shapes and values, bit for bit."""
    left, right = tensors(batch), tensors(expected)
    assert left.keys() == right.keys()
    for key, tensor in right.items():
        assert left[key].dtype == tensor.dtype, key
        assert torch.equal(left[key].cpu(), tensor.cpu()), key
