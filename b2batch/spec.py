"""The job file as a tree of frozen values: the one place where a setting has a name and a default.

``load_spec`` reads YAML strictly (no duplicate keys, bounded size), applies ``--set`` overrides and
validates; every message names the field, what was found and what is allowed. ``${env:NAME}`` stays
a reference in the tree, so no dump, hash or log of a spec can hold a secret: ``resolve_env`` puts
the value in at the place of use.

``model.model`` may name a config fragment, ``configs/models/NAME.yaml``: its ``model`` and
``sampling`` keys then hold wherever the job does not say otherwise.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from b2batch.assets import EMBEDDED_MODELS
from b2batch.errors import SpecError
from b2batch.notify_spec import WebhookSpec
from b2batch.ticks.cron import CronExpression, parse_cron
from b2batch.ticks.tick import Tick, latest_tick, mentions_tick, parse_tick

MAX_EXAMPLES_BYTES = 8 << 20
MAX_JOB_FILE_BYTES = 256 * 1024
_FRAGMENT_DIRECTORY = Path("configs", "models")
_FRAGMENT_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_ENV_REFERENCE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
# A password, which may hold a slash; host:port/ is none. And a secret in what follows the ?.
_PASSWORD = re.compile(r"://[^/@\s:]*:(?!\d+(?:/|$))[^@\s]+@")
_QUERY_SECRET = re.compile(r"[?&][^=&\s]*(?:secret|token|password|access_key)[^=&\s]*=[^&\s]", re.IGNORECASE)
_SHORTEST_SECRET = 4
_put_in: dict[str, str] = {}  # value → reference, of all that this process resolved


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def _as_location(text: str) -> str:
    """Refuse a secret, which would be copied into the output's records, into logs and to every node."""
    if "\0" in text:
        raise ValueError("a NUL stands in it, which no path has")
    if _holds_secret(text):
        raise ValueError(
            "a password or key stands in it, which would be written down with the run: put it in the "
            "environment of the driver and the nodes, and write ${env:NAME} here"
        )
    return text


def _holds_secret(text: str) -> bool:
    literal = _ENV_REFERENCE.sub("", text)
    return bool(_PASSWORD.search(literal) or _QUERY_SECRET.search(literal))


Location = Annotated[str, AfterValidator(_as_location)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ModelSpec(_Section):
    """Which checkpoint, and how it is read.

    ``position`` and ``norm_head`` override what a Baichuan config does not say (see
    ``models/baichuan.py``); other families ignore neither silently: they refuse them.
    """

    model: Location = Field(
        description="hub id, local path, ms://… (ModelScope), or a name from configs/models"
    )
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["nf4", "int8", "int8-dynamic"] | None = Field(
        default=None, description="of linear layers; a quantised checkpoint is recognised by itself"
    )
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="what nf4 layers compute in"
    )
    head_dtype: Literal["float32", "auto"] = Field(
        default="float32", description="what logits are computed in; auto: the weights' dtype"
    )
    adapter: Location | None = Field(default=None, description="a LoRA adapter of peft: hub id or local path")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    max_model_len: int | None = Field(default=None, ge=1, description="tokens of prompt and answer")
    position: Literal["auto", "rope", "alibi"] = "auto"
    norm_head: Literal["auto"] | bool = "auto"


