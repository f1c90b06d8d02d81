"""The engine's speed at fixed batch and context: tokens a second, and what share of the roofline that is.

floor of a decode step = max(bytes / bandwidth, flops / peak)
    bytes  = weights without the embedding + batch · context · KV of a token
    flops  = 2 · batch · (weights of layers and head)
floor of a prompt token = 2 · (weights of layers) / peak
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from b2batch.bench.child import peak_bytes
from b2batch.bench.peer_engine import make_spec
from b2batch.bench.peer_job import PeerJob
from b2batch.engine.engine import Engine
from b2batch.engine.request import Request
from b2batch.engine.runner import KVShape
from b2batch.engine_start import make_engine
from b2batch.models.loading import LoadedModel, load_model
from b2batch.spec import SamplingSpec

_WARMUP_STEPS = 3
_MARGIN_TOKENS = 8  # beyond what is timed, so that no sequence ends within
_STEP_TOKENS = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one model makes a device move and multiply."""

    num_layer_parameters: int
    num_head_parameters: int
    bytes_per_parameter: int
    kv_bytes_per_token: int

    @classmethod
    def of(cls, loaded: LoadedModel) -> ModelCost:
        """Of a loaded model; the input embedding is looked up, not multiplied."""
        model = loaded.model
        total = sum(weight.numel() for weight in model.parameters())
        embedding = model.get_input_embeddings().weight
        head = model.get_output_embeddings().weight
        tied = embedding.data_ptr() == head.data_ptr()
        layers = total - head.numel() - (0 if tied else embedding.numel())
        return cls(layers, head.numel(), embedding.dtype.itemsize, KVShape.of(model).bytes_per_token)

    def decode_floor_s(self, batch: int, context: int, bytes_per_s: float, flops_per_s: float) -> float:
        """The least time of a step of ``batch`` sequences at ``context`` tokens each."""
        num_parameters = self.num_layer_parameters + self.num_head_parameters
        moved = num_parameters * self.bytes_per_parameter + batch * context * self.kv_bytes_per_token
        return max(moved / bytes_per_s, 2 * batch * num_parameters / flops_per_s)

    def prefill_tokens_per_s(self, flops_per_s: float) -> float:
        """The most prompt tokens a second; attention and the head's few rows are left out."""
        return flops_per_s / (2 * self.num_layer_parameters)


@dataclass(frozen=True, slots=True)
class DecodePoint:
    """Decoding at one batch and context. ``step_s`` is None where the batch does not fit the memory."""

    batch: int
    context: int
    step_s: float | None
    tokens_per_s: float | None
    roofline_share: float | None


@dataclass(frozen=True, slots=True)
class PrefillPoint:
    """Prompt tokens a second at one prompt length."""

    context: int
    tokens_per_s: float
    roofline_share: float | None


