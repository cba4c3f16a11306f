"""Curves for TensorBoard."""

import warnings
from collections.abc import Callable
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from rlfeed.errors import ConfigError
from rlfeed.log import tags

_FLUSH_S = 1  # what a killed run may lose; torch's default is two minutes


class TensorBoardLogger:
    """Write scalars by declared tag, over env steps that never go back.

    Where the disk refuses, it warns once and the curves stop: a full disk must not end the training.

    Args:
        directory: Where the event files go; a resumed run goes on in the same.
        purge_step: On resume, the first env step that is no longer true (one after the checkpoint's): what was
            written from there on is hidden. None for a new run.
    """

    def __init__(self, directory: Path | str, purge_step: int | None = None) -> None:
        self._directory = Path(directory)
        self._writer = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=_FLUSH_S)
        self._last: dict[str, int] = {}
        self._failed = False

    def scalar(self, tag: str, value: float, env_steps: int) -> None:
        """Record one value.

        Args:
            tag: A tag of `rlfeed.log.tags`.
            value: The value, in the tag's unit.
            env_steps: The x-axis; not below the tag's last.

        Raises:
            TagError: If nobody declared the tag.
            ConfigError: If the env steps go back.
        """
        tags.lookup(tag)
        last = self._last.get(tag, env_steps)
        if env_steps < last:
            raise ConfigError(f"{tag}: at env step {env_steps} after {last}; expected env steps that do not go back.")
        self._last[tag] = env_steps
        self._guard(lambda: self._writer.add_scalar(tag, float(value), env_steps))

    def flush(self) -> None:
        """Hand what is pending to the operating system: call it before a checkpoint is saved."""
        self._guard(self._writer.flush)

    def close(self) -> None:
        """Write what is pending and close the file."""
        self._guard(self._writer.close)

    def _guard(self, write: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            write()
        except OSError as error:
            self._failed = True
            warnings.warn(
                f"{self._directory}: the curves stop here, {error}. Training goes on.", RuntimeWarning, stacklevel=3
            )
