"""Plan a dataset and read all of it, the way a run does, checking what holds for every input."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from b2batch.inputs.plan import Plan, make_plan
from b2batch.inputs.unit_reader import UnitReader
from b2batch.rows import PromptRow
from b2batch.spec import InputSpec

COMPRESSORS = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "gzip members": lambda data: (
        gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])
    ),
    "zstd": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


@dataclass(frozen=True)
class Dataset:
    plan: Plan
    rows: list[PromptRow]
    table: pa.Table

    @property
    def records(self) -> list[dict[str, Any]]:
        return [dict(row.columns) for row in self.rows]

    @property
    def failures(self) -> dict[int, Any]:
        return {i: row.failure for i, row in enumerate(self.rows) if row.failure}


def read_all(path: Path | str | list[str], **settings: Any) -> Dataset:
    spec = InputSpec(path=path if isinstance(path, list) else [str(path)], **settings)
    plan = make_plan(spec)
    rows: list[PromptRow] = []
    tables = [plan.schema.empty_table()]
    with UnitReader(plan.files, plan.schema, spec) as reader:
        for unit in plan.units:
            found = reader.read(unit)
            assert len(found.rows) == found.columns.num_rows == unit.num_rows <= spec.rows_per_unit
            rows += found.rows
            tables.append(found.columns)
    assert [row.row_id for row in rows] == expected_ids(plan)
    return Dataset(plan, rows, pa.concat_tables(tables))


def expected_ids(plan: Plan) -> list[str]:
    left = plan.num_rows
    ids = [f"{file.index}:{ordinal}" for file in plan.files for ordinal in range(file.num_rows)]
    return ids[:left]
