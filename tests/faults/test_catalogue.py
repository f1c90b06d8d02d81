"""``docs/faults.md``: every line of the catalogue has its test, and the test is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
LINES = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (CHECKOUT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| \d+ \|", line)
]


@cache
def names_in(path: Path) -> set[str]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return functions | {target.id for target in targets if isinstance(target, ast.Name)}


def test_no_line_is_missing() -> None:
    assert [int(cells[0]) for cells in LINES] == list(range(1, 73))


@pytest.mark.parametrize("cells", LINES, ids=lambda cells: cells[0])
def test_the_tests_of_a_line_exist(cells: list[str]) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", cells[3])
    assert named, f"{cells[1]}: no test"
    for path, name in named:
        assert name in names_in(CHECKOUT / path), f"{path} has no {name}"
