"""Random state of user code: transforms may use the global generators, and still give the same for any worker count.

For the time of one call the global generators are seeded by the number of the batch; then they are put back, so that
nothing in the learner's random state shows that a loader ran.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from rlfeed.replay.samplers import subkey


@contextmanager
def seeded(key: int, number: int) -> Iterator[None]:
    """Seed torch's, NumPy's and Python's global generators for a block of code, and put them back.

    Args:
        key: The stream of draws.
        number: Of the batch.
    """
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - the user's
    seed = subkey(key, number) & (2**63 - 1)
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        random.setstate(before[2])
