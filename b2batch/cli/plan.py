"""``b2batch plan``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from b2batch.cli.options import Config, Input, Job, Json, Limit, Output, Set, Verbose, log_to_stderr, read_job
from b2batch.cli.printing import (
    count,
    gigabytes,
    magnitude,
    plural,
    print_facts,
    print_json,
    share,
    shorten,
    size,
)

if TYPE_CHECKING:
    from b2batch.estimate import Estimate

_SHOWN_FILES = 5
_BAR_CHARS = 40


def plan(
    job: Job = None,
    config: Config = None,
    overrides: Set = None,
    paths: Input = None,
    output: Output = None,
    limit: Limit = None,
    gpu_memory: Annotated[
        str | None, typer.Option("--gpu-memory", metavar="24GB", help="See how the model fits such a GPU.")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what a run would do: rows, units, prompt lengths, the model, what is committed already."""
    log_to_stderr(verbose)
    spec = read_job(
        job, config, overrides, {"input.path": paths, "output.path": output, "input.limit": limit}
    )
    from b2batch.engine.memory_plan import parse_size
    from b2batch.estimate import estimate_job

    found = estimate_job(spec, None if gpu_memory is None else parse_size(gpu_memory))
    if as_json:
        print_json(found)
        return
    print_facts(_input_facts(found))
    print_facts(_prompt_facts(found))
    print_facts(_model_facts(found))
    print_facts(_output_facts(found))


def _input_facts(found: Estimate) -> Iterator[tuple[str, str]]:
    yield "job", f"{found.name}, run {found.run_id[:8]}"
    for index, file in enumerate(found.files[:_SHOWN_FILES]):
        yield "" if index else "input", file
    if len(found.files) > _SHOWN_FILES:
        yield "", f"and {plural(len(found.files) - _SHOWN_FILES, 'more file')}"
    blank = f"; {plural(found.num_blank, 'blank line')} left out" if found.num_blank else ""
    yield "rows", f"{count(found.num_rows)} in {plural(found.num_units, 'unit')}{blank}"
    yield "columns", ", ".join(f"{name} ({kind})" for name, kind in found.columns.items())


def _prompt_facts(found: Estimate) -> Iterator[tuple[str, str]]:
    lengths = found.lengths
    of = "all rows" if lengths.is_whole_input else f"a sample of {plural(lengths.num_rows, 'row')}"
    kind = "chat format" if found.uses_chat else "plain text"
    yield (
        "prompts",
        f"{kind}; tokens of {of}: median {lengths.median}, 99 % ≤ {lengths.p99}, longest {lengths.longest}",
    )
    highest = max((bin_.num_prompts for bin_ in lengths.histogram), default=1)
    for bin_ in lengths.histogram:
        bar = "█" * round(_BAR_CHARS * bin_.num_prompts / highest)
        yield "", f"{f'{bin_.low}–{bin_.high}':>11} {bin_.num_prompts:>6} {bar}"
    if lengths.num_too_long:
        yield (
            "too long",
            (
                f"{lengths.num_too_long} ({share(lengths.num_too_long, lengths.num_rows)}) have no room for "
                f"an answer in {found.model.max_model_len} tokens: row errors (see prompt.on_too_long)"
            ),
        )
    if lengths.num_truncated:
        yield "cut", f"{lengths.num_truncated} prompts are cut by prompt.on_too_long"
    if lengths.num_short_of_room:
        yield "short", f"{lengths.num_short_of_room} have less room than max_tokens: answers may be cut"
    if lengths.failures:
        kinds = ", ".join(f"{number} {name}" for name, number in lengths.failures.items())
        yield "row errors", f"{kinds} in {of}; the first: {shorten(lengths.example, 160)}"


def _model_facts(found: Estimate) -> Iterator[tuple[str, str]]:
    model = found.model
    yield (
        "model",
        (
            f"{model.source}: {model.variant}; {magnitude(model.num_parameters)} parameters, "
            f"context {count(model.max_model_len)}, "
            f"{size(model.kv_bytes_per_token)} of KV a token ({model.dtype})"
        ),
    )
    yield from _memory_facts(found)
    sampling = {"temperature": 0.0, **found.sampling}
    yield "sampling", ", ".join(f"{key} {value}" for key, value in sampling.items())
    most = (
        "up to the context (sampling.max_tokens is not set)"
        if found.max_generated_tokens is None
        else f"at most {count(found.max_generated_tokens)} out"
    )
    about = "" if found.lengths.is_whole_input else "about "
    yield "tokens", f"{about}{count(found.num_input_tokens)} in, {most}"


def _memory_facts(found: Estimate) -> Iterator[tuple[str, str]]:
    model = found.model
    kept = model.quantization or model.dtype
    yield (
        "memory",
        (
            f"{gigabytes(model.weight_bytes)} of weights ({kept}), {gigabytes(found.workspace_bytes)} for a "
            "step's work, the rest for KV"
        ),
    )
    if found.fit is not None:
        fit = found.fit
        room = f"{count(fit.num_kv_tokens)} tokens of KV, {fit.num_contexts:.1f} full contexts"
        gpus = f"{fit.num_devices} × " if fit.num_devices > 1 else ""
        yield "", f"on {gpus}{gigabytes(fit.device_bytes)}: {room}; {fit.advice}"


def _output_facts(found: Estimate) -> Iterator[tuple[str, str]]:
    standing = found.standing
    yield "output", found.output
    match standing.state:
        case "new":
            yield "", "new: nothing is committed"
        case "resumes":
            yield "", f"resumes: {standing.num_units_committed} of {found.num_units} units are committed"
        case "grows":
            yield "", f"grows: {standing.num_units_committed} of {found.num_units} units are committed"
        case "finished":
            yield "", "finished already: a run has nothing to do"
        case _:
            yield "", f"a run would be refused (exit 4): {standing.detail}"
