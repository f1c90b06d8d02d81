"""``compact``: the small parts of a finished output merged into few large ones, as its next generation."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from b2batch.errors import ErrorBudgetExceeded, OutputError, RunLocked
from b2batch.outputs.finalise import finalise
from b2batch.outputs.generation import GenerationKind
from b2batch.outputs.layout import RunKeys
from b2batch.outputs.merge import Merge, begin_merge, plan_merge, read_merge
from b2batch.outputs.run import RunDirectory, finish_merge
from b2batch.outputs.store import open_store
from b2batch.outputs.success import Success
from b2batch.planning import stored_plan
from b2batch.proof import stored_schema

PART_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class CompactReport:
    """How many parts there were and are. The first is larger also where an earlier try was completed."""

    output: str
    num_parts_before: int
    num_parts: int
    num_rows: int


def compact_output(path: str, part_bytes: int = PART_BYTES) -> CompactReport:
    """Merge neighbouring parts of a finished output up to ``part_bytes``; done again after any crash.

    While it works there is no ``_SUCCESS``; a reader that does not look for it may meet the rows of one
    new part twice for a moment, and never misses a row.

    Raises:
        OutputError: there is no finished run.
        RunLocked: a driver works on it.
        IntegrityError: the parts do not add up to the plan; nothing was lost, ``verify`` says what is wrong.
    """
    found = RunDirectory.existing(open_store(path))
    success = found.success()
    merge = _merge_of(found, success, part_bytes)
    if merge is None:
        assert success is not None  # else there is a merge to complete
        num_parts = len(success.parts)
        return CompactReport(found.store.uri, num_parts, num_parts, success.counts.num_rows)
    directory = RunDirectory.existing(open_store(found.store.uri, merge.merge8))
    directory.store.probe()
    with directory.take_epoch() as epoch:
        if success is not None:
            if directory.success() != success:
                raise RunLocked(f"{found.store.uri} changed meanwhile; the same command looks again")
            begin_merge(directory.store, directory.generation, merge)
        finish_merge(directory.store, epoch)
        done = _sign(RunDirectory.existing(directory.store), merge)
    directory.store.delete_tree(RunKeys(merge.merge8).staging)
    num_before = len(done.parts) - len(merge.parts) + merge.num_replaced
    return CompactReport(found.store.uri, num_before, len(done.parts), done.counts.num_rows)


def _merge_of(directory: RunDirectory, success: Success | None, part_bytes: int) -> Merge | None:
    """The merge to do, or to complete; None when there is nothing to merge."""
    if success is not None:
        return plan_merge(directory.store, success, part_bytes)
    if directory.generation.kind is GenerationKind.COMPACT:
        return read_merge(directory.store, directory.generation)
    raise OutputError(f"{directory.store.uri}: the run is not finished; only a finished output is compacted")


def _sign(directory: RunDirectory, merge: Merge) -> Success:
    """Account for the parts that are there now; the verdict on failed rows stays what it was."""
    plan = stored_plan(directory)
    with contextlib.suppress(ErrorBudgetExceeded):  # known since the run
        return finalise(
            directory,
            plan.units,
            stored_schema(directory, plan),
            num_skipped_blank=merge.num_skipped_blank,
            max_error_rate=0.0 if merge.partial else 1.0,
        )
    success = directory.success()
    assert success is not None  # it is written before the budget is looked at
    return success
