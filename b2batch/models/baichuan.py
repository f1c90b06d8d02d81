"""Baichuan 1 and 2, 7B and 13B, as a transformers model: `model_type: baichuan`, no remote code.

One pre-norm decoder covers the family; two switches tell its members apart:

    position   "rope"   7B    rotary embedding over the whole head, base 10,000
               "alibi"  13B   score + slope·(j - i), slopes of Press et al. 2021
    norm_head  True     2     logits = h · (W / ‖W_row‖)ᵀ
               False    1     logits = h · Wᵀ

Shapes: N tokens · B batch · T length · H heads · D head size · C hidden size · V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from b2batch.models.families import has_norm_head


class BaichuanConfig(PreTrainedConfig):
    """The hub's config keys, plus ``position``, ``norm_head`` and ``rope_theta``.

    The hub's files say neither which positions nor which head a model uses, so both are told from
    what the released checkpoints have in common unless given: 7B has ``max_position_embeddings``
    and 13B only ``model_max_length``; for the head see ``has_norm_head``.
    """

    model_type = "baichuan"
    keys_to_ignore_at_inference = ("past_key_values",)
    num_ranks = 1  # processes that share the heads; see models/sharding.py

    vocab_size: int = 125_696
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int | None = None
    model_max_length: int | None = None
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    position: str | None = None
    norm_head: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.position is None:
            self.position = "alibi" if self.max_position_embeddings is None else "rope"
        if self.norm_head is None:
            self.norm_head = has_norm_head(self.vocab_size, self.architectures)
        if self.model_max_length is None:
            self.model_max_length = self.max_position_embeddings or 4096

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        """Of this process. As many as query heads: the family has no grouped attention."""
        return self.num_attention_heads // self.num_ranks


def alibi_slopes(num_heads: int) -> list[float]:
    """Per-head slopes of the ALiBi bias, in head order (which is not sorted order).

    Heads beyond the largest power of two take every second slope of the next one.
    Source: Press et al. 2021, section 3; equals what the 13B checkpoints were trained with.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    finer = [2.0 ** (-8.0 * (i + 1) / (2 * power)) for i in range(2 * power)]
    return slopes + finer[0::2][: num_heads - power]


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis; the statistics are taken in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` (…, C); the result has the weight's dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(self.weight.dtype)


def rotary_tables(position_ids: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, each (B, T, D), float32, for positions (B, T)."""
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[..., None].float() * (1.0 / base**exponent)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """Turn each head vector by its position's angles ("neox" halves), in float32, and cast back."""
    wide = x_BHTD.float()
    low, high = wide.chunk(2, dim=-1)
    turned = wide * cos_BTD[:, None] + torch.cat((-high, low), dim=-1) * sin_BTD[:, None]
    return turned.to(x_BHTD.dtype)


def apply_rotary_pos_emb(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``rotate`` for queries and keys, by the name that transformers' models have for it."""
    return rotate(query, cos, sin), rotate(key, cos, sin)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention over (B, H, T, D), with the ALiBi bias where the module has slopes.

    The newest query is aligned with the newest key. The bias is slope·(j - i) in float32: it
    depends on the distance alone, so padding and batching cannot change it, and short distances,
    which carry the weight, stay exact where slope·j would be rounded.
    """
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scaling
    num_queries, num_keys = scores.shape[-2:]
    key_index = torch.arange(num_keys, device=scores.device)
    query_index = torch.arange(num_keys - num_queries, num_keys, device=scores.device)
    distance = key_index[None, :] - query_index[:, None]
    slopes = cast("Tensor | None", getattr(module, "alibi_slopes", None))
    if slopes is not None:
        scores = scores + slopes[:, None, None] * distance
    if attention_mask is None:
        scores = scores.masked_fill(distance > 0, float("-inf"))
    elif attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(torch.float32).min)
    else:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1).to(value.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class BaichuanAttention(nn.Module):
    """Self-attention with one fused projection: rows q, k, v of ``W_pack``, heads contiguous."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.first_head = 0
        self.head_dim = config.head_dim
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self._slopes: Tensor | None = None

    @property
    def alibi_slopes(self) -> Tensor | None:
        """(H,) float32 slopes on the weights' device, or None for rotary models.

        Made on first use: a tensor made in ``__init__`` would have no data where transformers
        builds the model on the meta device.
        """
        if self.config.position != "alibi":
            return None
        device = self.o_proj.weight.device
        if self._slopes is None or self._slopes.device != device:
            slopes = alibi_slopes(self.config.num_attention_heads)[self.first_head :][: self.num_heads]
            self._slopes = torch.tensor(slopes, dtype=torch.float32, device=device)
        return self._slopes

    def forward(
        self,
        hidden: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        batch, length, _ = hidden.shape
        packed = self.W_pack(hidden).view(batch, length, 3, self.num_heads, self.head_dim)
        query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        if rotary is not None:
            query, key = apply_rotary_pos_emb(query, key, *rotary)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        out, _ = self._attend()(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs
        )
        return cast(Tensor, self.o_proj(out.reshape(batch, length, -1)))

    def _attend(self) -> Callable[..., tuple[Tensor, Tensor]]:
        name = self.config._attn_implementation
        if self.config.position == "alibi" and name in ("eager", "sdpa"):
            return eager_attention  # sdpa would take the bias in the model's dtype and round it
        return cast(
            "Callable[..., tuple[Tensor, Tensor]]",
            ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention),
        )


class BaichuanMLP(nn.Module):
    """Gated feed-forward: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class BaichuanLayer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = BaichuanAttention(config, layer_idx)
        self.mlp = BaichuanMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, **attention: Any) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), **attention)
        return cast(Tensor, hidden + self.mlp(self.post_attention_layernorm(hidden)))


class NormHead(nn.Module):
    """The output projection of Baichuan 2, whose rows count by direction only.

    The rows' inverse norms are taken once in float32 and scale the *logits*: the same product as
    with normalised rows, without a second copy of the weight and without rounding it again.
    Logits are float32 whatever the weight is.
    """

    def __init__(self, hidden_size: int, vocab_size: int, normalise: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.normalise = normalise
        self.is_wide = True  # else logits are computed in the weight's dtype, and only then widened
        self._inverse_norm: Tensor | None = None
        self._measured = (-1, -1)

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, C) → (…, V) float32."""
        product = wide_linear if self.is_wide else F.linear
        logits = product(hidden, self.weight).float()
        return logits * self.inverse_norm() if self.normalise else logits

    def inverse_norm(self) -> Tensor:
        """(V,) float32: 1 / max(‖row‖, 1e-12), measured again when the weight has changed."""
        weight = self.weight.detach()
        state = (self.weight.data_ptr(), self.weight._version)
        if self._inverse_norm is None or state != self._measured:
            norm = torch.cat([rows.float().norm(dim=1) for rows in weight.split(8192)])
            self._inverse_norm, self._measured = norm.clamp_min(1e-12).reciprocal(), state
        return self._inverse_norm


def wide_linear(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden (…, C) · weight (V, C)ᵀ with a float32 result, without a float32 copy of ``weight``."""
    if weight.dtype == torch.float32:
        return F.linear(hidden.float(), weight)
    if weight.is_cuda:
        flat = hidden.reshape(-1, hidden.shape[-1])
        return torch.mm(flat, weight.t(), out_dtype=torch.float32).view(*hidden.shape[:-1], -1)
    wide = hidden.float()
    return torch.cat([F.linear(wide, rows.float()) for rows in weight.split(8192)], dim=-1)


class BaichuanPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to build, place and load the family."""

    config_class = BaichuanConfig
    base_model_prefix = "model"
    _no_split_modules = ("BaichuanLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _keys_to_ignore_on_load_unexpected = (r"self_attn\.rotary_emb\.inv_freq",)  # Baichuan 1 7B's files
    _supports_sdpa = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, NormHead):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        else:
            super()._init_weights(module)


class BaichuanModel(BaichuanPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        # No padding_idx: row 0 is <unk> as well as the pad, and upstream uses it as it is.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(BaichuanLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids (B, T), or their embeddings, → last hidden states (B, T, C)."""
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(start, start + hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = None
        if self.config.position == "rope":
            rotary = rotary_tables(position_ids, self.config.head_dim, self.config.rope_theta)
        for layer in self.layers:
            hidden = layer(
                hidden, rotary=rotary, attention_mask=mask, past_key_values=past_key_values, **kwargs
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), past_key_values=past_key_values)


class BaichuanForCausalLM(BaichuanPreTrainedModel, GenerationMixin):
    """The decoder with its head; ``generate`` works on it as on any other transformers model."""

    def __init__(self, config: BaichuanConfig) -> None:
        super().__init__(config)
        self.model = BaichuanModel(config)
        self.lm_head = NormHead(config.hidden_size, config.vocab_size, normalise=bool(config.norm_head))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Token ids (B, T) → float32 logits of the positions to keep (B, K, V)."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)


def register() -> None:
    """Make transformers' Auto classes build this family, in place of any remote code."""
    AutoConfig.register("baichuan", BaichuanConfig, exist_ok=True)
    AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
