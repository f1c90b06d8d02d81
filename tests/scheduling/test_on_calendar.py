"""systemd's calendar events elapse when the cron expression does."""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import datetime

import pytest

from b2batch.scheduling.on_calendar import on_calendar
from b2batch.ticks.cron import parse_cron

EXPRESSIONS = {
    "0 2 * * *": ["*-*-* 02:00:00"],
    "*/15 8-18 * * 1-5": ["Mon..Fri *-*-* 08..18:00,15,30,45:00"],
    "30 6 1,15 * *": ["*-*-01,15 06:30:00"],
    "0 0 * * 0": ["Sun *-*-* 00:00:00"],
    "0 0 * 1-3,12 6,0,1": ["Mon,Sat..Sun *-01..03,12-* 00:00:00"],
    "0 12 13 * 5": ["*-*-13 12:00:00", "Fri *-*-* 12:00:00"],  # either, as in cron
    "* * * * *": ["*-*-* *:*:00"],
}


@pytest.mark.parametrize(("text", "events"), EXPRESSIONS.items())
def test_events_of_an_expression(text: str, events: list[str]) -> None:
    assert on_calendar(parse_cron(text), None) == events
    assert on_calendar(parse_cron(text), "Asia/Shanghai") == [f"{event} Asia/Shanghai" for event in events]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd")
@pytest.mark.parametrize("text", EXPRESSIONS)
def test_systemd_elapses_when_cron_does(text: str) -> None:
    cron = parse_cron(text)

    command = ["systemd-analyze", "calendar", "--iterations=8", "--base-time=2026-11-23 12:30:30 UTC"]
    told = subprocess.run(
        [*command, *on_calendar(cron, "UTC")],
        check=True,
        capture_output=True,
        text=True,
        env={"TZ": "UTC", "PATH": "/usr/bin:/bin"},
    ).stdout

    found = re.findall(r"(?:Next elapse|Iteration #\d+|Iter\. #\d+): \w+ (\S+ \S+) UTC", told)
    times = sorted({datetime.fromisoformat(time) for time in found})
    assert times[:8] == cron.next_times(datetime(2026, 11, 23, 12, 30, 30), 8)
