"""A run's record as rich tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from b2batch.bench.record import Comparison, PeerResult, RunRecord, Spread

_PEAKS = {
    "peak_bytes": "all of it",
    "load_peak_bytes": "loading, on the device",
    "loaded_bytes": "what is loaded, on the device",
    "load_host_peak_bytes": "loading, in the host's memory",
}


def comparison_table(found: Comparison, title: str) -> Table:
    """Every peer with its rates, and how many times slower or faster than ours and than the loop."""
    table = Table(title=title, title_justify="left")
    table.add_column("peer")
    for heading in (
        "rows/s",
        "rows/CPU-s",
        "× ours",
        "× loop",
        "tokens/s",
        "peak MB",
        "batch",
        "prefix saved",
        "equal rows",
    ):
        table.add_column(heading, justify="right")
    for peer in found.peers:
        if peer.rounds:
            table.add_row(*_peer_cells(found, peer))
    return table


def _peer_cells(found: Comparison, peer: PeerResult) -> Iterator[str]:
    yield peer.name
    yield _spread(peer.rows_per_s)
    yield _spread(peer.rows_per_cpu_s)
    for base in (found.engine, found.loop):
        yield _ratios(found, peer, base)
    yield f"{peer.generated_tokens_per_s.median:.1f}"
    yield f"{peer.peak_bytes / 1e6:,.0f}"
    occupancy, saved = peer.fact("occupancy_fed") or peer.fact("occupancy"), peer.fact("prefix_tokens_saved")
    yield "" if occupancy is None else f"{occupancy:.1%}"
    yield "" if saved is None else f"{saved:,.0f}"
    yield "" if peer.num_equal_rows is None else f"{peer.num_equal_rows}/{peer.num_rows}"


def _ratios(found: Comparison, peer: PeerResult, base: PeerResult | None) -> str:
    """By wall time and by CPU time."""
    if base is None:
        return ""
    wall = found.ratio(peer, base, lambda p: p.rows_per_s)
    cpu = found.ratio(peer, base, lambda p: p.rows_per_cpu_s)
    return f"{wall:.2f} / {cpu:.2f}"


def _spread(found: Spread) -> str:
    return f"{found.median:.3g} ({found.low:.3g}–{found.high:.3g})"


def steps_tables(measurements: Mapping[str, Any], title: str) -> list[Table]:
    """Prefill and decode, point by point, and the most memory that was taken."""
    prefill = _points_table(f"{title}: prefill", ("context", "tokens/s", "of roofline"))
    for point in measurements["prefill"]:
        prefill.add_row(str(point["context"]), _rate(point), _share(point))
    headings = ("batch", "context", "ms a step", "tokens/s", "of roofline", "× shortest context")
    decode = _points_table(f"{title}: decode", headings)
    for point in measurements["decode"]:
        step = "does not fit" if point["step_s"] is None else f"{1e3 * point['step_s']:.2f}"
        cells = (str(point["batch"]), str(point["context"]), step, _rate(point), _share(point))
        decode.add_row(*cells, _growth(point, measurements["decode"]))
    memory = _points_table(f"{title}: memory", ("peak of", "GB"))
    for key, what in _PEAKS.items():
        if key in measurements:
            memory.add_row(what, f"{measurements[key] / 1e9:.2f}")
    return [prefill, decode, memory]


def _points_table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _rate(point: Mapping[str, Any]) -> str:
    return "" if point["tokens_per_s"] is None else f"{point['tokens_per_s']:,.1f}"


def _share(point: Mapping[str, Any]) -> str:
    return "" if point["roofline_share"] is None else f"{point['roofline_share']:.1%}"


def _growth(point: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> str:
    """A step's time over that of the same batch at the shortest context."""
    shortest = min(
        (p for p in points if p["batch"] == point["batch"] and p["step_s"]),
        key=lambda p: p["context"],
        default=None,
    )
    return "" if shortest is None or not point["step_s"] else f"{point['step_s'] / shortest['step_s']:.2f}"


