"""A whole run, peers in processes of their own, as ``b2batch bench`` does it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from b2batch.bench.child_process import run_child
from b2batch.cli.bench import bench
from b2batch.errors import CallerError, MeasurementFailed, SpecError

WORKLOAD = """
kind: generate
description: For a test.
model: random-tiny
rows: 3
warmup: 1
repeats: 2
max_tokens: 3
prompts: {shared_words: 40, min_words: 3, max_words: 9}
peers: [engine, static2, vllm, llamacpp]
"""


@pytest.fixture
def invoke(tmp_path: Path):
    (tmp_path / "small.yaml").write_text(WORKLOAD)
    app = typer.Typer()
    app.command()(bench)

    def invoke(*arguments: str):
        return CliRunner().invoke(app, list(arguments), catch_exceptions=True)

    return invoke


def test_the_list_has_every_workload(invoke):
    result = invoke("--list")

    assert result.exit_code == 0
    assert {"label", "score", "driver", "roofline"} <= {
        line.split()[0] for line in result.output.splitlines()
    }


def test_a_model_that_is_none_is_refused(invoke, tmp_path: Path):
    result = invoke(str(tmp_path / "small.yaml"), "--model", str(tmp_path / "nowhere"))

    assert isinstance(result.exception, SpecError)
    assert "nowhere" in str(result.exception)


def test_a_plot_without_plotly_is_refused_before_anything_runs(
    invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "plotly", None)
    result = invoke(str(tmp_path / "small.yaml"), "--plot", str(tmp_path / "plot.html"))

    assert isinstance(result.exception, CallerError)
    assert "b2batch[bench]" in str(result.exception)


def test_a_child_that_dies_says_why():
    with pytest.raises(MeasurementFailed, match="no_such_module"):
        run_child("no_such_module", {})


@pytest.mark.slow
def test_a_run_leaves_a_table_and_a_record(invoke, tmp_path: Path):
    out = tmp_path / "results.jsonl"
    result = invoke(str(tmp_path / "small.yaml"), "--out", str(out))

    assert result.exit_code == 0, result.output
    assert "vllm: left out: needs an interpreter with vllm" in " ".join(result.output.split())
    [record] = map(json.loads, out.read_text().splitlines())
    ours, static, vllm, llama = record["peers"]
    assert (record["name"], record["dtype"], record["workload"]["rows"]) == ("small", "float32", 3)
    assert [len(peer["rounds"]) for peer in record["peers"]] == [2, 2, 0, 0]
    assert static["num_equal_rows"] == ours["num_equal_rows"] == 3
    assert static["ratios"]["engine"]["rows_per_s"] > 0
    assert vllm["error"].startswith("left out")
    assert llama["error"].startswith("left out")


@pytest.mark.slow
def test_a_peer_that_fails_does_not_end_the_run(invoke, tmp_path: Path):
    result = invoke(
        str(tmp_path / "small.yaml"),
        "--peers",
        "engine,vllm",
        "--repeats",
        "1",
        "--model",
        "baichuan2-tiny",
        "--json",
        "--vllm-python",
        sys.executable,
    )

    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["peers"][0]["error"] == ""
    assert "failed: ModuleNotFoundError: No module named 'vllm'" in record["peers"][1]["error"]


@pytest.mark.slow
@pytest.mark.ray
def test_ray_data_is_a_peer(invoke, tmp_path: Path):
    pytest.importorskip("pandas")
    out = tmp_path / "results.jsonl"
    path = str(tmp_path / "small.yaml")
    arguments = ["--model", "baichuan2-tiny", "--peers", "engine,ray-data2", "--repeats", "1"]
    result = invoke(path, *arguments, "--out", str(out))

    assert result.exit_code == 0, result.output
    [record] = map(json.loads, out.read_text().splitlines())
    assert record["peers"][1]["error"] == ""
    assert record["peers"][1]["num_equal_rows"] == 3
