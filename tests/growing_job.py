"""A job started again and again in this process: real driver, worker, model, no Ray, a clock set by hand."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from b2batch import job, worker
from b2batch.due import ticks_to_run
from b2batch.engine.engine import Engine
from b2batch.engine_start import make_engine
from b2batch.errors import NothingToDo
from b2batch.job import JobResult, RunOptions, run_job
from b2batch.models.loading import LoadedModel, load_model
from b2batch.outputs.layout import META
from b2batch.outputs.lease import LEASE_TTL_S
from b2batch.outputs.store import LocalStore, Store, open_store
from b2batch.rows import WorkUnit
from b2batch.spec import JobSpec, parse_spec
from b2batch.worker import Worker


class Crash(BaseException):
    """Stands for kill -9."""


class Machine:
    """Where the job runs: its model is loaded once. It can be made to die before its n-th write."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._steps_left: int | None = None
        self._loaded: tuple[LoadedModel, Engine] | None = None
        patch.setattr(job, "open_store", self._open_store)
        patch.setattr(worker, "open_store", self._open_store)
        patch.setattr(job._Run, "_run_on_cluster", lambda run, pending: self._run_in_process(run, pending))

    def run(self, spec: JobSpec, dies_before: int | None = None, **options: Any) -> JobResult:
        """One start; ``dies_before`` is the number of writes until it dies with Crash."""
        self._steps_left = dies_before
        try:
            return run_job(spec, RunOptions(**options))
        except Crash:
            age_lease(Path(spec.output.path))
            raise
        finally:
            self._steps_left = None

    def run_tick(self, spec: JobSpec, now: datetime, **how: Any) -> list[JobResult]:
        """As ``run --tick auto`` at the time ``now``."""
        return [self.run(spec.at(tick), **how) for tick in ticks_to_run(spec, "auto", now)]

    def run_through_crashes(self, spec: JobSpec, now: datetime) -> int:
        """Start again and again, each dying one write later, until one comes to its end; how many died."""
        for num_steps in range(200):
            try:
                self.run_tick(spec, now, dies_before=num_steps)
            except Crash:
                continue
            except NothingToDo:
                pass  # it had died once all was written
            return num_steps
        raise AssertionError("it never got through")

    def step(self) -> None:
        if self._steps_left is not None:
            if not self._steps_left:
                raise Crash
            self._steps_left -= 1

    def _open_store(self, uri: str, run_id: str | None = None) -> Store:
        found = open_store(uri, run_id)
        assert isinstance(found, LocalStore)
        return _MortalStore(self, found)

    def _run_in_process(self, run: Any, pending: Sequence[WorkUnit]) -> None:
        if self._loaded is None:
            loaded = load_model(run._job.spec.model)
            self._loaded = loaded, make_engine(run._job.spec, loaded)
        labeller = Worker(run._worker_args(), *self._loaded)
        for unit in pending:
            run._note_waiting()
            labeller.add_unit(unit, attempt=1)
            while not labeller.idle:
                errors = [report.error for report in labeller.step() if report.error]
                assert not errors


class _MortalStore(LocalStore):
    """A directory whose writer may die before any of its writes."""

    def __init__(self, machine: Machine, store: LocalStore) -> None:
        super().__init__(store._root, store._staging)
        self._machine = machine

    def put_if_absent(self, key: str, data: bytes) -> bool:
        self._machine.step()
        return super().put_if_absent(key, data)

    def put(self, key: str, data: bytes) -> None:
        self._machine.step()
        super().put(key, data)

    def delete(self, key: str) -> None:
        self._machine.step()
        super().delete(key)


def age_lease(output: Path) -> None:
    """Let the lease of a dead driver run out: its process is this one, which lives on."""
    past = time.time() - 2 * LEASE_TTL_S
    for path in [*output.glob(f"{META}/*/epoch/*"), *output.glob(f"{META}/*/heartbeat.json")]:
        os.utime(path, (past, past))


def make_spec(directory: Path, **sections: dict[str, Any]) -> JobSpec:
    """A job over ``directory/in`` into ``directory/out``, due each day at 02:00 in Shanghai."""
    document: dict[str, dict[str, Any]] = {
        "model": {"model": "baichuan2-tiny"},
        "input": {"path": f"{directory}/in", "rows_per_unit": 4, "incremental": True},
        "prompt": {"template": "{{ text }}", "chat": False},
        "sampling": {"max_tokens": 2},
        "output": {"path": f"{directory}/out"},
        "schedule": {"cron": "0 2 * * *", "timezone": "Asia/Shanghai"},
    }
    for name, keys in sections.items():
        document[name] = document.get(name, {}) | keys
    return parse_spec(document)


def write(path: Path, texts: Iterable[str], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def read(output: Path) -> pa.Table:
    return pq.read_table(output)


def labels(output: Path) -> Counter[tuple[str, str]]:
    """Each row with its answer, and how often it is there."""
    table = read(output)
    return Counter(zip(table["text"].to_pylist(), table["generated_text"].to_pylist(), strict=True))
