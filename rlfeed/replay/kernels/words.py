"""Words of memory, by address: what compiled code needs and Python has no name for.

Heads are words that one writer stores and any number of readers load, in any process. A plain load of a head is
hoisted out of its loop by LLVM (the reader never sees it move), and ARM may reorder stores. So heads are touched only
through `load_acquire` and `store_release`:

    writer   reserve all lanes (store_release), fence, write the rows, commit all lanes (store_release)
    reader   load_acquire committed, copy, fence_loads, load_acquire reserved: older than reserved - rows is torn
"""

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import extending, njit, types
from numba.core import cgutils
from numba.core import config as numba_config

config: Any = numba_config
intrinsic: Any = extending.intrinsic  # its functions are called without their typing context


def _cache_folder() -> str:
    # numba looks only at the file of the function itself to see whether a cached kernel is out of date, but our kernels
    # inline functions of other files: so every state of this folder has a cache of its own.
    here = Path(__file__).parent
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))).hexdigest()[:16]
    places = [here / "__pycache__", Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rlfeed"]
    for place in [Path(config.CACHE_DIR), *places] if config.CACHE_DIR else places:
        try:
            (place / digest).mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place / digest, os.W_OK):
            return str(place / digest)
    warnings.warn(
        "rlfeed: no writable folder for compiled kernels, so every process compiles them anew (about 10 s). Set "
        "NUMBA_CACHE_DIR to a writable folder.",
        RuntimeWarning,
        stacklevel=2,
    )
    return ""


_CACHE_FOLDER = _cache_folder()


def kernel(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function for one signature, without the GIL, cached on disk where a folder is writable.

    Args:
        signature: The only signature it will ever have.

    Returns:
        A decorator.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        before, config.CACHE_DIR = config.CACHE_DIR, _CACHE_FOLDER
        try:
            return njit(signature, nogil=True, cache=bool(_CACHE_FOLDER))(function)
        finally:
            config.CACHE_DIR = before

    return decorate


def _pointer(builder: Any, address: Any, bits: int) -> Any:
    from llvmlite import ir

    return builder.inttoptr(address, ir.IntType(bits).as_pointer())


@intrinsic
def load_acquire(typingctx: Any, address: Any) -> Any:
    """Load a 64-bit word so that nothing after it is read before it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(builder, args[0], 64), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def store_release(typingctx: Any, address: Any, value: Any) -> Any:
    """Store a 64-bit word so that nothing before it is written after it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[1], _pointer(builder, args[0], 64), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def swap_if(typingctx: Any, address: Any, expected: Any, value: Any) -> Any:
    """Store a 64-bit word if it has an expected value, and give the value that it had, all at once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pair = builder.cmpxchg(_pointer(builder, args[0], 64), args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 0)

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def fence(typingctx: Any) -> Any:
    """Keep every load and store on its side."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def fence_loads(typingctx: Any) -> Any:
    """Keep every load before it from being made after it: what a reader needs, and no instruction at all on x86."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("acquire")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Ask for a cache line that will be read soon."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        from llvmlite import ir

        pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag])
        function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
        builder.call(function, [builder.inttoptr(args[0], pointer), flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def memcpy(typingctx: Any, destination: Any, source: Any, nbytes: Any) -> Any:
    """Copy bytes between places that do not overlap."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cgutils.raw_memcpy(builder, _pointer(builder, args[0], 8), _pointer(builder, args[1], 8), args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _memcpy_of(nbytes: int) -> Any:
    @intrinsic
    def copy(typingctx: Any, destination: Any, source: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            size = context.get_constant(types.intp, nbytes)
            cgutils.raw_memcpy(builder, _pointer(builder, args[0], 8), _pointer(builder, args[1], 8), size, 1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return copy


memcpy16, memcpy32 = _memcpy_of(16), _memcpy_of(32)


@intrinsic
def memzero(typingctx: Any, destination: Any, nbytes: Any) -> Any:
    """Set bytes to zero."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cgutils.memset(builder, _pointer(builder, args[0], 8), args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _load(kind: Any) -> Any:
    @intrinsic
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], context.get_value_type(kind).as_pointer())
            return builder.load(pointer, align=1)

        return kind(types.int64), codegen

    return load


def _store(kind: Any) -> Any:
    @intrinsic
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            pointer = builder.inttoptr(args[0], context.get_value_type(kind).as_pointer())
            builder.store(context.cast(builder, args[1], signature.args[1], kind), pointer, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, value), codegen

    return store


load_u8, load_u32, load_i64 = _load(types.uint8), _load(types.uint32), _load(types.int64)
load_i32 = _load(types.int32)
load_f32, load_f64, load_u64 = _load(types.float32), _load(types.float64), _load(types.uint64)
store_u8, store_u32, store_i64 = _store(types.uint8), _store(types.uint32), _store(types.int64)
store_f32, store_u64 = _store(types.float32), _store(types.uint64)


@njit
def copy_row(destination: int, source: int, nbytes: int) -> None:
    """Copy one row of one field: in vector registers where it is short, which saves the call of memcpy.

    The last piece overlaps the one before instead of going byte by byte: 68 bytes are three moves, not thirteen.
    """
    if nbytes > 512:
        memcpy(destination, source, nbytes)
    elif nbytes >= 32:
        offset = 0
        while offset + 32 <= nbytes:
            memcpy32(destination + offset, source + offset)
            offset += 32
        memcpy32(destination + nbytes - 32, source + nbytes - 32)
    elif nbytes >= 16:
        memcpy16(destination, source)
        memcpy16(destination + nbytes - 16, source + nbytes - 16)
    elif nbytes >= 8:
        store_u64(destination, load_u64(source))
        store_u64(destination + nbytes - 8, load_u64(source + nbytes - 8))
    elif nbytes >= 4:
        store_u32(destination, load_u32(source))
        store_u32(destination + nbytes - 4, load_u32(source + nbytes - 4))
    else:
        for offset in range(nbytes):
            store_u8(destination + offset, load_u8(source + offset))
