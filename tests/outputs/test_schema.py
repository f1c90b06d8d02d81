from __future__ import annotations

import pyarrow as pa
import pytest

from b2batch.errors import SpecError
from b2batch.outputs.schema import find_own, output_schema

from .tiny_run import INPUT_SCHEMA, make_spec

OWN = [
    "row_id",
    "status",
    "generated_text",
    "finish_reason",
    "num_input_tokens",
    "num_generated_tokens",
    "error",
]


def test_all_input_columns_are_carried_by_default() -> None:
    schema = output_schema(INPUT_SCHEMA, make_spec())
    assert schema.names == ["text", "stars", *OWN]
    assert schema.field("stars").type == pa.int64()
    assert schema.field("num_input_tokens").type == pa.int32()


def test_chosen_columns_in_the_chosen_order() -> None:
    assert output_schema(INPUT_SCHEMA, make_spec(columns=["stars"])).names == ["stars", *OWN]
    assert output_schema(INPUT_SCHEMA, make_spec(columns=[])).names == OWN


def test_samples_and_logprobs_only_when_asked_for() -> None:
    schema = output_schema(INPUT_SCHEMA, make_spec("sampling.n=2", "sampling.logprobs=0"))
    assert schema.names[-3:] == ["samples", "logprobs", "error"]


def test_prefix_is_put_before_every_own_column() -> None:
    schema = output_schema(INPUT_SCHEMA, make_spec(prefix="b2_"))
    assert schema.names == ["text", "stars", *(f"b2_{name}" for name in OWN)]
    assert find_own(schema, "row_id") == "b2_row_id"


def test_collision_names_the_column_and_the_way_out() -> None:
    with pytest.raises(SpecError, match=r"'status'.*output\.prefix"):
        output_schema(pa.schema({"status": pa.string()}), make_spec())
    assert "status" in output_schema(pa.schema({"status": pa.string()}), make_spec(prefix="b2_")).names


def test_a_column_left_out_does_not_collide() -> None:
    schema = output_schema(
        pa.schema({"status": pa.string(), "text": pa.string()}), make_spec(columns=["text"])
    )
    assert schema.names == ["text", *OWN]


def test_an_input_that_is_an_output_of_ours_is_told_apart() -> None:
    first = output_schema(INPUT_SCHEMA, make_spec())
    second = output_schema(first, make_spec(prefix="again_"))
    assert find_own(second, "row_id") == "again_row_id"


def test_unknown_column_names_the_nearest() -> None:
    with pytest.raises(SpecError, match="'txt'; did you mean 'text'"):
        output_schema(INPUT_SCHEMA, make_spec(columns=["txt"]))


def test_column_twice() -> None:
    with pytest.raises(SpecError, match="'text' stands twice"):
        output_schema(INPUT_SCHEMA, make_spec(columns=["text", "text"]))


def test_carried_columns_may_be_null_and_lose_metadata_of_their_table() -> None:
    source = pa.schema(
        [pa.field("text", pa.string(), nullable=False, metadata={"a": "b"})], metadata={"pandas": "{}"}
    )
    schema = output_schema(source, make_spec())
    assert schema.field("text").nullable
    assert schema.field("text").metadata is None
    assert schema.metadata is None