class InputSpec(_Section):
    """The prompt dataset. ``path`` may be files, globs and directories, local or on an object store."""

    path: Annotated[tuple[Location, ...], BeforeValidator(_as_list)] = Field(min_length=1)
    format: Literal["auto", "jsonl", "parquet", "openai-batch"] = "auto"
    key: str | None = Field(
        default=None, description="a column that names the row; carried, never trusted as unique"
    )
    limit: int | None = Field(default=None, ge=1, description="take only the first rows of the plan")
    encoding: Literal["utf-8", "gb18030"] = Field(default="utf-8", description="of JSON Lines")
    on_bad_file: Literal["fail", "skip"] = Field(
        default="fail", description="skip: a file that cannot be read is one error row, FILE"
    )
    rows_per_unit: int = Field(
        default=256, ge=1, description="rows a replica leases, retries and commits at once"
    )
    infer_rows: int = Field(
        default=10_000, ge=1, description="JSONL rows of each file read to find the columns' types"
    )
    max_record_bytes: int = Field(default=16 << 20, ge=1)
    fingerprint: Literal["full", "fast"] = Field(
        default="full", description="full: sha256; fast: size, time, both ends"
    )
    sampling_column: str | None = Field(
        default=None, description="a column of sampling keys that override `sampling`"
    )
    incremental: bool = Field(
        default=False, description="the output grows by what is new in the input since the run before"
    )
    on_changed: Literal["error", "reprocess", "skip"] = Field(
        default="error", description="incremental: a file that is not as it was labelled"
    )

    @model_validator(mode="after")
    def _grows_by_whole_files(self) -> Self:
        if self.incremental and self.limit is not None:
            raise ValueError("limit: an incremental input has no first rows to take; leave it out")
        if self.on_changed != "error" and not self.incremental:
            raise ValueError("on_changed: only with incremental: true")
        return self


class Message(_Section):
    """One turn; ``content`` is a template over the row's columns."""

    role: Literal["system", "user", "assistant"]
    content: str


class Example(_Section):
    """One worked example, shown before the row's own prompt; plain text, no template.

    ``key`` is what ``prompt.nearest`` compares with the row; without it, ``user`` is.
    """

    user: str
    assistant: str
    key: str | None = None


