"""The ``schedule`` section of a job file: when the job is due."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, Self
from zoneinfo import ZoneInfo

from pydantic import Field, model_validator

from b2batch.errors import SpecError
from b2batch.spec.section import Section
from b2batch.ticks.cron import CronExpression, parse_cron
from b2batch.ticks.tick import Tick, latest_tick, parse_tick


class ScheduleSpec(Section):
    """When the job is due, for ``run --tick auto`` and ``schedule``."""

    cron: str | None = Field(default=None, description="minute hour day month weekday")
    timezone: str = Field(default="UTC", description="of cron and of ticks, as Asia/Shanghai")
    catchup: Literal["latest", "all", "none"] = Field(
        default="latest", description="which of the ticks that were missed are made up for"
    )

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        try:
            ZoneInfo(self.timezone)
        except (ValueError, OSError, KeyError):
            raise ValueError(
                f"timezone: {self.timezone!r} is none that is known here, as Asia/Shanghai"
            ) from None
        if self.cron is None and self.catchup != "latest":
            raise ValueError("catchup: without cron no tick can be missed")
        if self.cron is not None:
            try:
                parse_cron(self.cron, "cron")
            except SpecError as error:
                raise ValueError(str(error)) from None
        return self

    @property
    def zone(self) -> ZoneInfo:
        """The time zone of its ticks."""
        return ZoneInfo(self.timezone)

    @property
    def expression(self) -> CronExpression | None:
        """``cron`` as it is read; None without one."""
        return None if self.cron is None else parse_cron(self.cron, "cron")

    def tick(self, text: str) -> Tick:
        """The tick at an instant in ISO 8601; SpecError when there is none."""
        return parse_tick(text, self.expression, self.zone)

    def latest_tick(self, now: datetime) -> Tick:
        """The tick that is due; SpecError without a cron."""
        expression = self.expression
        if expression is None:
            raise SpecError("--tick auto: the job has no schedule.cron to tell the tick by; give an instant")
        return latest_tick(expression, self.zone, now)
