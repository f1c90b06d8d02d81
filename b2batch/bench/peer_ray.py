"""Ray Data's ``map_batches`` around padded batches: the usual home-made distributed job.

Ray Data starts its actor, and so loads the model, inside the run. The clock therefore starts when the
actor is ready, and the CPU time is that of the actor and of this process; Ray's own daemons are left out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import ray

from b2batch.bench.child import cpu_s, peak_bytes
from b2batch.bench.peer_job import Answer, Answers, BenchRow, PeerJob


class _Generator:
    """What Ray Data runs in its actor: a column of rows as JSON → their answers as JSON."""

    def __init__(self, job: PeerJob) -> None:
        from b2batch.bench import peer_transformers

        self._peer = peer_transformers.load(replace(job, kind="static"))
        self._peer.answer(job.warmup_rows)
        self._ready_at = time.time()
        self._ready_cpu_s = cpu_s()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        rows = [BenchRow(**json.loads(row)) for row in batch["row"]]
        answers = self._peer.answer(rows).answers
        return {
            "row_id": [row.row_id for row in rows],
            "answer": [json.dumps(asdict(answer)) for answer in answers],
            "ready_at": [self._ready_at] * len(rows),
            "cpu_s": [cpu_s() - self._ready_cpu_s] * len(rows),
            "peak_bytes": [peak_bytes()] * len(rows),
        }


def load(job: PeerJob) -> RayDataPeer:
    """Start a local Ray; its actor loads the model within ``answer``, out of the clock."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(job.threads)}},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    return RayDataPeer(job)


class RayDataPeer:
    """``ray-data<B>``: one actor, batches of B."""

    def __init__(self, job: PeerJob) -> None:
        self._job = replace(job, rows=())

    def answer(self, rows: Sequence[BenchRow]) -> Answers:
        """See ``Peer``."""
        own_cpu_before_s = cpu_s()
        data = ray.data.from_items([{"row": json.dumps(asdict(row))} for row in rows]).map_batches(
            _Generator,
            fn_constructor_args=(self._job,),
            batch_size=self._job.size,
            concurrency=1,
            num_cpus=1,
            num_gpus=1 if self._job.device == "cuda" else 0,
        )
        found = {record["row_id"]: record for record in data.take_all()}
        ended_at = time.time()
        last = max(found.values(), key=lambda record: record["cpu_s"])
        return Answers(
            [Answer(**json.loads(found[row.row_id]["answer"])) for row in rows],
            wall_s=ended_at - last["ready_at"],
            cpu_s=cpu_s() - own_cpu_before_s + last["cpu_s"],
            peak_bytes=last["peak_bytes"],
        )
