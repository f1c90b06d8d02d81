"""From a job file to a validated spec, or one for each revision it lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from b2batch.errors import SpecError
from b2batch.spec.document import apply_overrides, read_yaml, set_values
from b2batch.spec.explanation import explain
from b2batch.spec.fragments import apply_fragment
from b2batch.spec.job import JobSpec


def parse_spec(document: Mapping[str, Any]) -> JobSpec:
    """A validated spec; SpecError lists every fault with its field, value and what is allowed."""
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        raise SpecError("\n".join(explain(fault) for fault in error.errors())) from None


def load_spec(
    path: str | Path, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None
) -> JobSpec:
    """Read a job file, override keys, resolve the model's name and validate.

    Args:
        overrides: ``a.b=value``, the value in YAML.
        values: dotted key → value as it is; these win.
    """
    specs = load_specs(path, overrides, values)
    if len(specs) > 1:
        raise SpecError(
            f"{path}: model.revision lists {len(specs)} revisions, a job each: `b2batch run` runs them all; "
            f"for anything else choose one: --set model.revision=[{specs[0].model.revision}]"
        )
    return specs[0]


def load_specs(
    path: str | Path, overrides: Iterable[str] = (), values: Mapping[str, Any] | None = None
) -> list[JobSpec]:
    """As ``load_spec``, but a job file that lists revisions of a model makes a spec of each.

    Their outputs stand side by side in ``output.path``, or where ``{revision}`` stands in it.
    """
    document = set_values(apply_overrides(read_yaml(Path(path)), overrides), values or {})
    try:
        resolved = apply_fragment(document, [Path(path).parent, Path.cwd()])
        return [parse_spec(one) for one in _one_a_revision(resolved)]
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None


def _one_a_revision(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    model, output = document.get("model"), document.get("output")
    revisions = model.get("revision") if isinstance(model, Mapping) else None
    if not isinstance(revisions, list):
        return [document]
    names = [re.sub(r"[^\w.-]", "-", str(revision)) for revision in revisions]
    if not names or len(set(names)) < len(names) or not all(isinstance(item, str) for item in revisions):
        raise SpecError(f"model.revision: a list needs different revisions, in quotes, found {revisions}")
    path = output.get("path") if isinstance(output, Mapping) else None
    if not isinstance(path, str):
        return [document]  # refused for its output
    pattern = path if "{revision}" in path else f"{path.rstrip('/')}/{{revision}}"
    return [
        set_values(document, {"model.revision": revision, "output.path": pattern.replace("{revision}", name)})
        for revision, name in zip(revisions, names, strict=True)
    ]
