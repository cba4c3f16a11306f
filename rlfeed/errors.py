"""Every error rlfeed raises, one class per cause.

    RlfeedError
    ├── UsageError                      the caller's input is wrong (exit code 2)
    │   ├── ConfigError        ValueError     a setting or argument
    │   ├── UnsupportedError   ValueError     a valid request that this version does not serve
    │   ├── SpaceError         TypeError      a space that cannot be stored or played
    │   ├── EnvNotFoundError   LookupError    no environment of that name
    │   ├── EnvMakeError       RuntimeError   the environment's constructor raised
    │   ├── DeviceError        RuntimeError   the device asked for is not there
    │   ├── CapacityError      MemoryError    it does not fit, with the numbers
    │   ├── FieldError         ValueError     a field's name, shape or dtype
    │   ├── LaneError          ValueError     a step that does not continue its lane
    │   ├── RunDirectoryError  FileExistsError  the run directory is taken, missing or locked
    │   └── TagError           LookupError    a TensorBoard tag nobody declared
    ├── EnvContractError       RuntimeError   an environment broke Gymnasium's contract
    ├── EnvFailedError         RuntimeError   an environment raised in reset() or step()
    ├── PolicyError            RuntimeError   a policy returned something unusable
    ├── NotEnoughDataError     RuntimeError   nothing to draw yet, with what is needed
    ├── StaleReadError         RuntimeError   rows were overwritten faster than they could be read
    ├── FeedTimeoutError       TimeoutError   a wait ran out; names the side that blocks
    ├── WorkerError            RuntimeError   a worker process raised or died
    ├── CheckpointError        RuntimeError   a checkpoint is missing, damaged, of another run or could not be written
    └── DivergedError          ArithmeticError  a loss or parameter is no longer finite

Messages read ``where: what is wrong with the value as it was; expected rule. Do this.``
"""

import difflib
from collections.abc import Iterable
from typing import ClassVar


class RlfeedError(Exception):
    """Base of every error raised by rlfeed."""

    exit_code: ClassVar[int] = 1


class UsageError(RlfeedError):
    """Report input that cannot be used as it was given."""

    exit_code: ClassVar[int] = 2


class ConfigError(UsageError, ValueError):
    """Report a setting or an argument that is wrong."""


class UnsupportedError(UsageError, ValueError):
    """Report a valid request that this version does not serve."""


class SpaceError(UsageError, TypeError):
    """Report a space, or the part of one, that cannot be stored or played."""


class EnvNotFoundError(UsageError, LookupError):
    """Report an environment, file, module or class that is not there."""


class EnvMakeError(UsageError, RuntimeError):
    """Report an environment whose constructor raised."""


class DeviceError(UsageError, RuntimeError):
    """Report a device that was asked for and is not there."""


class CapacityError(UsageError, MemoryError):
    """Report what does not fit into memory or into its place, with the numbers."""


class FieldError(UsageError, ValueError):
    """Report a field whose name, shape or dtype is not the declared one."""


class LaneError(UsageError, ValueError):
    """Report a step that does not continue the lane it was sent to."""


class RunDirectoryError(UsageError, FileExistsError):
    """Report a run directory that is taken, missing or locked."""


class TagError(UsageError, LookupError):
    """Report a TensorBoard tag that nobody declared."""


class EnvContractError(RlfeedError, RuntimeError):
    """Report an environment that broke Gymnasium's contract."""


class EnvFailedError(RlfeedError, RuntimeError):
    """Report an environment that raised in reset() or step()."""


class PolicyError(RlfeedError, RuntimeError):
    """Report a policy that returned something unusable."""


class NotEnoughDataError(RlfeedError, RuntimeError):
    """Report that nothing can be drawn yet, and what is needed."""


class StaleReadError(RlfeedError, RuntimeError):
    """Report rows that were overwritten faster than they could be read."""


class FeedTimeoutError(RlfeedError, TimeoutError):
    """Report a wait that ran out, and the side that blocks."""


class WorkerError(RlfeedError, RuntimeError):
    """Report a worker process that raised or died."""


class CheckpointError(RlfeedError, RuntimeError):
    """Report a checkpoint that is missing, damaged or of another run, or that could not be written."""


class DivergedError(RlfeedError, ArithmeticError):
    """Report a loss or a parameter that is no longer finite."""


def suggest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """Say which candidates a misspelt name may have meant.

    Args:
        name: What was typed.
        candidates: The names that exist.
        count: How many to name at most.

    Returns:
        A sentence with a leading space such as `` Did you mean 'CartPole-v1'?``, or an empty string.
    """
    near = difflib.get_close_matches(name, list(candidates), n=count, cutoff=0.6)
    return f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
