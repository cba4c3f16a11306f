"""The device feed's order of things, with a copy engine whose copies take their time."""

import pytest
import torch

from rlfeed import errors
from rlfeed.feed import DeviceFeed, device
from rlfeed.feed.device import choose_device
from rlfeed.types import Batch


class SlowEngine:
    """Copy only when told to: a batch read before its copy, or a source reused before it, shows."""

    reads_ahead = True

    def __init__(self, log):
        self.log, self.open = log, []

    def start(self, source):
        target = torch.full_like(source, -1)
        ticket = {"source": source, "target": target, "over": False}
        self.open.append(ticket)
        self.log.append(("start", source.item()))
        return target, ticket

    def wait(self, ticket):
        self.log.append(("wait", ticket["source"].item()))
        ticket["target"].copy_(ticket["source"])  # the copy happens as late as it may

    def is_over(self, ticket):
        return ticket["over"]


@pytest.fixture
def slow(monkeypatch):
    log, engines = [], []

    def make(target):
        engines.append(SlowEngine(log))
        return engines[0]

    monkeypatch.setattr(device, "engine_for", make)
    return log, engines


def test_feed_copies_are_under_way_before_they_are_asked_for(slow):
    log, _ = slow
    feed = DeviceFeed([torch.tensor([n]) for n in range(5)], "cpu", depth=2)
    assert [batch.item() for batch in feed] == [0, 1, 2, 3, 4]
    starts = {n: log.index(("start", n)) for n in range(5)}
    for n in range(3):  # when batch n is handed over, the copies of the next two have begun
        assert starts[n + 1] < log.index(("wait", n + 1))
        assert starts[n + 2] < log.index(("wait", n + 1))
    assert [entry for entry in log if entry[0] == "wait"] == [("wait", n) for n in range(5)]


def test_feed_keeps_a_source_until_its_copy_is_over(slow):
    feed = DeviceFeed([torch.tensor([n]) for n in range(6)], "cpu", depth=2)
    next(feed)
    next(feed)
    engine = slow[1][0]
    assert [ticket["source"].item() for ticket in feed._copying] == [0, 1, 2, 3]
    engine.open[0]["over"] = engine.open[1]["over"] = True
    next(feed)
    assert [ticket["source"].item() for ticket in feed._copying] == [2, 3, 4]


def test_feed_goes_on_where_it_stopped():
    feed = DeviceFeed([torch.tensor(n) for n in range(4)], "cpu")
    assert next(iter(feed)).item() == 0
    assert [batch.item() for batch in feed] == [1, 2, 3]
    with pytest.raises(StopIteration):
        next(feed)


def test_feed_on_cpu_reads_nothing_ahead():
    asked = []

    def source():
        for n in range(10):
            asked.append(n)
            yield torch.tensor(n)

    class Loader:
        def __iter__(self):
            return source()

    feed = DeviceFeed(Loader(), "cpu", depth=4)
    next(feed)
    assert asked == [0]
    assert (feed.stats().delivered, feed.stats().in_flight) == (1, 0)
    assert feed.stats().wait_s > 0


def test_feed_moves_nests_and_batches():
    batch = Batch(
        observation={"x": torch.ones(2, 3)}, action=torch.zeros(2), reward=torch.zeros(2),
        terminated=torch.zeros(2, dtype=torch.bool), truncated=torch.zeros(2, dtype=torch.bool), ids=torch.arange(2),
    )  # fmt: skip
    moved = device._move([batch, {"a": (torch.ones(1), "text")}], torch.device("meta"), False)
    assert moved[0].observation["x"].device.type == "meta"
    assert moved[0].ids.device.type == "cpu"
    assert moved[1]["a"][0].device.type == "meta"
    assert moved[1]["a"][1] == "text"


@pytest.mark.parametrize("name", ["warp", "cuda:x"])
def test_choose_device_nonsense_is_refused(name):
    with pytest.raises(errors.DeviceError, match="expected 'auto'"):
        choose_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_choose_device_cuda_where_there_is_none_says_so():
    with pytest.raises(errors.DeviceError, match=r"is 'cuda', but torch finds .* here"):
        choose_device("cuda")


def test_choose_device_auto_says_why():
    chosen, reason = choose_device("auto")
    assert (chosen.type == "cpu") == ("no accelerator" in reason)


@pytest.mark.parametrize(
    ("options", "error"), [({"depth": 0}, errors.ConfigError), ({"static_buffers": True}, errors.UnsupportedError)]
)
def test_feed_wrong_arguments_are_refused(options, error):
    with pytest.raises(error):
        DeviceFeed([], "cpu", **options)


def test_feed_priorities_without_a_replay_loader_are_refused():
    feed = DeviceFeed([torch.zeros(1)], "cpu")
    with pytest.raises(errors.UnsupportedError, match="the loader is a list"):
        feed.update_priorities(next(feed), torch.zeros(1))


def test_feed_error_of_the_loader_comes_after_the_batches_before_it(slow):
    class Loader:
        def __iter__(self):
            yield from (torch.tensor([n]) for n in range(3))
            raise RuntimeError("worker 0 died")

    feed = DeviceFeed(Loader(), "cpu", depth=2)
    assert [next(feed).item() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="worker 0 died"):
        next(feed)
