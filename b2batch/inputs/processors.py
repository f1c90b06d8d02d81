"""A user's own functions on the way of a row: before its prompt is rendered, and after it is answered.

The text of the function's module is part of the job (``spec.ProcessorSpec``), so what runs on a replica
is what the run was started with, wherever the module's file is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from b2batch.errors import RowError, RowFault, SpecError, Stage
from b2batch.spec import ProcessorSpec

Values = Mapping[str, Any]


def load_processor(spec: ProcessorSpec, where: str) -> Callable[..., Any]:
    """The function that ``spec`` names, from the module text it holds.

    Raises:
        SpecError: the module fails, or has no such function; ``where`` names the setting.
    """
    module_name, _, function_name = str(spec.function).partition(":")
    module = ModuleType(f"b2batch_job.{module_name}")
    sys.modules[module.__name__] = module  # dataclasses and pickles look their module up
    try:
        exec(compile(spec.source, f"{module_name}.py", "exec"), module.__dict__)
    except Exception as error:  # whatever the user's module does
        raise SpecError(f"{where}: {module_name} fails: {type(error).__name__}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise SpecError(f"{where}: {module_name} has no function {function_name!r}")
    return function  # type: ignore[no-any-return]


def process(function: Callable[..., Any], where: str, stage: Stage, *arguments: Values) -> dict[str, Any]:
    """What a processor returns for one row.

    Raises:
        RowError: it raised, or returned something else than a mapping of names.
    """
    try:
        result = function(*(dict(argument) for argument in arguments))
    except Exception as error:  # whatever the user's function does is this row's error
        raise RowError(RowFault.PROCESSOR, f"{where}: {type(error).__name__}: {error}", stage) from error
    if not isinstance(result, Mapping) or not all(isinstance(name, str) for name in result):
        found = type(result).__name__
        raise RowError(RowFault.PROCESSOR, f"{where}: expected a dict of columns, found {found}", stage)
    return dict(result)
