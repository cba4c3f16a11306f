"""From the live buffer to the learner's device: one gather and one copy."""

from rlfeed.feed.collate import pad_collate
from rlfeed.feed.dataset import ReplayDataset
from rlfeed.feed.device import DeviceFeed, FeedStats
from rlfeed.feed.epoch import epoch
from rlfeed.feed.loader import ReplayLoader, make_loader
from rlfeed.feed.streams import cycle, stream

__all__ = [
    "DeviceFeed",
    "FeedStats",
    "ReplayDataset",
    "ReplayLoader",
    "cycle",
    "epoch",
    "make_loader",
    "pad_collate",
    "stream",
]
