"""Kill a process at every operation on the disk that a save makes: what was reported as saved must still load."""

import json
import subprocess
import sys
from pathlib import Path

DRIVER = Path(__file__).with_name("checkpoint_kill_driver.py")


def test_save_killed_at_any_operation_leaves_the_last_reported_checkpoint(tmp_path):
    done = subprocess.run([sys.executable, DRIVER, tmp_path], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)

    assert result["failures"] == []
    assert result["points"] >= 40, "the faults are no longer injected"
    # All three states were met: nothing new yet, the first save reported, and renamed but not yet reported.
    assert {(100, 100), (200, 200), (100, 200)} <= {tuple(pair) for pair in result["reported_and_loaded"]}
