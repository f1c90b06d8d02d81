"""The job file as it is written: YAML, read strictly, and keys put into it before it is judged."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from b2batch.errors import SpecError

MAX_JOB_FILE_BYTES = 256 * 1024


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and aliases (a way to expand a small file without end)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise SpecError(f"line {mark.line + 1}: YAML aliases (*name) are not allowed in a job file")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise SpecError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds, read strictly; SpecError names the file and the line."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JOB_FILE_BYTES + 1)  # a pipe or device has no size to ask for
        if len(content) > MAX_JOB_FILE_BYTES:
            raise SpecError(f"larger than {MAX_JOB_FILE_BYTES} bytes, which no job file is")
        document = yaml.load(content.decode("utf-8"), _StrictLoader)
    except FileNotFoundError:
        raise SpecError(f"{path}: there is no such job file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise SpecError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise SpecError(f"{path}: a job file is a mapping of keys, found {type(document).__name__}")
    return document


def apply_overrides(document: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``document`` with ``a.b=value`` overrides put in; values are read as YAML scalars or lists."""
    values: dict[str, Any] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise SpecError(f"--set {override}: expected KEY=VALUE, such as sampling.max_tokens=64")
        try:
            values[dotted] = yaml.load(text, _StrictLoader) if text else None
        except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
            raise SpecError(
                f"--set {override}: not a YAML value: {error}; "
                "text with braces needs quotes: KEY='\"{{ text }}\"'"
            ) from error
    return set_values(document, values)


def set_values(document: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``document`` with the value of each dotted key put in, sections made where there are none."""
    merged: dict[str, Any] = json.loads(json.dumps(document, default=str))
    for dotted, value in values.items():
        section = merged
        *parents, leaf = dotted.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise SpecError(f"{dotted}: {parent} is not a section")
        section[leaf] = value
    return merged
