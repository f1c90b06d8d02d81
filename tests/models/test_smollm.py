"""A real instruct model, SmolLM2-135M: through the Baichuan path once rewritten, and as itself.

Set ``B2BATCH_SMOLLM2`` to a directory with its checkpoint; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from golden import forward
from safetensors.torch import load_file, save_file

from b2batch.engine import guard
from b2batch.engine.engine import Engine
from b2batch.engine.request import Request
from b2batch.engine.scheduler import Limits
from b2batch.models.loading import LoadedModel, load_model
from b2batch.spec import ModelSpec, SamplingSpec

pytestmark = pytest.mark.slow
MAX_LEN = 512
NUM_TOKENS = 24
QUESTIONS = ("What is the capital of France?", "Name three primary colors.", "Write a haiku about rain.")


@pytest.fixture(scope="module")
def source() -> Path:
    directory = os.environ.get("B2BATCH_SMOLLM2")
    if not directory:
        pytest.skip("B2BATCH_SMOLLM2 names no checkpoint")
    return Path(directory)


@pytest.fixture(scope="module")
def llama(source: Path) -> Any:
    """transformers' own model, float32, which no engine touches."""
    return transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(source: Path) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    rows = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    return [list(getattr(row, "input_ids", row)) for row in rows]


@pytest.fixture(scope="module")
def expected(llama: Any, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' greedy answers."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = llama.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NUM_TOKENS)
        answers.append(out[0, len(prompt) :].tolist())
    assert len({tuple(answer) for answer in answers}) == len(answers)
    return answers


def as_baichuan(source: Path, target: Path, tokenizer: Path) -> Path:
    """The same network in Baichuan 1's layout: a key head for every query head, q|k|v in one matrix."""
    config = json.loads((source / "config.json").read_text())
    size = config["head_dim"]
    group = config["num_attention_heads"] // config["num_key_value_heads"]

    def repeated(weight: torch.Tensor) -> torch.Tensor:
        return weight.view(-1, size, weight.shape[1]).repeat_interleave(group, dim=0).flatten(0, 1)

    llama = load_file(source / "model.safetensors")
    weights = {name: tensor for name, tensor in llama.items() if ".self_attn." not in name}
    weights["lm_head.weight"] = llama["model.embed_tokens.weight"].clone()
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}.self_attn."
        q, k, v = (llama[f"{name}{part}_proj.weight"] for part in "qkv")
        weights[f"{name}W_pack.weight"] = torch.cat([q, repeated(k), repeated(v)])
        weights[f"{name}o_proj.weight"] = llama[f"{name}o_proj.weight"]
    target.mkdir()
    save_file({name: w.contiguous() for name, w in weights.items()}, target / "model.safetensors")
    kept = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    written = {key: config[key] for key in (*kept, "max_position_embeddings", "bos_token_id", "eos_token_id")}
    written |= {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "hidden_act": "silu"}
    written |= {"rope_theta": 1e5, "rms_norm_eps": 1e-5, "norm_head": False, "tie_word_embeddings": False}
    (target / "config.json").write_text(json.dumps(written | {"pad_token_id": 2}))
    shutil.copyfile(tokenizer, target / "tokenizer.model")  # prompts are given as ids; any will do
    return target


@pytest.fixture(scope="module")
def baichuan(source: Path, shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    tokenizer = shared_dir / "golden" / "ckpt" / "b1_7b-tiny" / "tokenizer.model"
    directory = as_baichuan(source, tmp_path_factory.mktemp("rewritten") / "smollm2", tokenizer)
    return load_model(ModelSpec(model=str(directory), device="cpu", dtype="float32", max_model_len=MAX_LEN))


def on_engine(loaded: LoadedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers of the engine, which has passed its own guard."""
    guard.refuse_windows(loaded.model, MAX_LEN)
    guard.check_model(loaded.model, guard.reference_logits(loaded.model))
    engine = Engine(
        loaded.model,
        Limits(max_num_seqs=8, max_num_batched_tokens=40, kv_cache_tokens=2048),
        max_model_len=MAX_LEN,
        stop_token_ids=loaded.codec.stop_token_ids,
    )
    for i, prompt in enumerate(prompts):
        engine.add(Request(str(i), prompt, SamplingSpec(max_tokens=NUM_TOKENS)))
    done = {}
    while engine.has_work:
        done |= {finished.request_id: finished for finished in engine.step()}
    return [list(done[str(i)].completions[0].token_ids) for i in range(len(prompts))]


def test_rewritten_as_baichuan_1_it_gives_llamas_logits_and_tokens(
    baichuan: LoadedModel, llama: Any, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    config = baichuan.model.config
    assert (config.position, config.norm_head) == ("rope", False)
    for prompt, answer in zip(prompts, expected, strict=True):
        theirs = forward(llama, prompt + answer)
        ours = forward(baichuan.model, prompt + answer)
        assert ((ours - theirs).norm() / theirs.norm()).item() <= 1e-3
        assert (ours - theirs).abs().max().item() <= 1e-3 * theirs.abs().max().item()
    assert on_engine(baichuan, prompts) == expected


def test_as_itself_it_answers_with_its_chat_template(
    source: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    spec = ModelSpec(model=str(source), device="cpu", dtype="float32", max_model_len=MAX_LEN)
    loaded = load_model(spec)
    assert loaded.codec.chat is not None
    encoded = [loaded.codec.chat.encode([{"role": "user", "content": text}]) for text in QUESTIONS]
    assert encoded == prompts
    assert on_engine(loaded, encoded) == expected
    assert "Paris" in loaded.codec.tokenizer.decode(expected[0])
