"""The limiter keeps sampling and inserting in proportion."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limiter:
    """Bound the samples delivered per inserted step.

    Args:
        samples_per_insert: Samples per inserted step, > 0.
        min_size: Steps stored before the first sample.
        tolerance: Samples by which either side may run ahead.
    """

    samples_per_insert: float
    min_size: int
    tolerance: float
