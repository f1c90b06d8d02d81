"""The runner of a GPU against the plain one: on a CPU through Triton's interpreter, on a GPU for real."""

from __future__ import annotations

import copy
import logging
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from b2batch.engine.cuda_attention import CudaAttention, HeadShape, is_right
from b2batch.engine.cuda_runner import CudaRunner, head_shape
from b2batch.engine.flash_attention import FlashPlan, FlashSpans
from b2batch.engine.request import Request, ScoreRequest
from b2batch.engine.runner import Runner
from b2batch.engine.scheduler import Chunk, Step
from b2batch.engine.sequence import Sequence
from b2batch.models.baichuan import BaichuanConfig, register
from b2batch.spec import SamplingSpec
from engine.serving import engine_of, serve

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB, ARENA, MAX_SEQS = 97, 1000, 5
KINDS = ("rotary", "grouped", "alibi")


def random_model(kind: str) -> Any:
    """One or two layers with weights large enough for attention to prefer some tokens over others."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 48,
        "num_hidden_layers": 2 if kind == "grouped" else 1,
        "num_attention_heads": 3 if kind == "alibi" else 2,
        "initializer_range": 0.3,
    }
    if kind == "alibi":
        register()
        config: Any = BaichuanConfig(**sizes, model_max_length=ARENA, position="alibi", norm_head=True)
    else:
        config = LlamaConfig(
            **sizes, num_key_value_heads=1 if kind == "grouped" else 2, max_position_embeddings=ARENA
        )
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).to(DEVICE)


@cache
def runners(kind: str) -> tuple[Runner, CudaRunner]:
    pytest.importorskip("triton", reason="triton is not installed")
    model = random_model(kind)
    kernels = CudaAttention(head_shape(model), DEVICE)
    assert kernels.has_kernels
    return Runner(copy.deepcopy(model), ARENA), CudaRunner(model, ARENA, MAX_SEQS, kernels)


def tokens_of(seed: int, count: int) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests() -> list[Request | ScoreRequest]:
    """More than the batch holds: on one prefix, on another, alone, sampled, and scored."""
    shared, other = tokens_of(1, 40), tokens_of(2, 35)
    prompts = [shared + tokens_of(10 + i, 3 + 4 * i) for i in range(2)]
    prompts += [other + tokens_of(20 + i, 2) for i in range(2)]
    prompts += [tokens_of(30, 1), tokens_of(31, 66)]
    made: list[Request | ScoreRequest] = [
        Request(f"row {i}", prompt, SamplingSpec(max_tokens=2 + i % 2, ignore_eos=True))
        for i, prompt in enumerate(prompts)
    ]
    made.append(Request("sampled", [*shared, 7], SamplingSpec(max_tokens=2, temperature=1.0, seed=3)))
    made.append(ScoreRequest("scored", [*shared, 9], [[4, 5], [8]]))
    return made


@pytest.mark.parametrize(
    ("kind", "runs_ahead"),
    [*((kind, False) for kind in KINDS), ("grouped", True)],
)
def test_the_engine_writes_the_same_on_either_runner(kind: str, runs_ahead: bool) -> None:
    """Ahead, the token of a padded step's row comes from the device into the place of a graph's input."""
    found = []
    for runner in runners(kind):
        limits = {"max_num_seqs": MAX_SEQS, "max_num_batched_tokens": 64, "kv_cache_tokens": ARENA}
        is_ours = isinstance(runner, CudaRunner)
        engine = engine_of(copy.deepcopy(runner.model), **limits, runs_ahead=runs_ahead and is_ours)
        engine.runner = runner
        found.append(serve(engine, requests()))
    plain, ours = found
    assert plain.keys() == ours.keys()
    for name, expected in plain.items():
        assert [c.token_ids for c in ours[name].completions] == [c.token_ids for c in expected.completions]
        assert not any(c.error for c in expected.completions)
        scores, expected_scores = ([s.loglikelihood for s in x.scores] for x in (ours[name], expected))
        assert scores == pytest.approx(expected_scores, rel=1e-4)


def decode_step(runner: Runner, num_rows: int) -> Step:
    """A step of decoding behind prompts of 3, 4, 5, … tokens, which this computes first."""
    first, second = Step(), Step()
    for index in range(num_rows):
        place, prompt = 100 * index, tokens_of(index, 4 + index)
        sequence = Sequence(str(index), 0, prompt, SamplingSpec(), 1)
        first.chunks.append(Chunk(sequence, 0, len(prompt) - 1, place, 0))
        past = len(prompt) - 1
        second.chunks.append(Chunk(sequence, past, 1, place + past, past))
    runner.run(first)
    return second


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 3, 5])
def test_padding_to_a_bucket_changes_no_logits(kind: str, num_rows: int) -> None:
    plain, ours = runners(kind)
    expected = plain.run(decode_step(plain, num_rows))
    found = ours.run(decode_step(ours, num_rows))
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_logits_are_float32_and_the_scheduler_never_gets_the_scratch_slot() -> None:
    _, ours = runners("alibi")
    assert all(len(cache) == ARENA + 1 for pair in ours.caches for cache in pair)
    assert ours.run(decode_step(ours, 2)).dtype == torch.float32


# --- FlashAttention's side, with a slow stand-in for the operator that a CPU does not have ---------------


def slow_flash(
    query: Tensor, keys: Tensor, values: Tensor, spans: FlashSpans, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """What FlashAttention documents: causal is aligned to the last key, ``starts`` are offsets."""
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
    bounds = spans.cu_rows.tolist()
    group = query.shape[1] // keys.shape[1]
    for index, length in enumerate(spans.lengths.tolist()):
        rows, start = slice(bounds[index], bounds[index + 1]), int(spans.starts[index])
        k, v = (x[start : start + length].repeat_interleave(group, dim=1).float() for x in (keys, values))
        scores = torch.einsum("tqd,sqd->qts", query[rows].float(), k) * scale
        if causal:
            count = scores.shape[1]
            hidden = torch.ones(count, length, dtype=torch.bool).triu(length - count + 1)
            scores = scores.masked_fill(hidden, float("-inf"))
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("qts,sqd->tqd", scores.softmax(-1), v).to(out.dtype)
    return out, lse


def blind_flash(
    query: Tensor, keys: Tensor, values: Tensor, spans: FlashSpans, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """One that takes the starts for cumulative lengths, as another version might."""
    lengths = (spans.starts.diff() % len(keys)).clamp(min=spans.max_rows, max=90)
    other = FlashSpans(
        spans.first, spans.stop, spans.max_rows, spans.max_keys, spans.cu_rows, spans.starts, lengths
    )
    return slow_flash(query, keys, values, other, causal, scale)


def absent_flash(*_: Any) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("no kernel image")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_the_flash_path_attends_to_own_spans_and_prefixes(heads: tuple[int, int], dtype: torch.dtype) -> None:
    shape = HeadShape(*heads, 64, dtype, has_slopes=False)
    cpu = torch.device("cpu")
    assert is_right("flash", lambda rows: FlashPlan(slow_flash, rows.own, rows.prefixes), shape, cpu)


@pytest.mark.parametrize("flash", [blind_flash, absent_flash])
def test_a_path_that_is_wrong_or_absent_is_left_out_with_one_line(
    flash: Any, caplog: pytest.LogCaptureFixture
) -> None:
    shape = HeadShape(4, 4, 64, torch.bfloat16, has_slopes=False)
    with caplog.at_level(logging.WARNING, logger="b2batch"):
        found = is_right(
            "flash", lambda rows: FlashPlan(flash, rows.own, rows.prefixes), shape, torch.device("cpu")
        )
    assert not found
    assert len(caplog.records) == 1
