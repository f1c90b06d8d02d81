"""A Baichuan split over the processes of one replica: each has some heads and a part of the feed-forward.

    W_pack                   rows of the rank's heads, in q, k and v alike
    o_proj                   the columns that these heads feed; outputs are summed over the ranks
    gate_proj, up_proj       a block of rows
    down_proj                the same block of columns; outputs are summed over the ranks
    embeddings, norms, head  whole on every rank, so that each has the same logits

transformers' own tensor-parallel plans have no style for three matrices fused in one, which W_pack is.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from b2batch.errors import SpecError
from b2batch.models.baichuan import BaichuanForCausalLM


def shard(model: nn.Module, rank: int, num_ranks: int) -> None:
    """Keep this rank's part of each layer, in place; the process group must be up.

    Raises:
        SpecError: a model of another family, quantised weights, or heads that cannot be shared out.
    """
    if not isinstance(model, BaichuanForCausalLM):
        raise SpecError(
            f"engine.tensor_parallel_size: only Baichuan can be split, not {type(model).__name__}"
        )
    config = model.config
    for what in ("num_attention_heads", "intermediate_size"):
        if getattr(config, what) % num_ranks:
            raise SpecError(
                f"engine.tensor_parallel_size: {num_ranks} does not divide {what} {getattr(config, what)}"
            )
    layers: Any = model.model.layers
    for layer in layers:
        _shard_attention(layer.self_attn, rank, num_ranks)
        _shard_feed_forward(layer.mlp, rank, num_ranks)
        for part in (layer.self_attn, layer.mlp):
            part.register_forward_hook(_sum_over_ranks)
    config.num_ranks = num_ranks


def _shard_attention(attention: Any, rank: int, num_ranks: int) -> None:
    total, size = attention.num_heads, attention.head_dim
    attention.num_heads = total // num_ranks
    attention.first_head = rank * attention.num_heads
    heads = slice(attention.first_head, attention.first_head + attention.num_heads)
    packed = _plain_weight(attention.W_pack)
    _keep(attention.W_pack, packed.view(3, total, size, -1)[:, heads].reshape(-1, packed.shape[1]))
    _keep(attention.o_proj, _plain_weight(attention.o_proj)[:, heads.start * size : heads.stop * size])


def _shard_feed_forward(mlp: Any, rank: int, num_ranks: int) -> None:
    for linear, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
        _keep(linear, _plain_weight(linear).chunk(num_ranks, dim)[rank])


def _plain_weight(linear: nn.Module) -> Tensor:
    if type(linear) is not nn.Linear:
        raise SpecError(
            "engine.tensor_parallel_size: quantised weights and adapters beside them are not split"
        )
    return linear.weight.detach()


def _keep(linear: nn.Linear, weight: Tensor) -> None:
    linear.weight = nn.Parameter(weight.contiguous().clone(), requires_grad=False)
    linear.out_features, linear.in_features = weight.shape


def _sum_over_ranks(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    dist.all_reduce(output)
    return output
