"""``b2batch validate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from b2batch.cli.options import Config, Input, Job, Json, Limit, Output, Set, Verbose, log_to_stderr, read_job
from b2batch.cli.printing import count, plural, print_facts, print_json, size

if TYPE_CHECKING:
    from b2batch.validation import Validation


def validate(
    job: Job = None,
    config: Config = None,
    overrides: Set = None,
    paths: Input = None,
    output: Output = None,
    limit: Limit = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Check a job quickly: keys, model, prompt, columns, first rows, where the output goes."""
    log_to_stderr(verbose)
    spec = read_job(
        job, config, overrides, {"input.path": paths, "output.path": output, "input.limit": limit}
    )
    from b2batch.validation import validate_job

    found = validate_job(spec)
    if as_json:
        print_json(found)
    else:
        _print(found)


def _print(found: Validation) -> None:
    model = found.model
    kind = "chat format" if found.uses_chat else "plain text"
    print_facts(
        [
            ("ok", "job file: every key is known and in range"),
            ("ok", f"model: {model.source}: {model.variant}, context {count(model.max_model_len)}"),
            ("ok", f"prompt: {kind}; its columns are in the input"),
            ("ok", f"input: {plural(found.num_files, 'file')}, {size(found.num_bytes)}"),
            ("", f"columns: {', '.join(found.columns)}"),
            ("ok", f"output: {found.output}, with {', '.join(found.output_columns)}"),
        ]
    )
    if found.webhooks:
        print_facts([("ok", f"notify: {', '.join(found.webhooks)}; `b2batch notify` sends them a test")])
    if found.num_bad_rows:
        bad = f"{found.num_bad_rows} of the first {plural(found.num_rows, 'row')} would be row errors"
        print_facts([("warn", bad), ("", found.first_fault)])
    else:
        print_facts([("ok", f"rows: rendered and tokenised the first {plural(found.num_rows, 'row')}")])
    print_facts([("not checked", "weights, later rows; `b2batch plan` reads the whole input")])
