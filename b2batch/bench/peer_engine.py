"""b2batch's own engine, through the interface that a replica uses."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from b2batch.answers import read_sample
from b2batch.bench.peer_job import Answer, Answers, BenchRow, PeerJob
from b2batch.engine.engine import Engine
from b2batch.engine.request import Finished, Request, ScoreRequest
from b2batch.engine.runner import Runner
from b2batch.engine.scheduler import Step
from b2batch.engine_start import make_engine
from b2batch.models.families import PromptCodec
from b2batch.models.loading import load_model
from b2batch.spec import JobSpec, SamplingSpec, parse_spec, set_values

_TAIL_SHARE = 0.02  # of a job, when its batch runs empty


def make_spec(job: PeerJob, **values: Any) -> JobSpec:
    """A job spec for the engine alone; ``values`` are further keys, ``engine.max_num_seqs`` as
    ``engine__max_num_seqs``.
    """
    document = {
        "model": {
            "model": job.model,
            "device": job.device,
            "dtype": job.dtype,
            "max_model_len": job.max_model_len,
        },
        "input": {"path": "unused"},
        "prompt": {"column": "messages"},
        "output": {"path": "unused"},
    }
    return parse_spec(set_values(document, {key.replace("__", "."): value for key, value in values.items()}))


def load(job: PeerJob) -> EnginePeer:
    """The engine as the job's kind sets it up."""
    torch.set_num_threads(job.threads)
    settings: dict[str, Any] = {}
    if job.kind == "engine-no-prefix":
        settings["engine__enable_prefix_caching"] = False
    if job.kind == "engine-int8":
        settings["model__quantization"] = "int8-dynamic"
    spec = make_spec(job, **settings)
    loaded = load_model(spec.model)
    engine = make_engine(spec, loaded)
    if job.kind == "engine-no-cascade":
        engine.runner = cast(Runner, _ApartRunner(engine.runner))
    return EnginePeer(job, engine, loaded.codec)


class _ApartRunner:
    """A runner for which no two sequences share a prefix: it is computed once, and attended to by each."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def run(self, step: Step, unread: Tensor | None = None) -> Tensor:
        """See ``Runner``."""
        apart = [replace(chunk, prefix=copy(chunk.prefix)) for chunk in step.chunks]
        return self._runner.run(replace(step, chunks=apart), unread)


class EnginePeer:
    """An engine with its codec. All rows are queued at once."""

    def __init__(self, job: PeerJob, engine: Engine, codec: PromptCodec) -> None:
        self._job = job
        self._engine = engine
        self._codec = codec

    def answer(self, rows: Sequence[BenchRow]) -> Answers:
        """See ``Peer``."""
        saved_before = self._engine.scheduler_stats.num_prefix_tokens_saved
        for row in rows:
            self._engine.add(self._request(row))
        occupancy = Occupancy(self._engine, len(rows))
        found: dict[str, Answer] = {}
        while self._engine.has_work:
            for finished in self._engine.step():
                found[finished.request_id] = self._answer(finished)
            occupancy.note(len(found))
        saved = self._engine.scheduler_stats.num_prefix_tokens_saved - saved_before
        facts = {**occupancy.facts(), "prefix_tokens_saved": float(saved)}
        return Answers([found[row.row_id] for row in rows], facts)

    def _request(self, row: BenchRow) -> Request | ScoreRequest:
        prompt = encode_prompt(self._codec, row)
        if self._job.kind == "score-engine":
            prompt = prompt + self._codec.tokenizer.encode(self._job.answer_prefix)
            choices = [self._codec.tokenizer.encode(choice) for choice in row.choices]
            return ScoreRequest(row.row_id, prompt, choices)
        sampling = SamplingSpec(
            max_tokens=row.max_tokens,
            n=self._job.n,
            temperature=self._job.temperature,
            seed=self._job.seed,
            ignore_eos=self._job.ignore_eos,
        )
        return Request(row.row_id, prompt, sampling)

    def _answer(self, finished: Finished) -> Answer:
        if finished.scores:
            likelihoods = [score.loglikelihood for score in finished.scores]
            return Answer(finished.num_prompt_tokens, label=likelihoods.index(max(likelihoods)))
        samples = [read_sample(completion, self._codec.tokenizer) for completion in finished.completions]
        return Answer(
            finished.num_prompt_tokens,
            [sample.token_ids for sample in samples],
            [sample.text for sample in samples],
        )


class Occupancy:
    """How full the batch is, from step to step."""

    def __init__(self, engine: Engine, num_rows: int) -> None:
        self._engine = engine
        self._num_rows = num_rows
        self._num_seqs = 0  # over the steps that count
        self._num_steps = 0
        self._num_fed_seqs = 0  # over steps after which something still waited
        self._num_fed_steps = 0
        self._seen_seqs = engine.stats.sum_running
        self._is_tail = False

    def note(self, num_done: int) -> None:
        """Take in the step that just ran."""
        num_running = self._engine.stats.sum_running - self._seen_seqs
        self._seen_seqs = self._engine.stats.sum_running
        if not self._is_tail:
            self._num_seqs += num_running
            self._num_steps += 1
        if self._engine.num_waiting:
            self._num_fed_seqs += num_running
            self._num_fed_steps += 1
        self._is_tail = num_done >= (1 - _TAIL_SHARE) * self._num_rows

    def facts(self) -> dict[str, float]:
        """Shares of ``max_num_seqs``: over all but the last 2 % of rows, and while rows waited."""
        facts = {"occupancy": self._num_seqs / max(1, self._num_steps) / self._engine.max_num_seqs}
        if self._num_fed_steps:
            facts["occupancy_fed"] = self._num_fed_seqs / self._num_fed_steps / self._engine.max_num_seqs
        return facts


def encode_prompt(codec: PromptCodec, row: BenchRow) -> list[int]:
    """A row's chat as ids; for a base model its contents as plain text."""
    if codec.chat is not None:
        return codec.chat.encode(list(row.messages))
    return codec.tokenizer.encode_prompt("\n".join(message["content"] for message in row.messages))
