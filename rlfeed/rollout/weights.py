"""Weights that processes share: the learner publishes them, actors pull them, and neither waits for the other.

    words | one half | the other half

The learner writes into the half that holds the older weights, then says that it holds the newer. An actor copies the
newer half, and looks whether it was being written meanwhile: by the number of the publication before and after, and by
a sum over all bytes, since a processor may make stores visible in another order than they were made. Only a copy that
passes reaches the actor's module. See docs/adr/0013-actors.md.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from torch import Tensor, nn

from rlfeed.errors import ConfigError
from rlfeed.layout import Layout
from rlfeed.memory import Memory
from rlfeed.nest import Nest, leaves

_WORDS = 64
_LATEST = 0  # number of the last publication, from 1
_HALVES = (16, 32)  # where the words of each half begin: those of one writer, away from each other
_NUMBER, _VERSION, _SUM = range(3)  # of the publication in a half: its number (0 while it is written), version, sum
_TRIES = 8


class Weights:
    """Hold the weights of a module in memory that processes share; sent to another process by pickling.

    One process publishes, any number pull. What the last publication left stays readable when its process has ended.

    Args:
        source: A module, whose parameters and buffers are held, or a nest of tensors and arrays; published at once.
        version: Of these weights, at least 0: such as the number of updates that made them.

    Raises:
        CapacityError: If the memory cannot be reserved.
    """

    def __init__(self, source: nn.Module | Nest, version: int = 0) -> None:
        tensors = _tensors(source)
        self._layout = Layout.of((name, (), tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
        self._nbytes = max(self._layout.nbytes, 64)
        self._memory = Memory("shared", _WORDS * 8 + 2 * self._nbytes)
        self._staging: dict[str, Tensor] | None = None
        self._bind()
        self.publish(source, version)

    def _bind(self) -> None:
        self._words = self._memory.bytes[: _WORDS * 8].view(np.int64)
        starts = [_WORDS * 8 + half * self._nbytes for half in range(2)]
        self._halves = [self._memory.bytes[start : start + self._nbytes] for start in starts]
        self._pulled, self._has = 0, -1  # the publication that this process has, and its version
        self._copy = np.zeros(self._nbytes, np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        return {"_layout": self._layout, "_nbytes": self._nbytes, "_memory": self._memory, "_staging": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()

    @property
    def version(self) -> int:
        """Tell the version that was published last.

        Returns:
            The version.
        """
        return int(self._words[_HALVES[self._words[_LATEST] % 2] + _VERSION])

    @property
    def is_new(self) -> bool:
        """Tell whether there is a publication that this process has not pulled.

        Returns:
            True where there is.
        """
        return int(self._words[_LATEST]) != self._pulled

    @torch.no_grad()
    def publish(self, source: nn.Module | Nest, version: int) -> None:
        """Publish weights; whoever pulls from now on gets them.

        From an accelerator all of them cross at once; this waits for what computes them.

        Args:
            source: The module, or one of the same tensors.
            version: Of these weights, not below the last one.

        Raises:
            ConfigError: If the tensors are others, or the version is below the last one.
        """
        number = int(self._words[_LATEST]) + 1
        if number > 1 and version < self.version:
            raise ConfigError(
                f"Weights.publish: version is {version}; expected at least {self.version}, the last one published."
            )
        tensors, half, words = self._checked(source), self._halves[number % 2], self._words[_HALVES[number % 2] :]
        words[_NUMBER] = 0
        if any(tensor.device.type != "cpu" for tensor in tensors.values()):
            tensors = self._fetched(tensors)
        for name, tensor in tensors.items():
            self._layout.read_plain(name, half).copy_(tensor)
        words[_VERSION], words[_SUM] = version, _sum(half, number, version)
        words[_NUMBER] = number
        self._words[_LATEST] = number

    @torch.no_grad()
    def pull(self, target: nn.Module | Nest) -> int:
        """Take the weights that were published last, if they are new to this process.

        Args:
            target: The module that gets them, or tensors of the same names: always the same one.

        Returns:
            The version of what it has now; below 0 where it has had none yet, since they are published faster than
            this process can copy them.

        Raises:
            ConfigError: If its tensors are others than those published.
        """
        for _ in range(_TRIES):
            number = int(self._words[_LATEST])
            if number == self._pulled:
                break
            words = self._words[_HALVES[number % 2] :]
            self._copy[:] = self._halves[number % 2]
            version, total = int(words[_VERSION]), int(words[_SUM])
            if words[_NUMBER] != number or total != _sum(self._copy, number, version):
                continue  # it was being overwritten: there is a newer one
            for name, tensor in self._checked(target).items():
                tensor.copy_(self._layout.read_plain(name, self._copy))
            self._pulled, self._has = number, version
            break
        return self._has

    def _checked(self, source: nn.Module | Nest) -> dict[str, Tensor]:
        tensors = _tensors(source)
        given = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        expected = {slot.name: (slot.dtype, slot.shape) for slot in self._layout.slots}
        if given != expected:
            wrong = [
                f"{name} is {given.get(name, 'missing')}; expected {expected.get(name, 'none of that name')}"
                for name in dict.fromkeys([*expected, *given])
                if given.get(name) != expected.get(name)
            ]
            raise ConfigError(f"Weights: {'; '.join(wrong)}. Publish and pull the same module.")
        return tensors

    def _fetched(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy from an accelerator: all copies are under way before one is waited for."""
        if self._staging is None:
            block = torch.empty(self._nbytes, dtype=torch.uint8, pin_memory=True)
            self._staging = {name: self._layout.read(name, block, {}) for name in tensors}
        for name, tensor in tensors.items():
            self._staging[name].copy_(tensor, non_blocking=True)
        torch.accelerator.synchronize()
        return self._staging


def _tensors(source: nn.Module | Nest) -> dict[str, Tensor]:
    if isinstance(source, nn.Module):
        return dict([*source.named_parameters(), *source.named_buffers()])
    return {".".join(map(str, path)) or "value": torch.as_tensor(leaf) for path, leaf in leaves(source)}


def _sum(block: UInt8[ndarray, " bytes"], number: int, version: int) -> int:
    total = int(block.view(np.uint64).sum(dtype=np.uint64)) + 3 * number + 5 * version
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)  # as an int64 word holds it
