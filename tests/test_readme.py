"""The README says what the code does: its keys, defaults, verbs, codes, columns, links and job files."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from b2batch import errors
from b2batch.errors import B2BatchError, RowFault
from b2batch.inputs import READERS
from b2batch.models.families import MODELS
from b2batch.outputs.schema import own_columns
from b2batch.spec import Example, JobSpec, Label, Message, WebhookSpec, find_fragments, parse_spec

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
both = pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
FORCED = {130, 143}  # what a second signal ends with: 128 + its number

JOB_OF_ALL_COLUMNS: dict[str, Any] = {
    "model": {"model": "owner/name"},
    "input": {"path": "rows.jsonl", "incremental": True},
    "prompt": {"column": "text", "on_too_long": "truncate_left"},
    "sampling": {"n": 2, "logprobs": 1},
    "output": {"path": "out"},
}

OTHER_TASKS: list[dict[str, Any]] = [
    {"structured_outputs": {"choice": ["a"]}, "vote": "majority", "review": {"below": 0.7}},
    {"task": "classify", "labels": ["a", "b"], "classify": {"threshold": 0.5}},
    {"task": "score", "score": {"column": "text"}},
    {"task": "embed"},
]


def rows_of_table(text: str, header: str) -> list[list[str]]:
    """The cells of the table whose first header cell is ``header``; an escaped | does not end a cell."""
    found = re.search(rf"^\| {re.escape(header)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found, f"no table begins with {header}"
    lines = found[1].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def fenced(text: str, language: str) -> list[str]:
    """The code blocks of a language; all are matched in turn, so that no closing fence opens one."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for found, code in blocks if found == language]


def keys_of_spec(section: type[BaseModel] = JobSpec, before: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key → its default as the README writes it, of all keys but those of list elements."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys_of_spec(field.annotation, f"{before}{name}.")
        elif field.is_required():
            yield before + name, "*needed*"
        else:
            yield before + name, f"`{written(field.get_default(call_default_factory=True))}`"


def written(default: Any) -> str:
    assert default is not PydanticUndefined
    return default if isinstance(default, str) and default else json.dumps(default)


@both
def test_every_key_and_default_is_in_the_table(readme: Path) -> None:
    header = "key" if readme.name == "README.md" else "键"
    table = rows_of_table(readme.read_text(encoding="utf-8"), header)

    documented = {names(key)[0]: default.replace("*必填*", "*needed*") for key, default, _ in table}

    assert documented == dict(keys_of_spec())
    assert all(meaning for _, _, meaning in table)


@both
@pytest.mark.parametrize("section", [Message, Example, Label, WebhookSpec])
def test_keys_of_list_elements_are_named(readme: Path, section: type[BaseModel]) -> None:
    text = readme.read_text(encoding="utf-8")

    assert [name for name in section.model_fields if f"`{name}`" not in text] == []


@both
def test_yaml_is_a_job(readme: Path) -> None:
    snippets = fenced(readme.read_text(encoding="utf-8"), "yaml")

    specs = [parse_spec(yaml.safe_load(snippet)) for snippet in snippets]

    assert specs
    assert all(spec.model.model in find_fragments([ROOT]) for spec in specs)


@both
def test_commands_stand_there_to_be_copied(readme: Path) -> None:
    blocks = fenced(readme.read_text(encoding="utf-8"), "")

    assert "pip install -c constraints.txt -e '.[dev]' && b2batch run jobs/quickstart.yaml\n" in blocks
    assert "python -m pytest\n" in blocks
    assert (ROOT / "jobs" / "quickstart.yaml").is_file()
    assert "python -m pytest" in (ROOT / ".ci" / "run").read_text()
    assert "-c constraints.txt -e '.[dev]'" in (ROOT / ".ci" / "run").read_text()


@both
def test_line_that_shows_rows_is_the_quickstarts_output(readme: Path) -> None:
    (line,) = [block for block in fenced(readme.read_text(encoding="utf-8"), "") if "pq.read_table" in block]
    code = re.search(r'python -c "(.*)"\n', line)
    quickstart = parse_spec(yaml.safe_load((ROOT / "jobs" / "quickstart.yaml").read_text(encoding="utf-8")))

    assert code
    compile(code[1], "README", "exec")
    assert f"read_table('{quickstart.output.path}')" in code[1]


@both
def test_exit_codes_are_those_of_the_errors(readme: Path) -> None:
    header = "code" if readme.name == "README.md" else "退出码"
    table = rows_of_table(readme.read_text(encoding="utf-8"), header)

    documented = {int(code) for cell, *_ in table for code in re.findall(r"\d+", cell)}

    raised = {
        error.exit_code
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, B2BatchError)
    }
    assert documented == {0} | raised | FORCED


@both
def test_verbs_are_those_of_the_command(readme: Path) -> None:
    app = importlib.import_module("b2batch.cli.main").app
    text = readme.read_text(encoding="utf-8")

    documented = re.findall(r"^\| `b2batch (\w+)[^`]*` \|", text, re.MULTILINE)

    assert sorted(documented) == sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@both
def test_options_that_are_named_exist(readme: Path) -> None:
    app = importlib.import_module("b2batch.cli.main").app
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {
        option
        for command in commands.values()
        for p in command.params
        for option in (*p.opts, *p.secondary_opts)
    }

    named = set(re.findall(r"`(--?[a-z][a-z-]*)", readme.read_text(encoding="utf-8")))

    assert named - known - {"--help", "-4bits"} == set()


@both
def test_row_faults_are_all_explained(readme: Path) -> None:
    header = "type" if readme.name == "README.md" else "类型"
    table = rows_of_table(readme.read_text(encoding="utf-8"), header)

    assert [name for cell, *_ in table for name in names(cell)] == [fault.value for fault in RowFault]


@both
def test_output_columns_are_all_described(readme: Path) -> None:
    header = "column" if readme.name == "README.md" else "列"
    table = rows_of_table(readme.read_text(encoding="utf-8"), header)

    documented = [name for cell, *_ in table for name in names(cell)]

    columns = [list(own_columns(parse_spec(JOB_OF_ALL_COLUMNS | other))) for other in OTHER_TASKS]
    assert set(documented) == {name for names in columns for name in names}
    for names_of_task in columns:
        assert [name for name in documented if name in names_of_task] == names_of_task


@both
def test_links_lead_somewhere(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {heading.lower().replace(" ", "-") for heading in headings}

    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        assert path or anchor in anchors, target


@both
def test_places_to_extend_exist(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")

    assert "`MODELS`" in text
    assert "`READERS`" in text
    assert "baichuan" in MODELS
    assert [name for name in READERS if f"`{name}`" not in text] == []
    for path in re.findall(r"`(b2batch/[\w/]+\.py|configs/[\w/]+)/?`", text):
        assert (ROOT / path).exists(), path
