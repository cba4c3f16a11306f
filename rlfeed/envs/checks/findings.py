"""What a check finds: one `Finding` for each thing that is wrong, however often it was seen."""

import dataclasses
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Literal

Severity = Literal["error", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Describe one thing that an environment does wrong, or that is good to know about it.

    Args:
        where: Environment, episode, step and key.
        problem: What was seen.
        expected: The rule.
        fix: What to do.
        severity: ``"error"`` breaks Gymnasium's contract or hurts training; ``"note"`` may be as it should be.
    """

    where: str
    problem: str
    expected: str
    fix: str
    severity: Severity = field(default="error", kw_only=True)

    def __str__(self) -> str:
        return (
            f"{self.severity}: {self.where}: {self.problem}\n"
            f"    expected: {self.expected}\n"
            f"    fix: {self.fix}"
        )


class Findings:
    """Collect findings: the first of a kind is kept, further ones are counted.

    Args:
        name: What the environment is called.
        tell: Called with every first finding at once, so that it outlives a crash of this process.
    """

    def __init__(self, name: str, tell: Callable[[Finding], None] = lambda _: None) -> None:
        self.name = name
        self._tell = tell
        self._first: dict[Hashable, Finding] = {}
        self._count: dict[Hashable, int] = {}

    def error(self, kind: Hashable, place: str, problem: str, *, expected: str, fix: str) -> None:
        """Add what breaks the contract.

        Args:
            kind: Findings of one kind are told once.
            place: Where in the play; may be empty.
            problem: What was seen.
            expected: The rule.
            fix: What to do.
        """
        self._add(kind, Finding(self._where(place), problem, expected, fix))

    def note(self, kind: Hashable, place: str, problem: str, *, expected: str, fix: str) -> None:
        """Add what may be as it should be.

        Args:
            kind: Findings of one kind are told once.
            place: Where in the play; may be empty.
            problem: What was seen.
            expected: The rule.
            fix: What to do.
        """
        self._add(kind, Finding(self._where(place), problem, expected, fix, severity="note"))

    def has(self, *kinds: Hashable) -> bool:
        """Tell whether something of these kinds was found.

        Args:
            *kinds: Kinds, or the first parts of kinds that are tuples.

        Returns:
            True where it was.
        """
        return any(kind in kinds or (isinstance(kind, tuple) and kind[0] in kinds) for kind in self._first)

    def all(self) -> list[Finding]:
        """List what was found, errors first.

        Returns:
            The findings; ``where`` says how often, where more than once.
        """
        counted = [
            dataclasses.replace(first, where=f"{first.where} (the first of {self._count[kind]} times)")
            if self._count[kind] > 1
            else first
            for kind, first in self._first.items()
        ]
        return sorted(counted, key=lambda finding: finding.severity)

    def _add(self, kind: Hashable, finding: Finding) -> None:
        self._count[kind] = self._count.get(kind, 0) + 1
        if kind not in self._first:
            self._first[kind] = finding
            self._tell(finding)

    def _where(self, place: str) -> str:
        return f"{self.name}: {place}" if place else self.name
