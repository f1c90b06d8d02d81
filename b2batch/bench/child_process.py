"""One measurement in a process of its own, from the parent's side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import b2batch
from b2batch.errors import MeasurementFailed

_SHOWN_CHARS = 600
_PACKAGE = Path(b2batch.__file__).parent
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")


def run_child(
    module: str, document: Mapping[str, Any], *, threads: int = 1, python: str = sys.executable
) -> dict[str, Any]:
    """``b2batch.bench.MODULE.run(document)`` in a new process of ``python``.

    Thread counts stand in its environment before anything is imported: a library reads them once.

    Raises:
        MeasurementFailed: it did not end well.
    """
    with tempfile.TemporaryDirectory(prefix="b2batch-bench-") as scratch, tempfile.TemporaryFile() as log:
        # A path that holds this package and nothing else: another interpreter keeps its own libraries.
        Path(scratch, _PACKAGE.name).symlink_to(_PACKAGE)
        environment = {
            **os.environ,
            **dict.fromkeys(_THREAD_VARIABLES, str(threads)),
            "PYTHONPATH": scratch,
            "TOKENIZERS_PARALLELISM": "false",
        }
        done = subprocess.run(
            [python, "-m", "b2batch.bench.child", module],
            input=json.dumps(document).encode(),
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            cwd=scratch,
            check=False,
        )
        if done.returncode:
            log.seek(0)
            raise MeasurementFailed(_reason(log.read().decode("utf-8", "replace"), done.returncode))
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _reason(log: str, returncode: int) -> str:
    """The line that says what went wrong: the last that is not part of a traceback's frames."""
    lines = [line for line in log.splitlines() if line.strip() and not line.startswith(" ")]
    return (lines[-1] if lines else f"ended with code {returncode}")[:_SHOWN_CHARS]
