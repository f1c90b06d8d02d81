"""``b2batch preview``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from b2batch.cli.options import Config, Input, Job, Json, Output, Set, Verbose, log_to_stderr, read_job
from b2batch.cli.printing import print_json

if TYPE_CHECKING:
    from b2batch.preview import PreviewRow


def preview(
    job: Job = None,
    config: Config = None,
    overrides: Set = None,
    paths: Input = None,
    output: Output = None,
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, help="How many rows.")] = 5,
    generate: Annotated[bool, typer.Option(help="Load the model here and show its answers.")] = True,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show the first prompts as the model reads them, and its answers; nothing is written."""
    log_to_stderr(verbose)
    spec = read_job(job, config, overrides, {"input.path": paths, "output.path": output})
    from b2batch.preview import preview_job

    rows = preview_job(spec, limit, generate=generate)
    if as_json:
        from dataclasses import asdict

        print_json([asdict(row) for row in rows])
        return
    for row in rows:
        _print(row)
    if not rows:
        typer.echo("the input has no rows")


def _print(row: PreviewRow) -> None:
    cut = ", cut by prompt.on_too_long" if row.prompt_truncated else ""
    typer.secho(f"── row {row.row_id} · {row.num_input_tokens} tokens{cut}", bold=True)
    for message in row.messages:
        typer.echo(f"[{message['role']}] {message['content']}")
    if row.text is not None:
        typer.echo(row.text)
    if row.answer is not None:
        reason = f"  ({row.finish_reason})" if row.finish_reason else ""
        typer.secho(f"→ {row.answer}{reason}", fg=typer.colors.GREEN)
    if row.error:
        typer.secho(f"✗ {row.error}", fg=typer.colors.RED)
    typer.echo()
