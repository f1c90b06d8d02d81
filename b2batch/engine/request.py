"""What goes into the engine and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from b2batch.rows import FinishReason, TokenLogprob
from b2batch.spec import SamplingSpec


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue ``sampling.n`` times.

    ``request_id`` also seeds the sampling: the random number of a token is a hash of (seed,
    request_id, sample index, position), whatever the request is batched with. ``grammar``, in
    llguidance's notation, is what every answer must match.
    """

    request_id: str
    prompt: Sequence[int]
    sampling: SamplingSpec
    grammar: str | None = None


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One prompt and the continuations whose log-likelihood after it is wanted; nothing is decoded."""

    request_id: str
    prompt: Sequence[int]
    continuations: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """One prompt whose hidden states after the last layer are wanted: their mean, or the last one."""

    request_id: str
    prompt: Sequence[int]
    pooling: Literal["mean", "last"]


AnyRequest = Request | ScoreRequest | EmbedRequest


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished sample. ``token_ids`` ends with the stop token when one was met.

    ``num_text_tokens`` of them make the text: all but a stop token. ``stop_text`` is the stop
    string that ended the sample; with what follows it, it is the last ``num_cut_chars`` of the text.
    ``error`` is set when there was no finite number to choose a token by.
    """

    token_ids: tuple[int, ...]
    num_text_tokens: int
    finish_reason: FinishReason
    stop_text: str | None = None
    num_cut_chars: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """The log-likelihood of one continuation, and whether greedy decoding would have written it."""

    loglikelihood: float
    num_tokens: int
    is_greedy: bool


@dataclass(frozen=True, slots=True)
class Finished:
    """A request that is done.

    It has ``completions`` in sample order, or ``scores`` in continuation order, or an ``embedding``.
    """

    request_id: str
    num_prompt_tokens: int
    completions: tuple[Completion, ...] = ()
    scores: tuple[Score, ...] = ()
    embedding: tuple[float, ...] = ()
