"""What a run tells: curves for TensorBoard, progress on the console, and the table of all tags."""

from rlfeed.log.console import ConsoleLogger
from rlfeed.log.fanout import FanOut
from rlfeed.log.tensorboard import TensorBoardLogger

__all__ = ["ConsoleLogger", "FanOut", "TensorBoardLogger"]