def _as_examples(value: Any) -> Any:
    """Examples as they are, or those of a JSON Lines file, which so become part of the job."""
    if not isinstance(value, str):
        return value
    try:
        if os.path.getsize(value) > MAX_EXAMPLES_BYTES:
            raise ValueError(f"{value}: larger than {MAX_EXAMPLES_BYTES} bytes")
        with open(value, encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{value}: examples are JSON Lines of user and assistant: {error}") from error


class NearestSpec(_Section):
    """Instead of all examples, those most like the row: ``k`` by what stands in ``column``."""

    column: str | None = None
    k: int = Field(default=4, ge=1, le=100)


class PromptSpec(_Section):
    """How a row becomes a prompt: exactly one of ``template``, ``messages`` and ``column``.

    ``column`` names text, or a list of ``{role, content}`` messages. ``chat: auto`` uses the chat
    format for chat models and for message lists, plain text for base models.
    """

    template: str | None = None
    messages: tuple[Message, ...] | None = None
    column: str | None = None
    system: str | None = None
    examples: Annotated[tuple[Example, ...], BeforeValidator(_as_examples)] = ()
    nearest: NearestSpec = NearestSpec()
    chat: Literal["auto"] | bool = "auto"
    allow_special_tokens: bool = Field(
        default=False, description="let <reserved_106>, </s> in row text be control tokens"
    )
    on_too_long: Literal["error", "truncate_left", "truncate_right"] = "error"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("template", "messages", "column") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise ValueError(f"exactly one of template, messages and column is needed, found {found}")
        if self.nearest.column is not None and not self.examples:
            raise ValueError("nearest.column: there are no examples to choose from")
        if self.messages is not None and not self.messages:
            raise ValueError("messages must not be empty")
        if self.system is not None and self.messages is not None and self.messages[0].role == "system":
            raise ValueError("system is given twice: as `system` and as the first of `messages`")
        return self


_SAMPLING_ALIASES = {"max_new_tokens": "max_tokens", "num_return_sequences": "n"}


class SamplingSpec(_Section):
    """How tokens are chosen; vLLM's key names. ``temperature: 0`` is greedy.

    ``max_tokens: null`` means up to the model's context. ``from_model`` takes what is not given
    here from the checkpoint's ``generation_config.json``.
    """

    from_model: bool = False
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    temperature: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1, description="0 or -1: all tokens")
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    stop: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = Field(default=1, ge=1, le=1024)
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    logprobs: int | None = Field(
        default=None, ge=0, le=100, description="alternatives a token; 0: only its own"
    )
    logit_bias: Mapping[int, float] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _normalise_aliases(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        for alias, name in _SAMPLING_ALIASES.items():
            if alias in data:
                if name in data:
                    raise ValueError(f"{alias} is another name of {name}: give one of them")
                data[name] = data.pop(alias)
        do_sample = data.pop("do_sample", None)
        if do_sample is False:
            data["temperature"] = 0.0
        elif do_sample is True:
            data.setdefault("temperature", 1.0)
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        if any(not text for text in self.stop):
            raise ValueError("stop must not hold an empty string")
        return self


class OutputSpec(_Section):
    """Where the Parquet dataset goes and which input columns stand in it."""

    path: Location = Field(description="a directory; {run8} becomes the run's short id")
    columns: tuple[str, ...] | None = Field(default=None, description="input columns to carry; null: all")
    prefix: str | None = Field(default=None, description="put before b2batch's own column names")


def _as_schema(value: Any) -> Any:
    """A JSON schema as it is, or of the pydantic model that ``package.module:Class`` names."""
    if not isinstance(value, str):
        return value
    model = import_object(value)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        raise ValueError(f"{value} is not a pydantic model")
    return model.model_json_schema()


def _look_here() -> None:
    """Let modules of the current directory be found, as ``python`` itself would."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)


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


with warnings.catch_warnings():  # `json` is the name of a method of BaseModel that nobody calls
    warnings.filterwarnings("ignore", 'Field name "json"', UserWarning)

    class StructuredOutputsSpec(_Section):
        """What every answer must look like: at most one of the three.

        ``json`` is a JSON schema, or ``package.module:Class`` of a pydantic model.
        """

        choice: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(default=None, min_length=1)
        regex: str | None = Field(default=None, min_length=1)
        json: Annotated[Mapping[str, Any], BeforeValidator(_as_schema)] | None = None  # type: ignore[assignment]

        @model_validator(mode="after")
        def _one_form(self) -> Self:
            given = [name for name in ("choice", "regex", "json") if getattr(self, name) is not None]
            if len(given) > 1:
                raise ValueError(f"at most one of choice, regex and json, found {' and '.join(given)}")
            return self

        @property
        def is_set(self) -> bool:
            """Whether answers are bound at all."""
            return (self.choice, self.regex, self.json) != (None, None, None)


class Label(_Section):
    """One answer of a classification. ``text`` is what the model would write for it."""

    name: str = Field(min_length=1)
    text: str = Field(min_length=1)
    description: str = ""


def _as_labels(value: Any) -> Any:
    """Labels from a list of names, or from a mapping name → description or {text, description}."""
    if isinstance(value, Mapping):
        return [_as_label(name, meaning) for name, meaning in value.items()]
    if isinstance(value, list | tuple):
        return [item if isinstance(item, Mapping | Label) else _as_label(item, None) for item in value]
    return value


def _as_label(name: Any, meaning: Any) -> dict[str, Any]:
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise ValueError(f"a label is text, found {name!r}: put it in quotes")
    own = meaning if isinstance(meaning, Mapping) else {"description": "" if meaning is None else meaning}
    return {"name": str(name), "text": str(name), **own}


class ClassifySpec(_Section):
    """How the likelihoods of the labels' texts become probabilities.

    ``calibrate_with`` are texts without content that stand in for the row's columns: the labels'
    mean probabilities under them are divided out (Zhao et al. 2021, "Calibrate before use").
    """

    normalize: Literal["none", "tokens"] = Field(
        default="none", description="tokens: the mean log-likelihood of a label's tokens, not the sum"
    )
    calibrate_with: tuple[str, ...] = ()
    threshold: float | None = Field(
        default=None, gt=0.0, le=1.0, description="several labels may hold: all with this probability"
    )


class ScoreSpec(_Section):
    """Which text's log-likelihood after the prompt is wanted."""

    column: str | None = None


class EmbedSpec(_Section):
    """How the hidden states of the last layer become one vector."""

    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = Field(default=True, description="to length 1")


class ProcessorSpec(_Section):
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


class ReviewSpec(_Section):
    """Which rows people should look at."""

    below: float | None = Field(
        default=None, gt=0.0, le=1.0, description="rows whose label_score, or vote_share, is less"
    )


class EngineSpec(_Section):
    """What a replica's engine may use. ``auto`` measures the memory that is there."""

    max_num_seqs: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    max_num_batched_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    gpu_memory_utilization: float = Field(default=0.9, gt=0.0, le=1.0)
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_cache_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = "auto"
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = Field(
        default=1, ge=1, le=64, description="processes of a CPU replica that share a Baichuan's layers"
    )


def _as_range(replicas: tuple[int, int]) -> tuple[int, int]:
    if replicas[0] > replicas[1]:
        raise ValueError(f"[min, max] has min {replicas[0]} above max {replicas[1]}")
    return replicas


def _as_custom(resources: dict[str, float]) -> dict[str, float]:
    """Refuse what has a key of its own, or is not a replica's to ask for."""
    own = {"CPU": "cluster.cpus_per_replica", "GPU": "cluster.gpus_per_replica"}
    for name in resources:
        if name in own:
            raise ValueError(f"{name} is said by {own[name]}")
        if name in ("memory", "object_store_memory", "") or name.startswith(("node:", "accelerator_type:")):
            raise ValueError(f"{name!r} is no custom resource")
    return resources


def _as_gpus(amount: float) -> float:
    if amount > 1 and not amount.is_integer():
        raise ValueError(f"a share is of one GPU, and more than one are whole, found {amount:g}")
    return amount


GpuShare = Annotated[float, Field(ge=0.0), AfterValidator(_as_gpus)]
_Count = Annotated[int, Field(ge=1)]
ReplicaRange = Annotated[tuple[_Count, _Count], AfterValidator(_as_range)]


class ClusterSpec(_Section):
    """Where replicas run, how many, and on which nodes.

    ``replicas: auto`` is as many as the nodes carry, also those that join later. A number is asked for at
    once, and who finds no room starts as nodes join; ``[min, max]`` asks for ``max`` and begins with ``min``.
    """

    address: Location = Field(
        default="auto", description="auto: the running cluster or a local one; local; host:port; ray://…"
    )
    replicas: Literal["auto"] | Annotated[int, Field(ge=1)] | ReplicaRange = "auto"
    gpus_per_replica: Literal["auto"] | GpuShare = Field(
        default="auto", description="GPUs of one node; a model is spread over more than 1"
    )
    cpus_per_replica: Annotated[float, Field(gt=0.0)] = 1.0
    accelerator_type: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="only nodes with this accelerator, by Ray's name for it: A100, H200",
    )
    resources: Annotated[dict[str, Annotated[float, Field(gt=0.0)]], AfterValidator(_as_custom)] = Field(
        default={}, description="custom resource → how much of it a replica takes"
    )
    start_timeout_s: float = Field(
        default=600.0,
        gt=0.0,
        description="how long to wait for the first replicas, and for one of them to load",
    )
    step_timeout_s: float = Field(
        default=900.0, gt=0.0, description="a replica whose engine needs longer for a step is replaced"
    )
    drain_grace_s: float = Field(
        default=30.0, ge=0.0, description="after SIGTERM: how long leased units may go on"
    )

    @property
    def gpus_per_model(self) -> int:
        """Devices that the model of a replica is spread over."""
        return 1 if self.gpus_per_replica == "auto" else max(1, int(self.gpus_per_replica))

    @property
    def min_replicas(self) -> int:
        """So many are ready before a run begins."""
        return self.replicas[0] if isinstance(self.replicas, tuple) else 1

    @property
    def max_replicas(self) -> int | None:
        """So many are asked for; None: what the nodes carry."""
        if self.replicas == "auto":
            return None
        return self.replicas[1] if isinstance(self.replicas, tuple) else self.replicas


