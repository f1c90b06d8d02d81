"""Rows that people should look at → files that a labelling tool imports, next to the run's record."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from b2batch.errors import RowError
from b2batch.inputs.prompts import PromptRenderer
from b2batch.inputs.unit_reader import UnitReader
from b2batch.labelling.outcome import answer_column
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.schema import confidence_column, find_own, own_name
from b2batch.rows import PromptRow, WorkUnit
from b2batch.spec import JobSpec

_ROWS_PER_FILE = 50_000


def write_review(
    directory: RunDirectory, units: Mapping[int, WorkUnit], reader: UnitReader, spec: JobSpec
) -> int:
    """Write the rows that need review, with their prompts; how many there are.

    ``review/00000.parquet``, ``.jsonl`` and ``.label-studio.json`` under the run's keys, and further
    numbers for more rows; an incremental run puts its generation before them. The prompts are rendered
    again: the parts do not hold them.
    """
    num_rows = 0
    tables = _tables_to_review(directory, units, reader, PromptRenderer.of(spec))
    for number, table in enumerate(_in_files(tables)):
        generation = f"{directory.generation.num_plans:04d}-" if spec.input.incremental else ""
        _write_file(directory, f"{directory.keys.review}/{generation}{number:05d}", table, spec)
        num_rows += table.num_rows
    return num_rows


def _tables_to_review(
    directory: RunDirectory, units: Mapping[int, WorkUnit], reader: UnitReader, renderer: PromptRenderer
) -> Iterator[pa.Table]:
    for index, name in sorted(directory.part_names().items()):
        if index not in units:
            continue
        with directory.store.open(name) as file:
            table = pq.ParquetFile(file).read(use_threads=False)  # see read_parquet
        marked = table.filter(pc.fill_null(table.column(find_own(table.schema, "needs_review")), False))
        if marked.num_rows:
            rows = {row.row_id: row for row in reader.read(units[index]).rows}
            row_ids = marked.column(find_own(table.schema, "row_id")).to_pylist()
            prompts = [_prompt(renderer, rows[row_id]) for row_id in row_ids]
            yield marked.append_column("prompt", pa.array(prompts, pa.string())).replace_schema_metadata()


def _prompt(renderer: PromptRenderer, row: PromptRow) -> str | None:
    try:
        prompt = renderer.render(row.columns, row.tick)
    except RowError:
        return None  # it rendered once; a template that looks at the clock may not again
    if prompt.text is not None:
        return prompt.text
    return "\n\n".join(f"[{message.role}]\n{message.content}" for message in prompt.messages)


def _in_files(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The tables put together to files of about ``_ROWS_PER_FILE`` rows."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(t.num_rows for t in waiting) >= _ROWS_PER_FILE:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)


def _write_file(directory: RunDirectory, stem: str, table: pa.Table, spec: JobSpec) -> None:
    rows = table.to_pylist(maps_as_pydicts="lossy")
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    lines = (json.dumps(row, ensure_ascii=False, default=str) for row in rows)
    own = {own_name(field) or field.name: field.name for field in table.schema}
    tasks = [_label_studio_task(row, own, spec, directory.record.run8) for row in rows]
    directory.store.put(f"{stem}.parquet", sink.getvalue())
    directory.store.put(f"{stem}.jsonl", "".join(f"{line}\n" for line in lines).encode())
    directory.store.put(
        f"{stem}.label-studio.json", json.dumps(tasks, ensure_ascii=False, default=str).encode()
    )


def _label_studio_task(
    row: Mapping[str, Any], own: Mapping[str, str], spec: JobSpec, run8: str
) -> dict[str, Any]:
    """A task in Label Studio's import format; the model's label is its prediction.

    For a labelling interface with ``<Text name="prompt" value="$prompt"/>`` and
    ``<Choices name="label" toName="prompt">``.
    """
    answer = row[own[answer_column(spec)]]
    choices: Sequence[str] = [] if answer is None else [str(answer)]
    result = {"from_name": "label", "to_name": "prompt", "type": "choices", "value": {"choices": choices}}
    sure = confidence_column(spec)
    prediction = {"model_version": run8, "score": row[own[sure]] if sure else None, "result": [result]}
    return {"data": dict(row), "predictions": [prediction]}
