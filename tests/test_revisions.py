"""A job file that lists revisions of its model is a job each, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from b2batch.errors import ModelError, SpecError
from b2batch.models.checkpoint import open_checkpoint
from b2batch.spec import ModelSpec, load_spec, load_specs


def write_job(directory: Path, revision: Any, output: str = "out/curve") -> Path:
    document = {
        "model": {"model": "owner/name", "revision": revision},
        "input": {"path": "rows.jsonl"},
        "prompt": {"column": "text"},
        "output": {"path": output},
    }
    path = directory / "job.yaml"
    path.write_text(json.dumps(document))  # JSON is YAML
    return path


@pytest.mark.parametrize(
    ("output", "paths"),
    [
        ("out/curve", ["out/curve/train_00220B", "out/curve/refs-pr-1"]),
        (
            "s3://bucket/{revision}/labels/",
            ["s3://bucket/train_00220B/labels/", "s3://bucket/refs-pr-1/labels/"],
        ),
    ],
)
def test_each_revision_has_its_own_output(tmp_path: Path, output: str, paths: list[str]) -> None:
    specs = load_specs(write_job(tmp_path, ["train_00220B", "refs/pr/1"], output))

    assert [spec.model.revision for spec in specs] == ["train_00220B", "refs/pr/1"]
    assert [spec.output.path for spec in specs] == paths


def test_one_revision_is_the_job_itself(tmp_path: Path) -> None:
    (spec,) = load_specs(write_job(tmp_path, "v1.0"))

    assert spec == load_spec(tmp_path / "job.yaml")
    assert (spec.model.revision, spec.output.path) == ("v1.0", "out/curve")


def test_one_of_the_list_can_be_chosen_where_one_is_wanted(tmp_path: Path) -> None:
    path = write_job(tmp_path, ["a", "b"])

    with pytest.raises(SpecError, match=r"lists 2 revisions.*--set model\.revision=\[a\]"):
        load_spec(path)
    assert load_spec(path, ["model.revision=[b]"]) == load_specs(path)[1]


@pytest.mark.parametrize("revision", [[], ["a", "a"], ["a/b", "a-b"], [1, 2]])
def test_a_list_that_is_not_one_of_different_names(tmp_path: Path, revision: list[Any]) -> None:
    with pytest.raises(SpecError, match=r"model\.revision: a list needs different revisions"):
        load_specs(write_job(tmp_path, revision))


def test_a_directory_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.revision: 'v1'.*is a directory"):
        open_checkpoint(ModelSpec(model=str(tmp_path), revision="v1"), weights=False)
