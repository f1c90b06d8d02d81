"""Baichuan 2 7B's architecture in plain torch, with the dropout that training needs.

Names are the checkpoint's. Shapes: B sequences, T positions, H hidden, N heads, D head size, V pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class NetworkSize:
    """The sizes of a network; the defaults are the embedded model's."""

    vocab_size: int = 6000
    hidden_size: int = 192
    intermediate_size: int = 384
    num_layers: int = 4
    num_heads: int = 6
    max_positions: int = 1024


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x_BTH: Tensor) -> Tensor:
        x = x_BTH.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(self.weight.dtype)


class Attention(nn.Module):
    def __init__(self, size: NetworkSize) -> None:
        super().__init__()
        self.num_heads = size.num_heads
        self.W_pack = nn.Linear(size.hidden_size, 3 * size.hidden_size, bias=False)
        self.o_proj = nn.Linear(size.hidden_size, size.hidden_size, bias=False)

    def forward(self, x_BTH: Tensor, rotary_2TD: Tensor) -> Tensor:
        B, T, H = x_BTH.shape
        qkv = self.W_pack(x_BTH).view(B, T, 3, self.num_heads, H // self.num_heads)
        q_BNTD, k_BNTD, v_BNTD = qkv.permute(2, 0, 3, 1, 4)
        q_BNTD, k_BNTD = rotate(q_BNTD, rotary_2TD), rotate(k_BNTD, rotary_2TD)
        # Padding stands on the right and is never read by a position before it, so causal is enough.
        mixed_BNTD = functional.scaled_dot_product_attention(q_BNTD, k_BNTD, v_BNTD, is_causal=True)
        return self.o_proj(mixed_BNTD.transpose(1, 2).reshape(B, T, H))


class MLP(nn.Module):
    def __init__(self, size: NetworkSize) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.hidden_size, size.intermediate_size, bias=False)
        self.up_proj = nn.Linear(size.hidden_size, size.intermediate_size, bias=False)
        self.down_proj = nn.Linear(size.intermediate_size, size.hidden_size, bias=False)

    def forward(self, x_BTH: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x_BTH)) * self.up_proj(x_BTH))


class Layer(nn.Module):
    def __init__(self, size: NetworkSize, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(size)
        self.mlp = MLP(size)
        self.input_layernorm = RMSNorm(size.hidden_size)
        self.post_attention_layernorm = RMSNorm(size.hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTH: Tensor, rotary_2TD: Tensor) -> Tensor:
        x_BTH = x_BTH + self.dropout(self.self_attn(self.input_layernorm(x_BTH), rotary_2TD))
        return x_BTH + self.dropout(self.mlp(self.post_attention_layernorm(x_BTH)))


class Decoder(nn.Module):
    def __init__(self, size: NetworkSize, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(size.vocab_size, size.hidden_size)
        self.layers = nn.ModuleList(Layer(size, dropout) for _ in range(size.num_layers))
        self.norm = RMSNorm(size.hidden_size)
        self.dropout = nn.Dropout(dropout)
        # Not a buffer: it must stay float32 when the weights become bfloat16, and out of the checkpoint.
        self.rotary_2TD = rotary_table(size.max_positions, size.hidden_size // size.num_heads)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTH = self.dropout(self.embed_tokens(ids_BT))
        for layer in self.layers:
            x_BTH = layer(x_BTH, self.rotary_2TD[:, : ids_BT.shape[1]])
        return self.norm(x_BTH)


class Network(nn.Module):
    """The causal language model: ``forward`` gives hidden states, ``logits`` reads them out."""

    def __init__(self, size: NetworkSize, dropout: float = 0.0) -> None:
        super().__init__()
        self.model = Decoder(size, dropout)
        self.lm_head = nn.Linear(size.hidden_size, size.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.model(ids_BT)

    def logits(self, hidden: Tensor) -> Tensor:
        """Read hidden states (…, H) out as float32 logits (…, V) through NormHead: rows of unit length."""
        return functional.linear(hidden.float(), functional.normalize(self.lm_head.weight.float()))


def rotary_table(num_positions: int, head_size: int) -> Tensor:
    """Cosines and sines of rotary positions, (2, T, D), float32, base 10000."""
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, head_size, 2).float() / head_size)
    angles_TD = torch.outer(torch.arange(num_positions).float(), frequencies).repeat(1, 2)
    return torch.stack([angles_TD.cos(), angles_TD.sin()])


def rotate(x_BNTD: Tensor, rotary_2TD: Tensor) -> Tensor:
    """Apply rotary positions in float32 and cast back."""
    x = x_BNTD.float()
    left, right = x.chunk(2, dim=-1)
    rotated = x * rotary_2TD[0] + torch.cat([-right, left], dim=-1) * rotary_2TD[1]
    return rotated.to(x_BNTD.dtype)
