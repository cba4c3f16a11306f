"""The limiter keeps sampling and inserting in proportion, across processes, through words that they share.

    taken samples <= samples_per_insert * (inserted - offset) + tolerance      or the learner waits
    samples_per_insert * (inserted - offset) <= taken samples + tolerance      or writers in other processes wait

The offset counts the steps that earn nothing: up to the minimum size, and those inserted while it was bypassed. Nobody
waits for itself: a learner that is the only writer is told how many steps to collect, and its own steps pass freely.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from rlfeed.errors import ConfigError, FeedTimeoutError, NotEnoughDataError
from rlfeed.replay.storage import Storage

_POLL_S = 0.0005
_TAKEN, _TAKERS = 64, 64  # shared words: samples taken, one word per process that takes
_ACTIVE, _MIN_SIZE, _PREFILLED, _BYPASSED, _OPEN, _PID = range(128, 134)
_SAMPLES_PER_INSERT, _TOLERANCE, _TIMEOUT_S = range(134, 137)  # float64


@dataclass(frozen=True, slots=True)
class Limiter:
    """Bound the samples delivered per inserted step.

    Args:
        samples_per_insert: Samples per inserted step, > 0.
        min_size: Steps inserted before the first sample, >= 1.
        tolerance: Samples by which either side may run ahead, >= 0; at least a batch is allowed in any case.

    Raises:
        ConfigError: If one is out of its range.
    """

    samples_per_insert: float
    min_size: int
    tolerance: float

    def __post_init__(self) -> None:
        wrong = []
        if not 0.0 < self.samples_per_insert < math.inf:
            wrong.append(f"samples_per_insert is {self.samples_per_insert!r}; expected a number above 0")
        if not isinstance(self.min_size, int | np.integer) or self.min_size < 1:
            wrong.append(f"min_size is {self.min_size!r}; expected an int of at least 1")
        if not 0.0 <= self.tolerance < math.inf:
            wrong.append(f"tolerance is {self.tolerance!r}; expected a number >= 0")
        if wrong:
            raise ConfigError("Limiter: " + "; ".join(wrong) + ".")


class Gate:
    """Make learner and writers of a buffer wait for each other, as a `Limiter` says.

    Args:
        storage: Of the buffer; holds the words.
    """

    def __init__(self, storage: Storage) -> None:
        self._heads = storage.heads()
        self._words, self._floats = storage.words(0, 192), storage.words(0, 192).view(np.float64)
        self.active = self._words[_ACTIVE : _ACTIVE + 1]

    def open(self) -> None:
        """Forget the limiter, and keep the counts: whoever set it is gone."""
        self._words[[_ACTIVE, _OPEN]] = 0

    def limit(self, limiter: Limiter | None, timeout_s: float = 60.0) -> None:
        """Set or change the limiter; this process is the learner.

        Args:
            limiter: What holds from now on; None lets everybody pass.
            timeout_s: Seconds that a writer waits.
        """
        if limiter is not None:
            self._words[_MIN_SIZE], self._words[_PID] = limiter.min_size, os.getpid()
            self._floats[_SAMPLES_PER_INSERT] = limiter.samples_per_insert
            self._floats[_TOLERANCE], self._floats[_TIMEOUT_S] = limiter.tolerance, timeout_s
        self._words[_ACTIVE] = limiter is not None

    @contextmanager
    def bypassed(self) -> Iterator[None]:
        """Let writers pass, and leave what they insert meanwhile out of the proportion."""
        before = self.inserted
        self._words[_OPEN] += 1
        try:
            yield
        finally:
            self._words[_OPEN] -= 1
            if not self._words[_OPEN]:
                self._leave_out(before, self.inserted)

    def _leave_out(self, begin: int, end: int) -> None:
        if begin <= self._words[_PREFILLED]:
            self._words[_PREFILLED] = max(end, self._words[_PREFILLED])
        else:
            self._words[_BYPASSED] += max(0, end - max(begin, self._words[_MIN_SIZE]))

    @property
    def _offset(self) -> int:
        return int(max(self._words[_MIN_SIZE], self._words[_PREFILLED]) + self._words[_BYPASSED])

    @property
    def inserted(self) -> int:
        """Count the steps ever inserted.

        Returns:
            Steps.
        """
        return int(self._heads[3].sum())

    @property
    def taken(self) -> int:
        """Count the samples taken.

        Returns:
            Samples, of all processes.
        """
        return int(self._words[_TAKEN : _TAKEN + _TAKERS].sum())

    def take(self, count: int, taker: int = 0) -> None:
        """Count samples as taken.

        Args:
            count: How many.
            taker: Which process, 0 .. 63.
        """
        self._words[_TAKEN + taker % _TAKERS] += count

    def missing(self, count: int) -> int:
        """Tell how many steps must be inserted before samples may be taken.

        Args:
            count: Samples wanted.

        Returns:
            Steps; 0 where they may be taken now.
        """
        if not self.active[0]:
            return 0
        inserted, offset = self.inserted, self._offset
        if inserted < self._words[_MIN_SIZE]:
            return int(self._words[_MIN_SIZE] - inserted)
        # A tolerance below one batch would never let a batch through.
        ahead = self.taken + count - max(float(self._floats[_TOLERANCE]), count)
        return max(0, math.ceil(ahead / float(self._floats[_SAMPLES_PER_INSERT]) + offset - inserted))

    def wait_to_take(self, count: int, timeout_s: float, others_write: bool) -> None:
        """Wait until samples may be taken.

        Args:
            count: Samples wanted; 0 waits for the minimum size alone.
            timeout_s: Seconds to wait.
            others_write: Whether somebody else may insert meanwhile.

        Raises:
            NotEnoughDataError: If the caller is the only writer.
            FeedTimeoutError: If the writers do not come.
        """
        deadline = time.monotonic() + timeout_s
        while missing := self.missing(count):
            reason = (
                f"the limiter allows {float(self._floats[_SAMPLES_PER_INSERT])} samples per insert from step "
                f"{self._words[_MIN_SIZE]} on, {self.taken} samples were taken of {self.inserted} inserted steps"
            )
            if not others_write:
                raise NotEnoughDataError(f"sampling: {reason}; expected {missing} more steps first. Collect them.")
            if time.monotonic() > deadline:
                raise FeedTimeoutError(
                    f"sampling: waited {timeout_s:g} s for writers to insert {missing} more steps: {reason}. See "
                    "whether the actors live, or raise samples_per_insert."
                )
            time.sleep(_POLL_S)

    def wait_to_insert(self) -> None:
        """Wait until steps may be inserted; the learner's own always may.

        Raises:
            FeedTimeoutError: If the learner does not come.
        """
        if not self.active[0] or self._words[_OPEN] or self._words[_PID] == os.getpid():
            return
        deadline = time.monotonic() + float(self._floats[_TIMEOUT_S])
        while self.active[0] and not self._words[_OPEN] and (surplus := self._surplus()) > 0:
            if time.monotonic() > deadline:
                raise FeedTimeoutError(
                    f"inserting: waited {self._floats[_TIMEOUT_S]:g} s for the learner to take {math.ceil(surplus)} "
                    f"more samples: the limiter allows {float(self._floats[_SAMPLES_PER_INSERT])} samples per insert, "
                    f"{self.taken} were taken of {self.inserted} inserted steps. See whether the learner lives, or "
                    "lower samples_per_insert."
                )
            time.sleep(_POLL_S)

    def _surplus(self) -> float:
        earned = float(self._floats[_SAMPLES_PER_INSERT]) * (self.inserted - self._offset)
        return earned - self.taken - float(self._floats[_TOLERANCE])
