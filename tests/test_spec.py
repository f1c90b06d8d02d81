"""What a job file may not do: be ambiguous, run code, grow without end, hold a secret."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from b2batch.errors import SpecError
from b2batch.spec import (
    MAX_JOB_FILE_BYTES,
    apply_overrides,
    load_spec,
    mask_env,
    parse_spec,
    read_yaml,
    resolve_env,
)
from b2batch.telemetry import setup_logging

JOB: dict[str, Any] = {
    "model": {"model": "owner/name"},
    "input": {"path": "rows.jsonl"},
    "prompt": {"column": "text"},
    "output": {"path": "out"},
}

REFUSED = {
    "key twice": ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' stands twice"),
    "key twice inside": ("a: {b: 1, b: 2}\n", "the key 'b' stands twice"),
    "key twice in two spellings": ("a: 1\n'a': 2\n", "the key 'a' stands twice"),
    "alias": ("a: &x [1]\nb: *x\n", "line 2: YAML aliases"),
    "merge": ("a: &x {b: 1}\nc: {<<: *x}\n", "YAML aliases"),
    "billion laughs": (
        "a: &a [x,x]\n"
        + "".join(f"{c}: &{c} [*{p},*{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
        "YAML aliases",
    ),
    "python object": ("a: !!python/object/apply:os.system ['touch {owned}']\n", "not valid YAML"),
    "python name": ("a: !!python/name:os.system\n", "not valid YAML"),
    "own tag": ("a: !mine 1\n", "not valid YAML"),
    "binary tag that is none": ("a: !!int x\n", "not valid YAML"),
    "list as key": ("[1]: 2\n", "not valid YAML"),
    "nesting": ("a: " + "[" * 50_000, "not valid YAML"),
    "two documents": ("a: 1\n---\nb: 2\n", "not valid YAML"),
    "NUL": ("a: \0\n", "not valid YAML"),
    "a list": ("- a\n", "a job file is a mapping of keys, found list"),
    "nothing": ("", "found NoneType"),
    "too large": ("a: " + "x" * MAX_JOB_FILE_BYTES, f"larger than {MAX_JOB_FILE_BYTES} bytes"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_a_yaml_that_is_not_plain_is_refused_by_name(how: str, tmp_path: Path) -> None:
    text, said = REFUSED[how]
    path, owned = tmp_path / "job.yaml", tmp_path / "owned"
    path.write_text(text.replace("{owned}", str(owned)))
    with pytest.raises(SpecError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert not owned.exists()


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(SpecError, match=r"job\.yaml: cannot be read"):
        read_yaml(tmp_path / "job.yaml")


def test_a_pipe_is_read_no_further_than_a_job_file_goes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "job.yaml")

    def pour() -> None:
        with contextlib.suppress(BrokenPipeError), (tmp_path / "job.yaml").open("wb", buffering=0) as pipe:
            while True:
                pipe.write(b"x" * 65536)

    pourer = threading.Thread(target=pour, daemon=True)
    pourer.start()
    with pytest.raises(SpecError, match="larger than"):
        read_yaml(tmp_path / "job.yaml")
    pourer.join(10)
    assert not pourer.is_alive()


@pytest.mark.parametrize("value", ["{a: 1, a: 2}", "*x", "!!python/name:os.system", "[" * 50_000])
def test_an_override_is_read_as_strictly(value: str) -> None:
    with pytest.raises(SpecError):
        apply_overrides(JOB, [f"name={value}"])


# --- secrets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location",
    [
        "s3://AKIA:canary@bucket/x",
        "s3://AKIA:canary/with/slash@bucket/x",
        "s3://AKIA:8020canary@bucket/x",
        "s3://${env:KEY}:canary@bucket/x",
        "https://:canary@host/x",
        "s3://bucket/x?secret_key=canary",
        "s3://bucket/x?region=eu&session_token=canary",
    ],
)
@pytest.mark.parametrize("field", ["model.model", "input.path", "output.path", "cluster.address"])
def test_a_secret_in_the_job_file_is_refused_and_not_repeated(
    field: str, location: str, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(str(JOB))
    with pytest.raises(SpecError) as caught:
        load_spec(tmp_path / "job.yaml", values={field: location})
    assert field in str(caught.value)
    assert "${env:NAME}" in str(caught.value)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "location",
    [
        "s3://${env:KEY}:${env:SECRET}@bucket/x",
        "s3://bucket/a:b@c/x",
        "hdfs://user@host:8020/x@y",
        "hdfs://host:8020/x@y",
        "s3://bucket/x?region=eu&endpoint_override=host:9000",
        "s3://bucket/x?secret_key=${env:SECRET}",
    ],
)
def test_a_reference_and_a_host_are_no_secrets(location: str) -> None:
    assert parse_spec(JOB | {"input": {"path": location}}).input.path == (location,)


def test_what_the_environment_put_in_is_taken_out_of_messages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("B2_TEST_TOKEN", "canary/token+1")
    assert resolve_env("s3://${env:B2_TEST_TOKEN}@x") == "s3://canary/token+1@x"
    assert mask_env("cannot open s3://canary/token+1@x") == "cannot open s3://${env:B2_TEST_TOKEN}@x"
    for json_lines in (False, True):
        setup_logging(json_lines=json_lines)
        logging.getLogger("b2batch.inputs").warning("%s is gone", "s3://canary/token+1@x")
    said = capsys.readouterr().err
    assert said.count("s3://${env:B2_TEST_TOKEN}@x is gone") == 2
    assert "canary" not in said
