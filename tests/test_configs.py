"""Every job file and config fragment that ships loads; a fragment lies under the job's own keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from b2batch.assets import EMBEDDED_MODELS
from b2batch.errors import SpecError
from b2batch.spec import JobSpec, load_spec, read_yaml

ROOT = Path(__file__).parents[1]
JOBS = sorted((ROOT / "jobs").glob("**/*.yaml"))
FRAGMENTS = sorted((ROOT / "configs" / "models").glob("*.yaml"))
FAMILY_CARD = {
    f"baichuan-inc/Baichuan2-{size}-{variant}"
    for size in ("7B", "13B")
    for variant in ("Base", "Chat", "Chat-4bits")
}

JOB = """
model: {{model: {model}}}
input: {{path: rows.jsonl}}
prompt: {{column: text}}
{more}
output: {{path: out}}
"""


def write_job(directory: Path, model: str, more: str = "") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "job.yaml"
    path.write_text(JOB.format(model=model, more=more))
    return path


def write_fragment(directory: Path, name: str, text: str) -> None:
    (directory / "configs" / "models").mkdir(parents=True, exist_ok=True)
    (directory / "configs" / "models" / f"{name}.yaml").write_text(text)


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_job_loads(path: Path) -> None:
    spec = load_spec(path)

    assert spec.task != "generate" or spec.sampling.max_tokens is not None
    assert "/" in spec.model.model or spec.model.model in EMBEDDED_MODELS  # its name was resolved


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_fragment_loads_in_a_job(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)

    spec = load_spec(write_job(tmp_path, path.stem))

    assert spec.model.model == read_yaml(path)["model"]["model"]


def test_fragments_cover_the_family_card_and_the_embedded_models() -> None:
    named = {read_yaml(path)["model"]["model"] for path in FRAGMENTS}

    assert named == FAMILY_CARD | EMBEDDED_MODELS.keys()


def test_quickstart_input_is_the_sample_that_ships() -> None:
    spec = load_spec(ROOT / "jobs" / "quickstart.yaml")

    assert (ROOT / spec.input.path[0]).is_file()


def test_own_keys_win_over_the_fragment(tmp_path: Path) -> None:
    write_fragment(
        tmp_path,
        "mine",
        "model: {model: owner/name, revision: v1, dtype: bfloat16}\nsampling: {temperature: 0.3, top_k: 5}",
    )
    path = write_job(tmp_path / "deep" / "below", "mine", "sampling: {temperature: 0}")

    spec = load_spec(path, ["model.dtype=float32"])

    assert spec.model.model == "owner/name"
    assert (spec.model.revision, spec.model.dtype) == ("v1", "float32")
    assert (spec.sampling.temperature, spec.sampling.top_k) == (0.0, 5)


def test_nearest_fragment_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_fragment(tmp_path, "mine", "model: {model: owner/far}")
    write_fragment(tmp_path / "near", "mine", "model: {model: owner/near}")

    assert load_spec(write_job(tmp_path / "near" / "jobs", "mine")).model.model == "owner/near"
    assert load_spec(write_job(tmp_path / "other", "mine")).model.model == "owner/far"


def test_unknown_name_lists_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_fragment(tmp_path, "mine", "model: {model: owner/name}")

    with pytest.raises(SpecError, match=r"model\.model.*'mime'.*did you mean 'mine'.*baichuan2-tiny"):
        load_spec(write_job(tmp_path, "mime"))


@pytest.mark.parametrize("model", ["owner/name", "ms://owner/name", "./mine", "${env:MODEL}"])
def test_what_is_no_name_is_left_alone(model: str, tmp_path: Path) -> None:
    write_fragment(tmp_path, "mine", "model: {model: owner/name}")

    assert load_spec(write_job(tmp_path, f'"{model}"')).model.model == model


@pytest.mark.parametrize(
    "text", ["model: owner/name", "sampling: {top_k: 5}", "model: {model: a/b}\noutput: {path: out}"]
)
def test_malformed_fragment_is_refused_by_its_path(text: str, tmp_path: Path) -> None:
    write_fragment(tmp_path, "mine", text)

    with pytest.raises(SpecError, match=r"mine\.yaml: a model fragment has"):
        load_spec(write_job(tmp_path, "mine"))


def test_values_are_taken_as_they_are(tmp_path: Path) -> None:
    spec: JobSpec = load_spec(
        write_job(tmp_path, "owner/name"), ["input.limit=3"], {"input.path": ["*.jsonl", "a: b"]}
    )

    assert spec.input.path == ("*.jsonl", "a: b")
    assert spec.input.limit == 3
