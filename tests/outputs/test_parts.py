from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from b2batch.errors import IntegrityError
from b2batch.outputs.footer import read_footer
from b2batch.outputs.layout import parse_part_name, part_name
from b2batch.outputs.parts import PartOrigin, commit_part, encode_part, find_part, planned_row_ids
from b2batch.outputs.schema import output_schema
from b2batch.rows import (
    FinishReason,
    Generation,
    PromptRow,
    ResultRow,
    Sample,
    TokenLogprob,
    UnitCounts,
    WorkUnit,
)

from .memory_store import LostReplyError, MemoryStore
from .tiny_run import (
    INPUT_SCHEMA,
    answer,
    columns_of,
    failed,
    make_part,
    make_spec,
    make_units,
    rows_digest,
    rows_of,
    run_at,
)

RUN = "1f3a9c7e" * 8
OTHER_RUN = "1f3a9c7e" + "0" * 56
UNIT = WorkUnit(index=123, file_index=2, first_row=10, num_rows=3, start=0, stop=0)


def read(data: bytes) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(data), page_checksum_verification=True).to_pylist()
    return rows


def test_part_name() -> None:
    assert part_name(123, "1f3a9c7e") == "part-000123-1f3a9c7e.parquet"


@given(st.integers(0, 10**8), st.binary(min_size=4, max_size=4))
def test_part_names_are_read_back(unit_index: int, run: bytes) -> None:
    assert parse_part_name(part_name(unit_index, run.hex())) == (unit_index, run.hex())


@pytest.mark.parametrize(
    "key",
    [
        "part-123-1f3a9c7e.parquet",
        "part-0000123-1f3a9c7e.parquet",
        "d/part-000123-1f3a9c7e.parquet",
        "part-0",
    ],
)
def test_names_like_a_parts_are_not_taken_for_one(key: str) -> None:
    assert parse_part_name(key) is None


def test_rows_stand_in_input_order_whatever_order_they_were_answered_in() -> None:
    results = [answer("2:12"), failed("2:10"), answer("2:11")]
    part = make_part(UNIT, RUN, results=results)
    rows = read(part.data)
    assert [row["row_id"] for row in rows] == ["2:10", "2:11", "2:12"]
    assert [row["status"] for row in rows] == ["error", "ok", "ok"]
    assert [row["text"] for row in rows] == ["评论 2:10", "评论 2:11", "评论 2:12"]
    assert rows[0]["generated_text"] is None
    assert rows[0]["finish_reason"] == "error"
    assert rows[0]["error"] == {
        "type": "PROMPT_MISSING",
        "message": "no text",
        "stage": "render",
        "attempts": 1,
    }
    assert rows[1]["generated_text"] == "正面 2:11"
    assert rows[1]["error"] is None
    assert (rows[1]["num_input_tokens"], rows[1]["num_generated_tokens"]) == (7, 2)
    assert part.counts == UnitCounts(2, 1, 0, 14, 4)


def test_samples_and_logprobs() -> None:
    unit = make_units(1, 1)[0]
    cut = Sample(
        "很好",
        (5, 6),
        FinishReason.LENGTH,
        (TokenLogprob(5, -0.5, {5: -0.5, 9: -1.0}), TokenLogprob(6, -2.0)),
    )
    result = ResultRow("0:0", Generation(3, (cut, Sample("好", (5,), FinishReason.STOP))))
    part = make_part(unit, RUN, spec=make_spec("sampling.n=2", "sampling.logprobs=2"), results=[result])
    (row,) = read(part.data)
    assert row["generated_text"] == "很好"
    assert row["num_generated_tokens"] == 3
    assert row["samples"] == [
        {"text": "很好", "finish_reason": "length", "num_generated_tokens": 2},
        {"text": "好", "finish_reason": "stop", "num_generated_tokens": 1},
    ]
    assert row["logprobs"] == [
        {
            "token_id": 5,
            "logprob": -0.5,
            "top": [{"token_id": 5, "logprob": -0.5}, {"token_id": 9, "logprob": -1.0}],
        },
        {"token_id": 6, "logprob": -2.0, "top": []},
    ]
    assert part.counts.num_length == 1


def test_message_that_is_not_unicode_does_not_sink_its_unit() -> None:
    part = make_part(make_units(1, 1)[0], RUN, results=[failed("0:0", "bad \ud800 text")])
    assert read(part.data)[0]["error"]["message"] == "bad \\ud800 text"


def test_record_that_could_not_be_read_has_null_columns() -> None:
    unit = make_units(1, 1)[0]
    columns = pa.Table.from_pylist([{"text": None, "stars": None}], schema=INPUT_SCHEMA)
    origin = PartOrigin(RUN, {}, 1, 1, "w", {})
    schema = output_schema(INPUT_SCHEMA, make_spec())
    part = encode_part(unit, [PromptRow("0:0", b"h", {})], columns, [failed("0:0")], schema, origin)
    assert read(part.data)[0]["text"] is None


