"""Kill a process in the middle of saving its replay: what was saved before always loads, and the run goes on."""

import json
import subprocess
import sys
from pathlib import Path

DRIVER = Path(__file__).with_name("replay_kill_driver.py")


def test_save_killed_at_any_operation_and_at_50_random_moments_leaves_the_last_one(tmp_path):
    """Trap 35: at every operation on the disk that a save makes, then by SIGKILL at random."""
    done = subprocess.run([sys.executable, DRIVER, tmp_path], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)

    assert result["failures"] == []
    assert result["operations"] >= 30, "the faults are no longer injected"
    assert result["in_a_save"] == 50, "the kills no longer fall into a save"
