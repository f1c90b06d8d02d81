"""What the driver sends a replica; without torch, which a driver is spared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from b2batch.inputs.files import InputFile
from b2batch.spec import JobSpec


@dataclass(frozen=True, slots=True)
class WorkerArgs:
    """All that a worker needs to know of a run; small, and safe to pickle."""

    spec: JobSpec
    files: tuple[InputFile, ...]
    input_schema: pa.Schema
    output_uri: str
    run_id: str
    epoch: int
    provenance: Mapping[str, Any]