@pytest.mark.parametrize(
    "results",
    [
        [answer("2:10"), answer("2:11")],
        [answer("2:10"), answer("2:11"), answer("2:11")],
        [answer("2:10"), answer("2:11"), answer("2:13")],
        [answer("2:10"), answer("2:11"), answer("2:12"), answer("2:12")],
        [answer("2:10"), answer("2:11"), ResultRow("2:12")],
    ],
    ids=["lost", "lost and doubled", "another unit's", "doubled", "neither ok nor failed"],
)
def test_results_that_are_not_the_units_rows_are_refused(results: list[ResultRow]) -> None:
    with pytest.raises(IntegrityError):
        make_part(UNIT, RUN, results=results)


def test_records_that_are_not_the_planned_ones_are_refused() -> None:
    other = make_units(1)[0]
    results = [answer(row_id) for row_id in planned_row_ids(UNIT)]
    schema = output_schema(INPUT_SCHEMA, make_spec())
    with pytest.raises(IntegrityError, match="unit 123"):
        encode_part(
            UNIT, rows_of(other), columns_of(other), results, schema, PartOrigin(RUN, {}, 1, 1, "w", {})
        )


def test_footer_says_who_what_and_from_where() -> None:
    footer = read_footer(make_part(UNIT, RUN, epoch=3, attempt=2).data)
    assert (footer.run_id, footer.unit_index, footer.file_index) == (RUN, 123, 2)
    assert (footer.first_row, footer.num_rows) == (10, 3)
    assert (footer.epoch, footer.attempt, footer.worker_id) == (3, 2, "w0")
    assert footer.file == {"path": "reviews.jsonl", "sha256": "ab" * 32}
    assert footer.rows_digest == rows_digest(UNIT)
    assert footer.counts == UnitCounts(3, 0, 0, 21, 6)
    assert footer.provenance == {"seed": 0}


@pytest.mark.parametrize("data", [b"", b"PAR1", b"{}" * 100])
def test_what_is_not_parquet_is_damaged(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="x is damaged"):
        read_footer(data, "x")


def test_foreign_parquet_is_not_a_part() -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), sink)
    with pytest.raises(IntegrityError, match="not written by b2batch"):
        read_footer(sink.getvalue(), "x")


def test_commit_then_again_by_another_attempt(memory: MemoryStore) -> None:
    first = make_part(UNIT, RUN, attempt=1)
    second = make_part(UNIT, RUN, attempt=2, results=[failed(row_id) for row_id in planned_row_ids(UNIT)])
    assert commit_part(memory, first).newly_committed
    report = commit_part(memory, second)
    assert not report.newly_committed
    assert report.counts == first.counts, "the report must be of what is committed"
    assert memory.read(first.name) == first.data


def test_lost_reply_is_found_committed_by_the_next_try(memory: MemoryStore) -> None:
    memory.lose_next_reply = True
    with pytest.raises(LostReplyError):
        commit_part(memory, make_part(UNIT, RUN))
    assert find_part(memory, RUN, UNIT).counts.num_ok == 3
    assert not commit_part(memory, make_part(UNIT, RUN, attempt=2)).newly_committed


def test_name_taken_by_something_else_is_not_committed(memory: MemoryStore) -> None:
    commit_part(memory, make_part(UNIT, OTHER_RUN))
    with pytest.raises(IntegrityError, match="does not belong"):
        commit_part(memory, make_part(UNIT, RUN))
    memory.objects[part_name(123, RUN[:8])] = b"rubbish"
    with pytest.raises(IntegrityError, match="damaged"):
        commit_part(memory, make_part(UNIT, RUN))


def test_no_part_yet(memory: MemoryStore) -> None:
    with pytest.raises(FileNotFoundError):
        find_part(memory, RUN, UNIT)


def test_pages_carry_checksums() -> None:
    data = bytearray(make_part(make_units(1, 200)[0], RUN).data)
    column = pq.read_metadata(io.BytesIO(bytes(data))).row_group(0).column(0)
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    with pytest.raises(OSError, match=r"[Cc][Rr][Cc]"):
        pq.read_table(io.BytesIO(bytes(data)), page_checksum_verification=True)


def test_the_directory_is_a_dataset(tmp_path: Path) -> None:
    run_at(tmp_path)
    row_ids = [f"0:{ordinal}" for ordinal in range(12)]
    assert sorted(pq.read_table(tmp_path).column("row_id").to_pylist()) == sorted(row_ids)
    dataset = pyarrow.dataset.dataset(tmp_path, format="parquet")
    assert dataset.count_rows() == 12
    assert len(dataset.files) == 4
