"""``b2batch models``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from b2batch.cli.options import Json, Verbose, log_to_stderr
from b2batch.cli.printing import count, gigabytes, print_facts, print_json, size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from b2batch.models.facts import ModelFacts

models = typer.Typer(help="List the models that have a name here, or show one (list is the default).")


@models.callback(invoke_without_command=True)
def _default(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        list_models()


@models.command("list")
def list_models(as_json: Json = False) -> None:
    """List the names that model.model knows here: of configs/models, and the embedded ones."""
    from b2batch.spec import named_models

    names = named_models([Path.cwd()])
    if as_json:
        print_json(names)
        return
    width = max(map(len, names))
    for name, source in names.items():
        typer.echo(f"{name:<{width}}  {source}")


@models.command("show")
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME|PATH", help="A name, a hub id, ms://owner/name or a directory.")
    ],
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show a model's architecture as its config tells it; no weight is read."""
    log_to_stderr(verbose)
    from b2batch.models.facts import find_facts
    from b2batch.spec import find_model

    facts = find_facts(find_model(name, [Path.cwd()]))
    if as_json:
        print_json(facts)
    else:
        print_facts(_lines(facts))


@models.command("quantize")
def quantize(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A name, a hub id, ms://owner/name or a directory.")
    ],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The directory to write.")],
    method: Annotated[
        str | None, typer.Option("--to", metavar="nf4|int8", help="How; a quantised SRC keeps its own.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Write a model's weights quantised, in a format that loads without quantising again."""
    log_to_stderr(verbose)
    from b2batch.models.saving import quantize_checkpoint
    from b2batch.spec import find_model

    num_bytes = quantize_checkpoint(find_model(source, [Path.cwd()], quantization=method), destination)
    typer.echo(f"{destination}: {size(num_bytes)} of weights")


def _lines(facts: ModelFacts) -> Iterator[tuple[str, str]]:
    yield "model", facts.source
    yield "type", f"{facts.model_type}: {facts.variant}"
    yield "prompts", "chat format" if facts.is_chat else "plain text (no chat format)"
    heads = f"{facts.num_heads} heads"
    if facts.num_kv_heads != facts.num_heads:
        heads += f" ({facts.num_kv_heads} of keys and values)"
    yield "size", f"{facts.num_layers} layers, hidden {count(facts.hidden_size)}, {heads}"
    yield "parameters", count(facts.num_parameters)
    yield "vocabulary", count(facts.vocab_size)
    yield "context", f"{count(facts.max_model_len)} tokens, {size(facts.kv_bytes_per_token)} of KV each"
    kept = facts.dtype + (f", quantised: {facts.quantization}" if facts.quantization else "")
    yield "weights", f"{gigabytes(facts.weight_bytes)} on a GPU ({kept})"
