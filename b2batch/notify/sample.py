"""A few rows of an output in a line each, for webhooks that ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq

from b2batch.outputs.layout import PART_PREFIX
from b2batch.outputs.schema import own_name
from b2batch.outputs.store import Store

_ROW_CHARS = 200
_ANSWERS = ("vote", "label", "generated_text", "loglikelihood")
_TOLD = ("row_id", "error", *_ANSWERS)


def sample_rows(store: Store, num_rows: int) -> list[str]:
    """``row 0:17: answer`` of the first rows, or their errors; empty where no part is there yet."""
    first = next((key for key, _ in store.list(PART_PREFIX)), None)
    if first is None or not num_rows:
        return []
    with store.open(first) as file:
        part = pq.ParquetFile(file)
        own = {name: field.name for field in part.schema_arrow if (name := own_name(field)) in _TOLD}
        columns = list(own.values())
        batches = part.iter_batches(num_rows, columns=columns, use_threads=False)  # see read_parquet
        batch = next(batches, None)
        rows = [] if batch is None else batch.to_pylist()
    return [_line({name: row[column] for name, column in own.items()}) for row in rows]


def _line(row: Mapping[str, Any]) -> str:
    error = row["error"]
    answer = next((row[name] for name in _ANSWERS if row.get(name) is not None), "")
    told = f"{error['type']}: {error['message']}" if error else str(answer)
    return f"row {row['row_id']}: {told}"[:_ROW_CHARS]
