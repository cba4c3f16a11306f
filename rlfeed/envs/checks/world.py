"""Notice when an environment draws from random generators that belong to nobody, or seeds them."""

import random
from typing import Any

import numpy as np
import torch

from rlfeed.envs.checks.findings import Findings

_OWNERS = {"random": "Python's random", "numpy": "NumPy's np.random", "torch": "torch's default generator"}


class WorldGenerators:
    """Compare the world's random generators with how they were.

    Args:
        findings: What to add to.
    """

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._states = _states()

    def compare(self, call: str, place: str) -> None:
        """See whether one has moved since the last time.

        Args:
            call: What was called meanwhile.
            place: Where in the play.
        """
        states = _states()
        for name, owner in _OWNERS.items():
            if states[name] != self._states[name]:
                self._findings.error(
                    ("world", name), place, f"{call} uses {owner}, the generator of the whole process",
                    expected="draws from self.np_random, which reset(seed=...) seeds",
                    fix="Call super().reset(seed=seed) in reset(), then self.np_random.integers(...), .random() and "
                    "so on; never seed what others draw from.",
                )
        self._states = states


def _states() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 (looked at, not drawn from)
    return {
        "random": random.getstate(),
        "numpy": [bytes(part) if isinstance(part, np.ndarray) else part for part in numpy_state],
        "torch": bytes(torch.get_rng_state().numpy()),
    }
