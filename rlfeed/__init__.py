"""rlfeed: reinforcement-learning rollouts and replay on PyTorch and Gymnasium.

Data runs one way: an environment's rollout fills a replay buffer, an infinite dataset draws from it, a DataLoader
collates, and a feed puts batches on the learner's device.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlfeed.envs import Finding, ModelEnvs, check_env, make_envs
    from rlfeed.feed import (
        DeviceFeed,
        ReplayDataset,
        ReplayLoader,
        cycle,
        epoch,
        make_loader,
        pad_collate,
        stream,
    )
    from rlfeed.replay import (
        Episode,
        Hindsight,
        Limiter,
        Mixture,
        Prioritized,
        Recent,
        ReplayBuffer,
        Sequence,
        Transition,
        Uniform,
    )
    from rlfeed.rollout import Feedback, Rollout
    from rlfeed.train.evaluate import Evaluation, evaluate
    from rlfeed.train.run import load_policy
    from rlfeed.types import Batch, Policy, PolicyContext, PolicyOutput, Step

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "DeviceFeed",
    "Episode",
    "Evaluation",
    "Feedback",
    "Finding",
    "Hindsight",
    "Limiter",
    "Mixture",
    "ModelEnvs",
    "Policy",
    "PolicyContext",
    "PolicyOutput",
    "Prioritized",
    "Recent",
    "ReplayBuffer",
    "ReplayDataset",
    "ReplayLoader",
    "Rollout",
    "Sequence",
    "Step",
    "Transition",
    "Uniform",
    "check_env",
    "cycle",
    "epoch",
    "evaluate",
    "load_policy",
    "make_envs",
    "make_loader",
    "pad_collate",
    "stream",
]

_HOMES = {
    "rlfeed.envs": {"Finding", "ModelEnvs", "check_env", "make_envs"},
    "rlfeed.feed": {
        "DeviceFeed", "ReplayDataset", "ReplayLoader", "cycle", "epoch", "make_loader", "pad_collate", "stream",
    },
    "rlfeed.rollout": {"Feedback", "Rollout"},
    "rlfeed.train.evaluate": {"Evaluation", "evaluate"},
    "rlfeed.train.run": {"load_policy"},
    "rlfeed.types": {"Batch", "Policy", "PolicyContext", "PolicyOutput", "Step"},
}


def __getattr__(name: str) -> Any:
    # On first use, so that the replay and the feed work where Gymnasium is not installed.
    if name not in __all__:
        raise AttributeError(f"module 'rlfeed' has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "rlfeed.replay")
    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value
