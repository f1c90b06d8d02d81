"""Attention over the arena against plain attention, whatever the heads and wherever the keys stand.

Seen through the logits of tiny random models, so any way of computing it is held to the same.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from b2batch.engine.kv import PrefixSpan, Span
from b2batch.engine.runner import Runner
from b2batch.engine.scheduler import Chunk, Move, Step
from b2batch.engine.sequence import Sequence
from b2batch.models.baichuan import BaichuanConfig, register
from b2batch.spec import SamplingSpec

ARENA, VOCAB = 600, 97


@dataclass(frozen=True)
class Shape:
    """Heads of a model, and how it tells positions."""

    num_heads: int
    num_key_heads: int
    head_dim: int
    alibi: bool = False


SHAPES = (
    Shape(4, 4, 16),
    Shape(4, 2, 16),
    Shape(6, 2, 8),
    Shape(5, 1, 32),
    Shape(1, 1, 64),
    Shape(4, 4, 16, alibi=True),
    Shape(5, 5, 8, alibi=True),
    Shape(6, 6, 32, alibi=True),
    Shape(12, 12, 8, alibi=True),
)


def random_model(shape: Shape) -> Any:
    """Two layers with weights large enough for attention to prefer some tokens over others."""
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": shape.num_heads * shape.head_dim,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": shape.num_heads,
        "initializer_range": 0.3,
    }
    if shape.alibi:
        register()
        config: Any = BaichuanConfig(**sizes, model_max_length=ARENA, position="alibi", norm_head=False)
    else:
        config = LlamaConfig(
            **sizes,
            num_key_value_heads=shape.num_key_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=ARENA,
        )
    torch.manual_seed(shape.num_heads * shape.head_dim)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@cache
def models(shape: Shape) -> tuple[Any, Runner]:
    """The same weights twice: with transformers' eager attention, and in a runner."""
    model = random_model(shape)
    model.set_attn_implementation("eager")
    return model, Runner(copy.deepcopy(model), ARENA)


def tokens_of(seed: int, count: int) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def plain(model: Any, tokens: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].float()


def soil(runner: Runner) -> None:
    """Leave the keys of others all over the arena, as any engine that has run for a while has them."""
    rubbish = Sequence("rubbish", 0, tokens_of(99, ARENA), SamplingSpec(), 1)
    runner.run(Step([Chunk(rubbish, 0, ARENA, 0, 0)]))


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ((ours - theirs).norm() / theirs.norm()).item() < 2e-4


@dataclass(frozen=True)
class Layout:
    """Sequences of an arena: (own tokens, which prefix or None, the cuts between their chunks)."""

    shape: Shape
    prefixes: tuple[int, ...]
    sequences: tuple[tuple[int, int | None, tuple[int, ...]], ...]
    gap: int


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    prefixes = draw(st.lists(st.integers(1, 60), max_size=2))
    sequences = []
    for _ in range(draw(st.integers(1, 5))):
        own = draw(st.integers(1, 60))
        prefix = draw(st.sampled_from([None, *range(len(prefixes))]))
        cuts = draw(st.sets(st.integers(1, own), max_size=3))
        sequences.append((own, prefix, tuple(sorted(cuts - {own}))))
    return Layout(draw(st.sampled_from(SHAPES)), tuple(prefixes), tuple(sequences), draw(st.integers(0, 9)))


