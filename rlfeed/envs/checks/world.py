"""Notice when an environment changes what belongs to the whole process: random generators, the working directory."""

import os
import random
from typing import Any

import numpy as np
import torch

from rlfeed.envs.checks.findings import Findings

_OWNERS = {"random": "Python's random", "numpy": "NumPy's np.random", "torch": "torch's default generator"}


class World:
    """Compare the world with how it was.

    Args:
        findings: What to add to.
    """

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._states = _states()
        self._folder = os.getcwd()  # noqa: PTH109

    def compare(self, call: str, place: str) -> None:
        """See whether something has changed since the last time.

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
        folder = os.getcwd()  # noqa: PTH109 (text is what is shown)
        if folder != self._folder:
            self._findings.error(
                "folder", place, f"{call} changes the working directory, from {self._folder} to {folder}",
                expected="the directory that the run was started in",
                fix="Use absolute paths, such as pathlib.Path(__file__).parent / 'level.txt'.",
            )
        self._folder = folder


def _states() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 (looked at, not drawn from)
    return {
        "random": random.getstate(),
        "numpy": [bytes(part) if isinstance(part, np.ndarray) else part for part in numpy_state],
        "torch": bytes(torch.get_rng_state().numpy()),
    }
