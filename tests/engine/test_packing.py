"""Packed products against plain ones, and whole answers of packed models against the golden ones."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from golden import Golden
from torch import nn

from b2batch.engine.packing import (
    Int8Linear,
    PackedLinear,
    TokenQuantizer,
    can_pack,
    pack_linears,
    refuse_int8,
)
from b2batch.errors import SpecError
from b2batch.models.loading import LoadedModel
from engine.serving import engine_of, serve
from engine.test_engine import assert_golden, greedy_requests

has_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="the CPU has no VNNI")
has_bf16 = pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="the CPU has no bfloat16")


def linear(num_inputs: int, num_outputs: int, bias: bool = True) -> nn.Linear:
    torch.manual_seed(num_inputs + num_outputs)
    return nn.Linear(num_inputs, num_outputs, bias=bias).requires_grad_(False)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


@pytest.mark.parametrize("rows", [1, 7, 200])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_product_is_the_product(rows: int, bias: bool) -> None:
    plain = linear(96, 200, bias)
    x = torch.randn(1, rows, 96)
    assert relative(PackedLinear(plain.weight, plain.bias)(x), plain(x)) < 1e-6


@has_bf16
def test_a_packed_product_in_bfloat16() -> None:
    plain = linear(96, 200).to(torch.bfloat16)
    x = torch.randn(1, 9, 96, dtype=torch.bfloat16)
    assert relative(PackedLinear(plain.weight, plain.bias)(x), plain(x)) < 1e-2


@has_vnni
@pytest.mark.parametrize("bias", [True, False])
def test_eight_bits_are_a_percent_off(bias: bool) -> None:
    plain = linear(300, 200, bias)
    x = torch.randn(1, 50, 300) * torch.logspace(-3, 3, 50)[:, None]  # each token has a scale of its own
    ours, theirs = Int8Linear(plain.weight, plain.bias, TokenQuantizer())(x), plain(x)
    for token in range(50):
        assert relative(ours[0, token], theirs[0, token]) < 0.02


@has_vnni
def test_the_largest_numbers_do_not_overflow() -> None:
    weight = torch.ones(8, 4096)
    x = torch.ones(1, 3, 4096)
    assert torch.equal(Int8Linear(weight, None, TokenQuantizer())(x), torch.full((1, 3, 8), 4096.0))


@has_vnni
def test_a_token_of_zeros_and_rows_of_zeros() -> None:
    x = torch.zeros(1, 2, 64)
    x[0, 1] = torch.randn(64)
    out = Int8Linear(torch.zeros(5, 64), None, TokenQuantizer())(x)
    assert torch.equal(out, torch.zeros(1, 2, 5))


@has_vnni
def test_a_token_in_eight_bits_does_not_depend_on_its_batch() -> None:
    layer = Int8Linear(linear(300, 200).weight, None, TokenQuantizer())
    x = torch.randn(1, 40, 300)
    together = layer(x)
    for token in (0, 17, 39):
        assert torch.equal(layer(x[:, token : token + 1].clone()), together[:, token : token + 1])


GoldenOf = Callable[[str], Golden]
LoadedOf = Callable[[str], LoadedModel]


@pytest.mark.parametrize("variant", ["b2_7b", "b2_13b", "b1_7b"])
def test_packed_models_give_every_golden_token(variant: str, golden: GoldenOf, loaded: LoadedOf) -> None:
    model = copy.deepcopy(loaded(variant).model)
    assert can_pack(model)
    pack_linears(model)
    assert not any(type(module) is nn.Linear for module in model.modules())
    assert_golden(serve(engine_of(model), greedy_requests(golden(variant))), golden(variant))


def test_eight_bits_of_a_model_that_is_not_float32_are_refused(loaded: LoadedOf) -> None:
    model = copy.deepcopy(loaded("b2_7b").model).to(torch.bfloat16)
    with pytest.raises(SpecError, match="int8-dynamic is for float32 models on a CPU"):
        refuse_int8(model)
