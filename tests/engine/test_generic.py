"""Causal LMs of transformers, tiny and random, on the engine: their own generate is the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from b2batch.engine import guard
from b2batch.engine.request import Request
from b2batch.errors import ModelError
from b2batch.models.loading import LoadedModel, load_model
from b2batch.spec import ModelSpec, SamplingSpec
from engine.serving import engine_of, serve

MAX_LEN = 256
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Llama, a head a key": {"num_key_value_heads": 4},
    "Llama, one key head, wide": {"num_key_value_heads": 1, "head_dim": 32},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": None},
    "Gemma": {"head_dim": 16},
}


def checkpoint(directory: Path, family: str, **settings: Any) -> Path:
    """A random checkpoint of a family as it would lie on disk, with a tokenizer of its size."""
    name = family.partition(",")[0]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | FAMILIES.get(family, {}) | settings))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    words = {f"w{i}": i for i in range(300)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="w2").save_pretrained(directory)
    return directory


def load(directory: Path, **settings: Any) -> LoadedModel:
    return load_model(ModelSpec(model=str(directory), device="cpu", dtype="float32", **settings))


def prompts() -> list[list[int]]:
    """Mixed lengths, some with a long common beginning."""
    generator = torch.Generator().manual_seed(5)
    texts = [
        torch.randint(3, 300, (n,), generator=generator).tolist() for n in (1, 2, 7, 20, 33, 90, 5, 12, 64)
    ]
    return texts + [texts[5][:50] + text for text in texts[2:5]]


@torch.inference_mode()
def generated(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=num_tokens,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(family: str, tmp_path: Path) -> None:
    loaded = load(checkpoint(tmp_path, family))
    expected_of_plain = [generated(loaded.model, prompt, 24) for prompt in prompts()]
    assert len({tuple(tokens) for tokens in expected_of_plain}) > 6  # the models say something
    guard.refuse_windows(loaded.model, MAX_LEN)
    reference = guard.reference_logits(loaded.model)
    guard.check_model(loaded.model, reference)
    engine = engine_of(loaded.model, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=MAX_LEN)
    requests = [Request(str(i), prompt, SamplingSpec(max_tokens=24)) for i, prompt in enumerate(prompts())]
    results = serve(engine, requests)
    for i, tokens in enumerate(expected_of_plain):
        assert list(results[str(i)].completions[0].token_ids) == tokens, i
    assert engine.scheduler_stats.num_prefix_tokens_saved > 0


def test_a_window_shorter_than_the_context_is_refused(tmp_path: Path) -> None:
    loaded = load(checkpoint(tmp_path, "Mistral", sliding_window=100))
    with pytest.raises(ModelError, match=r"window of 100 .*model\.max_model_len"):
        guard.refuse_windows(loaded.model, MAX_LEN)
    guard.refuse_windows(loaded.model, 100)  # it hides nothing there


def test_a_window_that_no_layer_uses_is_none(tmp_path: Path) -> None:
    loaded = load(checkpoint(tmp_path, "Qwen2", sliding_window=100, use_sliding_window=False))
    guard.refuse_windows(loaded.model, MAX_LEN)


def test_a_window_of_some_layers_is_refused(tmp_path: Path) -> None:
    settings = {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 1}
    loaded = load(checkpoint(tmp_path, "Qwen2", **settings))
    with pytest.raises(ModelError, match="window of 100"):
        guard.refuse_windows(loaded.model, MAX_LEN)


def test_the_guard_sees_attention_that_the_engine_does_not_do(tmp_path: Path) -> None:
    """Scores that are soft-capped: the interface passes the cap on, and the engine does not know it."""
    settings = {"attn_logit_softcapping": 0.5, "head_dim": 16, "query_pre_attn_scalar": 16}
    directory = checkpoint(tmp_path, "Gemma2", sliding_window=4096, **settings)
    loaded = load(directory)
    guard.refuse_windows(loaded.model, MAX_LEN)
    reference = guard.reference_logits(loaded.model)
    with pytest.raises(ModelError, match="does not compute the same"):
        guard.check_model(loaded.model, reference)


@pytest.mark.parametrize("family", ["Bloom", "MPT", "Falcon"])
def test_models_that_bypass_the_attention_interface_are_refused(family: str, tmp_path: Path) -> None:
    names = {"MPT": "Mpt"}
    sizes = {"hidden_size": 64, "n_head": 4, "n_layer": 2, "vocab_size": 300}
    sizes |= {"max_position_embeddings": MAX_LEN}
    extra = {
        "Bloom": sizes,
        "Mpt": sizes | {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": MAX_LEN},
        "Falcon": sizes | {"num_attention_heads": 4, "num_hidden_layers": 2},
    }
    name = names.get(family, family)
    config = getattr(transformers, f"{name}Config")(**extra[name])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(300)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(written | {"max_position_embeddings": MAX_LEN}))
    with pytest.raises(ModelError, match="attention interface") as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert name in str(caught.value)
