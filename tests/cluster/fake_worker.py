"""Workers that commit a unit by creating a file exclusively: the store is a directory."""

import os
import signal
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from b2batch.rows import PieceBegun, UnitCounts, UnitReport, WorkUnit
from b2batch.telemetry import Progress


def make_units(num_units, rows_per_unit=4):
    return [WorkUnit(i, 0, i * rows_per_unit, rows_per_unit, 0, 0) for i in range(num_units)]


def part_path(store: Path, unit: WorkUnit) -> Path:
    return store / f"part-{unit.index:06d}"


def find_committed(store: Path, unit: WorkUnit) -> UnitCounts | None:
    return UnitCounts(num_ok=unit.num_rows) if part_path(store, unit).exists() else None


@dataclass(frozen=True)
class FakeWorker:
    """One unit, or one piece of a unit, a step.

    ``hurt_by`` names a unit at which the process suffers ``harm`` in its first ``max_harms`` attempts;
    ``poison`` are (unit, row) that kill it in every attempt.
    """

    store: Path
    step_s: float = 0.0
    harm: str = ""
    hurt_by: int = -1
    max_harms: int = 1
    poison: frozenset[tuple[int, int]] = frozenset()

    def __call__(self):
        return _Running(self)


@dataclass
class _Open:
    unit: WorkUnit
    attempt: int
    running: tuple[int, ...]
    pieces: deque[tuple[int, ...]]
    num_pieces: int
    condemned: list[int]


class _Running:
    def __init__(self, setting: FakeWorker) -> None:
        if setting.harm == "no start":
            raise RuntimeError("the checkpoint has no weights")
        (setting.store / f"pid-{os.getpid()}").write_text(os.environ.get("OMP_NUM_THREADS", ""))
        self._setting = setting
        self._queue: deque[_Open] = deque()
        self._num_rows = 0

    @property
    def wants_unit(self) -> bool:
        return len(self._queue) < 2

    @property
    def idle(self) -> bool:
        return not self._queue

    @property
    def next_piece(self) -> PieceBegun | None:
        if not self._queue or not self._queue[0].pieces or self._queue[0].running:
            return None
        unit = self._queue[0]
        return PieceBegun(unit.unit.index, unit.attempt, unit.num_pieces - len(unit.pieces))

    def begin_piece(self) -> None:
        self._queue[0].running = self._queue[0].pieces.popleft()

    def drop_unit(self, unit_index: int) -> None:
        self._queue = deque(unit for unit in self._queue if unit.unit.index != unit_index)

    def add_unit(self, unit: WorkUnit, attempt: int, caution=None, *, trusts_nan=False) -> None:
        if self._setting.harm == "unreadable" and unit.index == self._setting.hurt_by:
            raise OSError("the input is gone")
        pieces = deque(caution.pieces) if caution else deque()
        running = () if caution else tuple(range(unit.num_rows))
        condemned = [row.offset for row in caution.condemned] if caution else []
        self._queue.append(_Open(unit, attempt, running, pieces, len(pieces), condemned))

    def step(self) -> list[UnitReport]:
        unit = self._queue[0]
        if unit.unit.index == self._setting.hurt_by:
            self._suffer(unit.attempt)
        if self._setting.poison & {(unit.unit.index, row) for row in unit.running}:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self._setting.step_s)
        self._num_rows += len(unit.running)
        unit.running = ()
        if unit.pieces:
            return []
        self._queue.popleft()
        return [self._commit(unit.unit, unit.attempt, unit.condemned)]

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

    def _commit(self, unit: WorkUnit, attempt: int, condemned: list[int]) -> UnitReport:
        counts = UnitCounts(unit.num_rows - len(condemned), len(condemned))
        try:
            with part_path(self._setting.store, unit).open("x") as part:
                part.write(f"{os.getpid()} {attempt} {condemned}")
        except FileExistsError:
            return UnitReport(unit.index, attempt, counts, newly_committed=False)
        return UnitReport(unit.index, attempt, counts)
