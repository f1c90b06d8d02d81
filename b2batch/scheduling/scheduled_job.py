"""What a manifest is made from."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass

from b2batch.ticks.cron import CronExpression

_MOST_NAME_CHARS = 40  # KubeRay and CronJob append to it, and 63 are the limit
_LEAST_WARNING_S = 120


@dataclass(frozen=True, slots=True)
class Machines:
    """What a job is given on a cluster; ``gpus``, ``cpus`` and ``memory_gib`` are of each node."""

    nodes: int = 1
    gpus: int = 0
    cpus: int = 4
    memory_gib: int = 16
    image: str = ""  # of Kubernetes
    claim: str = "b2batch"  # PersistentVolumeClaim that is mounted where the job works


@dataclass(frozen=True, slots=True)
class ScheduledJob:
    """A job file, the command that runs it, and when.

    Attributes:
        directory: absolute; where the command starts, and NAME.env and NAME.log lie.
        arguments: of ``b2batch run`` and ``submit`` alike, the job file first.
        env_names: variables that the job refers to; their values are never known here.
        time_zone: None is the machine's own.
        dashboard: of the Ray cluster that the job is submitted to; empty: it runs where it is started.
    """

    name: str
    cron: CronExpression
    directory: str
    program: str
    arguments: tuple[str, ...]
    env_names: tuple[str, ...]
    drain_grace_s: float
    time_zone: str | None
    machines: Machines = Machines()
    dashboard: str = ""

    @property
    def command(self) -> tuple[str, ...]:
        """The words of the command that runs the job, or goes on with it, and ends with its exit code."""
        if self.dashboard:
            return (self.program, "submit", *self.arguments, "--address", self.dashboard, "--wait")
        return (self.program, "run", *self.arguments)

    @property
    def stop_s(self) -> int:
        """Seconds from a stop signal to the end: the grace of leased units, and what closing takes."""
        return math.ceil(self.drain_grace_s) + 60

    @property
    def warning_s(self) -> int:
        """Seconds before a time limit at which the stop signal comes."""
        return max(_LEAST_WARNING_S, self.stop_s + 30)

    @property
    def object_name(self) -> str:
        """The name as Kubernetes takes it: other names never become the same."""
        plain = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        if plain == self.name and len(plain) <= _MOST_NAME_CHARS:
            return plain
        digest = hashlib.sha256(self.name.encode()).hexdigest()[:8]
        return f"{plain[: _MOST_NAME_CHARS - 9].rstrip('-')}-{digest}"
