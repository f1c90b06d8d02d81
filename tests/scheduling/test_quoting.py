"""Whatever stands in a command comes out of each manifest as it was put in, or is refused."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from b2batch.errors import CallerError
from b2batch.scheduling import quoting
from b2batch.scheduling.manifest import Kind

from .airflow_stand_in import load_dag
from .jobs import JOB, rendered, with_arguments, words

EXPECTED = [JOB.program, "run"]


def unquoted_by_systemd(line: str) -> list[str]:
    """The words of ``ExecStart=:`` of double-quoted words, by systemd.syntax(7) and systemd.service(5)."""
    escapes = {'\\"': '"', "\\\\": "\\", "%%": "%"}
    inner = re.findall(r'"((?:[^"\\]|\\.)*)"(?: |$)', line)
    assert not re.search(r"(?<!%)%(?:%%)*(?!%)", " ".join(inner))  # no specifier
    return [re.sub(r'\\"|\\\\|%%', lambda found: escapes[found[0]], word) for word in inner]


def expanded_by_kubernetes(argument: str) -> str:
    """As the kubelet does: $$ is $; $(NAME) would be a variable."""
    assert not re.search(r"(?<!\$)(?:\$\$)*\$\(", argument)
    return argument.replace("$$", "$")


@settings(max_examples=50)
@given(words)
def test_systemd(arguments: list[str]) -> None:
    service = rendered(Kind.SYSTEMD, with_arguments(arguments))["label-reviews.service"]

    (line,) = re.findall(r"^ExecStart=:(.*)$", service, re.MULTILINE)
    assert unquoted_by_systemd(line) == EXPECTED + arguments


@settings(max_examples=50)
@given(words)
def test_cron(arguments: list[str]) -> None:
    job = with_arguments(arguments)
    if any("\\" in argument for argument in arguments):
        with pytest.raises(CallerError, match="backslash"):
            rendered(Kind.CRON, job)
        return
    line = rendered(Kind.CRON, job)["label-reviews.crontab"].splitlines()[-1]

    assert not re.search(r"(?<!\\)%", line)
    command = line.replace("\\%", "%").split("; } && { ")[1].rpartition(" >>./label-reviews.log")[0]
    if "; } && { " not in "".join(arguments):
        assert shlex.split(command) == EXPECTED + arguments


@settings(max_examples=50)
@given(words)
def test_kubernetes(arguments: list[str]) -> None:
    manifest = yaml.safe_load(
        rendered(Kind.KUBERNETES, with_arguments(arguments))["label-reviews.cronjob.yaml"]
    )

    (container,) = manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert [expanded_by_kubernetes(argument) for argument in container["args"]] == EXPECTED + arguments


@settings(max_examples=50)
@given(words)
def test_ray_job(arguments: list[str]) -> None:
    files = rendered(Kind.RAY_JOB, with_arguments(arguments))

    entrypoint = yaml.safe_load(files["label-reviews.rayjob.yaml"])["spec"]["entrypoint"]
    found = shlex.split(entrypoint)
    assert found[3 : 3 + 2 + len(arguments)] == EXPECTED + arguments
    assert found[5 + len(arguments) :] == ["--address", "auto", "||", "test", "$?", "-eq", "99"]


@settings(max_examples=50)
@given(words)
def test_slurm(arguments: list[str]) -> None:
    script = rendered(Kind.SLURM, with_arguments(arguments))["label-reviews.sbatch"]

    (line,) = re.findall(r"^command=\((.*) --address \"\$address\"\)$", script, re.MULTILINE)
    assert shlex.split(line) == EXPECTED + arguments


@settings(max_examples=50)
@given(words)
def test_airflow(arguments: list[str]) -> None:
    operator = load_dag(rendered(Kind.AIRFLOW, with_arguments(arguments))["label-reviews.py"]).operator

    line = operator.rendered_command().splitlines()[0]
    assert shlex.split(line) == ["set", "--", JOB.directory, "./label-reviews.env", *EXPECTED, *arguments]


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b", "a\x85b", "a\u2028b", "\x1b[31m"])
def test_line_breaks_and_control_characters_are_refused(kind: Kind, value: str) -> None:
    for changes in ({"arguments": (value,)}, {"directory": f"/{value}"}, {"program": f"/{value}"}):
        given: dict[str, Any] = {"arguments": ("job.yaml",), **changes}
        with pytest.raises(CallerError, match="control character or a line break"):
            rendered(kind, with_arguments(**given))


def test_line_too_long_for_cron_is_refused() -> None:
    with pytest.raises(CallerError, match="too long for a crontab"):
        rendered(Kind.CRON, with_arguments(["x" * 1000]))


@settings(max_examples=50)
@given(st.text(st.characters(blacklist_categories=("C", "Z")), min_size=1))
def test_directory_of_a_unit(name: str) -> None:
    directory = f"/srv/{name}"
    if directory.endswith("\\"):
        with pytest.raises(CallerError, match="no way to write"):
            quoting.systemd_path(directory)
        return
    assert quoting.systemd_path(directory).replace("%%", "%") == directory
