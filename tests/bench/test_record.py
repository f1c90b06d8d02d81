"""Medians, ratios and what a record keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from b2batch.bench.comparison import num_equal_rows
from b2batch.bench.environment import Environment
from b2batch.bench.peer_job import PeerRound
from b2batch.bench.plot import write_plot
from b2batch.bench.record import Comparison, PeerResult, Round, RunRecord, Spread
from b2batch.bench.table import comparison_table


def make_round(wall_s: float, cpu_s: float, **facts: float) -> Round:
    return Round(wall_s, cpu_s, 1.0, 100, 50, 2_000_000, facts)


def make_result(name: str, *walls: float) -> PeerResult:
    return PeerResult(name, 10, [make_round(wall, 2 * wall, occupancy=wall) for wall in walls])


OURS = make_result("engine", 1.0, 2.0, 4.0)
LOOP = make_result("loop", 10.0, 8.0, 9.0)
BROKEN = PeerResult("vllm", 10, error="left out")
FOUND = Comparison([OURS, LOOP, BROKEN])


def test_rates_are_medians_with_their_spread():
    assert OURS.rows_per_s == Spread(5.0, 2.5, 10.0)
    assert OURS.rows_per_cpu_s == Spread(2.5, 1.25, 5.0)
    assert OURS.generated_tokens_per_s.median == 25.0
    assert OURS.fact("occupancy") == 2.0
    assert OURS.fact("unknown") is None


def test_ratios_are_of_medians():
    ours, loop, broken = FOUND.to_document()

    assert ours["ratios"]["loop"] == {"rows_per_s": pytest.approx(4.5), "rows_per_cpu_s": pytest.approx(4.5)}
    assert loop["ratios"]["engine"]["rows_per_s"] == pytest.approx(1 / 4.5)
    assert ours["ratios"]["engine"]["rows_per_s"] == 1.0
    assert broken["ratios"] == {}
    assert "rows_per_s" not in broken


def test_without_ours_there_is_nothing_to_compare_with():
    assert Comparison([LOOP]).to_document()[0]["ratios"].keys() == {"loop"}
    assert Comparison([PeerResult("engine", 1, error="failed"), LOOP]).engine is None


def test_the_table_has_who_ran():
    table = comparison_table(FOUND, "title")

    assert list(table.columns[0].cells) == ["engine", "loop"]
    assert list(table.columns[3].cells) == ["1.00 / 1.00", "0.22 / 0.22"]


def test_the_plot_stands_alone(tmp_path: Path):
    pytest.importorskip("plotly")
    write_plot(FOUND, "a title", tmp_path / "plot.html")

    page = (tmp_path / "plot.html").read_text()
    assert "a title" in page
    assert "<script src=" not in page


def test_records_are_appended_as_lines(tmp_path: Path):
    record = RunRecord(
        time="2024-01-01T00:00:00+00:00",
        environment=Environment.here(),
        name="label",
        workload={"rows": 10},
        workload_digest="ab",
        device="cpu",
        dtype="float32",
        model="random-tiny",
        num_parameters=7,
        peers=FOUND.to_document(),
    )
    path = tmp_path / "results.jsonl"
    record.append_to(path)
    record.append_to(path)

    first, second = map(json.loads, path.read_text().splitlines())
    assert first == second
    assert {"format", "time", "environment", "workload", "workload_digest", "device", "peers"} <= first.keys()
    assert {"git_commit", "cpu_model", "num_cpus", "load_before", "versions"} <= first["environment"].keys()
    assert first["peers"][0]["rows_per_s"] == {"median": 5.0, "low": 2.5, "high": 10.0}
    assert [done["wall_s"] for done in first["peers"][0]["rounds"]] == [1.0, 2.0, 4.0]


def found(*rows: list[list[int]], labels: tuple[int | None, ...] = ()) -> PeerRound:
    return PeerRound(1.0, 1.0, 1.0, 1, 1, 1, rows, labels or [None] * len(rows), {}, {})


def test_rows_are_equal_by_all_their_tokens_and_their_label():
    ours = found([[1, 2]], [[3]], [[4], [5]])

    assert num_equal_rows(ours, ours) == 3
    assert num_equal_rows(found([[1, 2]], [[3, 9]], [[4], [6]]), ours) == 1
    assert num_equal_rows(found([[-1, -1]], [[-1]], [[-1]]), ours) is None
    assert num_equal_rows(found([], [], labels=(0, 1)), found([], [], labels=(0, 2))) == 1
