"""Logits → next tokens, for a batch of sequences with settings of their own. No state.

Order of the processors as in transformers: penalties, bias, forbidden stops → temperature → top_k →
top_p, min_p → draw. The noise of a token is a hash of (seed, request id, sample, position, token
id), so it does not depend on neighbours, replica or restart.

The draw is Gumbel-max: argmax of log-probability + noise. Logits differ in their last bits with the
batch they are computed in; here that moves a token only if two perturbed scores all but tie.
Inverting the cumulative distribution, which adds those bits up over the vocabulary, moved 1 token
of 288 where the distribution was flat.

Shapes: R rows · V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq

import torch
import xxhash
from torch import Tensor

from b2batch.engine.sequence import Sequence
from b2batch.rows import TokenLogprob


def sample(logits_RV: Tensor, rows: Seq[Sequence], stop_ids: Seq[frozenset[int]]) -> list[int | None]:
    """The next token of each row, None where the model gave no finite maximum.

    ``stop_ids`` are the tokens that end each row; they are forbidden below ``min_tokens``.
    """
    best, tokens = logits_RV.max(dim=-1)
    finite: list[bool] = torch.isfinite(best).tolist()
    chosen: list[int | None] = tokens.tolist()
    special = [r for r, row in enumerate(rows) if finite[r] and not _is_plain_greedy(row, stop_ids[r])]
    if special:
        picked = _process(logits_RV[special], [rows[r] for r in special], [stop_ids[r] for r in special])
        for r, token in zip(special, picked, strict=True):
            chosen[r] = token
    return [token if ok else None for token, ok in zip(chosen, finite, strict=True)]


def uniform(seed: int, request_id: str, sample_index: int, position: int, ids: Tensor) -> Tensor:
    """The random numbers in (0, 1) of the tokens ``ids`` (K,) at one position, float64 (K,).

    A 64-bit hash of the request mixed with each token id by splitmix64 (Steele et al. 2014).
    """
    key = f"{seed}\0{request_id}\0{sample_index}\0{position}"
    base = xxhash.xxh3_64_intdigest(key.encode())
    mixed = ids * _as_int64(0x9E3779B97F4A7C15) + _as_int64(base)
    mixed = (mixed ^ _shift_right(mixed, 30)) * _as_int64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shift_right(mixed, 27)) * _as_int64(0x94D049BB133111EB)
    mixed = mixed ^ _shift_right(mixed, 31)
    return (_shift_right(mixed, 12).double() + 0.5) / (1 << 52)


def _as_int64(word: int) -> int:
    """The signed number with the bits of an unsigned 64-bit word: torch multiplies modulo 2^64."""
    return word - (1 << 64) if word >> 63 else word


def _shift_right(words: Tensor, bits: int) -> Tensor:
    """Logical shift: zeros come in from the left."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def token_logprobs(logits_RV: Tensor, tokens: Seq[int], num_top: Seq[int]) -> list[TokenLogprob]:
    """Log-probabilities under the model's own distribution (before any processor)."""
    logprobs = logits_RV.log_softmax(dim=-1)
    index = torch.tensor(tokens, device=logits_RV.device)[:, None]
    own: list[float] = logprobs.gather(1, index)[:, 0].tolist()
    result = []
    for r, (token, count) in enumerate(zip(tokens, num_top, strict=True)):
        values, ids = logprobs[r].topk(min(count, logprobs.shape[-1]))
        result.append(TokenLogprob(token, own[r], dict(zip(ids.tolist(), values.tolist(), strict=True))))
    return result


def _is_plain_greedy(row: Sequence, stop_ids: frozenset[int]) -> bool:
    s = row.sampling
    forbids = bool(stop_ids) and row.num_generated < s.min_tokens
    return s.temperature == 0 and not (
        forbids or s.logit_bias or s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty
    )