class ScheduleSpec(_Section):
    """When the job is due, for ``run --tick auto`` and ``schedule``."""

    cron: str | None = Field(default=None, description="minute hour day month weekday")
    timezone: str = Field(default="UTC", description="of cron and of ticks, as Asia/Shanghai")
    catchup: Literal["latest", "all", "none"] = Field(
        default="latest", description="which of the ticks that were missed are made up for"
    )

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        try:
            ZoneInfo(self.timezone)
        except (ValueError, OSError, KeyError):
            raise ValueError(
                f"timezone: {self.timezone!r} is none that is known here, as Asia/Shanghai"
            ) from None
        if self.cron is None and self.catchup != "latest":
            raise ValueError("catchup: without cron no tick can be missed")
        if self.cron is not None:
            try:
                parse_cron(self.cron, "cron")
            except SpecError as error:
                raise ValueError(str(error)) from None
        return self

    @property
    def zone(self) -> ZoneInfo:
        """The time zone of its ticks."""
        return ZoneInfo(self.timezone)

    @property
    def expression(self) -> CronExpression | None:
        """``cron`` as it is read; None without one."""
        return None if self.cron is None else parse_cron(self.cron, "cron")

    def tick(self, text: str) -> Tick:
        """The tick at an instant in ISO 8601; SpecError when there is none."""
        return parse_tick(text, self.expression, self.zone)

    def latest_tick(self, now: datetime) -> Tick:
        """The tick that is due; SpecError without a cron."""
        expression = self.expression
        if expression is None:
            raise SpecError("--tick auto: the job has no schedule.cron to tell the tick by; give an instant")
        return latest_tick(expression, self.zone, now)


