"""``docs/faults.md``: every line of the catalogue names tests that are there, or says that none shows it."""

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
# Neither list may grow unnoticed: a line that is added here has lost its proof.
NOTHING_SHOWS = {13, 15}
SHOWN_IN_PART = {2, 8, 18, 20, 21, 27, 59, 70}
_GAP = re.compile(r"(?:^|; )(?:not tested|not done): \w+")


@cache
def names_in(path: Path) -> set[str]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    functions = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return functions | {target.id for target in targets if isinstance(target, ast.Name)}


def named_in(cells: list[str]) -> list[tuple[str, str]]:
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", cells[3])


def test_no_line_is_missing() -> None:
    assert [int(cells[0]) for cells in LINES] == list(range(1, 73))


@pytest.mark.parametrize("cells", LINES, ids=lambda cells: cells[0])
def test_the_tests_of_a_line_exist(cells: list[str]) -> None:
    for path, name in named_in(cells):
        assert name in names_in(CHECKOUT / path), f"{path} has no {name}"


def test_the_lines_that_nothing_shows_are_these() -> None:
    assert {int(cells[0]) for cells in LINES if not named_in(cells)} == NOTHING_SHOWS
    gaps = {int(cells[0]) for cells in LINES if _GAP.search(cells[3])}
    assert gaps == NOTHING_SHOWS | SHOWN_IN_PART