def _process(logits_RV: Tensor, rows: Seq[Sequence], stop_ids: Seq[frozenset[int]]) -> list[int | None]:
    """Tokens after penalties, bias and temperature; None where these leave no finite maximum."""
    logits_RV = logits_RV.clone()
    vocab_size = logits_RV.shape[-1]
    for logits, row, stops in zip(logits_RV, rows, stop_ids, strict=True):
        _penalise(logits, row)
        if stops and row.num_generated < row.sampling.min_tokens:
            logits[[token for token in stops if token < vocab_size]] = float("-inf")
    best, tokens = logits_RV.max(dim=-1)
    finite: list[bool] = torch.isfinite(best).tolist()
    chosen: list[int] = tokens.tolist()
    drawn = [r for r, row in enumerate(rows) if finite[r] and row.sampling.temperature > 0]
    if drawn:
        temperature = torch.tensor([rows[r].sampling.temperature for r in drawn], device=logits_RV.device)
        below = logits_RV[drawn] - best[drawn, None]  # at most 0: no temperature can make it overflow
        scaled = below / temperature.clamp_min(torch.finfo(temperature.dtype).tiny)[:, None]
        for r, token in zip(drawn, _draw(scaled, [rows[r] for r in drawn]), strict=True):
            chosen[r] = token
    return [token if ok else None for token, ok in zip(chosen, finite, strict=True)]


def _penalise(logits: Tensor, row: Sequence) -> None:
    """Apply the penalties and the bias to one row in place.

    The repetition penalty counts prompt and answer (Keskar et al. 2019, as in transformers);
    presence and frequency count the answer alone (as in the OpenAI API).
    """
    s = row.sampling
    if s.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(row.tokens)), device=logits.device)
        values = logits[seen]
        logits[seen] = torch.where(values < 0, values * s.repetition_penalty, values / s.repetition_penalty)
    if s.presence_penalty or s.frequency_penalty:
        counts = Counter(row.generated)
        if counts:
            ids = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), dtype=logits.dtype, device=logits.device)
            logits[ids] -= s.presence_penalty + s.frequency_penalty * times
    for token, bias in s.logit_bias.items():
        logits[token] += bias


def distribution(scaled_RV: Tensor, rows: Seq[Sequence]) -> tuple[Tensor, Tensor]:
    """What each row draws from: probabilities (R, V), most likely first, and their token ids (R, V).

    Tokens outside top_k, top_p or min_p have probability 0. top_p keeps the smallest set of tokens
    whose probability reaches it, and always the first.
    """
    logits, ids = scaled_RV.sort(dim=-1, descending=True, stable=True)
    device = scaled_RV.device
    vocab_size = scaled_RV.shape[-1]
    top_k = torch.tensor(
        [r.sampling.top_k if r.sampling.top_k > 0 else vocab_size for r in rows], device=device
    )
    rank = torch.arange(vocab_size, device=device)[None, :]
    logits = logits.masked_fill(rank >= top_k[:, None], float("-inf"))
    probabilities = logits.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    top_p = torch.tensor([r.sampling.top_p for r in rows], device=device)[:, None]
    min_p = torch.tensor([r.sampling.min_p for r in rows], device=device)[:, None]
    cut = ((before >= top_p) & (rank > 0) & (top_p < 1)) | (probabilities < min_p * probabilities[:, :1])
    probabilities = probabilities.masked_fill(cut, 0.0)
    return probabilities / probabilities.sum(dim=-1, keepdim=True), ids


def _draw(scaled_RV: Tensor, rows: Seq[Sequence]) -> list[int]:
    probabilities, ids = distribution(scaled_RV, rows)
    num_kept = int((probabilities > 0).sum(dim=-1).max())  # they stand first
    probabilities, ids = probabilities[:, :num_kept], ids[:, :num_kept]
    noise = torch.stack(
        [
            uniform(row.sampling.seed, row.request_id, row.index, len(row.tokens), own_ids)
            for row, own_ids in zip(rows, ids, strict=True)
        ]
    )
    scores = probabilities.double().log() - (-noise.log()).log()
    tokens: list[int] = ids.gather(1, scores.argmax(dim=-1, keepdim=True))[:, 0].tolist()
    return tokens
