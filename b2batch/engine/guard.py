"""A check at load: does the engine compute what the model's own code computes?

The engine runs any model that goes through transformers' attention interface, but some models do
more than the interface shows: sliding windows, attention sinks, soft-capped scores, layers that
bypass it. Two prompts through the plain forward pass and through the engine's runner, in chunks and
with a shared prefix, tell. A model that differs is refused rather than run wrongly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from b2batch.engine.cuda_runner import make_runner
from b2batch.engine.kv import PrefixSpan, Span
from b2batch.engine.runner import KVShape
from b2batch.engine.scheduler import Chunk, Step
from b2batch.engine.sequence import Sequence
from b2batch.errors import ModelError
from b2batch.spec import SamplingSpec

_PREFIX, _PROMPT = 24, 40  # tokens shared by both prompts, tokens of each
_TOLERANCE = {torch.float32: 2e-3}
_TOLERANCE_16_BIT = 6e-2


def refuse_windows(model: PreTrainedModel, max_model_len: int) -> None:
    """ModelError if some layer attends to fewer tokens than a sequence may have.

    A window longer than every sequence hides nothing, so such a model runs with a shorter context.
    """
    config: Any = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    uses_window = any("sliding" in kind for kind in kinds) if kinds else window is not None
    if window and uses_window and window < max_model_len:
        raise ModelError(
            f"{type(model).__name__} attends to a sliding window of {window} tokens, which the engine does "
            f"not do; sequences up to that length are exact: set model.max_model_len to {window} or less"
        )


@torch.inference_mode()
def reference_logits(model: PreTrainedModel) -> list[Tensor]:
    """Last-position logits of the two prompts by the model's own forward pass, each (V,)."""
    model.set_attn_implementation("eager")
    device = next(model.parameters()).device
    prompts = [torch.tensor([prompt], device=device) for prompt in _prompts(model.config.vocab_size)]
    return [model(input_ids=prompt, use_cache=False).logits[0, -1].float() for prompt in prompts]


def check_model(model: PreTrainedModel, expected: list[Tensor]) -> None:
    """ModelError unless the engine's logits equal ``expected`` within the dtype's rounding."""
    logits = _engine_logits(model)
    dtypes = {model.dtype, KVShape.of(model).dtype}
    tolerance = max(_TOLERANCE.get(dtype, _TOLERANCE_16_BIT) for dtype in dtypes)
    for ours, theirs in zip(logits, expected, strict=True):
        difference = ((ours - theirs).norm() / theirs.norm()).item()
        if not difference < tolerance:
            raise ModelError(
                f"{type(model).__name__} does not compute the same on the engine as by itself "
                f"(relative difference of the logits {difference:.2g}, allowed {tolerance:g}): its attention "
                "does something that the engine cannot"
            )


def _engine_logits(model: PreTrainedModel) -> Tensor:
    """Last-position logits (2, V) of the two prompts by a runner with an arena for just these."""
    prompts = _prompts(model.config.vocab_size)
    prefix = PrefixSpan(tuple(prompts[0][:_PREFIX]), Span(0, _PREFIX))
    sequences = [Sequence(f"guard-{i}", 0, prompt, SamplingSpec(), 1) for i, prompt in enumerate(prompts)]
    starts = [_PREFIX, _PROMPT]  # where each prompt's own tokens stand in the arena
    halves = [(_PREFIX, (_PREFIX + _PROMPT) // 2), ((_PREFIX + _PROMPT) // 2, _PROMPT)]
    first = [Chunk(prefix, 0, _PREFIX, 0, 0)]
    steps = []
    for begin, end in halves:
        chunks = [
            Chunk(sequence, begin, end - begin, start + begin - _PREFIX, begin - _PREFIX, prefix)
            for sequence, start in zip(sequences, starts, strict=True)
        ]
        steps.append(Step(chunks=first + chunks))
        first = []
    runner = make_runner(model, 2 * _PROMPT - _PREFIX, len(sequences))
    return [runner.run(step) for step in steps][-1]


def _prompts(vocab_size: int) -> list[list[int]]:
    """Two fixed prompts that share their first tokens, spread over the vocabulary."""
    ids = [(7 + 7919 * i) % vocab_size for i in range(2 * _PROMPT)]
    return [ids[:_PROMPT], ids[:_PREFIX] + ids[_PROMPT : 2 * _PROMPT - _PREFIX]]
