"""State as bytes and back: nested containers of numbers, strings, arrays and tensors; never pickle.

The layout is ``magic (8) | header length (8) | header | arrays | CRC-32 (8)``. The header is JSON: the tree, with an
offset where an array stands. Arrays are raw bytes, each on a multiple of 64. Reading it cannot run code.
"""

import json
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rlfeed.errors import CheckpointError, FieldError
from rlfeed.nest import Path, describe

MAGIC = b"RLFSTATE"
SCHEMA = 1
_ALIGNMENT = 64
_PREFIX = len(MAGIC) + 8
_TRAILER = 8
_DTYPE_KINDS = "biufcSUmM"  # what raw bytes can say: no objects (they would need pickle), no records (no exact name)
_SUPPORTED = "None, bool, int, float, str, bytes, list, tuple, dict, NumPy arrays and scalars, dense torch tensors"

Part = bytes | memoryview


def encode(state: Any, where: str = "state") -> list[Part]:
    """Turn a state into the parts of a file; large arrays are views of the caller's memory, not copies.

    Args:
        state: None, bool, int, float, str, bytes, NumPy arrays and scalars and dense torch tensors, in lists, tuples
            and dicts with keys that are str or int. An ``OrderedDict`` comes back as a dict, a tensor on the CPU.
        where: What the state is called in an error.

    Returns:
        The parts, to be written one after the other before the arrays change.

    Raises:
        FieldError: If a part of the state is of another type; the message says which.
    """
    writer = _Writer(where)
    tree = writer.node(state, ())
    header = json.dumps({"schema": SCHEMA, "data_bytes": writer.nbytes, "tree": tree}, separators=(",", ":")).encode()
    header += b" " * (-(_PREFIX + len(header)) % _ALIGNMENT)
    parts = [MAGIC + len(header).to_bytes(8, "little"), header, *writer.parts]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return [*parts, checksum.to_bytes(_TRAILER, "little")]


def decode(block: np.ndarray, where: str = "state") -> Any:
    """Turn the bytes of `encode` back into the state.

    Args:
        block: ``[bytes]`` uint8, the whole file. The arrays that come back are views of it.
        where: What the bytes are called in an error, such as the file's path.

    Returns:
        The state.

    Raises:
        CheckpointError: If the bytes are cut short, changed, or not of this format.
    """
    if len(block) < _PREFIX + _TRAILER or block[: len(MAGIC)].tobytes() != MAGIC:
        raise CheckpointError(f"{where}: is {len(block)} bytes that do not begin as a state file; expected {MAGIC!r}.")
    start = _PREFIX + int.from_bytes(block[len(MAGIC) : _PREFIX].tobytes(), "little")
    if start + _TRAILER > len(block):
        raise CheckpointError(f"{where}: is {len(block)} bytes; its header alone ends at {start}. It was cut short.")
    expected = int.from_bytes(block[-_TRAILER:].tobytes(), "little")
    if zlib.crc32(block[:-_TRAILER].data) != expected:
        raise CheckpointError(f"{where}: its contents do not have their checksum; it was cut short or changed.")
    try:
        header = json.loads(block[_PREFIX:start].tobytes())
        if header["schema"] != SCHEMA:
            raise CheckpointError(
                f"{where}: has schema {header['schema']!r}; expected {SCHEMA}. Read it with the rlfeed that wrote it."
            )
        data = block[start:-_TRAILER]
        if header["data_bytes"] != len(data):
            raise CheckpointError(f"{where}: has {len(data)} bytes of arrays; its header says {header['data_bytes']}.")
        return _Reader(data).value(header["tree"])
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{where}: its header cannot be read, {type(error).__name__}: {error}.") from error


