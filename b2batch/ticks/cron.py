"""Cron expressions of five fields, as cron, Kubernetes and Airflow all read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

from cronsim import CronSim, CronSimError

from b2batch.errors import SpecError

_STEPS = re.compile(r"\*/\d+")
_NUM_WEEKDAYS = 7  # Sunday is 0; cron takes 7 for it too, Kubernetes does not
_FULL = {"minutes": 60, "hours": 24, "days": 31, "months": 12, "weekdays": _NUM_WEEKDAYS}
_START = datetime(2000, 1, 1)


@dataclass(frozen=True, slots=True)
class CronExpression:
    """When a job starts. ``text`` is in numbers only; the other fields are the values it stands for."""

    text: str
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    is_either_day: bool  # both days and weekdays are restricted: one of them is enough, as in cron

    def times(self, after: datetime) -> Iterator[datetime]:
        """The starts later than ``after``, in its time zone."""
        yield from CronSim(self.text, after)

    def next_times(self, after: datetime, number: int) -> list[datetime]:
        """The first ``number`` of ``times``."""
        return list(islice(self.times(after), number))

    def is_full(self, field: str) -> bool:
        """Whether all values of ``minutes``, ``hours``, … are meant."""
        return len(getattr(self, field)) == _FULL[field]


def parse_cron(text: str, where: str = "--cron") -> CronExpression:
    """Read ``minute hour day month weekday``; ``where`` is the setting or option that it stands in.

    Raises:
        SpecError: it is none, never comes, or cron, Kubernetes and Airflow read it differently.
    """
    fields = text.split()
    if len(fields) != len(_FULL):
        raise _refusal(
            where, text, f"{len(fields)} fields; five are needed: minute hour day month weekday, '0 2 * * *'"
        )
    try:
        read = CronSim(text, _START)
        next(read)
    except CronSimError as error:
        raise _refusal(where, text, str(error)) from error
    except StopIteration:
        raise _refusal(where, text, "there is no such day") from None
    _refuse_dialect(where, text, read)
    found = (read.minutes, read.hours, read.days, read.months, {_weekday(item) for item in read.weekdays})
    values = dict(zip(_FULL, map(frozenset, found), strict=True))
    is_either_day = fields[2] != "*" and fields[4] != "*"
    if is_either_day and _is_read_differently(fields, values):
        raise _refusal(
            where,
            text,
            "a day and a weekday, one of them with * or with all values: cron, Kubernetes and Airflow "
            "differ over it; name the days, or restrict only one of the two",
        )
    written = [_written(field, name, values[name]) for field, name in zip(fields, _FULL, strict=True)]
    return CronExpression(" ".join(written), **values, is_either_day=is_either_day)


def ranges(values: Iterable[int]) -> Iterator[tuple[int, int]]:
    """The runs of consecutive numbers, first and last of each, in ascending order."""
    first = last = None
    for value in sorted(values):
        if last is not None and first is not None and value > last + 1:
            yield first, last
            first = value
        first, last = value if first is None else first, value
    if first is not None and last is not None:
        yield first, last


def _refusal(where: str, text: str, reason: str) -> SpecError:
    return SpecError(f"{where} {text!r}: {reason}")


def _refuse_dialect(where: str, text: str, read: CronSim) -> None:
    """Refuse the last day, the last Friday, the second Monday, which cron itself does not know."""
    if min(read.days) < 0 or any(isinstance(item, tuple) for item in read.weekdays):
        raise _refusal(where, text, "L, LW and # are read by some schedulers only; write the days as numbers")


def _weekday(item: object) -> int:
    assert isinstance(item, int)
    return item % _NUM_WEEKDAYS


def _is_read_differently(fields: list[str], values: dict[str, frozenset[int]]) -> bool:
    covers_all = any(len(values[name]) == _FULL[name] for name in ("days", "weekdays"))
    return covers_all or fields[2].startswith("*") or fields[4].startswith("*")


def _written(field: str, name: str, values: frozenset[int]) -> str:
    if field == "*" or (_STEPS.fullmatch(field) and name != "weekdays"):
        return field
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges(values))