class ErrorsSpec(_Section):
    """How many failed rows are still a success: at least 10, or this share of all rows."""

    max_error_rate: float = Field(default=0.01, ge=0.0, le=1.0)


class JobSpec(_Section):
    """One batch-inference job: which model, which rows, what prompt, where to."""

    name: str = Field(default="job", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    task: Literal["generate", "classify", "score", "embed"] = "generate"
    model: ModelSpec
    input: InputSpec
    prompt: PromptSpec
    sampling: SamplingSpec = SamplingSpec()
    labels: Annotated[tuple[Label, ...], BeforeValidator(_as_labels)] = ()
    classify: ClassifySpec = ClassifySpec()
    score: ScoreSpec = ScoreSpec()
    embed: EmbedSpec = EmbedSpec()
    structured_outputs: StructuredOutputsSpec = StructuredOutputsSpec()
    vote: Literal["majority"] | None = None
    vote_on: str = Field(
        default="text", pattern=r"^(text|parsed(\..+)?)$", description="text, parsed, or parsed.member"
    )
    gold: str | None = Field(default=None, description="a column of right labels, to measure against")
    review: ReviewSpec = ReviewSpec()
    preprocess: ProcessorSpec = ProcessorSpec()
    postprocess: PostprocessSpec = PostprocessSpec()
    dedup: bool = Field(default=True, description="run identical greedy requests once")
    output: OutputSpec
    engine: EngineSpec = EngineSpec()
    cluster: ClusterSpec = ClusterSpec()
    errors: ErrorsSpec = ErrorsSpec()
    notify: tuple[WebhookSpec, ...] = ()
    schedule: ScheduleSpec = ScheduleSpec()
    _tick: str = PrivateAttr(default="")

    @property
    def tick(self) -> str:
        """The tick that ``at`` bound it to; empty where it was to none."""
        return self._tick

    @property
    def has_tick_paths(self) -> bool:
        """Whether its paths mention the tick, so that the job must be bound to one."""
        return any(mentions_tick(path) for path in (*self.input.path, self.output.path))

    def at(self, tick: Tick) -> JobSpec:
        """The job of one tick: its paths with ``{{ tick.… }}`` put in.

        Raises:
            SpecError: a path names what a tick does not have, or two ticks would share an output.
        """
        output = tick.fill(self.output.path, "output.path")
        if not self.input.incremental:
            _refuse_shared_output(self, tick, output)
        paths = tuple(tick.fill(path, "input.path") for path in self.input.path)
        bound = self.model_copy(
            update={
                "input": self.input.model_copy(update={"path": paths}),
                "output": self.output.model_copy(update={"path": output}),
            }
        )
        bound._tick = tick.text
        return bound

    @model_validator(mode="before")
    @classmethod
    def _batch_lines_bring_their_prompts(cls, data: Any) -> Any:
        source = data.get("input") if isinstance(data, Mapping) else None
        is_batch = isinstance(source, Mapping) and source.get("format") == "openai-batch"
        return {"prompt": {"column": "body"}, **data} if is_batch else data

    @property
    def has_batch_lines(self) -> bool:
        """Whether each row is an OpenAI request, which brings its own prompt and settings."""
        return self.input.format == "openai-batch"

    @model_validator(mode="after")
    def _batch_lines_are_answered_as_they_ask(self) -> Self:
        if not self.has_batch_lines:
            return self
        if self.task != "generate" or self.prompt.column != "body":
            raise ValueError("input.format: openai-batch is for task: generate, with prompt.column: body")
        if self.structured_outputs.is_set or self.vote is not None or self.input.sampling_column is not None:
            raise ValueError(
                "input.format: openai-batch: each line says itself what structured_outputs, vote and "
                "input.sampling_column would say"
            )
        if self.output.columns is not None and not {"custom_id", "url", "body"} <= set(self.output.columns):
            raise ValueError("output.columns: custom_id, url and body are needed to export openai-batch")
        return self

    @model_validator(mode="after")
    def _grows_in_one_place(self) -> Self:
        if self.input.incremental and "{run8}" in self.output.path:
            raise ValueError("output.path: {run8} names one input; with input.incremental the output grows")
        return self

    @model_validator(mode="after")
    def _task_has_its_settings(self) -> Self:
        """A section of another task would be ignored without a word."""
        for name, task in _TASK_OF_SECTION.items():
            if self.task != task and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: only for task: {task}, and the task is {self.task}")
        if self.task == "classify":
            _check_labels(self.labels)
        if self.structured_outputs.is_set and (self.sampling.ignore_eos or self.sampling.min_tokens):
            raise ValueError(
                "structured_outputs: the answer ends where it is whole: no ignore_eos, min_tokens"
            )
        if self.task == "score" and self.score.column is None:
            raise ValueError("score.column: is needed for task: score and not given")
        if self.task != "generate" and self.input.sampling_column is not None:
            raise ValueError(f"input.sampling_column: nothing is sampled by task: {self.task}")
        return self

    @model_validator(mode="after")
    def _labels_can_be_judged(self) -> Self:
        if bool(self.postprocess.function) != bool(self.postprocess.columns):
            raise ValueError("postprocess: needs both a function and the columns it gives")
        if self.vote is not None and self.sampling.n < 2:
            raise ValueError("vote: needs sampling.n of 2 or more")
        if self.vote is None and self.vote_on != "text":
            raise ValueError("vote_on: only with vote: majority")
        if self.vote_on != "text" and not self.structured_outputs.is_set:
            raise ValueError(f"vote_on: {self.vote_on} needs structured_outputs")
        if self.review.below is not None and self.task != "classify" and self.vote is None:
            raise ValueError("review.below: needs a confidence: task: classify, or vote: majority")
        if self.gold is not None and self.task not in ("generate", "classify"):
            raise ValueError(f"gold: task: {self.task} gives no labels")
        if self.gold is not None and self.output.columns is not None and self.gold not in self.output.columns:
            raise ValueError(f"gold: {self.gold!r} must be among output.columns")
        return self

    def result_config(self) -> dict[str, Any]:
        """The settings that decide what the output says; another value is another run.

        Left out: where files stand (their content is fingerprinted by the plan), engine limits and
        dtype (they may change bits, so they are recorded as provenance), the cluster, the budget.
        """
        dump = self.model_dump(mode="json")
        sections = [name for name, task in _TASK_OF_SECTION.items() if task == self.task]
        return {
            "task": dump["task"],
            **{name: dump[name] for name in sections},
            "review": dump["review"],
            "preprocess": dump["preprocess"],
            "postprocess": dump["postprocess"],
            "model": {
                key: value
                for key, value in dump["model"].items()
                if key not in ("dtype", "compute_dtype", "head_dtype", "device")
            },
            "input": {
                k: dump["input"][k]
                for k in ("key", "encoding", "max_record_bytes", "sampling_column")
                + (("incremental",) if self.input.incremental else ())  # an output without it has no such key
            },
            "prompt": dump["prompt"],
            "sampling": dump["sampling"],
            "output": {k: dump["output"][k] for k in ("columns", "prefix")},
        }


_TASK_OF_SECTION = {
    "labels": "classify",
    "classify": "classify",
    "score": "score",
    "embed": "embed",
    "structured_outputs": "generate",
    "vote": "generate",
    "vote_on": "generate",
}


def _refuse_shared_output(spec: JobSpec, tick: Tick, output: str) -> None:
    path = spec.output.path
    is_shared = not mentions_tick(path) and "{run8}" not in path
    if tick.previous is not None and "{run8}" not in path:
        before = Tick(tick.previous, tick.previous - (tick.instant - tick.previous))
        is_shared |= before.fill(path, "output.path") == output
    if is_shared:
        raise SpecError(
            f"output.path: {spec.output.path}: each tick needs an output of its own: name it by "
            "{{ tick.date }}, {{ tick.hour }} …, or let one grow with input.incremental: true"
        )


def _check_labels(labels: tuple[Label, ...]) -> None:
    if len(labels) < 2:
        raise ValueError(f"labels: task: classify needs at least two, found {len(labels)}")
    for what in ("name", "text"):
        values = [getattr(label, what) for label in labels]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"labels: the {what} {twice!r} stands twice")


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of a JSON-able mapping, independent of key order."""
    text = json.dumps(config, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def resolve_env(text: str) -> str:
    """Put the values of ``${env:NAME}`` references into ``text``; SpecError names one that is not set."""

    def value(match: re.Match[str]) -> str:
        try:
            found = os.environ[match[1]]
        except KeyError:
            raise SpecError(f"the environment variable {match[1]}, used as {match[0]}, is not set") from None
        _put_in[found] = match[0]
        return found

    return _ENV_REFERENCE.sub(value, text)


def env_references(spec: JobSpec) -> set[str]:
    """The names of all ``${env:NAME}`` that a job refers to."""
    return set(_ENV_REFERENCE.findall(spec.model_dump_json()))


def mask_env(text: str) -> str:
    """``text`` with each value that ``resolve_env`` has put in turned back into its reference.

    For what libraries say of a path or URI. Values of under 4 characters, which stand in any text, stay.
    """
    for value in sorted(_put_in, key=len, reverse=True):
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, _put_in[value])
    return text


# --- reading the job file ------------------------------------------------------------------------


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


def find_fragments(directories: Iterable[Path]) -> dict[str, Path]:
    """Name → file of each ``configs/models/NAME.yaml`` in or above the directories; the nearest counts."""
    found: dict[str, Path] = {}
    for directory in directories:
        start = directory.absolute()
        for place in (start, *start.parents):
            for path in sorted((place / _FRAGMENT_DIRECTORY).glob("*.yaml")):
                found.setdefault(path.stem, path)
    return found


def apply_fragment(document: Mapping[str, Any], directories: Iterable[Path]) -> dict[str, Any]:
    """``document`` with the fragment that its ``model.model`` names laid under its own keys.

    A name is looked up as a fragment first, then as an embedded model, then as a local directory
    (``./NAME`` is always a directory); anything with a slash is no name, and left alone.

    Raises:
        SpecError: nothing has that name, or the fragment has sections that are not a fragment's.
    """
    model = document.get("model")
    name = model.get("model") if isinstance(model, Mapping) else None
    if not isinstance(name, str) or not _FRAGMENT_NAME.fullmatch(name):
        return dict(document)
    fragments = find_fragments(directories)
    if name in fragments:
        return _laid_under(document, name, fragments[name])
    if name not in EMBEDDED_MODELS and not Path(name).is_dir():
        raise SpecError(f"model.model: nothing is named {name!r}: {_known_models(name, fragments)}")
    return dict(document)


def find_model(name: str, directories: Iterable[Path], **keys: Any) -> ModelSpec:
    """The model of a job that says only ``model.model: name``, and ``keys`` that are not None.

    Raises:
        SpecError: as ``apply_fragment``, or the fragment's model is not valid.
    """
    given = {key: value for key, value in keys.items() if value is not None}
    model = apply_fragment({"model": {"model": name, **given}}, directories)["model"]
    try:
        return ModelSpec.model_validate(model)
    except ValidationError as error:
        raise SpecError("\n".join(f"model.{_explain(fault)}" for fault in error.errors())) from None


def named_models(directories: Iterable[Path]) -> dict[str, str]:
    """Name → what it stands for, of every fragment in or above the directories and every embedded model."""
    embedded = dict.fromkeys(EMBEDDED_MODELS, "embedded")
    fragments = find_fragments(directories)
    named = {name: str(read_yaml(path).get("model", {}).get("model")) for name, path in fragments.items()}
    return dict(sorted({**named, **embedded}.items()))


def _laid_under(document: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    fragment = read_yaml(path)
    unknown = sorted(fragment.keys() - {"model", "sampling"})
    sections = [section for section in fragment.values() if not isinstance(section, dict)]
    if unknown or sections or "model" not in fragment.get("model", {}):
        raise SpecError(
            f"{path}: a model fragment has the section model, with its key model, and may have sampling"
            + (f"; found {unknown[0]!r}" if unknown else "")
        )
    merged = dict(document)
    for key, defaults in fragment.items():
        own = document.get(key)
        if own is None or isinstance(own, Mapping):
            merged[key] = {**defaults, **(own or {})}
    merged["model"]["model"] = fragment["model"]["model"]
    return merged


def _known_models(name: str, fragments: Mapping[str, Path]) -> str:
    known = sorted({*fragments, *EMBEDDED_MODELS})
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"{hint}Known names: {', '.join(sorted(EMBEDDED_MODELS))} (embedded)"
        + "".join(f", {other}" for other in sorted(fragments.keys() - EMBEDDED_MODELS.keys()))
        + "; or give a hub id (owner/name), ms://owner/name or a directory"
    )


def parse_spec(document: Mapping[str, Any]) -> JobSpec:
    """A validated spec; SpecError lists every fault with its field, value and what is allowed."""
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        raise SpecError("\n".join(_explain(fault) for fault in error.errors())) from None


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


def _explain(fault: Any) -> str:
    """One line for one pydantic fault: the dotted field, what is wrong, the nearest known name."""
    location = [str(part) for part in fault["loc"]]
    dotted = ".".join(location) or "the job file"
    if fault["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{dotted}: unknown key{hint} (known here: {', '.join(sorted(known))})"
    if fault["type"] == "missing":
        return f"{dotted}: is needed and not given"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{dotted}: {message}" if location else message  # a whole-job check names its field itself
    found = repr(fault["input"])
    return f"{dotted}: {message}" + ("" if _holds_secret(found) else f", found {found}")


def _known_keys(location: list[str]) -> list[str]:
    section: Any = JobSpec
    for part in location:
        if part.isdigit():
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        candidates += [arg for c in candidates for arg in getattr(c, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    keys = list(section.model_fields)
    return keys + list(_SAMPLING_ALIASES) if section is SamplingSpec else keys
