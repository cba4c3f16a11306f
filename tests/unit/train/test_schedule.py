import pytest

from rlfeed.errors import ConfigError
from rlfeed.train.schedule import Linear, Rounds


def test_linear_before_between_and_after_gives_the_line():
    schedule = Linear(1.0, 0.2, over=100)
    assert [schedule(step) for step in (0, 25, 50, 100, 1000)] == pytest.approx([1.0, 0.8, 0.6, 0.2, 0.2])


def test_linear_over_no_steps_is_refused():
    with pytest.raises(ConfigError, match="over: is 0"):
        Linear(1.0, 0.0, over=0)


@pytest.mark.parametrize(("every", "first"), [(1, None), (1, 0), (7, None), (7, 0), (7, 3), (5, 100)])
def test_rounds_at_every_step_equal_counting_by_hand(every, first):
    rounds = Rounds(every, first=first)
    begins = every if first is None else first
    for env_steps in range(150):
        due = len(range(begins, env_steps + 1, every))
        assert rounds.due(env_steps) == due
        assert rounds.next(env_steps) == begins + due * every


@pytest.mark.parametrize("stride", [1, 3, 8, 50])
def test_rounds_with_several_environments_miss_none(stride):
    rounds = Rounds(16, first=10)
    served, next_at = 0, rounds.next(0)
    for env_steps in range(0, 400, stride):
        if env_steps >= next_at:
            served = rounds.due(env_steps)
            next_at = rounds.next(env_steps)
        assert served == rounds.due(env_steps)


def test_rounds_every_no_steps_is_refused():
    with pytest.raises(ConfigError, match="every: is 0"):
        Rounds(0)
