import os
import signal
import threading

import pytest

from rlfeed.train.interrupts import Interrupts


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupts_first_signal_sets_the_flag_only(number, code):
    with Interrupts() as interrupts:
        assert interrupts.received is None
        assert interrupts.exit_code == 0
        os.kill(os.getpid(), number)

        assert interrupts.received == number
        assert interrupts.exit_code == code


def test_interrupts_second_signal_leaves_at_once():
    with Interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGTERM)

    assert left.value.code == 143


def test_interrupts_gives_the_signals_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) != before[0]

    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_interrupts_outside_the_main_thread_does_nothing():
    seen = []

    def body():
        with Interrupts() as interrupts:
            seen.append(interrupts.exit_code)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join(timeout=30)

    assert seen == [0]
