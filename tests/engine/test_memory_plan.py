"""Memory worked out from configs: the family's real ones, on the GPUs people have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from b2batch.engine.memory import refuse_too_large
from b2batch.engine.memory_plan import MemoryPlan, parse_size
from b2batch.errors import ModelError, SpecError
from b2batch.models.checkpoint import Checkpoint
from b2batch.models.footprint import graph_bytes
from b2batch.spec import parse_spec

_7B = {
    "model_type": "baichuan",
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "model_max_length": 4096,
    "vocab_size": 125_696,
    "torch_dtype": "bfloat16",
}
_13B = {
    "model_type": "baichuan",
    "hidden_size": 5120,
    "intermediate_size": 13_696,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "model_max_length": 4096,
    "vocab_size": 125_696,
    "torch_dtype": "bfloat16",
}
_4BITS = {"quantization_config": {"load_in_4bit": True}}
CONFIGS: dict[str, dict[str, Any]] = {
    "7B-Base": _7B,
    "7B-Chat": _7B,
    "7B-Chat-4bits": _7B | _4BITS,
    "13B-Base": _13B,
    "13B-Chat": _13B,
    "13B-Chat-4bits": _13B | _4BITS,
}


def plan_of(name: str, **sections: dict[str, Any]) -> MemoryPlan:
    document: dict[str, Any] = {
        "model": {"model": f"baichuan-inc/Baichuan2-{name}"},
        "input": {"path": "rows.jsonl"},
        "prompt": {"column": "text"},
        "output": {"path": "out"},
    }
    for section, keys in sections.items():
        document[section] = document.get(section, {}) | keys
    checkpoint = Checkpoint(Path(), name, True, CONFIGS[name], {})
    return MemoryPlan.of(parse_spec(document), checkpoint, 4096)


@pytest.mark.parametrize(
    ("name", "num_bytes"),
    [
        # by hand: parameters (golden/README.md) · 2; the hub's index says the same
        ("7B-Base", 7_505_973_248 * 2),
        ("13B-Base", 13_896_668_160 * 2),
        # by hand: 6,476,005,376 weights in 4 bits, a byte for 64 of them, 4 bytes for 64 · 256; the rest · 2
        ("7B-Chat-4bits", 3_238_002_688 + 101_187_584 + 4 * 395_264 + 1_029_967_872 * 2),
        ("13B-Chat-4bits", 6_304_563_200 + 197_017_600 + 4 * 769_600 + 1_287_541_760 * 2),
    ],
)
def test_weights_are_those_counted_by_hand(name: str, num_bytes: int) -> None:
    assert plan_of(name).weight_bytes == num_bytes


@pytest.mark.parametrize(
    ("name", "settings", "gigabytes"),
    [
        ("7B-Chat", {}, 15.0),
        ("13B-Chat", {}, 27.8),
        ("7B-Chat-4bits", {}, 5.4),
        ("13B-Chat-4bits", {}, 9.1),
        ("7B-Chat", {"quantization": "nf4"}, 5.4),
        ("7B-Chat", {"quantization": "int8"}, 8.5),
        ("13B-Chat", {"quantization": "int8"}, 15.2),
        ("7B-Chat", {"dtype": "float32"}, 30.0),
    ],
)
def test_weights_in_gigabytes(name: str, settings: dict[str, str], gigabytes: float) -> None:
    assert round(plan_of(name, model=settings).weight_bytes / 1e9, 1) == gigabytes


def test_keys_and_values_of_a_token() -> None:
    assert plan_of("7B-Chat").kv_bytes_per_token == 512 * 1024
    assert plan_of("13B-Chat").kv_bytes_per_token == 800 * 1024
    assert plan_of("7B-Chat", model={"dtype": "float32"}).kv_bytes_per_token == 1024 * 1024


@pytest.mark.parametrize(
    ("name", "gpu", "fits", "advice"),
    [
        ("7B-Base", 24, True, r"few long sequences.*model\.quantization: nf4 \(6\.7"),
        ("7B-Base", 40, True, "^fits$"),
        ("7B-Base", 80, True, "^fits$"),
        ("7B-Base", 141, True, "^fits$"),
        ("7B-Chat-4bits", 24, True, "^fits$"),
        ("7B-Chat-4bits", 8, False, r"^does not fit; would: cluster\.gpus_per_replica: 2 \("),
        (
            "13B-Chat",
            24,
            False,
            r"would: model\.quantization: int8 .* nf4 .* cluster\.gpus_per_replica: 2 \(4\.2",
        ),
        ("13B-Chat", 40, True, "few long sequences.*int8.*nf4"),
        ("13B-Chat", 80, True, "^fits$"),
        ("13B-Chat", 141, True, "^fits$"),
        ("13B-Chat-4bits", 24, True, "^fits$"),
        ("13B-Chat-4bits", 80, True, "^fits$"),
        ("13B-Chat", 2, False, "does not fit, quantised or not, nor over 8 GPUs"),
    ],
)
def test_advice_for_a_described_gpu(name: str, gpu: int, fits: bool, advice: str) -> None:
    fit = plan_of(name).on(gpu * 10**9)
    assert fit.fits is fits
    assert re.search(advice, fit.advice), (fit.num_contexts, fit.advice)


def test_a_7b_on_24_gb_worked_out_by_hand() -> None:
    """15.01 GB of weights, 0.6 of CUDA; activations of 8192 · 114,688 B (attention, wide rotation) and four
    times 256 · 125,696 float32 logits; graphs: three times more, 36 · 256 · 4096 floats, activations of 256.
    """
    step = 8192 * 114_688 + 4 * 4 * 256 * 125_696
    graphs = 3 * 4 * 256 * 125_696 + 36 * 4 * 256 * 4096 + 256 * 114_688
    assert plan_of("7B-Base").workspace_bytes == step + graphs
    room = 24 * 10**9 - 600_000_000 - step - graphs - 2 * 7_505_973_248
    fit = plan_of("7B-Base").on(24 * 10**9)
    assert fit.num_kv_tokens == int(room * 0.9) // (512 * 1024)
    assert round(fit.num_contexts, 1) == 2.7


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("gpu", [24, 40, 80, 141])
def test_the_parts_never_exceed_the_device(name: str, gpu: int) -> None:
    plan = plan_of(name)
    used = plan.num_kv_tokens(gpu * 10**9) * plan.kv_bytes_per_token + plan.workspace_bytes
    if plan.on(gpu * 10**9).fits:
        assert used + plan.weight_bytes < gpu * 10**9


def test_keys_and_values_of_another_dtype_take_other_room() -> None:
    wide = plan_of("7B-Chat", engine={"kv_cache_dtype": "float32"})
    assert wide.kv_bytes_per_token == 2 * plan_of("7B-Chat").kv_bytes_per_token
    assert wide.weight_bytes == plan_of("7B-Chat").weight_bytes


def test_more_gpus_than_the_replica_sees_are_refused_before_loading() -> None:
    spec = {"model": {"model": "baichuan2-tiny"}, "input": {"path": "x"}, "prompt": {"column": "x"}}
    rest = {"output": {"path": "x"}, "cluster": {"gpus_per_replica": 999}}
    with pytest.raises(ModelError, match=r"gpus_per_replica: 999 CUDA devices are wanted"):
        refuse_too_large(parse_spec(spec | rest))


def test_a_part_of_a_gpu_beside_whole_ones_is_refused() -> None:
    with pytest.raises(SpecError, match=r"gpus_per_replica.*more than one are whole, found 1\.5"):
        plan_of("7B-Chat", cluster={"gpus_per_replica": 1.5})


def test_over_several_gpus_each_has_its_part_of_weights_and_keys() -> None:
    """By hand: half of 27.8 GB and 20 of 40 layers; what is left takes half of 800 KiB a token."""
    alone, halves = plan_of("13B-Chat"), plan_of("13B-Chat", cluster={"gpus_per_replica": 2})
    assert halves.weight_bytes == alone.weight_bytes
    graphs = graph_bytes(alone.shape, "bfloat16", 256)
    assert halves.workspace_bytes == alone.workspace_bytes - graphs, "there are none over several devices"
    room = 24 * 10**9 - 600_000_000 - halves.workspace_bytes - 13_896_668_160
    assert halves.num_kv_tokens(24 * 10**9) == int(room * 0.9) // (400 * 1024)
    fit = halves.on(24 * 10**9)
    assert (fit.fits, fit.num_devices, round(fit.num_contexts, 1)) == (True, 2, 4.2)


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("24GB", 24 * 10**9), ("24", 24 * 10**9), ("1.5 GiB", 3 << 29)]
)
def test_sizes_are_read(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "0GB", "-1GB", "24TB", "lots"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="no size of memory"):
        parse_size(text)
