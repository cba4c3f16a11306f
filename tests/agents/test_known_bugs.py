"""Each known bug of other libraries that could be ours, too, has a test of ours that would find it.

The numbers are those of our list: ``B17``, say, is an advantage at a truncated step that uses the next episode's
target. A test names those that it would find in its docstring; probes are ``P6``, metamorphic relations ``(d)``.
"""

import ast
import re
from pathlib import Path

import pytest

from rlfeed.testing.probes import PROBES

TESTS = Path(__file__).parents[1]


def docstrings():
    """Every docstring of a test, but those here."""
    for path in sorted(TESTS.rglob("test_*.py")):
        if path != Path(__file__):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                    yield ast.get_docstring(node) or ""


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        (r"\bB\d+\b", [f"B{number}" for number in range(1, 53)]),
        (r"\bP\d+\b", list(PROBES)),
        (r"\(([a-h])\)", list("abcdefgh")),
    ],
    ids=["bugs", "probes", "relations"],
)
def test_every_number_has_a_test(pattern, numbers):
    found = {number for text in docstrings() for number in re.findall(pattern, text)}
    assert [number for number in numbers if number not in found] == []
