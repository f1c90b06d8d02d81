"""A decoder layer's small operations on a CPU in float32, each in one pass over its tokens.

    norm      x / rms(x) · w             six operations in the models' own code
    rotary    both halves of a head      seven, and two copies
    gated     silu(gate(x)) · up(x)      done by the two products as they write (oneDNN's post-operations)

In the models' code each goes through all tokens on its own: memory traffic in a large step, calls in a
small one. What is replaced is found by its names and then by its numbers: what computes something else,
as a norm whose weight counts from 1, or a gate with another activation, stays as it is.

Shapes: T tokens · C features · H heads · D head size.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from b2batch.engine.compiled import compiled
from b2batch.engine.packing import PackedLinear

_ROTARY = "apply_rotary_pos_emb"  # as transformers' models call it, and ours
_TOLERANCE = 1e-6  # of the whole's norm
_ZERO, _ONE = np.float32(0), np.float32(1)

_Forward = Callable[[Tensor], Tensor]


@torch.inference_mode()
def fuse_layers(model: nn.Module) -> None:
    """Replace the small operations of a float32 model on a CPU, in place, once its linears are packed.

    Another model stays as it is.
    """
    parameter = next(model.parameters())
    if not parameter.is_cpu or parameter.dtype != torch.float32:
        return
    for module in model.modules():
        found = _norm_of(module) or _gate_of(module)
        if found is not None:
            fused, width = found
            sample = torch.linspace(-2, 3, 3 * width).view(1, 3, width)
            if _agree(module(sample), fused(sample)):
                module.forward = fused
    for name in {type(module).__module__ for module in model.modules()}:
        _fuse_rotary(sys.modules[name])


def _agree(theirs: Tensor, ours: Tensor) -> bool:
    if theirs.shape != ours.shape:
        return False
    return bool((theirs - ours).norm() < _TOLERANCE * theirs.norm())


def _norm_of(module: nn.Module) -> tuple[_Forward, int] | None:
    """What may stand in for an RMS norm, and its width."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    is_norm = type(module).__name__.endswith("RMSNorm") and isinstance(eps, float)
    if not is_norm or not isinstance(weight, Tensor) or weight.dtype != torch.float32 or weight.ndim != 1:
        return None
    size, weight_C = len(weight), weight.detach().numpy()

    def norm(x: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        _norm(x.view(-1, size).numpy(), weight_C, np.float32(eps), out.view(-1, size).numpy())
        return out

    return norm, size


@compiled
def _norm(x_TC, weight_C, eps, out_TC):  # type: ignore[no-untyped-def]
    num_tokens, size = x_TC.shape
    for t in range(num_tokens):
        total = _ZERO
        for c in range(size):
            total += x_TC[t, c] * x_TC[t, c]
        scale = _ONE / np.float32(math.sqrt(total / np.float32(size) + eps))
        for c in range(size):
            out_TC[t, c] = x_TC[t, c] * scale * weight_C[c]


def _gate_of(module: nn.Module) -> tuple[_Forward, int] | None:
    """What may stand in for a gated feed-forward with SiLU, and its width."""
    gate, up, down = (getattr(module, f"{name}_proj", None) for name in ("gate", "up", "down"))
    if not (
        isinstance(gate, PackedLinear) and isinstance(up, PackedLinear) and isinstance(down, PackedLinear)
    ):
        return None
    product = torch.ops.mkldnn._linear_pointwise

    def feed_forward(x: Tensor) -> Tensor:
        gated = product(x, gate.weight, gate.bias, "swish", [], "")
        out: Tensor = down(product.binary(x, gated, up.weight, up.bias, "mul"))
        return out

    return feed_forward, gate.in_features


def _fuse_rotary(module: ModuleType) -> None:
    """Replace a modeling file's rotary embedding by one that leaves to it what it cannot do."""
    original = getattr(module, _ROTARY, None)
    if original is None or original.__module__ == __name__:  # ours, since the model before
        return

    def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        angles = cos, sin
        if args or kwargs or not all(_is_plain(x, *angles) for x in (query, key)):
            return original(query, key, cos, sin, *args, **kwargs)
        return _rotated(query, *angles), _rotated(key, *angles)

    size = 8
    sample = torch.linspace(-2, 3, 2 * 3 * size).view(1, 3, 2, size).transpose(1, 2)
    angles = torch.linspace(0, 9, 3 * size).view(1, 3, size)
    try:
        theirs = original(sample, sample[:, :1], angles.cos(), angles.sin())
    except (TypeError, ValueError, RuntimeError, IndexError):
        return  # of another signature
    ours = rotary(sample, sample[:, :1], angles.cos(), angles.sin())
    if all(map(_agree, theirs, ours)):
        setattr(module, _ROTARY, rotary)


def _is_plain(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> bool:
    """Whether it is one packed row of float32 tokens on a CPU, turned in all of a head's dimensions."""
    return (
        x_BHTD.is_cpu
        and x_BHTD.dtype == cos_BTD.dtype == sin_BTD.dtype == torch.float32
        and not torch.is_grad_enabled()
        and x_BHTD.ndim == 4
        and len(x_BHTD) == 1
        and cos_BTD.shape == sin_BTD.shape == (1, *x_BHTD.shape[2:])
    )


def _rotated(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    x_THD = x_BHTD[0].transpose(0, 1).contiguous()
    out_THD = torch.empty_like(x_THD)
    _rotate(x_THD.numpy(), cos_BTD[0].contiguous().numpy(), sin_BTD[0].contiguous().numpy(), out_THD.numpy())
    return out_THD.transpose(0, 1)[None]


@compiled
def _rotate(x_THD, cos_TD, sin_TD, out_THD):  # type: ignore[no-untyped-def]
    num_tokens, num_heads, size = x_THD.shape
    half = size // 2
    for t in range(num_tokens):
        for h in range(num_heads):
            for d in range(half):
                low, high = x_THD[t, h, d], x_THD[t, h, d + half]
                out_THD[t, h, d] = low * cos_TD[t, d] - high * sin_TD[t, d]
                out_THD[t, h, d + half] = high * cos_TD[t, d + half] + low * sin_TD[t, d + half]
