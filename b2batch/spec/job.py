"""The whole job file as one frozen value, and what must hold between its sections."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from b2batch.errors import SpecError
from b2batch.spec.cluster import ClusterSpec
from b2batch.spec.engine import EngineSpec
from b2batch.spec.input import InputSpec
from b2batch.spec.labelling import (
    ClassifySpec,
    EmbedSpec,
    Label,
    ReviewSpec,
    ScoreSpec,
    as_labels,
    check_labels,
)
from b2batch.spec.model import ModelSpec
from b2batch.spec.notify import WebhookSpec
from b2batch.spec.output import ErrorsSpec, OutputSpec
from b2batch.spec.processors import PostprocessSpec, ProcessorSpec
from b2batch.spec.prompt import PromptSpec
from b2batch.spec.sampling import SamplingSpec
from b2batch.spec.schedule import ScheduleSpec
from b2batch.spec.secrets import ENV_REFERENCE
from b2batch.spec.section import Section
from b2batch.spec.structured import StructuredOutputsSpec
from b2batch.ticks.tick import Tick, mentions_tick

_TASK_OF_SECTION = {
    "labels": "classify",
    "classify": "classify",
    "score": "score",
    "embed": "embed",
    "structured_outputs": "generate",
    "vote": "generate",
    "vote_on": "generate",
}


class JobSpec(Section):
    """One batch-inference job: which model, which rows, what prompt, where to."""

    name: str = Field(default="job", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    task: Literal["generate", "classify", "score", "embed"] = "generate"
    model: ModelSpec
    input: InputSpec
    prompt: PromptSpec
    sampling: SamplingSpec = SamplingSpec()
    labels: Annotated[tuple[Label, ...], BeforeValidator(as_labels)] = ()
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
            check_labels(self.labels)
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


def config_digest(config: Mapping[str, Any]) -> str:
    """sha256 of a JSON-able mapping, independent of key order."""
    text = json.dumps(config, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def env_references(spec: JobSpec) -> set[str]:
    """The names of all ``${env:NAME}`` that a job refers to."""
    return set(ENV_REFERENCE.findall(spec.model_dump_json()))
