"""``b2batch bench faults``: jobs under random faults, resumed until they are done, and checked after each.

Everything is real: the command, the model, the Ray cluster, the kills. Each run starts the same command
again whenever it has ended, as a scheduler would, until it ends with 0; meanwhile a reader looks at the
output, and at the end its rows are compared with those of an undisturbed run.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from b2batch.bench.disturbed_run import DisturbedRun, Tally
from b2batch.bench.fault_cluster import FaultCluster
from b2batch.bench.fault_job import NUM_REPLICAS, run_calm
from b2batch.bench.fault_scratch import switch_in
from b2batch.bench.injector import Deck, FaultKind
from b2batch.bench.small_disk import SmallDisk
from b2batch.bench.workload import FaultsWorkload


def measure_faults(workload: FaultsWorkload, on_progress: Callable[[str], None]) -> dict[str, Any]:
    """Run jobs under faults for ``workload.minutes``; the last one is brought to its end.

    Raises:
        MeasurementFailed: the undisturbed run failed.
    """
    with (
        tempfile.TemporaryDirectory(prefix="b2batch-faults-") as name,
        SmallDisk(Path(name, "disk"), switch_in(Path(name))) as disk,
        FaultCluster(NUM_REPLICAS, Path(name)) as cluster,
    ):
        scratch = Path(name)
        on_progress("faults: undisturbed run")
        started_s = time.monotonic()
        expected = run_calm(scratch, cluster, workload)
        calm_s = time.monotonic() - started_s
        tally = Tally()
        random, deadline_s = Random(workload.seed), time.monotonic() + 60 * workload.minutes
        deck = Deck(random)
        while time.monotonic() < deadline_s and not tally.violations:
            run = DisturbedRun(scratch, disk, cluster, workload, tally, random, deck, expected)
            run.go(deadline_s, on_progress)
    return _measurements(tally, calm_s)


# --- the result ----------------------------------------------------------------------------------


def _measurements(tally: Tally, calm_s: float) -> dict[str, Any]:
    def count(invariant: str) -> int:
        return sum(f" {invariant}:" in violation for violation in tally.violations)

    return {
        "num_runs": tally.num_runs,
        "num_driver_starts": tally.num_driver_starts,
        "num_faults": tally.faults.total(),
        "faults": {kind.value: tally.faults[kind] for kind in FaultKind},
        "exit_codes": dict(sorted(tally.exit_codes.items())),
        "num_rows": tally.num_rows,
        "num_lost": count("I1"),
        "num_doubled": count("I2"),
        "num_differing": count("I5"),
        "num_rows_again": tally.num_rows_again,
        "num_tokens_again": tally.num_tokens_again,
        "recovery_s": {kind: quantiles(times) for kind, times in sorted(tally.recovery_s.items())},
        "recovery_all_s": quantiles([time for times in tally.recovery_s.values() for time in times]),
        "rss_slope_mb_per_min": max(tally.rss_slopes, default=0.0),
        "calm_s": calm_s,
        "disturbed_s": tally.disturbed_s,
        "violations": tally.violations,
    }


def quantiles(times_s: Sequence[float]) -> Mapping[str, float]:
    """p50 and p95, and how many; empty for none."""
    if not times_s:
        return {}
    ordered = sorted(times_s)
    return {
        "p50": statistics.median(ordered),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "num": len(ordered),
    }
