"""Logits → next tokens, for a batch of sequences with settings of their own. No state.

Order of the processors as in transformers: penalties, bias, forbidden stops → temperature → top_k →
top_p, min_p → draw. The noise of a token is a hash of (seed, request id, sample, position, token
id), so it does not depend on neighbours, replica or restart.

The draw is Gumbel-max: argmax of log-probability + noise. Logits differ in their last bits with the
batch they are computed in; here that moves a token only if two perturbed scores all but tie.
Inverting the cumulative distribution, which adds those bits up over the vocabulary, moved 1 token
of 288 where the distribution was flat.

On a GPU the host waits for the device once a step, when the tokens come back; once more where rows
draw without a top_k, and once where log-probabilities are asked for.

Shapes: R rows · V vocabulary.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Seq
from itertools import islice

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
    special = [r for r, row in enumerate(rows) if not _is_plain_greedy(row, stop_ids[r])]
    if special:
        index = _put(special, logits_RV)
        own_rows, own_stops = [rows[r] for r in special], [stop_ids[r] for r in special]
        found = _process(logits_RV.index_select(0, index), own_rows, own_stops)
        was_finite = torch.isfinite(best.index_select(0, index))
        best = best.index_copy(0, index, found[0].masked_fill(~was_finite, float("nan")))
        tokens = tokens.index_copy(0, index, found[1])
    chosen: list[int] = tokens.masked_fill(~torch.isfinite(best), -1).tolist()
    return [token if token >= 0 else None for token in chosen]


def _put(values: Seq[int] | Seq[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``values`` on the device of ``like``, without having the host wait for what runs there."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else tensor


def uniform(seed: int, request_id: str, sample_index: int, position: int, ids: Tensor) -> Tensor:
    """The random numbers in (0, 1) of the tokens ``ids`` (K,) at one position, float64 (K,).

    A 64-bit hash of the request mixed with each token id by splitmix64 (Steele et al. 2014).
    """
    return _mix(_request_hash(seed, request_id, sample_index, position), ids)


def _request_hash(seed: int, request_id: str, sample_index: int, position: int) -> int:
    key = f"{seed}\0{request_id}\0{sample_index}\0{position}"
    return _as_int64(xxhash.xxh3_64_intdigest(key.encode()))


def _mix(base: int | Tensor, ids: Tensor) -> Tensor:
    mixed = ids * _as_int64(0x9E3779B97F4A7C15) + base
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
    own = logprobs.gather(1, _put(tokens, logits_RV)[:, None])
    values, ids = logprobs.topk(min(max(num_top), logprobs.shape[-1]))
    found = torch.cat((own.double(), values.double(), ids.double()), dim=1).tolist()  # ids are exact in it
    result = []
    for token, count, (logprob, *top) in zip(tokens, num_top, found, strict=True):
        half = len(top) // 2
        alternatives = zip(map(int, top[half:]), top[:half], strict=True)
        result.append(TokenLogprob(token, logprob, dict(islice(alternatives, count))))
    return result


def _is_plain_greedy(row: Sequence, stop_ids: frozenset[int]) -> bool:
    s = row.sampling
    forbids = bool(stop_ids) and row.num_generated < s.min_tokens
    return s.temperature == 0 and not (
        forbids or s.logit_bias or s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty
    )


def _process(logits_RV: Tensor, rows: Seq[Sequence], stop_ids: Seq[frozenset[int]]) -> tuple[Tensor, Tensor]:
    """Penalties, bias, temperature: the largest logit (R,), not finite where they leave none; tokens (R,).

    Works in ``logits_RV``.
    """
    vocab_size = logits_RV.shape[-1]
    for logits, row, stops in zip(logits_RV, rows, stop_ids, strict=True):
        _penalise(logits, row)
        if stops and row.num_generated < row.sampling.min_tokens:
            known = [token for token in stops if token < vocab_size]
            logits.index_fill_(0, _put(known, logits, torch.long), float("-inf"))
    best, tokens = logits_RV.max(dim=-1)
    drawn = [r for r, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        index = _put(drawn, logits_RV)
        temperature = _put([rows[r].sampling.temperature for r in drawn], logits_RV, torch.float32)
        # At most 0: no temperature can make it overflow.
        below = logits_RV.index_select(0, index) - best.index_select(0, index)[:, None]
        scaled = below / temperature.clamp_min(torch.finfo(temperature.dtype).tiny)[:, None]
        tokens = tokens.index_copy(0, index, _draw(scaled, [rows[r] for r in drawn]))
    return best, tokens


def _penalise(logits: Tensor, row: Sequence) -> None:
    """Apply the penalties and the bias to one row in place.

    The repetition penalty counts prompt and answer (Keskar et al. 2019, as in transformers);
    presence and frequency count the answer alone (as in the OpenAI API).
    """
    s = row.sampling
    if s.repetition_penalty != 1:
        seen = _put(sorted(set(row.tokens)), logits)
        values = logits[seen]
        logits[seen] = torch.where(values < 0, values * s.repetition_penalty, values / s.repetition_penalty)
    if s.presence_penalty or s.frequency_penalty:
        counts = Counter(row.generated)
        if counts:
            ids = _put(list(counts), logits)
            times = _put(list(counts.values()), logits, logits.dtype)
            logits[ids] -= s.presence_penalty + s.frequency_penalty * times
    for token, bias in s.logit_bias.items():
        logits[token] += bias


def distribution(scaled_RV: Tensor, rows: Seq[Sequence]) -> tuple[Tensor, Tensor]:
    """What each row draws from: probabilities (R, V), most likely first, and their token ids (R, V).

    Tokens outside top_k, top_p or min_p have probability 0. top_p keeps the smallest set of tokens
    whose probability reaches it, and always the first.
    """
    logits, ids = scaled_RV.sort(dim=-1, descending=True, stable=True)
    vocab_size = scaled_RV.shape[-1]
    top_k = _put([r.sampling.top_k if r.sampling.top_k > 0 else vocab_size for r in rows], scaled_RV)
    rank = torch.arange(vocab_size, device=scaled_RV.device)[None, :]
    logits = logits.masked_fill(rank >= top_k[:, None], float("-inf"))
    probabilities = logits.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    top_p = _put([r.sampling.top_p for r in rows], scaled_RV, torch.float32)[:, None]
    min_p = _put([r.sampling.min_p for r in rows], scaled_RV, torch.float32)[:, None]
    cut = ((before >= top_p) & (rank > 0) & (top_p < 1)) | (probabilities < min_p * probabilities[:, :1])
    probabilities = probabilities.masked_fill(cut, 0.0)
    return probabilities / probabilities.sum(dim=-1, keepdim=True), ids


def _draw(scaled_RV: Tensor, rows: Seq[Sequence]) -> Tensor:
    """Tokens (R,)."""
    probabilities, ids = distribution(scaled_RV, rows)
    num_kept = _most_kept(probabilities, rows)  # they stand first
    probabilities, ids = probabilities[:, :num_kept], ids[:, :num_kept]
    hashes = [_request_hash(r.sampling.seed, r.request_id, r.index, len(r.tokens)) for r in rows]
    noise = _mix(_put(hashes, scaled_RV, torch.long)[:, None], ids)
    scores = probabilities.double().log() - (-noise.log()).log()
    return ids.gather(1, scores.argmax(dim=-1, keepdim=True))[:, 0]


def _most_kept(probabilities_RV: Tensor, rows: Seq[Sequence]) -> int:
    """At least as many tokens as any row draws from; only without top_k must the device be asked."""
    most = max(row.sampling.top_k if row.sampling.top_k > 0 else math.inf for row in rows)
    if most < probabilities_RV.shape[-1]:
        return int(most)
    return max(1, int((probabilities_RV > 0).sum(dim=-1).max()))
