"""``b2batch export``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from b2batch.cli.options import Json, Verbose, log_to_stderr
from b2batch.cli.printing import plural, print_facts, print_json


def export(
    output: Annotated[str, typer.Argument(metavar="OUT", help="A finished output directory.")],
    to: Annotated[Path, typer.Option("-o", "--output", help="The file of the responses.")],
    errors: Annotated[Path, typer.Option("--errors", help="The file of the errors.")],
    format_: Annotated[
        str, typer.Option("--format", help="openai: batch output and error files.")
    ] = "openai",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a finished output of OpenAI batch lines as OpenAI batch output and error files."""
    log_to_stderr(verbose)
    if format_ != "openai":
        raise typer.BadParameter(f"{format_}: the format is openai", param_hint="--format")
    from b2batch.export import export_openai

    with to.open("w", encoding="utf-8") as responses, errors.open("w", encoding="utf-8") as failed:
        exported = export_openai(output, responses, failed, created_s=int(time.time()))
    if as_json:
        print_json(exported)
        return
    told = [("responses", exported.num_responses, to), ("errors", exported.num_errors, errors)]
    print_facts((name, f"{plural(number, 'line')} in {path}") for name, number, path in told)
