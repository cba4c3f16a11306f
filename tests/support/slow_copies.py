"""A device in host memory for `DeviceFeed`: its streams work when a test's schedule lets them, on bare addresses.

Work knows addresses, not tensors, as on a device: memory that its owner let go of is filled by the next owner while
work that still uses it waits in a queue. So a wait that is missing, or a source that is let go of too early, shows as
wrong values under one schedule or another.
"""

import contextlib
import ctypes
import random
import weakref

import numpy as np
import torch

from rlfeed.feed import DeviceFeed, device
from rlfeed.layout import Layout, Slot
from rlfeed.types import Batch

GARBAGE = 0xA5
PITCH, NBYTES = 128, 768  # of a field, and of the batches below
SCHEDULES = ["lazy", "at once", "side first", "consumer first", "random 1", "random 2"]


class Stream:
    """Work in order: functions to run, and events of other streams to wait for."""

    def __init__(self):
        self.queue, self.finished = [], 0

    def step(self):
        """Do one piece of work; False where there is none, or it waits for another stream."""
        if self.finished == len(self.queue):
            return False
        kind, what = self.queue[self.finished]
        if kind == "wait":
            stream, end = what
            if stream.finished < end:
                return False
        else:
            what()
        self.finished += 1
        return True

    def reach(self, end):
        """Work until ``end``, and have others do what that waits for."""
        while self.finished < end:
            if not self.step():
                stream, needed = self.queue[self.finished][1]
                stream.reach(needed)


class Pool:
    """Memory that is never given back to the system: what is let go of goes to the next who asks for as much."""

    def __init__(self, on_free=lambda address, nbytes: None):
        self.free, self.all, self.on_free, self.taken = {}, [], on_free, 0

    def take(self, nbytes):
        """Give memory as an array that lets go of it when it is collected."""
        slabs = self.free.setdefault(nbytes, [])
        if not slabs:
            self.all.append(np.full(nbytes, GARBAGE, np.uint8))
            slabs.append(self.all[-1])
        slab = slabs.pop()  # the last one that was let go of, as a caching allocator gives it
        lent = slab.view(np.ndarray)
        self.taken += 1
        weakref.finalize(lent, self._give_back, slab)
        return lent

    def _give_back(self, slab):
        self.taken -= 1
        self.on_free(slab.ctypes.data, slab.nbytes)
        self.free[slab.nbytes].append(slab)

    def has(self, address):
        return any(slab.ctypes.data <= address < slab.ctypes.data + max(slab.nbytes, 1) for slab in self.all)

    def like(self, tensor):
        flat = torch.from_numpy(self.take(tensor.nbytes))
        return flat.view(tensor.dtype).view(tensor.shape) if tensor.nbytes else torch.empty_like(tensor)


def fill(address, nbytes, value=GARBAGE):
    ctypes.memset(address, value, nbytes)


