"""What a submitted job takes along, and what stays."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from b2batch.cluster import package
from b2batch.cluster.package import JOB_FILE, make_package
from b2batch.errors import CallerError
from b2batch.spec import JobSpec, load_spec, parse_spec

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml"))
JOB = {
    "model": {"model": "baichuan2-tiny"},
    "input": {"path": "rows/*.jsonl"},
    "prompt": {"column": "text"},
    "output": {"path": "out/{run8}"},
}


@contextmanager
def unpacked(content: bytes) -> Iterator[Path]:
    """A directory, as the driver's on the cluster; the current one while the context is open."""
    before = os.getcwd()
    with TemporaryDirectory() as directory, zipfile.ZipFile(io.BytesIO(content)) as archive:
        archive.extractall(directory)
        os.chdir(directory)
        try:
            yield Path(directory)
        finally:
            os.chdir(before)


def there(spec: JobSpec) -> JobSpec:
    """The job as the driver on the cluster reads it."""
    with unpacked(make_package(spec, None).content):
        return load_spec(JOB_FILE)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_is_the_same_run_there(path: Path) -> None:
    spec = load_spec(path)

    sent = there(spec)

    assert sent.result_config() == spec.result_config()
    assert (sent.engine, sent.errors, sent.input.limit) == (spec.engine, spec.errors, spec.input.limit)


@settings(max_examples=30)  # each unpacks a zip
@given(
    st.text(),
    st.text(),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), unique=True, min_size=2),
)
def test_any_text_arrives_as_it_was(system: str, example: str, labels: list[str]) -> None:
    prompt = {"column": "text", "system": system, "examples": [{"user": example, "assistant": system}] * 2}
    spec = parse_spec({**JOB, "task": "classify", "prompt": prompt, "labels": labels})

    assert there(spec).result_config() == spec.result_config()


def test_paths_mean_there_what_they_mean_here(home: Path) -> None:
    (home / "weights").mkdir()
    spec = parse_spec(
        {
            **JOB,
            "model": {"model": "weights"},
            "input": {"path": ["rows/*.jsonl", "s3://b/x", "${env:ROWS}/y", "/abs/z"]},
            "cluster": {"address": "local", "replicas": 3},
        }
    )

    sent = there(spec)

    assert sent.input.path == (f"{home}/rows/*.jsonl", "s3://b/x", "${env:ROWS}/y", "/abs/z")
    assert sent.output.path == f"{home}/out/{{run8}}"
    assert sent.model.model == str(home / "weights")
    assert (sent.cluster.address, sent.cluster.replicas) == ("auto", 3)


def test_no_secret_travels(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "s3://hidden-bucket")
    spec = parse_spec({**JOB, "input": {"path": "${env:PLACE}/rows"}, "output": {"path": "${env:PLACE}/out"}})

    with unpacked(make_package(spec, None).content) as place:
        text = (place / JOB_FILE).read_text(encoding="utf-8")

    assert "${env:PLACE}/rows" in text
    assert "hidden" not in text


def test_processors_bring_what_they_import_from_here(home: Path) -> None:
    (home / "lexicon").mkdir()
    (home / "lexicon" / "__init__.py").write_text("from lexicon.words import WORDS\n")
    (home / "lexicon" / "words.py").write_text("WORDS = ['好']\n")
    (home / "clean_rows.py").write_text(
        "import json\nimport numpy\ndef f(row):\n    import lexicon\n    return row\n"
    )
    (home / "unrelated.py").write_text("")
    spec = parse_spec({**JOB, "preprocess": "clean_rows:f"})

    found = make_package(spec, None)

    assert set(found.files) == {JOB_FILE, "clean_rows.py", "lexicon/__init__.py", "lexicon/words.py"}
    (home / "clean_rows.py").unlink()
    assert there(spec).preprocess == spec.preprocess, "its text is part of the job"


def test_a_directory_is_taken_without_data_weights_and_secrets(home: Path) -> None:
    kept = ["a.py", "notes/b.txt", "schema.json"]
    left = [".git/config", ".env", "rows.jsonl", "rows.jsonl.gz", "m/model.safetensors", "pytorch_model.BIN"]
    left += [
        "venv/pyvenv.cfg",
        "venv/lib/x.py",
        "out/__b2batch/gen-0001.json",
        "out/_SUCCESS",
        "__pycache__/a.pyc",
    ]
    for name in [*kept, *left]:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(name)

    found = make_package(parse_spec(JOB), home)

    assert set(found.files) == {*kept, JOB_FILE}
    assert found.content == make_package(parse_spec(JOB), home).content, "sent once"


def test_too_large_a_package_names_the_largest_files(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "MAX_PACKAGE_BYTES", 100_000)
    (home / "small.txt").write_text("x")
    (home / "noise.dat").write_bytes(os.urandom(150_000))

    with pytest.raises(CallerError, match=r"largest: noise\.dat \(0\.1 MiB\)"):
        make_package(parse_spec(JOB), home)

    (home / "zeros.dat").write_bytes(bytes(2_000_000))
    with pytest.raises(CallerError, match=r"largest: zeros\.dat \(1\.9 MiB\), noise\.dat"):
        make_package(parse_spec(JOB), home)
    with pytest.raises(CallerError, match="neither a directory nor a URI"):
        make_package(parse_spec(JOB), home / "nowhere")


def test_a_job_that_outgrows_a_job_file_is_refused_here(home: Path) -> None:
    (home / "big_module.py").write_text(f"WORDS = '{'好' * 100_000}'\ndef f(row):\n    return row\n")

    with pytest.raises(CallerError, match="more than a job file may have"):
        make_package(parse_spec({**JOB, "preprocess": "big_module:f"}), None)


def test_the_job_file_is_one_that_people_can_read(home: Path) -> None:
    with unpacked(
        make_package(parse_spec({**JOB, "prompt": {"template": "好 {{ text }}"}}), None).content
    ) as place:
        text = (place / JOB_FILE).read_text(encoding="utf-8")

    assert "template: 好 {{ text }}" in text
    assert yaml.safe_load(text)["model"]["model"] == "baichuan2-tiny"
