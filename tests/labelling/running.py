"""A whole job in this process, without Ray: the rows that a run would leave, and its engine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from b2batch.engine.engine import Engine
from b2batch.engine_start import make_engine
from b2batch.labelling.judgement import judge
from b2batch.models.loading import LoadedModel
from b2batch.outputs.run import RunDirectory
from b2batch.outputs.store import open_store
from b2batch.preflight import prepare_job
from b2batch.spec import JobSpec, parse_spec
from b2batch.worker import Worker
from b2batch.worker_args import WorkerArgs

REVIEW_TEMPLATE = "请判断下面这条评论的情感倾向,只回答“正面”或“负面”。\n{{ text }}"
REVIEWS = [
    "房间很干净，服务也好，下次还会来。",
    "太差了，电池用了两天就坏，客服也不理人。",
    "书的内容很实用，推荐。",
    "酒店又旧又吵，再也不住了。",
]


@dataclass(frozen=True)
class Ran:
    """What a job left: its rows in input order, and the engine it ran on."""

    rows: list[dict[str, Any]]
    engine: Engine


def make_spec(tmp_path: Path, rows: list[dict[str, Any]], **document: Any) -> JobSpec:
    """A job over ``rows``; ``document`` holds further keys of the job file."""
    tmp_path.mkdir(exist_ok=True, parents=True)
    source = tmp_path / "rows.jsonl"
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    source.write_text("\n".join(lines), encoding="utf-8")
    defaults: dict[str, Any] = {
        "model": {"model": "baichuan2-tiny"},
        "prompt": {"template": REVIEW_TEMPLATE},
        "output": {"path": str(tmp_path / "out")},
    }
    return parse_spec({**defaults, **document, "input": {"path": str(source)} | document.get("input", {})})


def run(spec: JobSpec, loaded: LoadedModel) -> Ran:
    """Run a job to the last part."""
    job = prepare_job(spec)
    store = open_store(spec.output.path, job.record.run_id)
    directory = RunDirectory.open(store, job.record, job.plan.to_bytes())
    engine = make_engine(job.spec, loaded)
    with directory.take_epoch():
        args = WorkerArgs(job.spec, job.plan.files, job.plan.schema, store.uri, job.record.run_id, 1, {})
        worker = Worker(args, loaded, engine)
        units = list(job.plan.units)
        reports = []
        while units or not worker.idle:
            while units and worker.wants_unit:
                worker.add_unit(units.pop(0), attempt=1)
            reports += worker.step()
        judge(directory, job.plan, job.spec)
    assert [report.error for report in reports if report.error] == []
    return Ran(pq.read_table(spec.output.path).to_pylist(), engine)
