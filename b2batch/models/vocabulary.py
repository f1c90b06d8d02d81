"""A model's vocabulary as llguidance needs it: the bytes of every token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from llguidance import LLTokenizer


class ByteVocabulary:
    """The bytes of each token id, and how text becomes ids; what llguidance asks of a tokenizer.

    ``special_token_ids`` are tokens that stand for no text, which no grammar may use.
    """

    is_tokenizer_wrapper = True

    def __init__(
        self,
        tokens: Sequence[bytes],
        special_token_ids: Sequence[int],
        eos_token_id: int,
        encode: Callable[[str], list[int]],
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special_token_ids
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        """Ids of a text."""
        return self._encode(text)

    def build(self, vocab_size: int, stop_token_ids: Collection[int]) -> LLTokenizer:
        """The vocabulary, with ids that a padded model has beyond it as tokens that never come."""
        return LLTokenizer(self, n_vocab=vocab_size, eos_token=sorted(stop_token_ids) or None)  # type: ignore[arg-type]
