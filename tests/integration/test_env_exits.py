"""However a learner ends, and whatever its environments do then, their processes end with it, in silence."""

import re
import signal
import sys
from pathlib import Path

import pytest
from support.endings import ends_of

DRIVER = Path(__file__).with_name("env_exit_driver.py")
WAYS = {"closed": 0, "the end": 0, "sys.exit": 0, "Ctrl-C": 0, "an exception": 1, "SIGTERM": -signal.SIGTERM}
KILLED = ("making", "resetting", "stepping", "holding the lock", "restarting", "waiting")
CASES = [
    *[(way, "waiting") for way in WAYS],
    ("the end", "closing"),
    ("stopped worker, killed", "stepping"),
    *[("killed", phase) for phase in KILLED],
]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_learner_ends_in_any_way_and_takes_its_environments_along_in_silence():
    """Rollout 3A.36: workers, and the processes that environments started, are gone; nothing is said, nothing left."""
    for (way, phase), end in zip(CASES, ends_of(DRIVER, CASES), strict=True):
        said, lived_s = end.pop("said"), end.pop("lived_s")
        if way == "an exception":  # its own traceback, and no other
            assert re.fullmatch(r"(?s)Traceback((?!Traceback).)*ArithmeticError: of the loop\n", said), said
        else:
            assert phase == "restarting" or said == "", (way, phase, said)
        expected = {"status": WAYS.get(way, -signal.SIGKILL), "processes": 4, "alive": 0, "names": 0}
        assert end | ({"processes": 4} if phase == "restarting" else {}) == expected, (way, phase)
        assert lived_s < 20, (way, phase)