class _Writer:
    """Collect the arrays of a state while its tree is built."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.parts: list[Part] = []
        self.nbytes = 0

    def node(self, value: Any, path: Path) -> Any:
        kind = type(value)
        if value is None or kind is bool or kind is str:
            return value
        if kind is int:
            return value if value.bit_length() <= 64 else {"int": hex(value)}  # decimal stops at 4300 digits
        if kind is float:
            return value if math.isfinite(value) else {"float": repr(value)}  # JSON has no name for these
        if kind is bytes:
            return {"bytes": [self.store(value), len(value)]}
        if kind is list:
            return [self.node(item, (*path, index)) for index, item in enumerate(value)]
        if kind is tuple:
            return {"tuple": [self.node(item, (*path, index)) for index, item in enumerate(value)]}
        if isinstance(value, dict):
            return {"dict": [[self.key(key, path), self.node(item, (*path, key))] for key, item in value.items()]}
        if isinstance(value, np.ndarray):
            return {"array": self.array(value, path)}
        if isinstance(value, np.generic):
            return {"scalar": self.array(np.asarray(value), path)}
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_quantized:
            return {"tensor": self.tensor(value)}
        name = f"{kind.__module__}.{kind.__qualname__}"
        raise FieldError(f"{describe(self.where, path)}: is a {name}; expected {_SUPPORTED}.")

    def key(self, key: Any, path: Path) -> Any:
        if type(key) not in (str, int):
            raise FieldError(f"{describe(self.where, path)}: has the key {key!r}; expected keys that are str or int.")
        return self.node(key, path)

    def array(self, array: np.ndarray, path: Path) -> list[Any]:
        if array.dtype.kind not in _DTYPE_KINDS:
            raise FieldError(
                f"{describe(self.where, path)}: has dtype {array.dtype}; expected numbers, bools, dates or "
                "fixed-length strings. Store records as their fields or as uint8."
            )
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return [array.dtype.str, list(array.shape), self.store(flat.data)]

    def tensor(self, tensor: torch.Tensor) -> list[Any]:
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        flat = plain.reshape(-1).view(torch.uint8).numpy()
        return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), self.store(flat.data)]

    def store(self, part: Part) -> int:
        offset, padding = self.nbytes, -len(part) % _ALIGNMENT
        self.parts += [part, bytes(padding)]
        self.nbytes += len(part) + padding
        return offset


class _Reader:
    """Build values from a tree and the arrays that it points to."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self.makers: dict[str, Callable[[Any], Any]] = {
            "int": lambda text: int(text, 16),
            "float": float,
            "bytes": lambda span: self.span(*span).tobytes(),
            "tuple": lambda items: tuple(self.value(item) for item in items),
            "dict": lambda pairs: {self.value(key): self.value(item) for key, item in pairs},
            "array": lambda entry: self.array(*entry),
            "scalar": lambda entry: self.array(*entry)[()],
            "tensor": lambda entry: self.tensor(*entry),
        }

    def value(self, node: Any) -> Any:
        if isinstance(node, list):
            return [self.value(item) for item in node]
        if isinstance(node, dict):
            ((kind, content),) = node.items()
            return self.makers[kind](content)
        return node

    def array(self, dtype: str, shape: list[int], offset: int) -> np.ndarray:
        kind = np.dtype(dtype)
        if kind.kind not in _DTYPE_KINDS:
            raise ValueError(f"dtype {dtype!r} is not one of raw bytes")
        return self.span(offset, math.prod(shape) * kind.itemsize).view(kind).reshape(shape)

    def tensor(self, dtype: str, shape: list[int], offset: int) -> torch.Tensor:
        kind = getattr(torch, dtype)
        if not isinstance(kind, torch.dtype):
            raise ValueError(f"dtype {dtype!r} is not one of torch's")
        return torch.from_numpy(self.span(offset, math.prod(shape) * kind.itemsize)).view(kind).reshape(shape)

    def span(self, offset: int, nbytes: int) -> np.ndarray:
        if not 0 <= offset <= offset + nbytes <= len(self.data):
            raise ValueError(f"bytes {offset} to {offset + nbytes} lie outside the {len(self.data)} bytes of arrays")
        return self.data[offset : offset + nbytes]
