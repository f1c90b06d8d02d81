"""A tick: one instant of a schedule, and what a job's paths and templates may say of it."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise, takewhile
from zoneinfo import ZoneInfo

from b2batch.errors import SpecError
from b2batch.ticks.cron import CronExpression

_REFERENCE = re.compile(r"\{\{\s*tick\.([A-Za-z_.]+)\s*\}\}")
_MARK = re.compile(r"\{\{-?\s*tick\b")
# Forwards alone cron is sure where a clock is changed: what came last is looked for from ever further back.
_REACHES = (
    timedelta(minutes=2),
    timedelta(hours=1),
    *(timedelta(days=days) for days in (1, 8, 32, 366, 3000)),
)


@dataclass(frozen=True, slots=True)
class Tick:
    """``instant`` is in the schedule's time zone; ``previous`` is the tick before, where there is a cron."""

    instant: datetime
    previous: datetime | None = None

    @property
    def text(self) -> str:
        """The instant as ISO 8601 with its offset, by which it is known."""
        return self.instant.isoformat()

    def values(self) -> dict[str, str | dict[str, str]]:
        """What ``{{ tick.… }}`` may name."""
        values: dict[str, str | dict[str, str]] = dict(_fields(self.instant))
        return values if self.previous is None else {**values, "previous": _fields(self.previous)}

    def fill(self, text: str, where: str) -> str:
        """``text`` with each ``{{ tick.… }}`` put in; ``where`` is the setting that it stands in.

        Raises:
            SpecError: it names something else.
        """
        known = _flat(self.values())

        def value(match: re.Match[str]) -> str:
            if match[1] not in known:
                raise SpecError(f"{where}: {match[0]}: a tick has {', '.join(sorted(known))}")
            return known[match[1]]

        filled = _REFERENCE.sub(value, text)
        if mentions_tick(filled):
            raise SpecError(f"{where}: {text}: expected {{{{ tick.NAME }}}}, as {{{{ tick.date }}}}")
        return filled


def mentions_tick(text: str) -> bool:
    """Whether ``{{ tick.… }}`` stands in it."""
    return _MARK.search(text) is not None


def _fields(instant: datetime) -> dict[str, str]:
    return {
        "date": f"{instant:%Y-%m-%d}",
        "year": f"{instant:%Y}",
        "month": f"{instant:%m}",
        "day": f"{instant:%d}",
        "hour": f"{instant:%H}",
        "minute": f"{instant:%M}",
        "instant": instant.isoformat(),
    }


def _flat(values: dict[str, str | dict[str, str]]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        flat |= (
            {f"{name}.{inner}": text for inner, text in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return flat


def latest_tick(cron: CronExpression, zone: ZoneInfo, now: datetime) -> Tick:
    """The tick that is due at ``now`` (timezone-aware): the last one that is not later."""
    found = last_ticks(cron, zone, now, 1)
    if not found:
        raise SpecError(f"schedule.cron {cron.text!r}: it never came in the last eight years")
    return found[0]


def last_ticks(cron: CronExpression, zone: ZoneInfo, now: datetime, number: int) -> list[Tick]:
    """The last ``number`` ticks that are not later than ``now``, the newest first; of eight years at most."""
    end, instants = now.astimezone(UTC), list[datetime]()
    for reach in _REACHES:
        times = cron.times((end - reach).astimezone(zone))
        until_now = takewhile(lambda instant: instant.astimezone(UTC) <= end, times)
        instants = list(deque(until_now, maxlen=number + 1))
        if len(instants) > number:
            break
    return [Tick(later, earlier) for earlier, later in pairwise(instants)][::-1]


def parse_tick(text: str, cron: CronExpression | None, zone: ZoneInfo) -> Tick:
    """An instant in ISO 8601; without an offset it is meant in ``zone``.

    Raises:
        SpecError: it is no instant, or none of ``cron``.
    """
    try:
        read = datetime.fromisoformat(text)
    except ValueError:
        raise SpecError(f"--tick {text!r}: expected auto, or an instant such as 2026-11-23T02:00") from None
    instant = read.replace(tzinfo=zone) if read.tzinfo is None else read.astimezone(zone)
    if cron is None:
        return Tick(instant)
    due = latest_tick(cron, zone, instant)
    if due.instant.astimezone(UTC) != instant.astimezone(UTC):
        after = cron.next_times(instant, 1)[0]
        raise SpecError(
            f"--tick {text!r}: no tick of schedule.cron {cron.text!r} ({zone.key}); "
            f"those beside it: {due.text}, {after.isoformat()}"
        )
    return due
