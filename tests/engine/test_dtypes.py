"""Keys and values, and the head, in a dtype of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden import Golden, forward

from b2batch.engine.request import Request
from b2batch.engine_start import make_engine
from b2batch.models.loading import load_model
from b2batch.spec import SamplingSpec, parse_spec


def engine_of(golden: Golden, **engine: Any) -> Any:
    model = golden.spec().model_dump()
    rest = {"input": {"path": "x"}, "prompt": {"column": "x"}, "output": {"path": "x"}}
    spec = parse_spec({"model": model, "engine": {"kv_cache_tokens": 1024, **engine}, **rest})
    return make_engine(spec, load_model(spec.model))


def answer(engine: Any, prompt: list[int]) -> tuple[int, ...]:
    engine.add(Request("row", prompt, SamplingSpec(max_tokens=8)))
    (done,) = [finished for _ in iter(lambda: engine.has_work, False) for finished in engine.step()]
    return tuple(done.completions[0].token_ids)


@pytest.mark.parametrize("variant", ["b2_7b", "b2_13b"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_keys_and_values_may_be_kept_narrower(
    variant: str, dtype: str, golden: Callable[[str], Golden]
) -> None:
    engine = engine_of(golden(variant), kv_cache_dtype=dtype)
    assert {tensor.dtype for pair in engine.runner.caches for tensor in pair} == {getattr(torch, dtype)}
    assert engine.runner.model.dtype == torch.float32
    first, *_ = answer(engine, golden(variant).prompts[0])
    logits = golden(variant).arrays["logits_0"][-1]
    assert first in logits.argsort()[-2:]


def test_logits_may_be_computed_in_the_weights_dtype(golden: Callable[[str], Golden]) -> None:
    spec, prompt = golden("b2_7b").spec(), golden("b2_7b").prompts[3]
    logits = {
        head: forward(
            load_model(spec.model_copy(update={"dtype": "bfloat16", "head_dtype": head})).model, prompt
        )
        for head in ("float32", "auto")
    }
    assert {tensor.dtype for tensor in logits.values()} == {torch.float32}
    assert not torch.equal(logits["float32"], logits["auto"])
    torch.testing.assert_close(logits["auto"], logits["float32"], atol=0.2, rtol=0.02)
