"""Page-lock memory that is not torch's own, so that a device copies out of it by itself."""

import resource
import warnings
from collections.abc import Callable
from typing import Any

from rlfeed.memory import readable_bytes

Release = Callable[[], None]
Register = Callable[[int, int], Release | None]  # address and bytes -> what lets go, or None


def page_lock(runtime: Any, address: int, nbytes: int, forget: Release) -> Release | None:
    """Page-lock memory for every context of a device, so that it copies from there by itself.

    Torch does not know which copies out of such memory are under way: who uses it again waits for an event of its own.
    A limit on locked memory (``ulimit -l``) is not looked at before: NVIDIA's driver does not heed it, and where one
    refuses, batches still come, through torch's own pinned memory.

    Args:
        runtime: Has ``cudaHostRegister`` and ``cudaHostUnregister``, as ``torch.cuda.cudart()`` does.
        address: Of the memory.
        nbytes: Its length, bytes.
        forget: Clears the runtime's last error.

    Returns:
        What unlocks it; None where there is nothing to lock, or, with a warning, where the driver refuses.
    """
    if nbytes == 0:
        return None
    portable = 1
    code = int(runtime.cudaHostRegister(address, nbytes, portable))
    if code != 0:
        forget()
        warnings.warn(
            f"DeviceFeed: {readable_bytes(nbytes)} of batch slots could not be page-locked (CUDA error {code}"
            f"{locked_limit()}); batches go through pinned memory instead, with one copy more each. Raise the limit "
            "on locked memory, or free memory.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None

    def release() -> None:
        if int(runtime.cudaHostUnregister(address)) != 0:  # a process that ends may have lost its driver before
            forget()

    return release


def locked_limit() -> str:
    """Say what limit on locked memory there is, if there is one.

    Returns:
        The end of a sentence; empty where there is none.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "" if limit == resource.RLIM_INFINITY else f", limit on locked memory {readable_bytes(limit)}"
