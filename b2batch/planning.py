"""What a start of a job has to do: its plan, and the run that this plan belongs to.

A plain job's plan is its whole input, and with its settings says which run it is. An incremental job's run is
the one that its output holds; what is new in the input extends that run's plan.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from b2batch.errors import IntegrityError, OutputError
from b2batch.inputs.growth import Growth, grow_plan
from b2batch.inputs.plan import Plan, make_plan
from b2batch.outputs.drift import check_drift, diff_config, diff_values
from b2batch.outputs.generation import Extension
from b2batch.outputs.record import RunRecord
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.store import open_store
from b2batch.spec import JobSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A plan and the record of its run; ``extension`` is what it adds to the run that the output holds."""

    plan: Plan
    record: RunRecord
    extension: Extension | None = None


@dataclass(frozen=True, slots=True)
class RunMaker:
    """Makes the record of a job's run, once the plan is known."""

    spec: JobSpec
    answer_tokens: int
    model_digest: str
    provenance: Mapping[str, Any]

    def record(self, plan: Plan) -> RunRecord:
        """The record of the run that begins with ``plan``."""
        return self._make(plan.digest, len(plan.units), [asdict(file) for file in plan.files])

    def on_input_of(self, held: RunRecord) -> RunRecord:
        """The record of a run of this job on the input of another run."""
        return self._make(held.plan_digest, held.num_units, held.files)

    def _make(self, plan_digest: str, num_units: int, files: Sequence[Mapping[str, Any]]) -> RunRecord:
        return RunRecord.make(
            self.spec,
            plan_digest=plan_digest,
            num_units=num_units,
            files=files,
            model_digest=self.model_digest,
            provenance=self.provenance,
        )


def plan_run(maker: RunMaker, overwrite: bool) -> PlannedRun:
    """Plan what is to be done. With ``overwrite`` a finished or another run's output is begun anew.

    Raises:
        CallerError: the input cannot be planned.
        DriftError: the output is of other settings, or input files changed under it.
        NothingToDo: an incremental input has no rows yet.
    """
    spec = maker.spec
    if not spec.input.incremental:
        plan = make_plan(spec.input, maker.answer_tokens, spec.tick)
        return PlannedRun(plan, maker.record(plan))
    directory = _held(spec)
    if directory is None or (overwrite and _is_replaced(directory, maker)):
        growth = grow_plan(spec.input, maker.answer_tokens, spec.tick)
        assert growth is not None  # without rows it had raised
        return PlannedRun(growth.plan, maker.record(growth.plan), _extension("", growth, spec.tick))
    return _plan_onwards(maker, directory)


def stored_plan(directory: RunDirectory) -> Plan:
    """The plan of the run in its directory; IntegrityError if it is another than is recorded."""
    try:
        plan = Plan.from_bytes(directory.read_plan())
    except FileNotFoundError as error:
        raise IntegrityError(f"{directory.store.uri}: the plan of its run is gone: {error}") from error
    if plan.digest != directory.plan_digest:
        raise IntegrityError(f"{directory.store.uri}: the stored plan is not the one of its run.json")
    return plan


def _held(spec: JobSpec) -> RunDirectory | None:
    try:
        return RunDirectory.existing(open_store(spec.output.path))
    except OutputError:
        return None


def _is_replaced(directory: RunDirectory, maker: RunMaker) -> bool:
    has_other_settings = bool(diff_config(directory.record, maker.on_input_of(directory.record)))
    return has_other_settings or directory.success() is not None


def _plan_onwards(maker: RunMaker, directory: RunDirectory) -> PlannedRun:
    """Go on from the plan that the output holds. A tick that has one is done as it was planned."""
    spec = maker.spec
    check_drift(directory.record, maker.on_input_of(directory.record), directory.store.uri)
    held = stored_plan(directory)
    growth = None
    if not (spec.tick and spec.tick in held.ticks):
        growth = grow_plan(spec.input, maker.answer_tokens, spec.tick, held, directory.read_keys)
    plan = growth.plan if growth else held
    record = replace(maker.record(plan), run_id=directory.record.run_id)
    for line in diff_values(directory.record.provenance, record.provenance):
        logger.warning("this run was begun with another environment, bits may differ: %s", line)
    return PlannedRun(plan, record, _extension(held.digest, growth, spec.tick) if growth else None)


def _extension(base_digest: str, growth: Growth, tick: str) -> Extension:
    return Extension(base_digest, growth.superseded, growth.keys, tick)
