"""However a learner ends, its workers end with it, in silence, and leave nothing behind."""

import re
import signal
import sys
from pathlib import Path

import pytest
from support.endings import ends_of

DRIVER = Path(__file__).with_name("feed_exit_driver.py")
WAYS = {
    "used up": 0,
    "closed": 0,
    "closed while computing": 0,
    "left while computing": 0,
    "left by break": 0,
    "left by sys.exit": 0,
    "left by Ctrl-C": 0,
    "left by an exception": 1,
    "killed": -signal.SIGKILL,
    "killed while computing": -signal.SIGKILL,
}
FORKED = [(way, "fork") for way in WAYS]
SERVED = [(way, "forkserver") for way in WAYS]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize(
    "cases", [[*FORKED, SERVED[-1]], pytest.param(SERVED, marks=pytest.mark.slow)], ids=["fork", "forkserver"]
)
def test_learner_ends_in_any_way_and_takes_its_workers_along_in_silence(cases):
    """Feed traps T17 (close with workers that never answer), T18 (killed learners), T19 and T20 (noise at exit)."""
    for (way, context), end in zip(cases, ends_of(DRIVER, cases), strict=True):
        said, _ = end.pop("said"), end.pop("lived_s")
        if WAYS[way] == 1:  # its own traceback, and no other
            assert re.fullmatch(r"(?s)Traceback((?!Traceback).)*ArithmeticError: of the loop\n", said), said
        else:
            assert said == "", (way, context)
        assert end == {"status": WAYS[way], "processes": 2, "alive": 0, "names": 0}, (way, context)
