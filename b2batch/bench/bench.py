"""One run of one workload, from its settings to its record."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from b2batch.assets import EMBEDDED_MODELS
from b2batch.bench.child_process import run_child
from b2batch.bench.comparison import Setting, Tools, compare
from b2batch.bench.environment import Environment
from b2batch.bench.job_rounds import measure_job
from b2batch.bench.peer_job import PeerJob
from b2batch.bench.prompts import make_rows, read_rows
from b2batch.bench.record import Comparison, RunRecord, Spread
from b2batch.bench.workload import (
    DriverWorkload,
    FaultsWorkload,
    JobWorkload,
    StepsWorkload,
    Workload,
)
from b2batch.errors import SpecError

RANDOM_MODEL_PREFIX = "random-"
DRIVER_MEASUREMENTS = ("dispatch", "loop", "ray", "resume", "plan-parquet", "plan-jsonl")
_DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


class RandomModels:
    """The checkpoint with random weights that was made last: workloads that follow each other share it.

    One at a time, for a 13B takes 26 GB of the disk. It goes with this object.
    """

    def __init__(self) -> None:
        self._made: tuple[str, str, str] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._num_parameters = 0

    def get(self, name: str, device: str, dtype: str, on_progress: Callable[[str], None]) -> tuple[Path, int]:
        """Its directory and number of parameters."""
        if self._scratch is None or self._made != (name, device, dtype):
            if self._scratch is not None:
                self._scratch.cleanup()
            on_progress(f"making {name}")
            self._scratch = tempfile.TemporaryDirectory(prefix="b2batch-bench-")
            document = {"name": name, "device": device, "dtype": dtype, "directory": self._scratch.name}
            self._num_parameters = int(run_child("random_model", document)["num_parameters"])
            self._made = (name, device, dtype)
        return Path(self._scratch.name), self._num_parameters


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Where and on what a workload is run. ``model`` replaces the workload's own."""

    device: str = "cpu"
    model: str = ""
    prompts: Path | None = None
    tools: Tools = field(default_factory=Tools)
    on_progress: Callable[[str], None] = lambda text: None
    models: RandomModels = field(default_factory=RandomModels)


@dataclass(frozen=True, slots=True)
class BenchResult:
    """A finished run: what is kept of it, and for workloads with peers what their table shows."""

    record: RunRecord
    comparison: Comparison | None = None


def run_bench(name: str, workload: Workload, options: BenchOptions) -> BenchResult:
    """Run a workload.

    Raises:
        SpecError: the model is none.
        InputError: the file of prompts has not what the workload needs.
        MeasurementFailed: a measurement without peers gave no result.
    """
    environment = Environment.here()
    if isinstance(workload, DriverWorkload):
        measurements = _measure_driver(workload, options)
        return BenchResult(_record(name, workload, environment, "", "", "", 0, measurements=measurements))
    if isinstance(workload, FaultsWorkload):
        from b2batch.bench.faults import measure_faults  # imports Ray

        measurements = measure_faults(workload, options.on_progress)
        return BenchResult(_record(name, workload, environment, "", "", "", 0, measurements=measurements))
    if isinstance(workload, JobWorkload):
        measurements = measure_job(workload, options.on_progress)
        return BenchResult(_record(name, workload, environment, "", "", "", 0, measurements=measurements))
    dtype = _DTYPES[options.device] if workload.dtype == "auto" else workload.dtype
    model = options.model or workload.model
    directory, num_parameters = _model_directory(model, options, dtype)
    setting = Setting(directory, options.device, dtype, options.tools)
    make = _recorder(name, workload, environment, options.device, dtype, model, num_parameters)
    if isinstance(workload, StepsWorkload):
        return BenchResult(make(measurements=_measure_steps(workload, setting, options)))
    rows = read_rows(options.prompts, workload) if options.prompts else make_rows(workload)
    found = compare(
        workload,
        rows,
        setting,
        lambda peer, number: options.on_progress(f"{name}: {peer}, round {number} of {workload.repeats}"),
    )
    return BenchResult(make(peers=found.to_document()), found)


def _model_directory(model: str, options: BenchOptions, dtype: str) -> tuple[Path, int]:
    """The checkpoint, made where it has random weights; and its parameters."""
    if not model.startswith(RANDOM_MODEL_PREFIX):
        directory = EMBEDDED_MODELS.get(model, Path(model).expanduser())
        if not directory.is_dir():
            raise SpecError(f"model: {model!r} is no directory here, no embedded model and not random-…")
        return directory, 0
    return options.models.get(model, options.device, dtype, options.on_progress)


def _recorder(*fixed: Any) -> Callable[..., RunRecord]:
    return lambda **found: _record(*fixed, **found)


def _record(
    name: str,
    workload: Workload,
    environment: Environment,
    device: str,
    dtype: str,
    model: str,
    num_parameters: int,
    *,
    peers: Sequence[Mapping[str, Any]] = (),
    measurements: Mapping[str, Any] | None = None,
) -> RunRecord:
    return RunRecord(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment,
        name=name,
        workload=workload.model_dump(mode="json"),
        workload_digest=workload.digest,
        device=device,
        dtype=dtype,
        model=model,
        num_parameters=num_parameters,
        peers=peers,
        measurements=measurements or {},
    )


# --- workloads without peers ---------------------------------------------------------------------


def _measure_driver(workload: DriverWorkload, options: BenchOptions) -> dict[str, Any]:
    document = workload.model_dump(mode="json")
    found = {}
    for measurement in DRIVER_MEASUREMENTS:
        if measurement == "ray" and not workload.ray_s:
            continue
        options.on_progress(f"driver: {measurement}")
        found[measurement] = run_child("driver_scale", {"measurement": measurement, "workload": document})
    return found


def _measure_steps(workload: StepsWorkload, setting: Setting, options: BenchOptions) -> dict[str, Any]:
    """The medians of all rounds at each point."""
    job = asdict(steps_job(workload, setting))
    rounds = []
    for number in range(1, workload.repeats + 1):
        options.on_progress(f"steps, round {number} of {workload.repeats}")
        document = {"workload": workload.model_dump(mode="json"), "job": job}
        rounds.append(run_child("steps", document, threads=workload.threads))
    return {
        "prefill": _medians([found["prefill"] for found in rounds]),
        "decode": _medians([found["decode"] for found in rounds]),
        **{key: max(found[key] for found in rounds) for key in rounds[0] if key.endswith("_bytes")},
    }


def steps_job(workload: StepsWorkload, setting: Setting) -> PeerJob:
    """On what a steps workload is measured; it has no rows."""
    return PeerJob(
        kind="engine",
        size=0,
        model=str(setting.model.absolute()),
        device=setting.device,
        dtype=setting.dtype,
        threads=workload.threads,
        max_model_len=workload.max_model_len,
        rows=(),
        warmup_rows=(),
    )


def _medians(rounds: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Point by point the median of each rate, with the lowest and highest tokens a second."""
    points = []
    for same in zip(*rounds, strict=True):
        rates = [point["tokens_per_s"] for point in same]
        point = dict(same[0])
        if None not in rates:
            for key in ("step_s", "tokens_per_s", "roofline_share"):
                if point.get(key) is not None:
                    point[key] = statistics.median(one[key] for one in same)
            point["spread"] = asdict(Spread.of(rates))
        points.append(point)
    return points
