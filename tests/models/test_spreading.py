"""Which block of a model goes to which of several devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.utils import check_device_map
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, PreTrainedConfig

from b2batch.errors import ModelError
from b2batch.models.baichuan import BaichuanConfig, register
from b2batch.models.footprint import Architecture, head_bytes, stages, weight_bytes
from b2batch.models.loading import load_model
from b2batch.models.spreading import carry_between_blocks, spread_by_layers
from b2batch.spec import ModelSpec

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
}


def configs() -> dict[str, PreTrainedConfig]:
    register()
    return {
        "baichuan": BaichuanConfig(**SIZES, model_max_length=64),
        "llama": LlamaConfig(**SIZES),
        "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
        "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=48, max_position_embeddings=64),
        "gpt2": GPT2Config(vocab_size=97, n_embd=48, n_layer=4, n_head=3, n_positions=64),
    }


@pytest.mark.parametrize("name", configs())
def test_every_weight_has_a_device_and_ends_are_where_tokens_come_and_go(name: str) -> None:
    config = configs()[name]
    model = AutoModelForCausalLM.from_config(config)
    device_map = spread_by_layers(config, [1, 2, 1])
    check_device_map(model, device_map)
    names = {module: name for name, module in model.named_modules()}
    assert device_map[names[model.get_input_embeddings()]] == 0
    layers = [device_map[key] for key in device_map if key.rpartition(".")[2] in "0123"]
    assert layers == [0, 1, 1, 2]
    if not config.tie_word_embeddings:
        assert device_map[names[model.get_output_embeddings()]] == 2


def test_accelerates_hooks_give_way_and_the_logits_stay() -> None:
    config = configs()["llama"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids, use_cache=False).logits
    blocks = dict.fromkeys(spread_by_layers(config, [2, 2]), torch.device("cpu"))
    dispatch_model(model, dict.fromkeys(blocks, "cpu"), force_hooks=True)
    carry_between_blocks(model, blocks)
    assert not [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


shapes = st.builds(
    Architecture,
    num_layers=st.integers(1, 12),
    hidden_size=st.integers(1, 64),
    intermediate_size=st.integers(1, 64),
    query_size=st.integers(1, 64),
    kv_size=st.integers(1, 64),
    vocab_size=st.integers(1, 400),
    is_tied=st.booleans(),
)


@given(shapes, st.sampled_from([None, "nf4", "int8"]), st.integers(1, 5))
def test_no_layer_could_move_to_a_device_that_holds_less(
    shape: Architecture, quantization: str | None, num_devices: int
) -> None:
    parts = stages(shape, "bfloat16", quantization, num_devices)
    assert sum(part.num_layers for part in parts) == shape.num_layers
    total = weight_bytes(shape, "bfloat16", quantization)
    assert total - shape.num_layers < sum(part.weight_bytes for part in parts) <= total
    tables = (1 if shape.is_tied else 2) * head_bytes(shape, "bfloat16")
    layer = (total - tables) // shape.num_layers
    lightest = min(part.weight_bytes for part in parts)
    assert all(part.weight_bytes <= lightest + layer for part in parts if part.num_layers)


def test_more_gpus_than_there_are_is_refused() -> None:
    with pytest.raises(ModelError, match=r"gpus_per_replica: 999 CUDA devices are wanted, but"):
        load_model(ModelSpec(model="baichuan2-tiny"), 999)
