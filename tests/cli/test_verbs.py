"""What each verb says, and how it ends, without a cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from b2batch.cli import main

from .command import QUICKSTART, b2batch, write_job

VERBS = ("init", "validate", "plan", "preview", "run", "status", "verify", "doctor", "bench", "models")
ROWS = ['{"text": "很好"}', '{"text": "不好"}', '{"text": "一般"}']


@pytest.fixture(autouse=True)
def _from_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(QUICKSTART.parents[1])


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(verb: str) -> None:
    assert verb in b2batch("--help").stdout
    assert b2batch(verb, "--help").exit_code == 0


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom b2batch.cli.main import app\n"
        "assert CliRunner().invoke(app, ['run', '--help']).exit_code == 0\n"
        "print({'torch', 'ray', 'transformers', 'pyarrow'} & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "sampling.max_tokns=3"], "sampling.max_tokns: unknown key; did you mean 'max_tokens'?"),
        (["--set", "sampling.max_tokens"], "--set sampling.max_tokens: expected KEY=VALUE"),
        (["--set", "sampling.max_tokens=many"], "sampling.max_tokens"),
        (["--set", "prompt.template='{{ txt }}'"], "txt"),
        (["--set", "prompt.template={{ text }}"], "text with braces needs quotes"),
        (["--set", "model.model=./no-such-model"], "'./no-such-model' is not a directory"),
        (["--set", "model.model=baichuan2-tony"], "did you mean 'baichuan2-tiny'?"),
        (["-i", "no/such.jsonl"], "no/such.jsonl: there is no such file"),
    ],
)
@pytest.mark.parametrize("verb", ["validate", "plan", "run"])
def test_what_is_wrong_is_told_without_a_traceback(
    verb: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    ended = b2batch(verb, QUICKSTART, "-o", tmp_path / "out", *arguments)

    assert ended.exit_code == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()


def test_a_job_file_is_needed_once() -> None:
    assert b2batch("validate").exit_code == 2
    assert b2batch("validate", QUICKSTART, "-c", QUICKSTART).exit_code == 2
    assert b2batch("validate", "-c", QUICKSTART).exit_code == 0


def test_init_writes_a_job_that_validates_and_never_replaces_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"text": "你好"}\n', encoding="utf-8")

    assert b2batch("init").exit_code == 0
    assert b2batch("validate", "job.yaml").exit_code == 0
    (tmp_path / "job.yaml").write_text("mine")
    again = b2batch("init")

    assert again.exit_code == 2
    assert "job.yaml exists" in again.stderr
    assert (tmp_path / "job.yaml").read_text() == "mine"


def test_validate_as_json() -> None:
    found = json.loads(b2batch("validate", QUICKSTART, "--json").stdout)

    assert found["columns"] == ["id", "text", "label"]
    assert (found["num_rows"], found["num_bad_rows"]) == (100, 0)
    assert "generated_text" in found["output_columns"]


def test_validate_tells_rows_that_would_fail(tmp_path: Path) -> None:
    ended = b2batch("validate", write_job(tmp_path, [*ROWS, "{"]))

    assert ended.exit_code == 0
    assert "1 of the first 4 rows would be row errors" in ended.stdout
    assert "INPUT_JSON" in ended.stdout


def test_plan_as_json(tmp_path: Path) -> None:
    found = json.loads(b2batch("plan", QUICKSTART, "-o", tmp_path / "out", "--json").stdout)

    assert (found["num_rows"], found["num_units"]) == (200, 4)
    assert found["max_generated_tokens"] == 200 * 8
    assert sum(bin_["num_prompts"] for bin_ in found["lengths"]["histogram"]) == 200
    assert found["standing"]["state"] == "new"
    assert not (tmp_path / "out").exists()


def test_plan_takes_the_limit(tmp_path: Path) -> None:
    assert (
        "rows         60 in 2 units" in b2batch("plan", QUICKSTART, "-n", "60", "-o", tmp_path / "out").stdout
    )


def test_preview_shows_prompts_without_the_model() -> None:
    ended = b2batch("preview", QUICKSTART, "-n", "2", "--no-generate", "--json")

    rows = json.loads(ended.stdout)
    assert [row["row_id"] for row in rows] == ["0:0", "0:1"]
    assert rows[0]["messages"][0]["content"].startswith("请判断下面这条评论的情感倾向")
    assert rows[0]["answer"] is None


def test_preview_answers(tmp_path: Path) -> None:
    ended = b2batch("preview", QUICKSTART, "-n", "2", "-o", tmp_path / "out", "--json")

    assert {row["answer"] for row in json.loads(ended.stdout)} <= {"正面", "负面"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["status", "verify"])
@pytest.mark.parametrize("name", ["", "no-such-directory"])
def test_a_directory_without_a_run_is_told_and_left_alone(verb: str, name: str, tmp_path: Path) -> None:
    ended = b2batch(verb, tmp_path / name)

    assert ended.exit_code == 2
    assert "holds no b2batch run" in ended.stderr
    assert not list(tmp_path.iterdir())


def test_models_lists_names_and_shows_one() -> None:
    names = json.loads(b2batch("models", "list", "--json").stdout)
    shown = json.loads(b2batch("models", "show", "baichuan2-tiny", "--json").stdout)

    assert names["baichuan2-7b-chat"] == "baichuan-inc/Baichuan2-7B-Chat"
    assert names["baichuan2-tiny"] == "embedded"
    assert set(names) == {line.split()[0] for line in b2batch("models").stdout.splitlines()}
    assert (shown["model_type"], shown["num_layers"], shown["is_chat"]) == ("baichuan", 4, True)


def test_doctor_tries_the_output_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ended = b2batch("doctor", "-o", tmp_path / "out", "--json")

    verdicts = {check["name"]: check["verdict"] for check in json.loads(ended.stdout)}
    assert ended.exit_code == 0
    assert verdicts["output"] == "ok"
    assert not list(tmp_path.iterdir())


def test_doctor_fails_where_the_output_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "file").write_text("")
    ended = b2batch("doctor", "-o", tmp_path / "file" / "out")

    assert ended.exit_code == 1
    assert "fail" in ended.stdout


def test_what_nobody_raised_on_purpose_ends_with_its_traceback_and_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def break_down() -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(main, "app", break_down)
    with pytest.raises(SystemExit) as ended:
        main.main()

    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert "Traceback" in said
    assert said.splitlines()[-2] == "error: b2batch failed unexpectedly: RuntimeError: a fault of ours"


def test_python_m_is_the_same_command() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "b2batch", "--version"], capture_output=True, text=True, check=True
    )
    assert ended.stdout.startswith("b2batch ")
