"""Workers that commit a unit by creating a file exclusively: the store is a directory."""

import os
import signal
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from b2batch.rows import UnitCounts, UnitReport, WorkUnit
from b2batch.telemetry import Progress


def make_units(num_units, rows_per_unit=4):
    return [WorkUnit(i, 0, i * rows_per_unit, rows_per_unit, 0, 0) for i in range(num_units)]


def part_path(store: Path, unit: WorkUnit) -> Path:
    return store / f"part-{unit.index:06d}"


def find_committed(store: Path, unit: WorkUnit) -> UnitCounts | None:
    return UnitCounts(num_ok=unit.num_rows) if part_path(store, unit).exists() else None


@dataclass(frozen=True)
class FakeWorker:
    """One unit a step. ``hurt_by`` names a unit at which the process suffers ``harm``, once a token."""

    store: Path
    step_s: float = 0.0
    harm: str = ""
    hurt_by: int = -1
    max_harms: int = 1

    def __call__(self):
        return _Running(self)


class _Running:
    def __init__(self, setting: FakeWorker) -> None:
        if setting.harm == "no start":
            raise RuntimeError("the checkpoint has no weights")
        (setting.store / f"pid-{os.getpid()}").touch()
        self._setting = setting
        self._queue: deque[tuple[WorkUnit, int]] = deque()
        self._num_rows = 0

    @property
    def wants_unit(self) -> bool:
        return len(self._queue) < 2

    @property
    def idle(self) -> bool:
        return not self._queue

    def add_unit(self, unit: WorkUnit, attempt: int) -> None:
        if self._setting.harm == "unreadable" and unit.index == self._setting.hurt_by:
            raise OSError("the input is gone")
        self._queue.append((unit, attempt))

    def step(self) -> list[UnitReport]:
        unit, attempt = self._queue.popleft()
        if unit.index == self._setting.hurt_by:
            self._suffer(attempt)
        time.sleep(self._setting.step_s)
        self._num_rows += unit.num_rows
        return [self._commit(unit, attempt)]

    def progress(self) -> Progress:
        return Progress(num_rows=self._num_rows)

    def _suffer(self, attempt: int) -> None:
        if attempt > self._setting.max_harms:
            return
        match self._setting.harm:
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "step raises":
                raise ValueError("device-side assert")

    def _commit(self, unit: WorkUnit, attempt: int) -> UnitReport:
        counts = UnitCounts(num_ok=unit.num_rows)
        try:
            with part_path(self._setting.store, unit).open("x") as part:
                part.write(f"{os.getpid()} {attempt}")
        except FileExistsError:
            return UnitReport(unit.index, attempt, counts, newly_committed=False)
        return UnitReport(unit.index, attempt, counts)
