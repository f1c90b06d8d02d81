"""Answers that a grammar must accept: which tokens may come next, worked out while the model runs.

llguidance compiles a grammar over the model's own vocabulary; each sequence walks through it with
every token it is given. The masks of a step depend on the tokens before it alone, so a thread fills
them beside the forward pass (the GIL is free meanwhile) and they are there when the logits are.

Shapes: R rows · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par
from numpy.typing import NDArray

_MAX_GRAMMARS = 256  # compiled ones that are kept: a job has one, or one a row


class Constraint:
    """Where one sequence stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole and nothing can follow."""
        return self.matcher.is_stopped() and not self.matcher.is_error()

    def accept(self, token: int) -> str | None:
        """Go on with a token; why that cannot be, or None."""
        return None if self.matcher.consume_token(token) else str(self.matcher.get_error())


class Grammars:
    """Compiles grammars over one vocabulary, and fills the masks of a step's sequences."""

    def __init__(
        self, make_vocabulary: Callable[[], LLTokenizer], vocab_size: int, *, num_threads: int = 1
    ) -> None:
        self._vocab_size = vocab_size
        self._num_threads = num_threads
        self._make_vocabulary = make_vocabulary
        self._vocabulary: LLTokenizer | None = None
        self._compiled = lru_cache(_MAX_GRAMMARS)(self._compile)
        self._thread = ThreadPoolExecutor(1, "masks")
        self._executor: LLExecutor | None = None
        self._filling: Future[NDArray[np.bool_]] | None = None

    def constraint(self, grammar: str) -> Constraint:
        """The beginning of a grammar.

        Raises:
            ValueError: llguidance refuses the grammar.
        """
        return Constraint(self._compiled(grammar).deep_copy())

    def _compile(self, grammar: str) -> LLMatcher:
        if self._vocabulary is None:
            self._vocabulary = self._make_vocabulary()
        matcher = LLMatcher(self._vocabulary, grammar)
        if matcher.is_error():
            raise ValueError(f"the grammar cannot be used: {matcher.get_error()}")
        return matcher

    def begin_masks(self, constraints: Seq[Constraint]) -> None:
        """Start to fill the masks of ``constraints``; their matchers are the thread's until ``masks``."""
        if self._filling is not None:
            self._filling.result()  # of a step that failed half way
        self._filling = self._thread.submit(self._fill, constraints) if constraints else None

    def masks(self) -> NDArray[np.bool_]:
        """What was begun: True where a token may not come, (R, V)."""
        assert self._filling is not None
        filling, self._filling = self._filling, None
        return filling.result()

    def _fill(self, constraints: Seq[Constraint]) -> NDArray[np.bool_]:
        if self._executor is None:
            self._executor = LLExecutor(num_threads=self._num_threads)
        bits = allocate_token_bitmask(len(constraints), self._vocab_size)
        matchers = [(constraint.matcher, row) for row, constraint in enumerate(constraints)]
        fill_next_token_bitmask_par(self._executor, matchers, bits)
        return _unpack(bits, self._vocab_size)


def _unpack(bits: NDArray[np.int32], vocab_size: int) -> NDArray[np.bool_]:
    """One bit a token, the lowest first → True for each token that is not allowed."""
    allowed = np.unpackbits(bits.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
    forbidden: NDArray[np.bool_] = allowed == 0
    return forbidden
