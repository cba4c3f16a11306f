"""Checking an environment: every finding at once, with the fix."""

from collections.abc import Callable
from dataclasses import dataclass

import gymnasium

from rlfeed.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Finding:
    """Describe one thing that an environment does wrong.

    Args:
        where: Environment, episode, step and key.
        problem: What was seen.
        expected: The rule.
        fix: What to do.
    """

    where: str
    problem: str
    expected: str
    fix: str


def check_env(env_or_factory: gymnasium.Env | Callable[[], gymnasium.Env], *, episodes: int = 3) -> list[Finding]:
    """Play whole episodes and list everything that breaks Gymnasium's contract.

    Args:
        env_or_factory: The environment, or what makes it.
        episodes: Whole episodes to play.

    Returns:
        The findings; empty where there are none.

    Raises:
        UnsupportedError: In this version.
    """
    raise UnsupportedError(
        f"check_env({env_or_factory!r}, episodes={episodes}): is not served by this version. Play it with a "
        "Rollout, which checks every step and names the first thing that is wrong."
    )
