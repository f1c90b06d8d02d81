"""What a committed part says of each row: its label, how sure, whether people should look, and gold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from b2batch.outputs.schema import confidence_column, find_own
from b2batch.outputs.store import Store
from b2batch.spec import JobSpec


def answer_column(spec: JobSpec) -> str:
    """The own column that holds a row's label."""
    if spec.task == "classify":
        return "label"
    if spec.vote is not None:
        return "vote"
    return "parsed" if spec.structured_outputs.choice is not None else "generated_text"


@dataclass(frozen=True, slots=True)
class Outcomes:
    """One part's rows, column by column. ``confidence`` is None where the job gives none."""

    gold: list[str | None]
    answer: list[str | None]
    confidence: list[float | None] | None


def read_outcomes(store: Store, names: Sequence[str], spec: JobSpec) -> Iterator[Outcomes]:
    """Each part's labels beside its gold column."""
    sure = confidence_column(spec)
    for name in names:
        with store.open(name) as file:
            parquet = pq.ParquetFile(file)
            schema = parquet.schema_arrow
            answer = find_own(schema, answer_column(spec))
            confidence = find_own(schema, sure) if sure else None
            columns = [str(spec.gold), answer, *([confidence] if confidence else [])]
            table = parquet.read(columns=columns, use_threads=False)  # see read_parquet
        yield Outcomes(
            _texts(table.column(str(spec.gold))),
            _texts(table.column(answer)),
            table.column(confidence).to_pylist() if confidence else None,
        )


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    values: list[Any] = column.to_pylist()
    return [None if value is None else _as_text(value) for value in values]


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value).strip()
