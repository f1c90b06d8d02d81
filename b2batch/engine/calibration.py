"""How large a step pays with this model on this device: ``auto`` settings → numbers, by timing a few.

A small model's step takes most of its time for what does not depend on its rows (launches, Python), a
large one's for its rows; nothing but a trial tells which. It runs the loaded model over an arena of
its own, which is gone before the engine is made: of the trial only the numbers stay.
"""

from __future__ import annotations

import gc
import logging
import time
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from b2batch.engine.cuda_runner import make_runner
from b2batch.engine.heap import release_freed_memory
from b2batch.engine.kv import Span
from b2batch.engine.memory import is_out_of_memory, resolve_limits
from b2batch.engine.memory_plan import StepSize
from b2batch.engine.runner import KVShape
from b2batch.engine.sampling import sample
from b2batch.engine.scheduler import Chunk, Step
from b2batch.engine.sequence import Sequence
from b2batch.engine.trial import choose_size, time_sizes
from b2batch.errors import SpecError
from b2batch.spec import EngineSpec, SamplingSpec

logger = logging.getLogger(__name__)

_CONTEXT = 128  # tokens of a prompt, and of a sequence with the one that it decodes
_ROOM = 512  # tokens of keys and values that each sequence finds in the job's arena on average
_FACTORS = (1, 2, 4)  # of the default
_GREEDY = SamplingSpec()

Setting = Literal["max_num_seqs", "max_num_batched_tokens"]


@dataclass(frozen=True, slots=True)
class _Method:
    """How a kind of device is tried."""

    settings: tuple[Setting, ...]
    num_warmups: int
    budget_s: float  # of each setting
    arena_bytes: int  # more than the caches hold, so that keys come from memory as they do in a job


# Prompts run about as fast on a CPU in steps of 512 tokens as in steps of 4,096: nothing to be found.
_CPU = _Method(("max_num_seqs",), num_warmups=1, budget_s=0.4, arena_bytes=64 << 20)
# A graph of decoding is recorded at the fourth step of its shape.
_CUDA = _Method(("max_num_seqs", "max_num_batched_tokens"), num_warmups=5, budget_s=3.0, arena_bytes=4 << 30)


class Calibration:
    """Settles ``auto`` for one loaded model. No engine may hold the device's memory meanwhile."""

    def __init__(self, model: PreTrainedModel, max_model_len: int, device: torch.device) -> None:
        self._model = model
        self._max_model_len = max_model_len
        self._device = device
        self._context = min(_CONTEXT, max_model_len)
        self._method = _CPU if device.type == "cpu" else _CUDA

    def is_wanted(self, spec: EngineSpec) -> bool:
        """Whether ``spec`` leaves a number to a trial.

        Processes that share a model keep the defaults: all would have to run the same steps.
        """
        return spec.tensor_parallel_size == 1 and any(
            getattr(spec, setting) == "auto" for setting in self._method.settings
        )

    def settle(self, spec: EngineSpec) -> EngineSpec:
        """``spec`` with a number where it left one to a trial; the log says which and why.

        The default is kept where a trial would take too long or memory is short of one.
        """
        self._give_back()
        for setting in self._method.settings:
            if getattr(spec, setting) == "auto":
                default: int = getattr(StepSize.of(spec, on_cpu=self._device.type == "cpu"), setting)
                least_s = self._time(setting, self._sizes(spec, setting, default))
                size = choose_size(least_s, default)
                logger.info("engine.%s: auto is %d here; %s", setting, size, _describe(least_s))
                spec = _with(spec, setting, size)
        return spec

    def _sizes(self, spec: EngineSpec, setting: Setting, default: int) -> list[int]:
        """The sizes to compare, the default first; none where memory does not allow two."""
        sizes = [factor * default for factor in _FACTORS]
        fitting = [size for size in sizes if self._fits(_with(spec, setting, size))]
        return fitting if len(fitting) > 1 and fitting[0] == default else []

    def _fits(self, spec: EngineSpec) -> bool:
        """Whether the memory that is free now lets a step of that size have sequences of some length."""
        try:
            limits = resolve_limits(spec, self._model, self._max_model_len, self._device)
        except SpecError:
            return False
        return limits.kv_cache_tokens >= limits.max_num_seqs * min(_ROOM, self._max_model_len)

    def _time(self, setting: Setting, sizes: list[int]) -> dict[int, float]:
        """Seconds of a step by size; empty where there is nothing to compare."""
        if not sizes:
            return {}
        try:
            return self._run_trial(setting, sizes)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return {}
        finally:
            self._give_back()

    def _run_trial(self, setting: Setting, sizes: list[int]) -> dict[int, float]:
        method = self._method
        trial = _Trial(self._model, setting, sizes[-1], self._context, method.arena_bytes)
        return time_sizes(trial.time_step_s, sizes, num_warmups=method.num_warmups, budget_s=method.budget_s)

    def _give_back(self) -> None:
        """Free what the last runner held: it and its graphs refer to each other, on a CPU nothing does."""
        if self._device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        release_freed_memory()


class _Trial:
    """Steps of one kind on a runner of their own: of sequences that decode, or of whole prompts."""

    def __init__(
        self, model: PreTrainedModel, setting: Setting, largest: int, context: int, arena_bytes: int
    ) -> None:
        self._context = context
        self._is_decode = setting == "max_num_seqs"
        room = arena_bytes // KVShape.of(model).bytes_per_token // context
        self._num_spans = max(1, min(self._num_sequences(largest), room))
        num_tokens = self._num_spans * context
        self._runner = make_runner(model, num_tokens, largest if self._is_decode else 1)
        # Pages that were never written are all the same one, which would be in the cache.
        self._runner.scrub(Span(0, num_tokens))
        vocab_size = model.config.get_text_config().vocab_size
        self._ids = [(7 + 7919 * i) % vocab_size for i in range(2 * context)]

    def time_step_s(self, size: int) -> float:
        """Run a step of so many rows; its seconds, until its tokens are on the host."""
        chunks = [self._chunk(index) for index in range(self._num_sequences(size))]
        owners = [chunk.owner for chunk in chunks if isinstance(chunk.owner, Sequence)]
        started_s = time.perf_counter()
        sample(self._runner.run(Step(chunks)), owners).tolist()
        return time.perf_counter() - started_s

    def _num_sequences(self, size: int) -> int:
        return size if self._is_decode else max(1, size // self._context)

    def _chunk(self, index: int) -> Chunk:
        """What a sequence runs: its last token, or all. Some share a span, where memory is dear."""
        first = index % self._context
        sequence = Sequence(f"trial-{index}", 0, self._ids[first : first + self._context], _GREEDY, 1)
        slot = index % self._num_spans * self._context
        num_past = self._context - 1 if self._is_decode else 0
        return Chunk(sequence, num_past, self._context - num_past, slot + num_past, num_past)


def _with(spec: EngineSpec, setting: Setting, value: int) -> EngineSpec:
    return spec.model_copy(update={setting: value})


def _describe(least_s: dict[int, float]) -> str:
    if not least_s:
        return "no trial: too long, or too little memory for one"
    speeds = (f"{size / step_s:,.0f} at {size}" for size, step_s in least_s.items())
    return f"tokens a second: {', '.join(speeds)}"
