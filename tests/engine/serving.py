"""An engine over a model, and the same requests through it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from b2batch.engine.engine import Engine
from b2batch.engine.request import Finished, Request, ScoreRequest
from b2batch.engine.scheduler import Limits
from b2batch.spec import SamplingSpec

MAX_MODEL_LEN = 512


def engine_of(
    model: Any,
    *,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 2048,
    kv_cache_tokens: int = 16_384,
    enable_prefix_caching: bool = True,
    max_model_len: int = MAX_MODEL_LEN,
    stop_token_ids: Iterable[int] = (2,),
    decode: Any = None,
    make_vocabulary: Any = None,
    runs_ahead: bool = False,
) -> Engine:
    limits = Limits(max_num_seqs, max_num_batched_tokens, kv_cache_tokens, enable_prefix_caching)
    return Engine(
        model,
        limits,
        max_model_len=max_model_len,
        stop_token_ids=frozenset(stop_token_ids),
        decode=decode,
        make_vocabulary=make_vocabulary,
        runs_ahead=runs_ahead,
    )


def serve(engine: Engine, requests: Iterable[Request | ScoreRequest]) -> dict[str, Finished]:
    """Results by request id, once the engine has nothing left to do."""
    for request in requests:
        engine.add(request)
    done = [finished for _ in iter(lambda: engine.has_work, False) for finished in engine.step()]
    assert len(done) == len({finished.request_id for finished in done})
    return {finished.request_id: finished for finished in done}


def answer(engine: Engine, prompt: list[int], request_id: str = "row", **sampling: Any) -> Finished:
    """One prompt, alone in the engine."""
    return serve(engine, [Request(request_id, prompt, SamplingSpec(**sampling))])[request_id]