def run(document: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one round of a steps workload; the entry of the child process."""
    measured = _StepMeasurement(document["workload"], PeerJob.from_document(document["job"]))
    return measured.run()


class _StepMeasurement:
    def __init__(self, workload: Mapping[str, Any], job: PeerJob) -> None:
        torch.set_num_threads(job.threads)
        self._workload = workload
        self._is_cuda = job.device == "cuda"
        self._roofline = workload["roofline"] if self._is_cuda else None
        takes_all = self._is_cuda and workload["kv"] == "free memory"
        max_batch = max(workload["batches"])
        self._step_tokens = max(_STEP_TOKENS[job.device], 2 * max_batch)
        spec = make_spec(
            job,
            engine__enable_prefix_caching=False,
            engine__max_num_seqs=max_batch,
            engine__max_num_batched_tokens=self._step_tokens,
            engine__kv_cache_tokens="auto" if takes_all else self._most_tokens(job.max_model_len),
            model__quantization=workload["quantization"],
        )
        loaded = load_model(spec.model)
        self._load = self._loading()
        self._cost = ModelCost.of(loaded)
        self._vocab_size = loaded.model.config.get_text_config().vocab_size
        self._engine: Engine = make_engine(spec, loaded)
        self._chance = random.Random(0)
        self._num_requests = 0

    def run(self) -> dict[str, Any]:
        workload = self._workload
        prefill = [self._prefill(context) for context in workload["contexts"]]
        decode = [
            self._decode(batch, context) for context in workload["contexts"] for batch in workload["batches"]
        ]
        return {
            "prefill": [asdict(point) for point in prefill],
            "decode": [asdict(point) for point in decode],
            "peak_bytes": torch.cuda.max_memory_reserved() if self._is_cuda else peak_bytes(),
            **self._load,
        }

    def _loading(self) -> dict[str, int]:
        """The peak of loading, on the host and on the device, and what is left of it there."""
        found = {"load_host_peak_bytes": peak_bytes()}
        if self._is_cuda:
            found["load_peak_bytes"] = torch.cuda.max_memory_allocated()
            found["loaded_bytes"] = torch.cuda.memory_allocated()
        return found

    def _most_tokens(self, max_model_len: int) -> int:
        """KV for the largest point, and for the longest prompts timed."""
        batch: int = max(self._workload["batches"])
        context: int = max(self._workload["contexts"])
        largest = batch * (context + self._num_answer_tokens(batch, context))
        return max(int(largest), int(self._workload["prefill_tokens"]) + context, max_model_len)

    def _num_answer_tokens(self, batch: int, context: int) -> int:
        """Tokens that the first sequence of a batch generates: while the others' prompts run, and timed."""
        num_prompt_steps: int = math.ceil(batch * context / (self._step_tokens - batch))
        num_steps: int = self._workload["num_steps"]
        return num_prompt_steps + _WARMUP_STEPS + num_steps + _MARGIN_TOKENS

    def _prefill(self, context: int) -> PrefillPoint:
        """All prompts are queued, then run to their first token."""
        num_prompts = max(1, self._workload["prefill_tokens"] // context)
        self._add(1, context, max_tokens=1)  # warms the shapes
        self._drain()
        self._add(num_prompts, context, max_tokens=1)
        started_s = self._now_s()
        self._drain()
        tokens_per_s = num_prompts * context / (self._now_s() - started_s)
        best = self._roofline and self._cost.prefill_tokens_per_s(self._roofline["flops_per_s"])
        return PrefillPoint(context, tokens_per_s, tokens_per_s / best if best else None)

    def _decode(self, batch: int, context: int) -> DecodePoint:
        """Steps in which every sequence of the batch gets a token; contexts grow around ``context``."""
        num_steps = self._workload["num_steps"]
        max_tokens = self._num_answer_tokens(batch, context)
        self._add(batch, max(1, context - max_tokens // 2), max_tokens)
        step_s = self._time_steps(batch, num_steps) if self._fill(batch) else None
        self._drain()
        if step_s is None:
            return DecodePoint(batch, context, None, None, None)
        share = None
        if self._roofline:
            floor_s = self._cost.decode_floor_s(batch, context, **self._roofline)
            share = floor_s / step_s
        return DecodePoint(batch, context, step_s, batch / step_s, share)

    def _fill(self, batch: int) -> bool:
        """Run prompts until the whole batch decodes; False where it cannot be held at once."""
        num_preempted = self._engine.scheduler_stats.num_preempted
        for _ in range(_WARMUP_STEPS):
            while not self._step_is_full(batch):
                if self._engine.scheduler_stats.num_preempted > num_preempted or not self._engine.has_work:
                    return False
        return True

    def _step_is_full(self, batch: int) -> bool:
        before = self._engine.stats.num_generated_tokens
        self._engine.step()
        return self._engine.stats.num_generated_tokens - before == batch

    def _time_steps(self, batch: int, num_steps: int) -> float | None:
        started_s = self._now_s()
        before = self._engine.stats.num_generated_tokens
        for _ in range(num_steps):
            self._engine.step()
        step_s = (self._now_s() - started_s) / num_steps
        return step_s if self._engine.stats.num_generated_tokens - before == batch * num_steps else None

    def _add(self, num_prompts: int, num_tokens: int, max_tokens: int) -> None:
        sampling = SamplingSpec(max_tokens=max_tokens, ignore_eos=True)
        for _ in range(num_prompts):
            prompt = [self._chance.randrange(3, self._vocab_size) for _ in range(num_tokens)]
            self._num_requests += 1
            self._engine.add(Request(str(self._num_requests), prompt, sampling))

    def _drain(self) -> None:
        while self._engine.has_work:
            self._engine.step()

    def _now_s(self) -> float:
        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
