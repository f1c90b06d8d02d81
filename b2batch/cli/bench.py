"""``b2batch bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from b2batch.cli.options import Json, Set, Verbose, log_to_stderr
from b2batch.cli.printing import print_facts, print_json
from b2batch.errors import MeasurementFailed

if TYPE_CHECKING:
    from b2batch.bench.record import RunRecord

_DEFAULTS = {
    "cpu": ["label", "score"],
    "cuda": ["roofline", "label-170", "label-500", "label-1500", "score", "roofline-13b"],
}


def bench(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WORKLOAD", help="Names in configs/bench or YAML files; none: label and score."
        ),
    ] = None,
    overrides: Set = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="What the models run on.")] = "cpu",
    model: Annotated[
        str, typer.Option(metavar="DIR|NAME", help="Replaces the workload's model; random-7b, random-13b, …")
    ] = "",
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Prompts to answer; without it they are made up."),
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Rounds of each peer.")] = None,
    peers: Annotated[
        str, typer.Option(metavar="A,B,…", help="Replaces the workload's peers; names are in the docs.")
    ] = "",
    minutes: Annotated[float | None, typer.Option(min=0.1, help="Of faults (b2batch bench faults).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Replaces the workload's seed.")] = None,
    vllm_python: Annotated[str, typer.Option(metavar="PYTHON", help="An interpreter that has vllm.")] = "",
    gguf: Annotated[str, typer.Option(metavar="FILE", help="The model's weights for llama.cpp.")] = "",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Append each run's record as a JSON line.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Draw the peers (needs plotly).")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the workloads and stop.")] = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure the engine beside its peers, or the driver at scale (driver), or let jobs suffer (faults).

    ``faults`` ends with 1 when a row was lost or doubled, or anything else that is promised did not hold.
    """
    log_to_stderr(verbose)
    from b2batch.bench.bench import BenchOptions, run_bench
    from b2batch.bench.comparison import Tools
    from b2batch.bench.plot import require_plotly, write_plot
    from b2batch.bench.workload import find_workloads, load_workload

    if list_:
        print_facts((name, load_workload(name).description) for name in sorted(find_workloads()))
        return
    if plot is not None:
        require_plotly()
    given = {"repeats": repeats, "peers": f"[{peers}]" if peers else None, "minutes": minutes, "seed": seed}
    chosen = [*(overrides or ()), *(f"{key}={value}" for key, value in given.items() if value is not None)]
    loaded = [(Path(name).stem, load_workload(name, chosen)) for name in workloads or _DEFAULTS[device]]
    options = BenchOptions(
        device=device,
        model=model,
        prompts=prompts,
        tools=Tools(vllm_python, str(Path(gguf).absolute()) if gguf else ""),
        on_progress=lambda text: typer.echo(text, err=True),
    )
    for name, workload in loaded:
        result = run_bench(name, workload, options)
        if out is not None:
            result.record.append_to(out)
        if plot is not None and result.comparison is not None:
            write_plot(
                result.comparison, name, plot if len(loaded) == 1 else plot.with_stem(f"{plot.stem}-{name}")
            )
        if as_json:
            print_json(result.record)
        else:
            _print_tables(result)
        _refuse_violations(result.record)


def _refuse_violations(record: RunRecord) -> None:
    violations = record.measurements.get("violations", [])
    if violations:
        raise MeasurementFailed("\n".join([f"{len(violations)} violations:", *violations[:20]]))


def _print_tables(result: object) -> None:
    from rich.console import Console

    from b2batch.bench.bench import BenchResult
    from b2batch.bench.table import tables

    assert isinstance(result, BenchResult)
    console = Console(width=None if Console().is_terminal else 160)
    for table in tables(result.record, result.comparison):
        console.print(table)
    for peer in result.comparison.peers if result.comparison else ():
        if peer.error:
            console.print(f"{peer.name}: {peer.error}", style="yellow", markup=False)
