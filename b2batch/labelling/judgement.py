"""What is made of a run's labels once all parts stand: metrics against gold, and files for review.

A function of the parts and the input alone, so that a run that was cut short here does it again.
"""

from __future__ import annotations

import logging
from typing import Any

from b2batch.inputs.plan import Plan
from b2batch.inputs.unit_reader import UnitReader
from b2batch.labelling.metrics import Tally
from b2batch.labelling.outcome import read_outcomes
from b2batch.labelling.review import write_review
from b2batch.outputs.document import encode_document
from b2batch.outputs.run import RunDirectory
from b2batch.spec import JobSpec

logger = logging.getLogger(__name__)


def judge(directory: RunDirectory, plan: Plan, spec: JobSpec) -> None:
    """Write ``metrics.json`` where there is gold, and the review files where rows are to be looked at."""
    if spec.gold is not None:
        metrics = _measure(directory, spec)
        directory.store.put(directory.keys.metrics, encode_document(metrics))
    if spec.review.below is not None:
        first = plan.first_unit(plan.generation)  # of a plan that grew, what is new is to be looked at
        units = {unit.index: unit for unit in plan.units if unit.index >= first}
        with UnitReader(plan.files, plan.schema, spec.input) as reader:
            num_rows = write_review(directory, units, reader, spec)
        logger.info("%d rows need review: %s/%s", num_rows, directory.store.uri, directory.keys.review)


def _measure(directory: RunDirectory, spec: JobSpec) -> dict[str, Any]:
    names = [*directory.merged_names(), *(name for _, name in sorted(directory.part_names().items()))]
    tally = Tally([label.name for label in spec.labels] or list(spec.structured_outputs.choice or ()))
    for outcomes in read_outcomes(directory.store, names, spec):
        tally.add(outcomes.gold, outcomes.answer, outcomes.confidence)
    return {"run_id": directory.record.run_id, "gold": spec.gold, **tally.metrics()}