class SlowCopies:
    """An `Engine` of `DeviceFeed`."""

    reads_ahead = True

    def __init__(self, schedule="lazy", *, registers=True):
        self.device, self.side, self.current = torch.device("cpu"), Stream(), Stream()
        kind, _, seed = schedule.partition(" ")
        self.kind, self.chance = schedule, random.Random(int(seed)) if kind == "random" else None
        self.memory = Pool()  # of the device
        self.pinned = Pool(on_free=fill)  # of the host: others write to it as soon as it is let go of
        self.locked, self.registers, self.released, self.inside = [], registers, [], 0
        self.host_waits = 0

    @property
    def register(self):
        return self.page_lock

    def page_lock(self, address, nbytes):
        if not self.registers:
            return None
        self.locked.append((address, nbytes))
        return lambda: self.released.append(address)

    @contextlib.contextmanager
    def active(self):
        self.inside += 1
        yield
        self.inside -= 1

    def consumer(self):
        return self.current

    def holds(self, tensor):
        return self.memory.has(tensor.data_ptr())

    def allocate(self, like):
        tensor = self.memory.like(like)
        address, nbytes = tensor.data_ptr(), tensor.nbytes
        self.launch(self.current, lambda: fill(address, nbytes))  # what the memory's last user still had to do
        return tensor

    def stage(self, tensor):
        address = tensor.data_ptr()
        if self.pinned.has(address) or any(begin <= address < begin + n for begin, n in self.locked):
            return tensor
        return self.pinned.like(tensor).copy_(tensor)

    def landing(self, like):
        return self.pinned.like(like)

    def copy(self, stream, target, source):
        assert self.inside
        assert target.is_contiguous()
        assert source.is_contiguous()
        to, start, nbytes = target.data_ptr(), source.data_ptr(), source.nbytes
        half = nbytes // 2  # a copy takes its time: others work between its halves
        self.launch(stream, lambda: ctypes.memmove(to, start, half))
        self.launch(stream, lambda: ctypes.memmove(to + half, start + half, nbytes - half))

    def launch(self, stream, work):
        stream.queue.append(("work", work))
        self.go_on()

    def record(self, stream):
        return stream, len(stream.queue)

    def wait(self, stream, event):
        stream.queue.append(("wait", event))
        self.go_on()

    def is_over(self, event):
        self.go_on()
        stream, end = event
        return stream.finished >= end

    def finish(self, event):
        stream, end = event
        self.host_waits += stream.finished < end
        stream.reach(end)

    def go_on(self):
        """Let time pass."""
        eager = {"at once": [self.side, self.current], "side first": [self.side], "consumer first": [self.current]}
        while any(stream.step() for stream in eager.get(self.kind, ())):
            pass
        if self.chance:
            for _ in range(self.chance.randrange(4)):
                self.chance.choice([self.side, self.current]).step()

    def read(self, tensor, results):
        """Have the consumer read a tensor of the device when it comes to it: the bytes that are there then."""
        address, nbytes = tensor.data_ptr(), tensor.nbytes
        self.launch(self.current, lambda: results.append(ctypes.string_at(address, nbytes)))

    def write(self, tensor, values):
        """Have the consumer write a tensor of the device when it comes to it."""
        address, written = tensor.data_ptr(), bytes(values.numpy())
        self.launch(self.current, lambda: ctypes.memmove(address, written, len(written)))

    def synchronize(self):
        for stream in (self.side, self.current):
            stream.reach(len(stream.queue))


class Ring:
    """A loader of leased slots: a batch's memory is overwritten as soon as nobody holds it.

    Batch n is one block full of its number; ``most`` tells how many slots were out at a time.
    """

    def __init__(self, batches, slots=None, nbytes=64):
        self.batches, self.slots, self.nbytes = batches, slots, nbytes
        self.pool, self.most, self.number = Pool(on_free=fill), 0, 0
        self.attached = []
        self.batches_ahead = 0

    def attach(self, *, depth, register):
        self.attached.append(depth)
        if register is not None:
            slabs = [self.pool.take(self.nbytes) for _ in range(self.slots or 16)]
            for slab in slabs:
                register(slab.ctypes.data, slab.nbytes)

    def __iter__(self):
        return self

    def __next__(self):
        if self.number == self.batches:
            raise StopIteration
        slot = self.pool.take(self.nbytes)
        self.most = max(self.most, self.pool.taken)
        slot[:] = self.number % 251
        self.number += 1
        return self.wrap(torch.from_numpy(slot))

    def wrap(self, block):
        return block


def expected(batches, nbytes=64):
    return [bytes([n % 251]) * nbytes for n in range(batches)]


def slow_feeds(monkeypatch):
    """A fixture: makes feeds over a slow device, called as `DeviceFeed` is, and gives their engines."""

    def make(loader, schedule="lazy", *, registers=True, **options):
        engine = SlowCopies(schedule, registers=registers)
        monkeypatch.setattr(device, "engine_for", lambda target: engine)
        return DeviceFeed(loader, "cpu", **options), engine

    return make


def make_batch(block=None, rows=4, value=0.0):
    """A batch in one block: observations and rewards full of a value, ids that tell it too."""
    shapes = [("observation", ("x",), torch.float32, (rows, 3)), ("reward", (), torch.float32, (rows,))]
    shapes += [(name, (), torch.bool, (rows,)) for name in ("action", "terminated", "truncated")]
    shapes += [("ids", (), torch.int64, (rows,))]
    layout = Layout(tuple(Slot(*shape, PITCH * n) for n, shape in enumerate(shapes)), NBYTES)
    batch = Batch.carve(torch.zeros(NBYTES, dtype=torch.uint8) if block is None else block, layout)
    batch.observation["x"].fill_(value)
    batch.reward.fill_(value)
    batch.ids.copy_(torch.arange(rows) + 100 * int(value))
    return batch


class BatchRing(Ring):
    """Slots that hold a `Batch` each, of its number."""

    def __init__(self, batches, **options):
        super().__init__(batches, nbytes=NBYTES, **options)

    def wrap(self, block):
        return make_batch(block, value=float(self.number - 1))
