"""A few rows of a plan, for a look before anything runs: the first ones, or some from all over it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from b2batch.inputs.plan import Plan
from b2batch.inputs.unit_reader import UnitReader
from b2batch.rows import PromptRow
from b2batch.spec import InputSpec

_MAX_UNITS = 32


def first_rows(plan: Plan, spec: InputSpec, num_rows: int) -> list[PromptRow]:
    """The first ``num_rows`` rows of the plan, or as many as it has."""
    with UnitReader(plan.files, plan.schema, spec) as reader:
        rows = (row for unit in plan.units for row in reader.read(unit).rows)
        return list(islice(rows, num_rows))


def spread_rows(plan: Plan, spec: InputSpec, num_rows: int) -> Iterator[PromptRow]:
    """About ``num_rows`` rows from units spaced evenly over the plan; all of them where it has no more.

    A sorted input (short rows first, one language a file) is so seen from end to end. The same plan
    gives the same rows.
    """
    num_units = len(plan.units)
    if plan.num_rows > num_rows:
        wanted = min(num_units, _MAX_UNITS)
        indexes = [i * num_units // wanted for i in range(wanted)]
        rows_of_each = -(-num_rows // wanted)
    else:
        indexes, rows_of_each = list(range(num_units)), num_rows
    with UnitReader(plan.files, plan.schema, spec) as reader:
        for index in indexes:
            yield from reader.read(plan.units[index]).rows[:rows_of_each]
