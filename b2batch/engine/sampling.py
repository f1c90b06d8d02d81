"""Logits → next tokens, for a batch of sequences with settings of their own. No state.

Order of the processors as in transformers: penalties, bias, forbidden stops → temperature → top_k →
top_p, min_p → draw. The noise of a token is a hash of (seed, request id, sample, position, token
id), so it does not depend on neighbours, replica or restart.

The draw is Gumbel-max: argmax of log-probability + noise. Logits differ in their last bits with the
batch they are computed in; here that moves a token only if two perturbed scores all but tie.
Inverting the cumulative distribution, which adds those bits up over the vocabulary, moved 1 token
of 288 where the distribution was flat.

On a GPU the host never waits here: tokens stay on the device. A sequence whose newest token the host
has not read yet ends in a number below 0 that stands for it: -1 - i is the i-th of those last sampled.

Shapes: R rows · T tokens · V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from itertools import islice

import torch
import xxhash
from torch import Tensor

from b2batch.engine.sequence import Sequence
from b2batch.rows import TokenLogprob

_ROWS_AT_ONCE = 32  # whose noise is drawn: it may be as wide as the vocabulary, in eight bytes


def sample(logits_RV: Tensor, rows: Seq[Sequence], unread: Tensor | None = None) -> Tensor:
    """The next token of each row (R,), -1 where the model gave no finite maximum.

    ``unread`` is what the last step sampled, if some rows end in a token of it.
    """
    best, tokens = logits_RV.max(dim=-1)
    special = [r for r, row in enumerate(rows) if not _is_plain_greedy(row)]
    if special:
        index = put(special, logits_RV)
        found = _process(logits_RV.index_select(0, index), [rows[r] for r in special], unread)
        was_finite = torch.isfinite(best.index_select(0, index))
        best = best.index_copy(0, index, found[0].masked_fill(~was_finite, float("nan")))
        tokens = tokens.index_copy(0, index, found[1])
    return tokens.masked_fill(~torch.isfinite(best), -1)


def fill_in(tokens_T: Tensor, unread: Tensor | None) -> None:
    """Put the tokens in place of the numbers that stand for them.

    Token 0 stands in where none was sampled: what follows it is dropped.
    """
    if unread is not None:
        found = unread.to(tokens_T.device).index_select(0, (-1 - tokens_T).clamp_min(0))
        tokens_T.copy_(torch.where(tokens_T < 0, found.clamp_min(0), tokens_T))


def put(values: Seq[int] | Seq[float], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
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


def token_logprobs(logits_RV: Tensor, tokens_R: Tensor, num_top: int) -> Tensor:
    """Log-probabilities under the model's own distribution (before any processor), for ``read_logprobs``.

    (R, 1 + 2 num_top) float64: that of the row's token, those of the likeliest tokens, their ids.
    """
    logprobs = logits_RV.log_softmax(dim=-1)
    own = logprobs.gather(1, tokens_R.clamp_min(0)[:, None])
    values, ids = logprobs.topk(min(num_top, logprobs.shape[-1]))
    return torch.cat((own.double(), values.double(), ids.double()), dim=1)  # ids are exact in it


def read_logprobs(row: Seq[float], token: int, num_top: int) -> TokenLogprob:
    """A row of ``token_logprobs``, with the first ``num_top`` of its likeliest tokens."""
    logprob, *top = row
    half = len(top) // 2
    alternatives = zip(map(int, top[half:]), top[:half], strict=True)
    return TokenLogprob(token, logprob, dict(islice(alternatives, num_top)))


def _forbids_stops(row: Sequence) -> bool:
    return bool(row.stops) and row.num_generated < row.sampling.min_tokens


def _is_plain_greedy(row: Sequence) -> bool:
    s = row.sampling
    return s.temperature == 0 and not (
        _forbids_stops(row)
        or s.logit_bias
        or s.repetition_penalty != 1
        or s.presence_penalty
        or s.frequency_penalty
    )


def _process(logits_RV: Tensor, rows: Seq[Sequence], unread: Tensor | None) -> tuple[Tensor, Tensor]:
    """Penalties, bias, temperature: the largest logit (R,), not finite where they leave none; tokens (R,).

    Works in ``logits_RV``.
    """
    vocab_size = logits_RV.shape[-1]
    for logits, row in zip(logits_RV, rows, strict=True):
        _penalise(logits, row, unread)
        if _forbids_stops(row):
            known = [token for token in row.stops if token < vocab_size]
            logits.index_fill_(0, put(known, logits, torch.long), float("-inf"))
    best, tokens = logits_RV.max(dim=-1)
    drawn = [r for r, row in enumerate(rows) if row.sampling.temperature > 0]
    if drawn:
        index = put(drawn, logits_RV)
        temperature = put([rows[r].sampling.temperature for r in drawn], logits_RV, torch.float32)
        # At most 0: no temperature can make it overflow.
        below = logits_RV.index_select(0, index) - best.index_select(0, index)[:, None]
        scaled = below / temperature.clamp_min(torch.finfo(temperature.dtype).tiny)[:, None]
        tokens = tokens.index_copy(0, index, _draw(scaled, [rows[r] for r in drawn]))
    return best, tokens


def _penalise(logits_V: Tensor, row: Sequence, unread: Tensor | None) -> None:
    """Apply the penalties and the bias to one row in place.

    The repetition penalty counts prompt and answer (Keskar et al. 2019, as in transformers);
    presence and frequency count the answer alone (as in the OpenAI API).
    """
    s = row.sampling
    if s.repetition_penalty != 1:
        seen = put(sorted(set(row.tokens)), logits_V)
        fill_in(seen, unread)  # one may be there twice, with the same value
        values = logits_V[seen]
        logits_V[seen] = torch.where(values < 0, values * s.repetition_penalty, values / s.repetition_penalty)
    if (s.presence_penalty or s.frequency_penalty) and row.num_generated:
        written = put(row.generated, logits_V)
        fill_in(written, unread)
        times_V = torch.zeros_like(logits_V).index_add_(
            0, written, torch.ones_like(written, dtype=logits_V.dtype)
        )
        logits_V -= s.presence_penalty * (times_V > 0) + s.frequency_penalty * times_V
    for token, bias in s.logit_bias.items():
        logits_V[token] += bias


def distribution(scaled_RV: Tensor, rows: Seq[Sequence]) -> tuple[Tensor, Tensor]:
    """What each row draws from: probabilities (R, V), most likely first, and their token ids (R, V).

    Tokens outside top_k, top_p or min_p have probability 0. top_p keeps the smallest set of tokens
    whose probability reaches it, and always the first.
    """
    logits, ids = scaled_RV.sort(dim=-1, descending=True, stable=True)
    vocab_size = scaled_RV.shape[-1]
    top_k = put([r.sampling.top_k if r.sampling.top_k > 0 else vocab_size for r in rows], scaled_RV)
    rank = torch.arange(vocab_size, device=scaled_RV.device)[None, :]
    logits = logits.masked_fill(rank >= top_k[:, None], float("-inf"))
    probabilities = logits.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    top_p = put([r.sampling.top_p for r in rows], scaled_RV, torch.float32)[:, None]
    min_p = put([r.sampling.min_p for r in rows], scaled_RV, torch.float32)[:, None]
    cut = ((before >= top_p) & (rank > 0) & (top_p < 1)) | (probabilities < min_p * probabilities[:, :1])
    probabilities = probabilities.masked_fill(cut, 0.0)
    return probabilities / probabilities.sum(dim=-1, keepdim=True), ids


def _draw(scaled_RV: Tensor, rows: Seq[Sequence]) -> Tensor:
    """Tokens (R,)."""
    probabilities, ids = distribution(scaled_RV, rows)
    num_kept = _most_kept(probabilities, rows)  # they stand first
    hashes = [_request_hash(r.sampling.seed, r.request_id, r.index, len(r.tokens)) for r in rows]
    blocks = zip(
        torch.split(probabilities[:, :num_kept], _ROWS_AT_ONCE),
        torch.split(ids[:, :num_kept], _ROWS_AT_ONCE),
        torch.split(put(hashes, scaled_RV, torch.long)[:, None], _ROWS_AT_ONCE),
        strict=True,
    )
    return torch.cat([_best_perturbed(*block) for block in blocks])


def _best_perturbed(probabilities_RV: Tensor, ids_RV: Tensor, hashes_R1: Tensor) -> Tensor:
    noise = _mix(hashes_R1, ids_RV)
    scores = probabilities_RV.double().log() - (-noise.log()).log()
    return ids_RV.gather(1, scores.argmax(dim=-1, keepdim=True))[:, 0]


def _most_kept(probabilities_RV: Tensor, rows: Seq[Sequence]) -> int:
    """At least as many tokens as any row draws from. Without top_k a GPU would be waited for: all."""
    most = max(row.sampling.top_k if row.sampling.top_k > 0 else math.inf for row in rows)
    if most < probabilities_RV.shape[-1]:
        return int(most)
    if probabilities_RV.is_cuda:
        return probabilities_RV.shape[-1]
    return max(1, int((probabilities_RV > 0).sum(dim=-1).max()))
