"""A device whose streams do their work as late as they may: a wait that is missing shows as wrong values."""

import torch

from rlfeed.replay import device_engine


class SlowStream:
    """Work in order; none of it is over before somebody needs it."""

    def __init__(self):
        self.queue, self.finished = [], 0


class SlowEngine:
    """Streams of a device in host memory.

    ``eager`` readers see their own work at once, as a test needs that looks at batches; what they do not wait for,
    the writer's, is still as late as it may be.
    """

    def __init__(self, *, eager=True, free=1 << 40):
        self.device, self.free, self.eager = torch.device("cpu"), free, eager
        self.writer, self.current = SlowStream(), SlowStream()
        self.transfers = 0

    def reader(self):
        return self.current

    def launch(self, stream, work):
        stream.queue.append(work)
        self.transfers += stream is self.writer
        if self.eager and stream is not self.writer:
            self.finish(self.record(stream))

    def record(self, stream):
        return stream, len(stream.queue)

    def wait(self, stream, event):
        stream.queue.append(lambda: self.finish(event))

    def finish(self, event):
        stream, end = event
        while stream.finished < end:
            stream.finished += 1
            stream.queue[stream.finished - 1]()

    def stage(self, nbytes):
        return torch.full((nbytes,), 0xAB, dtype=torch.uint8)

    def free_bytes(self):
        return self.free


def slow_device(monkeypatch):
    """A fixture: buffers with ``storage="cuda"`` lie on one such device, which this is."""
    engine = SlowEngine()
    monkeypatch.setattr(device_engine, "choose_engine", lambda: engine)
    return engine
