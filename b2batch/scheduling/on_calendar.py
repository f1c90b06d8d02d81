"""Cron expressions as systemd's calendar events."""

from __future__ import annotations

from collections.abc import Iterable

from b2batch.ticks.cron import CronExpression, ranges

_WEEKDAYS = ("Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat")


def on_calendar(cron: CronExpression, time_zone: str | None) -> list[str]:
    """The ``OnCalendar=`` values that together elapse when ``cron`` does: two for a day or a weekday."""
    months = _numbers(cron, "months")
    days = f"*-{months}-{_numbers(cron, 'days')}"
    weekdays = "" if cron.is_full("weekdays") else f"{_names(cron.weekdays)} "
    time = f"{_numbers(cron, 'hours')}:{_numbers(cron, 'minutes')}:00"
    dates = [days, f"{weekdays}*-{months}-*"] if cron.is_either_day else [f"{weekdays}{days}"]
    zone = f" {time_zone}" if time_zone else ""
    return [f"{date} {time}{zone}" for date in dates]


def _numbers(cron: CronExpression, field: str) -> str:
    if cron.is_full(field):
        return "*"
    return ",".join(_range(f"{first:02}", f"{last:02}") for first, last in ranges(getattr(cron, field)))


def _names(weekdays: Iterable[int]) -> str:
    return ",".join(_range(_WEEKDAYS[first], _WEEKDAYS[last]) for first, last in _from_monday(weekdays))


def _from_monday(weekdays: Iterable[int]) -> list[tuple[int, int]]:
    """Ranges in systemd's week, which ends with Sunday."""
    runs = ranges((day - 1) % 7 for day in weekdays)
    return [((first + 1) % 7, (last + 1) % 7) for first, last in runs]


def _range(first: str, last: str) -> str:
    return first if first == last else f"{first}..{last}"
