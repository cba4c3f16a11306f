import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlfeed.errors import ConfigError, TagError
from rlfeed.log import FanOut, TensorBoardLogger
from rlfeed.types import Logger


def points(directory, tag):
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_scalar_is_read_back_with_env_steps_as_x(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.scalar("train/loss", 0.5, 100)
    logger.scalar("train/loss", torch.tensor(0.25), 200)
    logger.scalar("time/fps", np.float64(3), np.int64(150))
    logger.scalar("train/loss", 0.125, 200)
    logger.close()

    assert points(tmp_path, "train/loss") == [(100, 0.5), (200, 0.25), (200, 0.125)]
    assert points(tmp_path, "time/fps") == [(150, 3.0)]


def test_scalar_unknown_tag_is_an_error(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    with pytest.raises(TagError, match="Did you mean 'train/loss'"):
        logger.scalar("train/loos", 0.5, 1)
    logger.close()


def test_scalar_env_steps_going_back_is_an_error(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.scalar("train/loss", 0.5, 100)
    with pytest.raises(ConfigError, match="train/loss: at env step 99 after 100"):
        logger.scalar("train/loss", 0.5, 99)
    logger.close()


def test_flush_makes_scalars_readable_before_close(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    logger.scalar("train/loss", 0.5, 100)
    logger.flush()

    assert points(tmp_path, "train/loss") == [(100, 0.5)]
    logger.close()


def test_resume_in_the_same_directory_hides_what_came_after_the_checkpoint(tmp_path):
    first = TensorBoardLogger(tmp_path)
    for env_steps in (100, 200, 300):
        first.scalar("train/loss", 1.0, env_steps)
    first.close()
    resumed = TensorBoardLogger(tmp_path, purge_step=201)
    resumed.scalar("train/loss", 2.0, 250)
    resumed.close()

    assert points(tmp_path, "train/loss") == [(100, 1.0), (200, 1.0), (250, 2.0)]


def test_disk_refuses_warns_once_and_training_goes_on(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    logger = TensorBoardLogger(tmp_path)
    monkeypatch.setattr(logger._writer, "add_scalar", refuse)
    with pytest.warns(RuntimeWarning, match=r"the curves stop here, .*No space left.* Training goes on"):
        logger.scalar("train/loss", 0.5, 100)
    logger.scalar("train/loss", 0.5, 200)  # a second warning would be an error here
    logger.flush()
    logger._writer.close()


def test_fan_out_hands_everything_to_every_logger(tmp_path):
    calls = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def scalar(self, tag, value, env_steps):
            calls.append((self.name, tag, value, env_steps))

        def flush(self):
            calls.append((self.name, "flush"))

        def close(self):
            calls.append((self.name, "close"))

    logger = FanOut(Recorder("a"), Recorder("b"))
    logger.scalar("train/loss", 0.5, 7)
    logger.flush()
    logger.close()
    value = ("train/loss", 0.5, 7)

    assert isinstance(logger, Logger)
    assert calls == [
        ("a", *value), ("b", *value), ("a", "flush"), ("b", "flush"), ("a", "close"), ("b", "close")
    ]  # fmt: skip
