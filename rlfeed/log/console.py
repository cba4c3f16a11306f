"""Progress on the console: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

_INTERVAL_S = 10.0
_SHOWN = {"rollout/ep_rew_mean": "return", "train/loss": "loss"}


class _Bar(tqdm):
    monitor_interval = 0  # no watcher thread: worker processes may be forked from here


class ConsoleLogger:
    """Show env steps, their rate, the return and the loss.

    Args:
        total_env_steps: Where the run ends.
        env_steps: Where it begins; more than 0 when resumed.
        stream: Where to; None for standard error.
        clock: A monotonic clock in seconds.
    """

    def __init__(
        self,
        total_env_steps: int,
        env_steps: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._first, self._env_steps = total_env_steps, env_steps, env_steps
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started_s = self._shown_s = clock()
        self._values: dict[str, float] = {}
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = _Bar(
                total=total_env_steps, initial=env_steps, unit=" env steps", file=self._stream, dynamic_ncols=True
            )

    def scalar(self, tag: str, value: float, env_steps: int) -> None:
        """Take one value; the return and the loss are shown with the progress.

        Args:
            tag: A tag of `rlfeed.log.tags`; others than those shown are ignored.
            value: The value, in the tag's unit.
            env_steps: Where it was taken.
        """
        if tag in _SHOWN:
            self._values[_SHOWN[tag]] = float(value)
        self.advance(env_steps)

    def advance(self, env_steps: int) -> None:
        """Move to where the run is; cheap enough to call at every step.

        Args:
            env_steps: Steps taken so far, summed over environments.
        """
        moved, self._env_steps = env_steps - self._env_steps, env_steps
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(), refresh=False)
            self._bar.update(moved)
        elif self._clock() - self._shown_s >= _INTERVAL_S:
            self._line()

    def flush(self) -> None:
        """Do nothing: what is shown is out already."""

    def close(self) -> None:
        """Show where the run ended."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._line()

    def _line(self) -> None:
        self._shown_s = self._clock()
        rate = (self._env_steps - self._first) / max(self._shown_s - self._started_s, 1e-9)
        text = f"env steps {self._env_steps}/{self._total}, {rate:.0f}/s, {self._text()}".removesuffix(", ")
        self._stream.write(text + "\n")
        self._stream.flush()

    def _text(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in self._values.items())
