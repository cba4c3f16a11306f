"""One logger that is several."""

from rlfeed.types import Logger


class FanOut:
    """Hand every scalar to several loggers.

    Args:
        *loggers: The loggers, in the order in which they are called.
    """

    def __init__(self, *loggers: Logger) -> None:
        self._loggers = loggers

    def scalar(self, tag: str, value: float, env_steps: int) -> None:
        """Record one value everywhere.

        Args:
            tag: A tag of `rlfeed.log.tags`.
            value: The value, in the tag's unit.
            env_steps: The x-axis of every curve.
        """
        for logger in self._loggers:
            logger.scalar(tag, value, env_steps)

    def flush(self) -> None:
        """Have all of them hand over what is pending."""
        for logger in self._loggers:
            logger.flush()

    def close(self) -> None:
        """Close all of them."""
        for logger in self._loggers:
            logger.close()
