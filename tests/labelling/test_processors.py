"""A user's functions before and after the model: their columns, and that a fault costs one row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from b2batch.errors import SpecError
from b2batch.preflight import prepare_job
from b2batch.spec import parse_spec
from labelling.running import REVIEW_TEMPLATE, REVIEWS, make_spec, run

MODULE = """
FORBIDDEN = {"坏行"}

def clean(row):
    if row["text"] in FORBIDDEN:
        raise LookupError("not this one")
    return {"text": row["text"].strip(), "asked": True}

def stars(row, answer):
    if row["text"] == "无":
        return {"stars": "five"}
    return {"stars": 5 if answer["generated_text"] == "正面" else 1, "is_short": len(row["text"]) < 10}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "job_functions.py"
    path.write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return path


def job(tmp_path: Path, texts: list[str]) -> Any:
    return make_spec(
        tmp_path / "job",
        [{"text": text} for text in texts],
        sampling={"max_tokens": 4},
        preprocess={"function": "job_functions:clean"},
        postprocess={
            "function": "job_functions:stars",
            "columns": {"stars": "int64", "is_short": "bool"},
        },
        prompt={
            "template": "{% if asked %}" + REVIEW_TEMPLATE + "{% endif %}",
        },
    )


def test_both_ends_of_a_row_and_its_faults(tmp_path, module, tiny) -> None:
    spec = job(tmp_path, [f"  {REVIEWS[0]} ", REVIEWS[1], "坏行", "无"])
    assert parse_spec(spec.model_dump(mode="json")) == spec
    module.write_text("raise SystemExit", encoding="utf-8")
    found = run(spec, tiny).rows
    assert [row["stars"] for row in found] == [5, 1, None, None]
    assert found[1]["is_short"] is False
    errors = [row["error"] for row in found[2:]]
    assert {error["type"] for error in errors} == {"PROCESSOR"}
    assert "LookupError: not this one" in errors[0]["message"]
    assert "int64" in errors[1]["message"]


def test_another_function_is_another_run(tmp_path, module) -> None:
    before = prepare_job(job(tmp_path, REVIEWS)).record.run_id
    module.write_text(MODULE.replace("5 if", "4 if"), encoding="utf-8")
    assert prepare_job(job(tmp_path, REVIEWS)).record.run_id != before


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"preprocess": {"function": "job_functions"}}, "package.module:function"),
        ({"preprocess": {"function": "no_such_module:f"}}, "no_such_module"),
        ({"preprocess": {"function": "job_functions:nothing"}}, "no function 'nothing'"),
        ({"postprocess": {"function": "job_functions:stars"}}, "needs both"),
        (
            {"postprocess": {"function": "job_functions:stars", "columns": {"status": "string"}}},
            "itself writes",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path, module, section, told) -> None:
    with pytest.raises(SpecError, match=told):
        prepare_job(make_spec(tmp_path / "job", [{"text": "好"}], **section))
