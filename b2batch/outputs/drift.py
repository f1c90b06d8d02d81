"""Saying what differs between the run that an output holds and the one that is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from b2batch.errors import DriftError
from b2batch.outputs.record import RunRecord

_MAX_LINES = 20
_ABSENT = object()


def check_drift(found: RunRecord, wanted: RunRecord, where: str) -> None:
    """Pass when both are the same run.

    Raises:
        DriftError: with one line for each setting and each input file that differs.
    """
    if found.run_id == wanted.run_id:
        return
    lines = diff_config(found, wanted)
    if found.plan_digest != wanted.plan_digest:
        lines += _diff_input(found, wanted)
    if len(lines) > _MAX_LINES:
        lines[_MAX_LINES:] = [f"… and {len(lines) - _MAX_LINES} more"]
    raise DriftError(
        f"{where} holds run {found.run8}, which was made from something else (old -> new):\n"
        + "\n".join(f"  {line}" for line in lines)
        + "\nUndo the change, choose another output.path ({run8} in it gives each run its own), "
        "or replace the old output with --overwrite."
    )


def diff_config(found: RunRecord, wanted: RunRecord) -> list[str]:
    """A line for each setting that differs and decides the result."""
    return list(diff_values(found.config, wanted.config))


def diff_values(old: Any, new: Any, field: str = "") -> Iterator[str]:
    """``a.b: old -> new`` for each leaf that differs between two JSON-like values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}, key=str):
            yield from diff_values(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{field}.{key}".lstrip("."))
    elif _shown(old) != _shown(new):
        yield f"{field}: {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    # As JSON, since the old value was read back from JSON: a tuple and a list are the same setting.
    if value is _ABSENT:
        return "(absent)"
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _diff_input(found: RunRecord, wanted: RunRecord) -> list[str]:
    lines = list(_diff_files(found.files, wanted.files))
    # Same files, other plan: a setting that says how they are read and cut into units.
    return (
        lines
        or list(diff_values(found.spec["input"], wanted.spec["input"], "input"))
        or [f"plan: {_plan_shown(found)} -> {_plan_shown(wanted)}"]
    )


def _plan_shown(record: RunRecord) -> str:
    return f"{record.num_units} units, digest {record.plan_digest[:8]}"


def _diff_files(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    old_files = {file["path"]: file for file in old}
    new_files = {file["path"]: file for file in new}
    for path in sorted({*old_files, *new_files}):
        before, after = _fingerprint(old_files.get(path)), _fingerprint(new_files.get(path))
        if before != after:
            yield f"input file {path}: {before} -> {after}"


def _fingerprint(file: Mapping[str, Any] | None) -> str:
    if file is None:
        return "(absent)"
    # Not the time of writing: a copied file is the same input.
    kind, _, digest = str(file.get("fingerprint", "")).partition(":")
    return f"{file.get('size')} bytes, {kind} {digest[:12]}"
