"""The command line run in this process, and a small job for it."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from b2batch.cli.main import app

QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"


def b2batch(*arguments: str | Path) -> Result:
    """The end of ``b2batch ARGUMENTS``; ``stdout`` and ``stderr`` apart."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_job(directory: Path, lines: list[str], **sections: dict[str, object]) -> Path:
    """A job over ``lines`` of JSONL that answers with the embedded model; its output is ``out``."""
    (directory / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    document: dict[str, dict[str, object]] = {
        "model": {"model": "baichuan2-tiny"},
        "input": {"path": str(directory / "rows.jsonl"), "rows_per_unit": 2},
        "prompt": {"column": "text"},
        "sampling": {"max_tokens": 2},
        "output": {"path": str(directory / "out")},
        "cluster": {"replicas": 1},
    }
    for name, keys in sections.items():
        document[name] = {**document.get(name, {}), **keys}
    path = directory / "job.yaml"
    path.write_text(json.dumps(document), encoding="utf-8")  # JSON is YAML
    return path
