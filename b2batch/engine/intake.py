"""Requests → sequences: what cannot run is refused here, before it meets the others of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from llguidance import LLTokenizer

from b2batch.engine.request import AnyRequest, EmbedRequest, Request, ScoreRequest
from b2batch.engine.sequence import Sequence
from b2batch.engine.structured import Constraint, Grammars
from b2batch.spec import SamplingSpec

_SCORING = SamplingSpec()


class Intake:
    """Knows what the model can take. ``grammars`` is None where the vocabulary is not known.

    ``stop_token_ids`` are the model's own; a request may ignore them, and name more.
    """

    def __init__(
        self,
        max_model_len: int,
        vocab_size: int,
        stop_token_ids: frozenset[int],
        make_vocabulary: Callable[[], LLTokenizer] | None,
    ) -> None:
        self._max_model_len = max_model_len
        self._stop_token_ids = stop_token_ids
        self._vocab_size = vocab_size
        self.grammars = (
            Grammars(make_vocabulary, vocab_size, num_threads=torch.get_num_threads())
            if make_vocabulary
            else None
        )

    def sequences(self, request: AnyRequest) -> list[Sequence]:
        """The sequences of a request, numbered in order.

        Raises:
            ValueError: the prompt is empty or leaves no room for a token, or it or the sampling names a
                token that the model does not have.
        """
        if not request.prompt:
            raise ValueError("the prompt has no tokens")
        self._check_tokens("the prompt", request.prompt)
        if isinstance(request, ScoreRequest):
            return self._score_paths(request)
        if isinstance(request, EmbedRequest):
            return self._embedded(request)
        return self._samples(request)

    def _check_tokens(self, where: str, tokens: Iterable[int]) -> None:
        """One row's impossible token must not end the step of all."""
        for token in tokens:
            if not 0 <= token < self._vocab_size:
                raise ValueError(f"{where}: there is no token {token} in a vocabulary of {self._vocab_size}")

    def _embedded(self, request: EmbedRequest) -> list[Sequence]:
        if len(request.prompt) > self._max_model_len:
            raise ValueError(f"the prompt exceeds the context of {self._max_model_len}")
        prompt = list(request.prompt)
        return [Sequence(request.request_id, 0, prompt, _SCORING, 0, probes={}, pooling=request.pooling)]

    def _samples(self, request: Request) -> list[Sequence]:
        self._check_tokens("logit_bias", request.sampling.logit_bias)
        self._check_tokens("stop_token_ids", request.sampling.stop_token_ids)
        prompt = list(request.prompt)
        room = self._max_model_len - len(prompt)
        if room < 1:
            raise ValueError(f"a prompt of {len(prompt)} tokens fills the context of {self._max_model_len}")
        max_tokens = min(request.sampling.max_tokens or room, room)
        stops = self._stops(request.sampling)
        return [
            Sequence(
                request.request_id,
                index,
                list(prompt),
                request.sampling,
                max_tokens,
                stops,
                constraint=self._constraint(request),
            )
            for index in range(request.sampling.n)
        ]

    def _stops(self, sampling: SamplingSpec) -> frozenset[int]:
        eos = frozenset[int]() if sampling.ignore_eos else self._stop_token_ids
        return eos.union(sampling.stop_token_ids)

    def _constraint(self, request: Request) -> Constraint | None:
        if request.grammar is None:
            return None
        if self.grammars is None:
            raise ValueError("a grammar needs the engine to know the vocabulary")
        return self.grammars.constraint(request.grammar)

    def _score_paths(self, request: ScoreRequest) -> list[Sequence]:
        """The longest token paths that cover every continuation; a shorter one is probed on the way.

        So labels of one token each cost one forward pass of the prompt, not one a label.
        """
        if not request.continuations:
            raise ValueError("there is no continuation to score")
        paths: dict[tuple[int, ...], dict[int, set[int]]] = {}
        for continuation in sorted(request.continuations, key=len, reverse=True):
            if not continuation:
                raise ValueError("a continuation has no tokens")
            self._check_tokens("a continuation", continuation)
            if len(request.prompt) + len(continuation) > self._max_model_len:
                raise ValueError(f"prompt and continuation exceed the context of {self._max_model_len}")
            head = tuple(continuation[:-1])
            path = next((p for p in paths if p[: len(head)] == head), head)
            probes = paths.setdefault(path, {})
            for offset, token in enumerate(continuation):
                probes.setdefault(len(request.prompt) - 1 + offset, set()).add(token)
        return [
            Sequence(
                request.request_id,
                index,
                [*request.prompt, *path],
                _SCORING,
                max_tokens=0,
                probes={position: tuple(sorted(tokens)) for position, tokens in sorted(probes.items())},
            )
            for index, (path, probes) in enumerate(paths.items())
        ]
