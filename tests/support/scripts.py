"""The scripts as modules: they are run from the checkout, never installed."""

import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(CHECKOUT / "scripts"))

import agents_benchmark  # noqa: E402
import benchmark as benchmark_script  # noqa: E402
import check_env as check_env_script  # noqa: E402
import command_line  # noqa: E402
import contest  # noqa: E402
import contestants  # noqa: E402
import evaluate as evaluate_script  # noqa: E402
import feed_benchmark  # noqa: E402
import feed_contestants  # noqa: E402
import feed_life  # noqa: E402
import peers  # noqa: E402
import rollout_contestants  # noqa: E402
import rollout_life  # noqa: E402
import rollout_peers  # noqa: E402
import score_rows  # noqa: E402
import score_runs  # noqa: E402
import score_tables  # noqa: E402
import scores as scores_script  # noqa: E402
import train as train_script  # noqa: E402
import workloads  # noqa: E402

__all__ = [
    "CHECKOUT",
    "agents_benchmark",
    "benchmark_script",
    "check_env_script",
    "command_line",
    "contest",
    "contestants",
    "evaluate_script",
    "feed_benchmark",
    "feed_contestants",
    "feed_life",
    "peers",
    "rollout_contestants",
    "rollout_life",
    "rollout_peers",
    "score_rows",
    "score_runs",
    "score_tables",
    "scores_script",
    "train_script",
    "workloads",
]
