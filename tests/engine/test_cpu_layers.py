"""Each fused operation against the model's own code, and what must be left alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from b2batch.engine.cpu_layers import fuse_layers
from b2batch.engine.packing import PackedLinear, pack_linears
from b2batch.models.baichuan import BaichuanConfig, BaichuanForCausalLM

SIZES = {
    "vocab_size": 90,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2))


def qwen() -> nn.Module:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16))


def baichuan() -> nn.Module:
    return BaichuanForCausalLM(BaichuanConfig(**SIZES, position="rope"))


def replaced(model: nn.Module) -> int:
    return sum("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(("make", "norms"), [(llama, 5), (qwen, 9), (baichuan, 5)])
@torch.no_grad()
def test_a_fused_model_computes_the_same(make: Callable[[], nn.Module], norms: int) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.copy_(torch.rand_like(parameter))
    tokens = torch.randint(0, 90, (1, 23))
    expected = model(tokens, use_cache=False).logits
    pack_linears(model)
    fuse_layers(model)
    assert replaced(model) == norms + 2  # and two feed-forwards
    torch.testing.assert_close(model(tokens, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


class OffsetRMSNorm(nn.Module):
    """As Gemma's: the weight counts from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class GatedByGelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(nn.functional.gelu(self.gate_proj(x)) * self.up_proj(x))
        return out


def test_what_computes_something_else_stays() -> None:
    model = nn.Sequential(OffsetRMSNorm(), GatedByGelu())
    for child in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(model[1], child)
        setattr(model[1], child, PackedLinear(linear.weight, linear.bias))
    fuse_layers(model)
    assert replaced(model) == 0


def test_a_model_of_another_dtype_stays() -> None:
    model = llama().to(torch.bfloat16)
    fuse_layers(model)
    assert replaced(model) == 0


def turn(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def one(x: Tensor) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]

    return one(query), one(key)


def modeling_file(
    monkeypatch: pytest.MonkeyPatch, rotary: Callable[..., object]
) -> tuple[ModuleType, nn.Module]:
    """A module of its own with a layer in it, as transformers has one for each model."""
    module = ModuleType("modeling_test")
    module.apply_rotary_pos_emb = rotary  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    layer = type("Layer", (nn.Linear,), {"__module__": module.__name__})
    return module, layer(4, 4)


@pytest.mark.parametrize("num_tokens", [1, 9])
def test_a_fused_rotary_embedding(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    module, layer = modeling_file(monkeypatch, turn)
    fuse_layers(layer)
    assert module.apply_rotary_pos_emb is not turn
    fused = module.apply_rotary_pos_emb
    fuse_layers(layer)
    assert module.apply_rotary_pos_emb is fused, "a second engine in the process"
    query = torch.randn(1, num_tokens, 3, 16).transpose(1, 2)
    key = torch.randn(1, 1, num_tokens, 32)[..., 8:24]  # not contiguous
    angles = torch.randn(1, num_tokens, 16)
    arguments = (query, key, angles.cos(), angles.sin())
    with torch.inference_mode():
        torch.testing.assert_close(fused(*arguments), turn(*arguments), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_angles", [1, 2])
@torch.inference_mode()
def test_what_the_fused_rotary_embedding_cannot_do_the_original_does(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num_angles: int
) -> None:
    module, layer = modeling_file(monkeypatch, turn)
    fuse_layers(layer)
    query = torch.randn(2, 3, 5, 16, dtype=dtype)  # two sequences
    angles = torch.randn(num_angles, 5, 16, dtype=dtype)
    arguments = (query, query[:, :1], angles.cos(), angles.sin())
    assert all(map(torch.equal, module.apply_rotary_pos_emb(*arguments), turn(*arguments)))


def interleaved(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def one(x: Tensor) -> Tensor:
        pairs = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos[:, None] + pairs * sin[:, None]

    return one(query), one(key)


@pytest.mark.parametrize("rotary", [interleaved, lambda x, freqs: x * freqs])
def test_another_rotary_embedding_stays(
    monkeypatch: pytest.MonkeyPatch, rotary: Callable[..., object]
) -> None:
    module, layer = modeling_file(monkeypatch, rotary)
    fuse_layers(layer)
    assert module.apply_rotary_pos_emb is rotary