def planned(layout: Layout) -> tuple[list[Step], list[list[int]]]:
    """The steps that compute a layout, each sequence a chunk a step, and all tokens of each sequence."""
    place = layout.gap
    first = Step()
    prefixes = []
    for index, length in enumerate(layout.prefixes):
        prefix = PrefixSpan(tuple(tokens_of(index, length)), Span(place, length))
        prefixes.append(prefix)
        first.chunks.append(Chunk(prefix, 0, length, place, 0))
        place += length + layout.gap
    rounds: list[list[Chunk]] = [[] for _ in range(4)]
    texts = []
    for index, (own, number, cuts) in enumerate(layout.sequences):
        prefix = prefixes[number] if number is not None else None
        shared = list(prefix.tokens) if prefix else []
        sequence = Sequence(str(index), 0, shared + tokens_of(50 + index, own), SamplingSpec(), 1)
        texts.append(list(sequence.tokens))
        edges = [0, *cuts, own]
        chunks = [
            Chunk(sequence, len(shared) + a, b - a, place + a, a, prefix)
            for a, b in itertools.pairwise(edges)
        ]
        for later, chunk in enumerate(reversed(chunks)):  # all end in the last step
            rounds[3 - later].append(chunk)
        place += own + layout.gap
    for chunks in rounds:
        chunks.sort(key=lambda chunk: chunk.prefix.span.start if chunk.prefix else -1)
    steps = [Step(chunks) for chunks in rounds if chunks]
    steps[0].chunks[:0] = first.chunks  # computed in the very step that first attends to them
    return steps, texts


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(layout=layouts())
def test_any_layout_gives_the_logits_of_plain_attention(layout: Layout) -> None:
    model, runner = models(layout.shape)
    soil(runner)
    steps, texts = planned(layout)
    logits = [runner.run(step) for step in steps][-1]
    owners = [chunk.owner for chunk in steps[-1].chunks if isinstance(chunk.owner, Sequence)]
    assert len(owners) == len(texts)
    for owner, ours in zip(owners, logits, strict=True):
        assert_close(ours, plain(model, texts[int(owner.request_id)]))


@pytest.mark.parametrize("shape", SHAPES)
def test_one_token_a_step_equals_plain_attention(shape: Shape) -> None:
    """Decoding, of two sequences on a shared prefix and one without."""
    model, runner = models(shape)
    soil(runner)
    layout = Layout(shape, (40,), ((20, 0, (18,)), (9, 0, (7,)), (30, None, (28,))), 3)
    steps, texts = planned(layout)
    runner.run(steps[0])
    owners = [chunk.owner for chunk in steps[0].chunks if isinstance(chunk.owner, Sequence)]
    halves = [
        [Chunk(c.owner, c.start + i, 1, c.slot + i, c.num_past + i, c.prefix) for c in steps[1].chunks]
        for i in range(2)
    ]
    logits = [runner.run(Step(chunks)) for chunks in halves][-1]
    for owner, ours in zip(owners, logits, strict=True):
        assert_close(ours, plain(model, texts[int(owner.request_id)]))


@pytest.mark.parametrize("target", [0, 35, 45, 300])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[6]])
def test_a_moved_span_is_the_same_span(shape: Shape, target: int) -> None:
    """Also when the old and the new place overlap."""
    model, runner = models(shape)
    soil(runner)
    tokens = tokens_of(1, 30)
    sequence = Sequence("row", 0, list(tokens), SamplingSpec(), 1)
    runner.run(Step([Chunk(sequence, 0, 29, 40, 0)]))
    moved = Step([Chunk(sequence, 29, 1, target + 29, 29)], [Move(40, target, 29)])
    assert_close(runner.run(moved)[0], plain(model, tokens))


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[7]])
def test_rows_do_not_see_each_other(shape: Shape) -> None:
    _, runner = models(shape)
    alone = Sequence("a", 0, tokens_of(1, 20), SamplingSpec(), 1)
    other = Sequence("b", 0, tokens_of(2, 33), SamplingSpec(), 1)
    expected = runner.run(Step([Chunk(alone, 0, 20, 0, 0)]))[0]
    for chunks in ([(other, 33, 20), (alone, 20, 0)], [(alone, 20, 0), (other, 33, 20)]):
        step = Step([Chunk(sequence, 0, count, slot, 0) for sequence, count, slot in chunks])
        ours = runner.run(step)[[sequence is alone for sequence, _, _ in chunks].index(True)]
        assert_close(ours, expected)
