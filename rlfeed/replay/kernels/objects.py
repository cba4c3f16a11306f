"""Python's tuples and NumPy's arrays by address: a kernel looks at a step's arrays itself.

Asking Python for shape, dtype, flags and address of an array costs 0.5 us or more, and a step has a dozen of them.
The places of these in an array object are public (``PyArrayObject_fields``, ``PyArray_Descr``), and are tried out on
real arrays at import.
"""
# NumPy's integers are ints to numba:
# pyright: reportArgumentType=false, reportReturnType=false

import ctypes

import numpy as np
from numba import njit

from rlfeed.replay.kernels.words import load_i32, load_i64

# Places in an array object and in a dtype object, from the end of the object head on.
DATA, NDIM, DIMENSIONS, DTYPE, ARRAY_FLAGS = 0, 8, 16, 40, 48
KIND = 8  # of a dtype: kind, type, byteorder, flags as characters, then the type's number
KIND_MASK = ~(0xFF << 24)  # without the flags
C_CONTIGUOUS = 1
# What a kernel must be told of this process: sizes of the heads of objects, addresses of the type and of None.
HEAD, ITEMS, NDARRAY, NONE, RUNTIME_SIZE = range(5)
# One line of what an array must be: its dtype's kind word, its axes behind the first, and where their lengths stand.
KIND_WORD, AXES, LENGTHS, EXPECT_SIZE = range(4)


def runtime() -> list[int]:
    """Describe this process to a kernel.

    Returns:
        ``[RUNTIME_SIZE]`` integers.
    """
    return [object.__basicsize__, tuple.__basicsize__, id(np.ndarray), id(None)]


def kind_word(dtype: np.dtype) -> int:
    """Give the word that tells a dtype from every other one.

    Args:
        dtype: A number or bool.

    Returns:
        The word.
    """
    return _word(id(dtype) + object.__basicsize__ + KIND) & KIND_MASK


@njit
def item_of(about: np.ndarray, items: int, index: int) -> int:
    """Give the address of an item of a tuple."""
    return load_i64(items + about[ITEMS] + index * 8)


@njit
def data_of(about: np.ndarray, expect: np.ndarray, lengths: np.ndarray, array: int, count: int) -> int:
    """Give the address of an array's data, or 0 where it is not exactly what is expected."""
    head = about[HEAD]
    if load_i64(array + head - 8) != about[NDARRAY]:
        return 0
    array += head
    dtype = load_i64(array + DTYPE) + head
    if load_i64(dtype + KIND) & KIND_MASK != expect[KIND_WORD]:
        return 0
    axes, sizes = expect[AXES], load_i64(array + DIMENSIONS)
    if load_i32(array + NDIM) != axes + 1 or not load_i32(array + ARRAY_FLAGS) & C_CONTIGUOUS:
        return 0
    if load_i64(sizes) != count:
        return 0
    for axis in range(axes):
        if load_i64(sizes + 8 + axis * 8) != lengths[expect[LENGTHS] + axis]:
            return 0
    return load_i64(array + DATA)


def _word(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


def _probe() -> None:
    """Try the places out on real objects."""
    head = object.__basicsize__
    arrays = [np.zeros((3, 5), np.float32), np.zeros((2, 3, 4), bool)[:, ::2], np.zeros(7, np.int64), np.zeros(())]
    seen, real = [], []
    for array in arrays:
        at = id(array) + head
        flags, axes = (ctypes.c_int32.from_address(at + place).value for place in (ARRAY_FLAGS, NDIM))
        sizes = tuple(_word(_word(at + DIMENSIONS) + 8 * axis) for axis in range(min(max(axes, 0), 4)))
        seen.append((_word(at - 8), _word(at + DATA), _word(at + DTYPE), sizes, bool(flags & C_CONTIGUOUS)))
        real.append((id(np.ndarray), array.ctypes.data, id(array.dtype), array.shape, array.flags.c_contiguous))
    items = tuple(arrays)
    seen.append([_word(id(items) + tuple.__basicsize__ + 8 * i) for i in range(len(items))])
    real.append([id(array) for array in arrays])
    kinds = [np.dtype(name) for name in ("?", "b", "B", "h", "H", "i", "I", "l", "L", "e", "f", "d", ">i8", ">f4")]
    bytes_of = [kind_word(dtype).to_bytes(8, "little", signed=True) for dtype in kinds]
    seen.append([(chr(b[0]), chr(b[1]), chr(b[2]), int.from_bytes(b[4:], "little")) for b in bytes_of])
    real.append([(dtype.kind, dtype.char, dtype.byteorder, dtype.num) for dtype in kinds])
    if seen != real:
        raise ImportError(
            "rlfeed.replay: this NumPy or Python lays out its objects in a way that rlfeed does not know. Use CPython "
            "3.11 or newer with NumPy 1.26 to 2.x."
        )


_probe()
