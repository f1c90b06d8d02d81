"""A whole job on the embedded model, phase by phase, and the engine alone on the same rows.

    start      plan, Ray, and the replicas until all are ready
    work       from there until the last row is answered
    finish     the last commit, the account, the end of Ray

The engine's loop has its rows in memory and its tokenizer beside it: what a job costs beyond that is
reading, Ray, Arrow and the commit. Both have the same batch, so that they run the same steps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import torch

from b2batch.bench.child import cpu_s
from b2batch.bench.peer_engine import Occupancy
from b2batch.encoding import RowEncoder
from b2batch.engine_start import make_engine
from b2batch.job import RunOptions, run_job
from b2batch.logbook import JobProgress
from b2batch.models.loading import load_model
from b2batch.rows import PromptRow
from b2batch.spec import JobSpec, parse_spec

_TEMPLATE = "请判断下面这条评论的情感倾向,只回答“正面”或“负面”。\n{{ text }}"


def run(document: Mapping[str, Any]) -> dict[str, Any]:
    """``{input, output, replicas, rows_per_unit, max_tokens}``; no replicas: the engine alone."""
    spec = _spec(document)
    return _run_job(spec) if document["replicas"] else _run_engine(spec)


def _spec(document: Mapping[str, Any]) -> JobSpec:
    return parse_spec(
        {
            "name": "end-to-end",
            "model": {"model": "baichuan2-tiny"},
            "input": {"path": document["input"], "rows_per_unit": document["rows_per_unit"]},
            "prompt": {"template": _TEMPLATE},
            "sampling": {"max_tokens": document["max_tokens"], "ignore_eos": True},
            "output": {"path": document["output"]},
            "engine": {"max_num_seqs": 64},
            "cluster": {"replicas": document["replicas"] or 1},
        }
    )


def _run_job(spec: JobSpec) -> dict[str, Any]:
    started_s = time.monotonic()
    points: list[tuple[float, int]] = []
    ready_s: list[float] = []

    def note(progress: JobProgress) -> None:
        now_s = time.monotonic() - started_s
        points.append((now_s, progress.live.num_rows))
        if progress.num_ready and not progress.num_starting:
            ready_s.append(now_s)

    result = run_job(spec, RunOptions(on_progress=note))
    wall_s = time.monotonic() - started_s
    num_rows = result.counts.num_rows
    answered_s = next(at_s for at_s, rows in points if rows >= num_rows)
    return {
        "start_s": ready_s[0],
        "work_s": answered_s - ready_s[0],
        "finish_s": wall_s - answered_s,
        "wall_s": wall_s,
        "rows_per_s": num_rows / (answered_s - ready_s[0]),
    }


def _run_engine(spec: JobSpec) -> dict[str, Any]:
    """All rows queued, as fast as one engine answers them."""
    torch.set_num_threads(1)
    loaded = load_model(spec.model)
    engine = make_engine(spec, loaded)
    encoder = RowEncoder(spec, loaded.codec, loaded.checkpoint.generation_config)
    with open(str(spec.input.path[0]), encoding="utf-8") as file:
        rows = [PromptRow(f"0:{i}", b"", json.loads(line)) for i, line in enumerate(file)]
    occupancy = Occupancy(engine, len(rows))
    started_s, started_cpu_s, num_done = time.monotonic(), cpu_s(), 0
    for row in rows:
        engine.add(encoder.encode(row).request)
    while engine.has_work:
        for finished in engine.step():
            completion = finished.completions[0]
            loaded.codec.tokenizer.decode(list(completion.token_ids[: completion.num_text_tokens]))
            num_done += 1
        occupancy.note(num_done)
    wall_s = time.monotonic() - started_s
    return {
        "wall_s": wall_s,
        "cpu_s": cpu_s() - started_cpu_s,
        "rows_per_s": len(rows) / wall_s,
        "occupancy": occupancy.facts()["occupancy"],
    }