def driver_table(measurements: Mapping[str, Any], title: str) -> Table:
    """What each measurement of the driver took."""
    headings = ("measurement", "what", "wall s", "CPU s", "a second", "peak MB", "core share")
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < 2 else "right")
    for name, found in measurements.items():
        share = found["facts"].get("core_share")
        table.add_row(
            name,
            f"{found['count']:,} {found['items']}",
            f"{found['wall_s']:.2f}",
            f"{found['cpu_s']:.2f}",
            f"{found['count'] / found['wall_s']:,.0f}" if share is None else "",
            f"{found['peak_bytes'] / 1e6:,.0f}",
            "" if share is None else f"{share:.2%}",
        )
    return table


def job_table(measurements: Mapping[str, Any], title: str) -> Table:
    """Each kind of run: its phases in seconds, its rate at work and what that is of the engine's alone."""
    table = _points_table(
        title, ("what", "start s", "work s", "finish s", "rows/s at work", "× engine alone", "batch")
    )
    alone = next(iter(measurements.values()))["rows_per_s"]
    for name, found in measurements.items():
        phases = (
            f"{found[phase]:.1f}" if phase in found else "" for phase in ("start_s", "work_s", "finish_s")
        )
        rates = f"{found['rows_per_s']:.1f} ({min(found['rounds']):.1f}–{max(found['rounds']):.1f})"
        batch = f"{found['occupancy']:.1%}" if "occupancy" in found else ""
        table.add_row(name, *phases, rates, f"{found['rows_per_s'] / alone:.2f}", batch)
    return table


def faults_tables(measurements: Mapping[str, Any], title: str) -> list[Table]:
    """How often each fault came and how soon new rows came after it; then the account of the rows."""
    faults = _points_table(
        f"{title}: {measurements['num_faults']} faults", ("fault", "times", "p50 s", "p95 s")
    )
    for kind, times in measurements["faults"].items():
        recovery = measurements["recovery_s"].get(kind, {})
        faults.add_row(kind, str(times), *(f"{recovery[p]:.1f}" if recovery else "" for p in ("p50", "p95")))
    account = _points_table(f"{title}: {len(measurements['violations'])} violations", ("what", "figure"))
    for what in ("num_runs", "num_driver_starts", "num_rows", "num_lost", "num_doubled", "num_differing"):
        account.add_row(what.removeprefix("num_").replace("_", " "), f"{measurements[what]:,}")
    account.add_row("rows generated again", f"{measurements['num_rows_again']:,}")
    account.add_row("tokens generated again", f"{measurements['num_tokens_again']:,}")
    account.add_row("driver memory, MB/min at most", f"{measurements['rss_slope_mb_per_min']:.2f}")
    account.add_row("undisturbed run, s", f"{measurements['calm_s']:.0f}")
    account.add_row("disturbed runs, s", f"{measurements['disturbed_s']:.0f}")
    account.add_row("exit codes", ", ".join(f"{k}: {v}" for k, v in measurements["exit_codes"].items()))
    return [faults, account]


def tables(record: RunRecord, comparison: Comparison | None) -> list[Table]:
    """All tables of a run."""
    busy = f"; BUSY machine (load {record.environment.load_before})" if record.environment.was_busy else ""
    if comparison is not None:
        where = f"{record.model}, {record.device}, {record.dtype}, {record.workload['threads']} threads{busy}"
        title = f"{record.name}: {record.workload['rows']} rows, {where}; ratios are wall / CPU"
        return [comparison_table(comparison, title)]
    if record.workload["kind"] == "driver":
        return [driver_table(record.measurements, f"{record.name}{busy}")]
    if record.workload["kind"] == "job":
        return [job_table(record.measurements, f"{record.name}: {record.workload['rows']} rows{busy}")]
    if record.workload["kind"] == "faults":
        return faults_tables(record.measurements, f"{record.name}, seed {record.workload['seed']}{busy}")
    return steps_tables(record.measurements, f"{record.name}: {record.model}, {record.dtype}{busy}")
