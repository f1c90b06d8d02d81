"""The user's own Python: objects by ``package.module:name``, and the functions a job runs on its rows."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from b2batch.spec.section import Section


class ProcessorSpec(Section):
    """A function of the user's; the text of its module is read when the job is, and becomes part of it."""

    function: str | None = Field(default=None, description="package.module:function")
    source: str = Field(default="", description="the module's text; read by itself")

    @model_validator(mode="before")
    @classmethod
    def _read_source(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"function": data}
        if not isinstance(data, Mapping) or not data.get("function") or data.get("source"):
            return data
        return {**data, "source": _module_source(str(data["function"]))}


class PostprocessSpec(ProcessorSpec):
    """Also which columns the function gives, with their types."""

    columns: Mapping[str, Literal["string", "int64", "double", "bool"]] = Field(default_factory=dict)


def _module_source(name: str) -> str:
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"expected package.module:function, found {name!r}")
    _look_here()
    try:
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:
            raise ValueError(f"there is no module {module}")
        return Path(found.origin).read_text(encoding="utf-8")
    except (ImportError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{module} cannot be read: {error}") from error


def import_object(name: str) -> Any:
    """What ``package.module:name`` stands for; the current directory is looked in as well.

    Raises:
        ValueError: there is no such thing.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"expected package.module:name, found {name!r}")
    _look_here()
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the user's module does when it is imported
        raise ValueError(f"{module} cannot be imported: {type(error).__name__}: {error}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{module} has no {attribute}")
        found = getattr(found, part)
    return found


def _look_here() -> None:
    """Let modules of the current directory be found, as ``python`` itself would."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
