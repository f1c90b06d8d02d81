"""A benchmark workload as a YAML file: what is answered, how often, by which peers.

Every workload states its warm-up, repeats, dtype and threads. ``auto`` dtype is float32 on a CPU, where
all peers must give the same greedy tokens, and bfloat16 on a GPU.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from b2batch.bench.peers import split_name
from b2batch.errors import SpecError
from b2batch.spec import apply_overrides, config_digest, read_yaml

_DIRECTORY = Path("configs", "bench")
_CHECKOUT = Path(__file__).parents[2]


def _known_peer(name: str) -> str:
    split_name(name)
    return name


PeerName = Annotated[str, AfterValidator(_known_peer)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class PromptShape(_Section):
    """Made-up prompts, for when no file of prompts is given. Sizes are words, about as many tokens."""

    shared_words: int = Field(default=0, ge=0, description="of an instruction that all rows begin with")
    min_words: int = Field(default=20, ge=1)
    max_words: int = Field(default=150, ge=1)
    seed: int = 0


class _Workload(_Section):
    description: str

    @property
    def digest(self) -> str:
        """sha256 of all settings."""
        return config_digest(self.model_dump(mode="json"))


class _ModelWorkload(_Workload):
    model: str = Field(description="a model directory, an embedded model, or random-7b / random-13b")
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    threads: int = Field(default=1, ge=1)
    repeats: int = Field(default=3, ge=1)
    max_model_len: int = Field(default=1024, ge=16)


class _RowsWorkload(_ModelWorkload):
    rows: int = Field(ge=1)
    warmup: int = Field(
        default=4, ge=0, description="rows answered before the clock starts; they share nothing"
    )
    prompts: PromptShape = PromptShape()
    peers: tuple[PeerName, ...] = Field(min_length=1)


class GenerateWorkload(_RowsWorkload):
    """Rows that are answered with text. ``max_tokens`` holds where the file of prompts says nothing."""

    kind: Literal["generate"]
    max_tokens: int = Field(ge=1)
    n: int = Field(default=1, ge=1)
    temperature: float = Field(default=0.0, ge=0.0)
    seed: int = 0
    ignore_eos: bool = False


class ScoreWorkload(_RowsWorkload):
    """Rows whose ``choices`` are rated by their likelihood after prompt and ``answer_prefix``."""

    kind: Literal["score"]
    choices: tuple[str, ...] = Field(min_length=2)
    answer_prefix: str = ""


class Roofline(_Section):
    """What the device can do at best, measured on it."""

    bytes_per_s: float = Field(gt=0)
    flops_per_s: float = Field(gt=0)


class StepsWorkload(_ModelWorkload):
    """The engine's speed at fixed batch and context, through its public interface."""

    kind: Literal["steps"]
    batches: tuple[int, ...] = Field(min_length=1)
    contexts: tuple[int, ...] = Field(min_length=1)
    num_steps: int = Field(default=16, ge=1, description="decode steps timed at each point")
    prefill_tokens: int = Field(default=4096, ge=1, description="prompt tokens timed at each context")
    quantization: Literal["nf4", "int8"] | None = None
    kv: Literal["free memory", "needed"] = Field(
        default="free memory", description="what keys and values take on a GPU; needed: to measure the peak"
    )
    roofline: Roofline | None = Field(
        default=None, description="of a GPU and weights in full precision; not used on a CPU"
    )


class DriverWorkload(_Workload):
    """The driver's share of a large run, with fake engines."""

    kind: Literal["driver"]
    num_units: int = Field(ge=1)
    num_replicas: int = Field(ge=1)
    num_committed: int = Field(ge=1, description="parts that a resume finds")
    num_parquet_files: int = Field(ge=1)
    jsonl_bytes: int = Field(ge=1)
    unit_s: float = Field(default=60.0, gt=0, description="how long a replica takes for a unit")
    simulated_s: float = Field(default=600.0, gt=0, description="of the driver's loop, on a simulated clock")
    ray_s: float = Field(default=30.0, ge=0, description="of the loop over real Ray calls; 0: leave it out")


class JobWorkload(_Workload):
    """Whole jobs on the embedded model with so many replicas, beside the engine alone on the same rows."""

    kind: Literal["job"]
    rows: int = Field(ge=10)
    rows_per_unit: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    replicas: tuple[int, ...] = Field(min_length=1)
    repeats: int = Field(default=3, ge=1)


class FaultsWorkload(_Workload):
    """Jobs on the embedded model under random faults; ``seed`` decides the jobs and the faults."""

    kind: Literal["faults"]
    minutes: float = Field(gt=0, description="of faults; the last job is then brought to its end")
    seed: int = Field(ge=0)
    rows: int = Field(ge=1, description="of each job")
    rows_per_unit: int = Field(ge=1)
    max_tokens: int = Field(ge=1)
    mean_gap_s: float = Field(gt=1.0, description="between two faults")
    patience_s: float = Field(ge=0.0, description="longer to wait when no new rows came since the last one")


Workload = Annotated[
    GenerateWorkload | ScoreWorkload | StepsWorkload | DriverWorkload | JobWorkload | FaultsWorkload,
    Field(discriminator="kind"),
]
_ADAPTER: TypeAdapter[Workload] = TypeAdapter(Workload)


def find_workloads() -> dict[str, Path]:
    """Name → file of each ``configs/bench/NAME.yaml`` in or above here, or of this checkout."""
    here = Path.cwd()
    found: dict[str, Path] = {}
    for place in (here, *here.parents, _CHECKOUT):
        for path in sorted((place / _DIRECTORY).glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def load_workload(name: str, overrides: Iterable[str] = ()) -> Workload:
    """The workload of a name in ``configs/bench``, or of a YAML file; ``a.b=value`` overrides put in.

    Raises:
        SpecError: there is none, or it is not valid.
    """
    path = _find(name)
    document = apply_overrides(read_yaml(path), overrides)
    try:
        return _ADAPTER.validate_python(document)
    except ValidationError as error:
        raise SpecError("\n".join(f"{path}: {_explain(fault)}" for fault in error.errors())) from None


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    found = find_workloads()
    if name in found:
        return found[name]
    near = difflib.get_close_matches(name, found, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise SpecError(f"no workload is named {name!r}: {hint}Known: {', '.join(sorted(found)) or 'none'}")


def _explain(fault: Any) -> str:
    return f"{'.'.join(map(str, fault['loc'][1:]))}: {fault['msg']}, found {fault['input']!r}"
