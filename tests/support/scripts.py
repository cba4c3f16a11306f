"""The scripts as modules: they are run from the checkout, never installed."""

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT / "scripts"))

import command_line  # noqa: E402
import evaluate as evaluate_script  # noqa: E402
import train as train_script  # noqa: E402

__all__ = ["CHECKOUT", "command_line", "evaluate_script", "train_script"]
