"""What one start of a run tells of itself: ``status.json`` for everybody, progress for its caller."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from b2batch.errors import B2BatchError, Drained, Fenced, StorageError
from b2batch.inputs.plan import Plan
from b2batch.outputs.status import RunState, Status, write_status
from b2batch.outputs.store import Store
from b2batch.rows import UnitCounts
from b2batch.spec import mask_env
from b2batch.telemetry import Progress

if TYPE_CHECKING:
    from b2batch.cluster.driver import RunProgress

logger = logging.getLogger(__name__)

_WRITE_INTERVAL_S = 5.0
_MAX_REASON_CHARS = 2000


@dataclass(frozen=True, slots=True)
class JobProgress:
    """Where a running job is. Rows include those that earlier starts committed."""

    num_rows: int
    num_rows_done: int
    num_error_rows: int
    num_units: int
    num_units_committed: int
    live: Progress
    num_ready: int
    num_starting: int
    num_lost: int


class Logbook:
    """Kept by the driver that holds the lease; ``status`` is the run as it was last told."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        epoch: int,
        plan: Plan,
        started_s: float,
        on_progress: Callable[[JobProgress], None],
    ) -> None:
        """``started_s``: when this start began, by the monotonic clock; rates are means since then."""
        self._store = store
        self._plan = plan
        self._started_s = started_s
        self._on_progress = on_progress
        self._next_write_s = 0.0
        self.resumed = UnitCounts()
        self._num_units_resumed = 0
        self.num_attempts = 0
        now = _utc_now()
        self.status = Status(
            run_id=run_id,
            state=RunState.RUNNING,
            epoch=epoch,
            num_units=len(plan.units),
            num_units_committed=0,
            counts=UnitCounts(),
            num_replicas=0,
            started=now,
            updated=now,
            num_rows=plan.num_rows,
        )

    def note_committed(self, committed: Iterable[UnitCounts]) -> None:
        """The units that earlier starts have committed."""
        counts = list(committed)
        self.resumed = sum(counts, UnitCounts())
        self._num_units_resumed = len(counts)
        self.status = replace(self.status, counts=self.resumed, num_units_committed=len(counts))

    def note_progress(self, progress: RunProgress) -> None:
        """Take the driver's progress in; tell the caller, and now and then ``status.json``."""
        self.num_attempts = progress.num_attempts
        self.status = replace(
            self.status,
            counts=self.resumed + progress.counts,
            num_units_committed=self._num_units_resumed + progress.num_committed,
            num_replicas=progress.num_ready,
            num_replicas_lost=progress.num_lost,
            num_rows_again=progress.num_rows_again,
            num_out_of_memory=progress.live.num_out_of_memory,
            num_reused_rows=progress.live.num_reused_rows,
        )
        num_rows = self._plan.num_rows
        self._on_progress(
            JobProgress(
                num_rows=num_rows,
                num_rows_done=min(num_rows, self.resumed.num_rows + progress.live.num_rows),
                num_error_rows=self.resumed.num_error + progress.live.num_error_rows,
                num_units=self.status.num_units,
                num_units_committed=self.status.num_units_committed,
                live=progress.live,
                num_ready=progress.num_ready,
                num_starting=progress.num_starting,
                num_lost=progress.num_lost,
            )
        )
        self.refresh()

    def refresh(self) -> None:
        """Write how far it is, if that is some seconds old.

        A store that fails ends the run where a part cannot be committed, not here.
        """
        now_s = time.monotonic()
        if now_s < self._next_write_s:
            return
        self._next_write_s = now_s + _WRITE_INTERVAL_S
        try:
            self.write(RunState.RUNNING)
        except StorageError as error:
            logger.warning("the status could not be written: %s", error)

    def write(self, state: RunState, *, exit_code: int | None = None, reason: str = "") -> None:
        """Write ``status.json`` now."""
        counts = self.status.counts
        self.status = replace(
            self.status,
            state=state,
            updated=_utc_now(),
            rows_per_s=self._per_s(counts.num_rows - self.resumed.num_rows),
            tokens_per_s=self._per_s(counts.num_generated_tokens - self.resumed.num_generated_tokens),
            exit_code=exit_code,
            reason=reason,
        )
        write_status(self._store, self.status)

    def write_end(self, error: BaseException, forced_code: Callable[[], int | None]) -> None:
        """Note how the run ended, unless another driver owns the status by now.

        ``forced_code``: see ``RunOptions``.
        """
        if isinstance(error, Fenced):
            return
        exit_code = error.exit_code if isinstance(error, B2BatchError) else forced_code() or 1
        state = RunState.DRAINED if isinstance(error, Drained) else RunState.FAILED
        if exit_code == 3:
            state = RunState.SUCCEEDED  # every row is accounted for; the code says that too many failed
        try:
            self.write(state, exit_code=exit_code, reason=mask_env(str(error))[:_MAX_REASON_CHARS])
        except (OSError, B2BatchError) as second:
            logger.warning("the status could not be written: %s", second)

    def _per_s(self, number: int) -> float:
        elapsed_s = time.monotonic() - self._started_s
        return round(number / elapsed_s, 3) if elapsed_s else 0.0


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
