from __future__ import annotations

import hashlib
from pathlib import Path

from b2batch.models.checkpoint import open_checkpoint
from b2batch.preflight import prepare_job
from b2batch.spec import ModelSpec, parse_spec


def test_the_record_names_every_file_of_weights_with_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "很好"}\n', encoding="utf-8")
    job = prepare_job(
        parse_spec(
            {
                "model": {"model": "baichuan2-tiny"},
                "input": {"path": str(tmp_path / "rows.jsonl")},
                "prompt": {"column": "text"},
                "output": {"path": str(tmp_path / "out")},
            }
        )
    )
    directory = Path(open_checkpoint(ModelSpec(model="baichuan2-tiny"), weights=False).directory)
    weights = [path for path in directory.iterdir() if path.suffix in {".safetensors", ".bin"}]
    assert weights
    assert job.record.provenance["weights"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weights
    }
