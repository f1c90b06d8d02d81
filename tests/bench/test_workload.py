"""Workloads as files: all that ship load, and what is wrong with one is said by its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from b2batch.bench.peers import PEERS, split_name
from b2batch.bench.workload import GenerateWorkload, find_workloads, load_workload
from b2batch.errors import SpecError

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "bench").glob("*.yaml"))

LABEL = """
kind: generate
description: For a test.
model: random-tiny
rows: 4
max_tokens: 4
peers: [engine, static8]
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str, name: str = "mine.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_ships_loads_by_path_and_by_name(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    assert load_workload(path.stem) == load_workload(str(path))


def test_a_nearer_directory_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    own = tmp_path / "configs" / "bench"
    own.mkdir(parents=True)
    (own / "label.yaml").write_text(LABEL)
    monkeypatch.chdir(own)

    assert load_workload("label").description == "For a test."
    assert set(find_workloads()) >= {path.stem for path in SHIPPED}


def test_overrides_change_the_workload_and_its_digest(write):
    path = write(LABEL)
    workload = load_workload(path, ["rows=9", "prompts.shared_words=30"])

    assert isinstance(workload, GenerateWorkload)
    assert (workload.rows, workload.prompts.shared_words) == (9, 30)
    assert workload.digest != load_workload(path).digest
    assert load_workload(path).digest == load_workload(path).digest


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LABEL.replace("engine,", "vlm,"), "peers.*unknown peer 'vlm'; one of engine"),
        (LABEL.replace("static8", "static0"), "unknown peer 'static0'"),
        (LABEL.replace("static8", "engine8"), "unknown peer 'engine8'"),
        (LABEL + "row: 3", "row: .*'?3"),
        (LABEL.replace("rows: 4", "rows: 0"), "rows: .*0"),
        (LABEL.replace("generate", "sing"), "sing"),
    ],
)
def test_what_is_wrong_is_named(text: str, said: str, write):
    with pytest.raises(SpecError, match=said):
        load_workload(write(text))


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(SpecError, match="did you mean 'label'"):
        load_workload("lable")


def test_every_kind_of_peer_has_a_name_that_reads_back():
    for name, kind in PEERS.items():
        assert split_name(name) == (name, kind.default_size)
    assert split_name("hf-continuous4") == ("hf-continuous", 4)
    assert split_name("engine-int8") == ("engine-int8", 0)
