"""What updates tell, averaged where it is computed; the first number that is not finite stops the run."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlfeed.durable import save_state
from rlfeed.errors import DivergedError
from rlfeed.types import Batch

_UNREAD = 3  # updates whose numbers may still be on their way from a device


class Means:
    """Average the scalars of updates, and look at every one of them.

    On a CPU each is looked at at once. From a device they are copied without waiting and looked at a few updates
    later; until then their batches are held.

    Args:
        place: Where the batch is written whose update gave a number that is not finite; None: nowhere.
    """

    def __init__(self, place: Path | None = None) -> None:
        self._place = place
        self._sums: dict[tuple[str, ...], tuple[Tensor, int]] = {}  # by which tags came together
        self._unread: deque[tuple[Tensor, Any, tuple[str, ...], Batch, int, int]] = deque()

    def add(self, batch: Batch, scalars: Mapping[str, Tensor], env_steps: int, updates: int) -> None:
        """Take what an update gave.

        Args:
            batch: It learned from.
            scalars: By tag, one number each.
            env_steps: Of the run.
            updates: Of the run, this one included.

        Raises:
            DivergedError: If a number is not finite.
        """
        if not scalars:
            return
        tags = tuple(scalars)
        values = torch.stack([value.detach().float().reshape(()) for value in scalars.values()])
        before = self._sums.get(tags)
        self._sums[tags] = (values, 1) if before is None else (before[0] + values, before[1] + 1)
        if values.device.type == "cpu":
            self._look(values, tags, batch, env_steps, updates)
            return
        copy = torch.empty(len(tags), pin_memory=values.device.type == "cuda")
        copy.copy_(values, non_blocking=True)
        event = torch.Event(device=values.device)
        event.record()
        self._unread.append((copy, event, tags, batch, env_steps, updates))
        while self._unread and (len(self._unread) > _UNREAD or self._unread[0][1].query()):
            self._look_at_oldest()

    def take(self) -> dict[str, float]:
        """Give the means since this was asked last; waits for the device.

        Returns:
            By tag; empty where there was no update.

        Raises:
            DivergedError: If a number is not finite.
        """
        self.settle()
        totals: dict[str, tuple[float, int]] = {}
        for tags, (sums, count) in self._sums.items():
            for tag, value in zip(tags, sums.tolist(), strict=True):
                total, number = totals.get(tag, (0.0, 0))
                totals[tag] = total + value, number + count
        self._sums = {}
        return {tag: total / number for tag, (total, number) in totals.items()}

    def settle(self) -> None:
        """Look at everything that is still on its way.

        Raises:
            DivergedError: If a number is not finite.
        """
        while self._unread:
            self._look_at_oldest()

    def _look_at_oldest(self) -> None:
        values, event, tags, batch, env_steps, updates = self._unread.popleft()
        event.synchronize()
        self._look(values, tags, batch, env_steps, updates)

    def _look(self, values: Tensor, tags: tuple[str, ...], batch: Batch, env_steps: int, updates: int) -> None:
        if math.isfinite(values.sum().item()):  # one number to read; the sum of finite ones may be too large, though
            return
        told = dict(zip(tags, values.tolist(), strict=True))
        wrong = [(tag, value) for tag, value in told.items() if not math.isfinite(value)]
        if not wrong:
            return
        kept = ""
        if self._place is not None:
            numbers = {"env_steps": env_steps, "updates": updates, "scalars": told}
            save_state(self._place, {**numbers, "batch": _fields_of(batch)})
            kept = f" Its batch lies in {self._place}: look at it by rlfeed.durable.load_state."
        others = f", with {', '.join(tag for tag, _ in wrong[1:])}" if wrong[1:] else ""
        raise DivergedError(
            f"{wrong[0][0]}: is {wrong[0][1]} at env step {env_steps}, in update {updates}{others}; expected finite "
            f"values.{kept} Look at its rewards and observations, or lower the learning rate; earlier checkpoints are "
            "as they were."
        )


def _fields_of(batch: Batch) -> dict[str, Any]:
    moved = batch.to("cpu")
    values = {f.name: getattr(moved, f.name) for f in fields(Batch) if f.init}
    return {name: value for name, value in values.items() if value is not None}
