"""What a driver is spared, and what a replica is told of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from b2batch.models.checkpoint import open_checkpoint
from b2batch.spec import parse_spec
from b2batch.worker_start import with_fixed_model

DRIVER = """
import pickle, sys
from functools import partial
from b2batch.cluster import driver, fleet, placement
from b2batch.job import prepare_job, start_worker
from b2batch.spec import load_spec
from b2batch.worker_args import WorkerArgs
job = prepare_job(load_spec(sys.argv[1]))
pickle.dumps(partial(start_worker, WorkerArgs(job.spec, job.plan.files, job.plan.schema, "", "", 1, {})))
print([name for name in ("torch", "transformers") if name in sys.modules])
"""


def make_document(directory: Path, model: str) -> dict[str, dict[str, str]]:
    (directory / "rows.jsonl").write_text('{"text": "很好"}\n', encoding="utf-8")
    return {
        "model": {"model": model},
        "input": {"path": str(directory / "rows.jsonl")},
        "prompt": {"column": "text"},
        "output": {"path": str(directory / "out")},
    }


def test_a_driver_prepares_a_job_and_its_replicas_without_torch(tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    job.write_text(json.dumps(make_document(tmp_path, "baichuan2-tiny")), encoding="utf-8")
    command = [sys.executable, "-c", DRIVER, str(job)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_replicas_get_a_relative_directory_as_the_driver_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = parse_spec(make_document(tmp_path, "baichuan2-tiny"))
    directory = Path(open_checkpoint(tiny.model, weights=False).directory)
    monkeypatch.chdir(directory.parent)
    spec = parse_spec(make_document(tmp_path, f"./{directory.name}"))
    assert with_fixed_model(spec, open_checkpoint(spec.model, weights=False)).model.model == str(directory)
