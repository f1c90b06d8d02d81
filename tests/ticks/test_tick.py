"""Ticks: which one is due, across changes of the clock, and what paths say of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from b2batch.errors import SpecError
from b2batch.ticks.cron import parse_cron
from b2batch.ticks.tick import Tick, last_ticks, latest_tick, parse_tick

CRONS = ["* * * * *", "*/15 * * * *", "0 2 * * *", "30 2 * * *", "30 1 * * 0", "0 0 1 * *", "0 12 29 2 *"]
ZONES = ["UTC", "Asia/Shanghai", "America/New_York", "Europe/Berlin", "Australia/Lord_Howe"]
instants = st.datetimes(datetime(2024, 1, 1), datetime(2030, 1, 1)).map(lambda at: at.replace(tzinfo=UTC))
# Within three hours of a change of the clocks of New York and Berlin, where mistakes live.
changes = st.tuples(
    st.sampled_from([datetime(2026, 3, 8, 7), datetime(2026, 11, 1, 6), datetime(2026, 10, 25, 1)]),
    st.integers(-3 * 60, 3 * 60),
).map(lambda drawn: drawn[0].replace(tzinfo=UTC) + timedelta(minutes=drawn[1]))


def utc(tick: Tick) -> datetime:
    return tick.instant.astimezone(UTC)


@given(st.sampled_from(CRONS), st.sampled_from(ZONES), instants | changes)
def test_the_tick_that_is_due_is_the_last_one_that_is_not_later(cron: str, zone: str, now: datetime) -> None:
    read = parse_cron(cron)
    due = latest_tick(read, ZoneInfo(zone), now)
    assert utc(due) <= now
    assert due.previous is not None
    assert due.previous.astimezone(UTC) < utc(due)
    later = next(read.times(due.instant))
    assert later.astimezone(UTC) > now


@given(st.sampled_from(CRONS[:6]), st.sampled_from(ZONES), instants | changes)
def test_a_tick_is_found_again_by_its_text_and_by_the_one_after_it(
    cron: str, zone: str, now: datetime
) -> None:
    read, place = parse_cron(cron), ZoneInfo(zone)
    due = latest_tick(read, place, now)
    assert parse_tick(due.text, read, place).text == due.text
    assert due.previous is not None
    for before in last_ticks(read, place, now, 5)[1:2]:
        assert utc(before) == due.previous.astimezone(UTC)
        assert latest_tick(read, place, utc(due) - timedelta(seconds=1)) == before
        assert before.instant.tzinfo == place


def test_ticks_of_a_day_with_an_hour_twice_are_each_there_once() -> None:
    read, place = parse_cron("30 1 * * *"), ZoneInfo("America/New_York")
    now, seen = datetime(2026, 10, 30, 12, tzinfo=UTC), set()
    while now < datetime(2026, 11, 4, tzinfo=UTC):
        seen.add(latest_tick(read, place, now).text)
        now += timedelta(minutes=10)
    assert sorted(text[:16] for text in seen) == [
        "2026-10-30T01:30",
        "2026-10-31T01:30",
        "2026-11-01T01:30",
        "2026-11-02T01:30",
        "2026-11-03T01:30",
    ]


def test_paths_name_a_tick_in_its_own_zone() -> None:
    due = latest_tick(parse_cron("0 2 * * *"), ZoneInfo("Asia/Shanghai"), datetime(2026, 3, 1, 1, tzinfo=UTC))
    filled = due.fill(
        "in/{{ tick.previous.date }}/{{tick.year}}{{tick.month}}{{tick.day}}-{{tick.hour}}{{tick.minute}}",
        "input.path",
    )
    assert filled == "in/2026-02-28/20260301-0200"
    assert due.text == "2026-03-01T02:00:00+08:00"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("in/{{ tick.week }}", r"input.path: \{\{ tick.week \}\}: a tick has date, day, hour"),
        ("in/{{ tick }}", r"expected \{\{ tick.NAME \}\}"),
        ("in/{{ tick.date | upper }}", r"expected \{\{ tick.NAME \}\}"),
    ],
)
def test_what_a_tick_does_not_have_is_refused(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Tick(datetime(2026, 11, 23, tzinfo=UTC)).fill(text, "input.path")


def test_an_instant_between_two_ticks_is_refused_with_those_beside_it() -> None:
    with pytest.raises(SpecError, match=r"2026-11-22T02:00:00\+08:00, 2026-11-23T02:00:00\+08:00"):
        parse_tick("2026-11-23", parse_cron("0 2 * * *"), ZoneInfo("Asia/Shanghai"))


@pytest.mark.parametrize("text", ["yesterday", "", "2026-13-01"])
def test_what_is_no_instant_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="expected auto, or an instant"):
        parse_tick(text, None, ZoneInfo("UTC"))
