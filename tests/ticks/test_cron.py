"""Cron expressions: what is read, what is refused, and that writing them in numbers changes nothing."""

from __future__ import annotations

from datetime import datetime
from itertools import islice, pairwise

import pytest
from cronsim import CronSim, CronSimError
from hypothesis import assume, given
from hypothesis import strategies as st

from b2batch.errors import CallerError
from b2batch.ticks.cron import parse_cron, ranges

START = datetime(2026, 11, 23, 12, 30)
LIMITS = [(0, 59), (0, 23), (1, 31), (1, 12), (0, 7)]


@st.composite
def fields(draw: st.DrawFn, low: int, high: int) -> str:
    number = st.integers(low, high)
    pair = st.tuples(number, number).map(sorted).map(lambda both: f"{both[0]}-{both[1]}")
    plain = st.one_of(number.map(str), pair)
    step = st.tuples(st.just("*") | plain, st.integers(1, 9)).map(lambda both: f"{both[0]}/{both[1]}")
    return draw(st.one_of(st.just("*"), plain, step, st.lists(plain, min_size=2, max_size=3).map(",".join)))


expressions = st.tuples(*(fields(low, high) for low, high in LIMITS)).map(" ".join)


@given(expressions)
def test_expression_in_numbers_means_the_same(text: str) -> None:
    try:
        read = parse_cron(text)
        expected = list(islice(CronSim(text, START), 20))
    except (CallerError, CronSimError):
        assume(False)
    assert read.next_times(START, 20) == expected
    assert parse_cron(read.text) == read


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("0 2 * * *", "0 2 * * *"),
        ("*/15 8-18 * * mon-FRI", "*/15 8-18 * * 1-5"),
        ("5/20 0 1 jan,jul *", "5,25,45 0 1 1,7 *"),
        ("0 0 * * 7", "0 0 * * 0"),  # Kubernetes knows no 7
        ("0 0 1,15 * 5", "0 0 1,15 * 5"),
    ],
)
def test_expression_is_written_in_numbers(text: str, written: str) -> None:
    assert parse_cron(text).text == written


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("@daily", "1 fields; five are needed"),
        ("0 0 2 * * *", "6 fields"),
        ("60 2 * * *", "Bad minute"),
        ("0 2 * * someday", "Bad day-of-week"),
        ("0 2 30 2 *", "day"),
        ("0 2 L * *", "some schedulers only"),
        ("0 2 LW * *", "some schedulers only"),
        ("0 2 * * 5L", "some schedulers only"),
        ("0 2 * * 1#2", "some schedulers only"),
        ("0 2 */2 * 1", "differ over it"),
        ("0 2 1-31 * 1", "differ over it"),
    ],
)
def test_what_is_not_read_alike_is_refused(text: str, reason: str) -> None:
    with pytest.raises(CallerError, match=f"--cron.*{reason}") as refused:
        parse_cron(text)
    assert refused.value.exit_code == 2


@given(st.sets(st.integers(0, 60)))
def test_ranges_are_the_numbers(numbers: set[int]) -> None:
    found = list(ranges(numbers))

    assert {number for first, last in found for number in range(first, last + 1)} == numbers
    assert all(later[0] > earlier[1] + 1 for earlier, later in pairwise(found))
