import io

import pytest

from rlfeed.log import ConsoleLogger
from rlfeed.types import Logger


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def now_s():
    return [0.0]


def test_console_without_terminal_writes_a_line_every_ten_seconds_and_at_the_end(now_s):
    stream = io.StringIO()
    console = ConsoleLogger(1000, stream=stream, clock=lambda: now_s[0])
    for env_steps in range(0, 301, 10):
        now_s[0] = env_steps / 10
        console.advance(env_steps)
    console.scalar("rollout/ep_rew_mean", 12.5, 300)
    console.scalar("train/loss", 0.25, 300)
    console.scalar("time/fps", 1.0, 300)
    now_s[0] = 32.0
    console.advance(320)
    console.close()

    assert stream.getvalue().splitlines() == [
        "env steps 100/1000, 10/s",
        "env steps 200/1000, 10/s",
        "env steps 300/1000, 10/s",
        "env steps 320/1000, 10/s, return 12.5, loss 0.25",
    ]


def test_console_resumed_run_has_the_rate_of_its_own_steps(now_s):
    stream = io.StringIO()
    console = ConsoleLogger(1000, env_steps=500, stream=stream, clock=lambda: now_s[0])
    now_s[0] = 10.0
    console.advance(600)

    assert stream.getvalue() == "env steps 600/1000, 10/s\n"


def test_console_on_a_terminal_shows_a_bar_with_return_and_loss():
    stream = Terminal()
    console = ConsoleLogger(1000, stream=stream)
    console.scalar("rollout/ep_rew_mean", 12.5, 400)
    console.scalar("train/loss", 0.25, 500)
    console.close()
    last = stream.getvalue().split("\r")[-1]

    assert "500/1000" in last
    assert "return 12.5, loss 0.25" in last
    assert last.endswith("\n")


def test_console_is_a_logger():
    assert isinstance(ConsoleLogger(1, stream=io.StringIO()), Logger)
