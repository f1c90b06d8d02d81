"""Weights of 4 and 8 bits, by bitsandbytes: made at load, or read from a checkpoint that has them.

    nf4     blocks of 64 weights, an index of 4 bits each and a scale, the scales in 8 bits themselves
    int8    LLM.int8: rows in 8 bits; columns of activations beyond 6.0 stay in 16 bits

Only linear layers inside the decoder change; embeddings, norms and the head stay as they are.

A 4-bit checkpoint of the hub was pickled by bitsandbytes 0.41, which kept a layer's scales in a
list. ``from_hub_layout`` renames it into today's state dict, so that one way of loading serves both.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from b2batch.errors import ModelError

_BLOCK = 64
_INT8_THRESHOLD = 6.0
_DATA, _STATE = ".weight.data", ".weight.quant_state"


@contextmanager
def _no_kernels_from_the_hub() -> Iterator[None]:
    """bitsandbytes fetches and runs a compiled kernel when it is imported beside the package ``kernels``."""
    if "kernels" in sys.modules or "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]


def import_bitsandbytes() -> Any:
    """The package, imported when it is needed: it takes a second."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else it warns of every cast, in every layer
    with _no_kernels_from_the_hub():
        import bitsandbytes
    return bitsandbytes


def quantization_settings(method: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers needs to quantise while it loads. ``method`` is ``nf4`` or ``int8``."""
    import_bitsandbytes()
    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=_INT8_THRESHOLD)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def is_hub_layout(names: Mapping[str, Any]) -> bool:
    """Whether a state dict is one of bitsandbytes 0.41, as the hub's ``-4bits`` checkpoints are."""
    return any(name.endswith(_STATE) for name in names)


def from_hub_layout(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same weights under the names that today's transformers gives them.

    Raises:
        ModelError: a layer's list is not as bitsandbytes 0.41 wrote it.
    """
    converted: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith(_STATE):
            layer = name.removesuffix(_STATE)
            for key, part in _quant_state(layer, value).as_dict(packed=True).items():
                converted[f"{layer}.weight.{key}"] = part
        elif name.endswith(_DATA):
            converted[name.removesuffix(".data")] = value.detach()
        else:
            converted[name] = value.detach()
    return converted


def _quant_state(layer: str, values: Any) -> Any:
    """Today's form of [absmax, shape, dtype, blocksize, [offset, [absmax, code, …]], type, code]."""
    state_class = import_bitsandbytes().functional.QuantState
    try:
        absmax, shape, dtype, blocksize, (offset, nested), quant_type, code = values
        state2 = state_class(absmax=nested[0], code=nested[1], blocksize=nested[2], dtype=nested[4])
        return state_class(
            absmax=absmax,
            shape=shape,
            code=code,
            blocksize=blocksize,
            quant_type=quant_type,
            dtype=dtype,
            offset=offset,
            state2=state2,
        )
    except (TypeError, ValueError, IndexError) as error:
        raise ModelError(
            f"{layer}.weight.quant_state: not a double-quantised state of bitsandbytes 0.41: {error}"
        ) from error


def dequantize_nf4(packed: Tensor, state: Any) -> Tensor:
    """The weight (out, in) that 4-bit indices stand for, in the dtype that it was quantised from.

    Plain torch, element by element as bitsandbytes defines it: its own CPU kernel reads the scales of
    a row that is no multiple of a block from the wrong place (0.50, on machines with AVX-512).
    """
    absmax = state.absmax
    if state.nested:
        outer = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: absmax.numel()]
        absmax = state.state2.code[absmax.long()] * outer + state.offset
    bytes_ = packed.flatten().view(torch.uint8)
    indices = torch.stack((bytes_ >> 4, bytes_ & 15), dim=1).flatten()[: state.shape.numel()]
    scales = absmax.repeat_interleave(state.blocksize)[: indices.numel()]
    weight: Tensor = state.code[indices.long()] * scales
    return weight.view(state.shape).to(state.dtype)


def check_quantized(model: nn.Module, source: str) -> None:
    """ModelError if a layer that the config calls quantised holds plain weights."""
    nn_ = import_bitsandbytes().nn
    for name, module in model.named_modules():
        if not isinstance(module, nn_.Linear4bit | nn_.Linear8bitLt):
            continue
        scales = "quant_state" if isinstance(module, nn_.Linear4bit) else "SCB"
        if getattr(module.weight, scales, None) is None:
            raise ModelError(
                f"{source}: config.json says that the weights are quantised, and {name} is not; remove its "
                "quantization_config if they are of full precision"
            )


def settle_on_cpu(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Let quantised layers on a CPU multiply by their dequantised weight, in place.

    bitsandbytes' own products there take activations to bfloat16 (4 bits), or round them to 8 bits
    together with those of other rows (8 bits), so that neither is the reference's.
    """
    nn_ = import_bitsandbytes().nn
    for module in model.modules():
        if not isinstance(module, nn_.Linear4bit | nn_.Linear8bitLt) or module.weight.device.type != "cpu":
            continue
        is_4bit = isinstance(module, nn_.Linear4bit)
        module.compute_dtype = compute_dtype
        dequantize = _weight_of_4_bits if is_4bit else _weight_of_8_bits
        module.forward = MethodType(partial(_dequantized_linear, dequantize), module)


def _dequantized_linear(dequantize: Callable[[Any], Tensor], layer: Any, x: Tensor) -> Tensor:
    weight = dequantize(layer).to(layer.compute_dtype)
    bias = None if layer.bias is None else layer.bias.to(layer.compute_dtype)
    return F.linear(x.to(layer.compute_dtype), weight, bias).to(x.dtype)


def _weight_of_4_bits(layer: Any) -> Tensor:
    if layer.in_features % _BLOCK:
        return dequantize_nf4(layer.weight.data, layer.weight.quant_state)
    return cast(
        Tensor, import_bitsandbytes().functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    )


def _weight_of_8_bits(layer: Any) -> Tensor:
    scale = layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB
    return cast(Tensor, layer.weight.data * (scale[:, None] / 127.0))
