"""One stream of tokens in the engine: a sample of a request, or a continuation to be scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from b2batch.engine.kv import PrefixSpan, Span
from b2batch.rows import TokenLogprob
from b2batch.spec import SamplingSpec

if TYPE_CHECKING:
    from b2batch.engine.structured import Constraint


class Sequence:
    """Tokens, and how many of them have their keys and values in the arena.

        tokens   |----- prompt -----|-- generated --|
        KV       |- prefix -|-- own span --|            num_computed
                 shared, not ours

    An answer is over with any token of ``stops``, which are forbidden below ``min_tokens``.

    A sequence with ``probes`` is scored, not continued: for each position, the token ids whose
    log-probability after that position is wanted. One that is embedded has none, and ``pooling``.

    The newest token may be one that is on its way from the device: a number below 0 stands for it
    (see ``in_flight``). It counts like any other.
    """

    __slots__ = (
        "constraint",
        "index",
        "logprobs",
        "max_tokens",
        "num_computed",
        "num_prompt",
        "pooling",
        "prefix",
        "prefix_tokens",
        "probes",
        "request_id",
        "sampling",
        "scores",
        "span",
        "stops",
        "tokens",
    )

    def __init__(
        self,
        request_id: str,
        index: int,
        prompt: list[int],
        sampling: SamplingSpec,
        max_tokens: int,
        stops: frozenset[int] = frozenset(),
        probes: Mapping[int, tuple[int, ...]] | None = None,
        pooling: Literal["mean", "last"] | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.request_id = request_id
        self.index = index
        self.tokens = prompt
        self.num_prompt = len(prompt)
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.stops = stops
        self.probes = probes
        self.pooling = pooling
        self.constraint = constraint
        self.num_computed = 0
        self.prefix_tokens: tuple[int, ...] = ()  # what it should share, once that is known
        self.prefix: PrefixSpan | None = None
        self.span: Span | None = None
        self.logprobs: list[TokenLogprob] = []
        self.scores: dict[tuple[int, int], tuple[float, bool]] = {}  # (position, token) → (logprob, is best)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def shareable(self) -> list[int]:
        """Tokens that a shared prefix may come from; it always leaves the last of them to the sequence.

        A prefix gives no logits and no hidden states, so those of a scored sequence end where the
        first are wanted, and one whose mean is wanted has none.
        """
        if self.pooling == "mean":
            return []
        return self.tokens[: min(self.probes) + 1] if self.probes else self.tokens

    @property
    def prefix_length(self) -> int:
        return self.prefix.length if self.prefix else 0

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are still to be computed; none once the answer has its last token."""
        return 0 if self.is_full else len(self.tokens) - self.num_computed

    @property
    def is_full(self) -> bool:
        """Whether an answer has all the tokens it may have, and is over once they are read."""
        return 0 < self.max_tokens == self.num_generated

    @property
    def num_own(self) -> int:
        """Tokens that need room in the sequence's own span."""
        return len(self.tokens) - self.prefix_length

    @property
    def max_own(self) -> int:
        """Room in the own span that the sequence can ever need."""
        return self.num_prompt + self.max_tokens - self.prefix_length
