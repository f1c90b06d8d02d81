"""b2batch: distributed batch inference for Baichuan 2 and other causal LMs, every input row exactly once.

    from b2batch import load_spec, run_job
    result = run_job(load_spec("jobs/quickstart.yaml"))
    print(result.counts.num_ok, "rows in", result.output)

The names below are the public API; they are imported when first used, so that ``import b2batch``
costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from b2batch.errors import B2BatchError
    from b2batch.job import JobResult, RunOptions, run_job
    from b2batch.logbook import JobProgress
    from b2batch.spec import JobSpec, load_spec, parse_spec

__all__ = [
    "B2BatchError",
    "JobProgress",
    "JobResult",
    "JobSpec",
    "RunOptions",
    "load_spec",
    "parse_spec",
    "run_job",
]

_HOMES = {
    "B2BatchError": "b2batch.errors",
    "JobProgress": "b2batch.logbook",
    "JobResult": "b2batch.job",
    "RunOptions": "b2batch.job",
    "run_job": "b2batch.job",
    "JobSpec": "b2batch.spec",
    "load_spec": "b2batch.spec",
    "parse_spec": "b2batch.spec",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'b2batch' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
