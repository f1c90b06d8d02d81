"""The ``input`` section of a job file: the prompt dataset."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from b2batch.spec.section import Location, Section, as_list


class InputSpec(Section):
    """The prompt dataset. ``path`` may be files, globs and directories, local or on an object store."""

    path: Annotated[tuple[Location, ...], BeforeValidator(as_list)] = Field(min_length=1)
    format: Literal["auto", "jsonl", "parquet", "openai-batch"] = "auto"
    key: str | None = Field(
        default=None, description="a column that names the row; carried, never trusted as unique"
    )
    limit: int | None = Field(default=None, ge=1, description="take only the first rows of the plan")
    encoding: Literal["utf-8", "gb18030"] = Field(default="utf-8", description="of JSON Lines")
    on_bad_file: Literal["fail", "skip"] = Field(
        default="fail", description="skip: a file that cannot be read is one error row, FILE"
    )
    rows_per_unit: int = Field(
        default=256, ge=1, description="rows a replica leases, retries and commits at once"
    )
    infer_rows: int = Field(
        default=10_000, ge=1, description="JSONL rows of each file read to find the columns' types"
    )
    max_record_bytes: int = Field(default=16 << 20, ge=1)
    fingerprint: Literal["full", "fast"] = Field(
        default="full", description="full: sha256; fast: size, time, both ends"
    )
    sampling_column: str | None = Field(
        default=None, description="a column of sampling keys that override `sampling`"
    )
    incremental: bool = Field(
        default=False, description="the output grows by what is new in the input since the run before"
    )
    on_changed: Literal["error", "reprocess", "skip"] = Field(
        default="error", description="incremental: a file that is not as it was labelled"
    )

    @model_validator(mode="after")
    def _grows_by_whole_files(self) -> Self:
        if self.incremental and self.limit is not None:
            raise ValueError("limit: an incremental input has no first rows to take; leave it out")
        if self.on_changed != "error" and not self.incremental:
            raise ValueError("on_changed: only with incremental: true")
        return self
