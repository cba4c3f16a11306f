"""Memory that a driver page-locks, or refuses to; and the calls that reach torch, on a machine without a device."""

import contextlib
import warnings

import pytest
import torch

from rlfeed.errors import CapacityError
from rlfeed.feed import engines
from rlfeed.feed.engines import StreamEngine, engine_for
from rlfeed.feed.page_lock import page_lock


class Runtime:
    """What `torch.cuda.cudart()` gives, refusing with a code; codes are its own type, as there."""

    def __init__(self, code=0, code_at_release=0):
        self.code, self.code_at_release, self.calls = code, code_at_release, []

    def cudaHostRegister(self, address, nbytes, flags):  # noqa: N802
        self.calls.append(("register", address, nbytes, flags))
        return self.code

    def cudaHostUnregister(self, address):  # noqa: N802
        self.calls.append(("unregister", address))
        return self.code_at_release


def test_page_lock_registers_once_for_every_context_and_lets_go():
    runtime, forgotten = Runtime(), []
    release = page_lock(runtime, 4096, 8192, lambda: forgotten.append(1))
    assert runtime.calls == [("register", 4096, 8192, 1)]
    release()
    assert runtime.calls[1:] == [("unregister", 4096)]
    assert forgotten == []


def test_page_lock_refused_warns_with_the_numbers_and_forgets_the_error():
    """Feed trap T40: unchecked, the code would come up in the next kernel that is launched."""
    runtime, forgotten = Runtime(code=2), []
    with pytest.warns(RuntimeWarning, match=r"3\.0 MB of batch slots could not be page-locked \(CUDA error 2.*pinned"):
        release = page_lock(runtime, 4096, 3_000_000, lambda: forgotten.append(1))
    assert release is None
    assert forgotten == [1]


def test_page_lock_of_nothing_asks_nobody():
    """Feed trap T40: a driver calls zero bytes an invalid value."""
    runtime = Runtime(code=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert page_lock(runtime, 4096, 0, lambda: None) is None
    assert runtime.calls == []


def test_page_lock_release_that_fails_leaves_no_error_behind():
    forgotten = []
    page_lock(Runtime(code_at_release=4), 4096, 64, lambda: forgotten.append(1))()
    assert forgotten == [1]


class FakeStream:
    def __init__(self, name):
        self.name, self.calls = name, []

    def record_event(self):
        self.calls.append("record")
        return FakeEvent()

    def wait_event(self, event):
        self.calls.append(("wait", event))

    def synchronize(self):
        self.calls.append("synchronize")


class FakeEvent:
    def query(self):
        return False

    def synchronize(self):
        raise RuntimeError("told")


@pytest.fixture
def accelerator(monkeypatch):
    """A second device of two, as torch's calls would show it: a log of what becomes current."""
    log, streams = [], {"now": FakeStream("consumer")}

    @contextlib.contextmanager
    def current_device(index):
        log.append(("device", index))
        yield
        log.append(("device", "back"))

    def set_stream(stream):
        log.append(("stream", stream.name))
        streams["now"] = stream

    class Module:
        device = staticmethod(current_device)

    monkeypatch.setattr(torch, "get_device_module", lambda kind: Module)
    monkeypatch.setattr(torch, "Stream", lambda device: FakeStream(f"side of {device}"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: streams["now"])
    monkeypatch.setattr(torch.accelerator, "set_stream", set_stream)
    return log


def test_stream_engine_without_an_index_takes_the_current_device(accelerator):
    engine = engine_for(torch.device("cuda"))
    assert engine.device == torch.device("cuda", 1)
    assert engine.side.name == "side of cuda:1"
    assert accelerator == [("device", 1), ("device", "back")]  # feed trap T32: made while that device was current


def test_stream_engine_copies_on_its_stream_and_gives_the_consumers_back(accelerator):
    engine = StreamEngine(torch.device("xpu:1"))
    target = torch.zeros(3)
    engine.copy(engine.side, target, torch.ones(3))
    assert target.tolist() == [1.0] * 3
    assert accelerator[2:] == [("stream", "side of xpu:1"), ("stream", "consumer")]
    with pytest.raises(RuntimeError):
        engine.copy(engine.side, target, torch.ones(4))
    assert accelerator[4:] == [("stream", "side of xpu:1"), ("stream", "consumer")]
    assert engine.register is None  # torch cannot register with that device


def test_stream_engine_events_go_to_the_streams_they_are_for(accelerator):
    engine = StreamEngine(torch.device("cuda:1"))
    event = engine.record(engine.side)
    engine.wait(engine.consumer(), event)
    assert engine.side.calls == ["record"]
    assert engine.consumer().calls == [("wait", event)]
    assert not engine.is_over(event)
    with pytest.raises(RuntimeError, match="told"):
        engine.finish(event)
    assert not engine.holds(torch.zeros(1))


def test_stream_engine_unlocks_memory_when_its_copies_are_over(accelerator, monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    engine = StreamEngine(torch.device("cuda:1"))
    release = engine.register(4096, 64)
    assert engine.side.calls == []
    release()
    assert engine.side.calls == ["synchronize"]
    assert runtime.calls == [("register", 4096, 64, 1), ("unregister", 4096)]


def test_stream_engine_refused_memory_gives_none(accelerator, monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(code=304))
    engine = StreamEngine(torch.device("cuda:1"))
    monkeypatch.setattr(engine, "_forget", lambda: None)
    with pytest.warns(RuntimeWarning, match="CUDA error 304"):
        assert engine.register(4096, 64) is None


def test_stream_engine_no_pinned_memory_says_how_much_was_wanted(accelerator, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    engine, tensor = StreamEngine(torch.device("cuda:1")), torch.zeros(250_000)
    monkeypatch.setattr(engines.torch, "empty_like", refuse)
    with pytest.raises(CapacityError, match=r"1\.0 MB of page-locked memory could not be had \(CUDA error: out of mem"):
        engine.stage(tensor)
