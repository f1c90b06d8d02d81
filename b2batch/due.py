"""Which ticks a start of a job is to run: the one that is due, and what it makes up for."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import Enum

from b2batch.errors import CallerError, NothingToDo, SpecError
from b2batch.outputs.run import RunDirectory
from b2batch.planning import stored_plan
from b2batch.preflight import open_output
from b2batch.spec import JobSpec
from b2batch.ticks.tick import Tick, last_ticks, mentions_tick

ON_TIME = timedelta(minutes=10)
_MOST_MISSED = 1000


class Standing(Enum):
    """What became of a tick."""

    UNKNOWN = "unknown"
    BEGUN = "begun"
    FINISHED = "finished"


def ticks_to_run(spec: JobSpec, wanted: str, now: datetime) -> list[Tick]:
    """The ticks that ``--tick`` means, the oldest first; ``now`` is timezone-aware.

    Raises:
        SpecError: ``wanted`` is no instant of the schedule, or ``auto`` for a job without one.
        NothingToDo: the tick that is due was missed, and ``schedule.catchup`` is ``none``.
    """
    if wanted != "auto":
        return [spec.schedule.tick(wanted)]
    due = spec.schedule.latest_tick(now)
    if spec.schedule.catchup == "all" and _takes_ticks_apart(spec):
        return missed_ticks(spec, now, lambda tick: standing_of(spec, tick))
    late = now.astimezone(UTC) - due.instant.astimezone(UTC)
    if spec.schedule.catchup == "none" and late > ON_TIME and standing_of(spec, due) is not Standing.BEGUN:
        raise NothingToDo(f"tick {due.text} was missed, and schedule.catchup is none")
    return [due]


def missed_ticks(spec: JobSpec, now: datetime, standing: Callable[[Tick], Standing]) -> list[Tick]:
    """The tick that is due and those since the last finished one; it alone where none was ever begun."""
    expression = spec.schedule.expression
    if expression is None:
        raise SpecError("schedule.cron: is needed to tell which ticks were missed")
    due, *earlier = last_ticks(expression, spec.schedule.zone, now, _MOST_MISSED)
    missed, has_begun = [due], False
    for tick in earlier:
        found = standing(tick)
        has_begun |= found is not Standing.UNKNOWN
        if found is Standing.FINISHED:
            break
        missed.append(tick)
    return missed[::-1] if has_begun else [due]


def standing_of(spec: JobSpec, tick: Tick) -> Standing:
    """What became of a tick, as its output tells."""
    try:
        bound = spec.at(tick)
        directory = RunDirectory.existing(open_output(bound))
    except CallerError:
        return Standing.UNKNOWN
    if spec.input.incremental and tick.text not in stored_plan(directory).ticks:
        return Standing.UNKNOWN
    return Standing.BEGUN if directory.success() is None else Standing.FINISHED


def _takes_ticks_apart(spec: JobSpec) -> bool:
    """Whether a missed tick has an input or an output of its own: else the next one takes all there is."""
    return not spec.input.incremental or any(
        mentions_tick(path) for path in (*spec.input.path, spec.output.path)
    )
