"""Text ↔ token ids, so that a row's text can never become a control token unless it is let.

A Baichuan vocabulary holds its role tokens as ordinary user-defined pieces (`<reserved_106>` opens
a user turn), so plain sentencepiece turns them into ids wherever a text spells them. ``encode``
therefore cuts the text inside every such spelling: the ids still decode to the same text, and only
the chat format itself can place a role token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import sentencepiece

from b2batch.errors import ModelError
from b2batch.models.vocabulary import ByteVocabulary

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_RESERVED = re.compile(r"<(reserved_\d+>)")


class Tokenizer(Protocol):
    """What the worker needs of a tokenizer.

    ``first_token_id`` stands before a document that has nothing before it: BOS, or else EOS.
    """

    vocab_size: int
    first_token_id: int

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a piece of text, without any token that frames a whole prompt."""
        ...

    def encode_prompt(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a plain-text prompt, with the frame (such as a BOS) the model was trained with."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids; control tokens are left out."""
        ...

    def grammar_vocabulary(self, vocab_size: int, stop_token_ids: Collection[int]) -> LLTokenizer:
        """The tokens' bytes, for grammars over a model of ``vocab_size``; takes up to a second."""
        ...


class BaichuanTokenizer:
    """The family's sentencepiece model, used directly.

    ``decode(encode(text)) == text`` for every text: the model normalises nothing and falls back to
    bytes. ``allow_special`` reads ``<s>``, ``</s>``, ``<unk>`` and ``<reserved_N>`` in the text as
    tokens, as the upstream tokenizer always does.
    """

    def __init__(self, model_file: Path, *, add_bos: bool = False) -> None:
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        except (RuntimeError, OSError) as error:
            raise ModelError(f"{model_file}: not a sentencepiece model: {error}") from error
        self.vocab_size: int = self._pieces.vocab_size()
        self.first_token_id: int = self._pieces.bos_id()
        self._add_bos = add_bos
        self._control_ids = {
            self._pieces.id_to_piece(i): i for i in range(3) if i < self.vocab_size
        }  # <unk>, <s>, </s>
        self._control = re.compile("(" + "|".join(map(re.escape, self._control_ids)) + ")")
        pieces = (self._pieces.id_to_piece(i) for i in range(self.vocab_size))
        reserved = [re.escape(match[1]) for match in map(_RESERVED.fullmatch, pieces) if match]
        self._inside_reserved = re.compile(f"(?<=<)(?={'|'.join(reserved) or '(?!)'})")

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """See ``Tokenizer``."""
        if not allow_special:
            return [i for part in self._inside_reserved.split(text) for i in self._pieces.encode(part)]
        ids: list[int] = []
        for part in self._control.split(text):
            if part in self._control_ids:
                ids.append(self._control_ids[part])
            else:
                ids.extend(self._pieces.encode(part))
        return ids

    def encode_prompt(self, text: str, *, allow_special: bool = False) -> list[int]:
        """See ``Tokenizer``; a BOS only where the checkpoint's tokenizer config asks for one."""
        bos = [self._pieces.bos_id()] if self._add_bos else []
        return bos + self.encode(text, allow_special=allow_special)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer``; ids that a padded vocabulary has beyond the pieces are left out too."""
        return cast(str, self._pieces.decode([int(i) for i in ids if 2 < i < self.vocab_size]))

    def grammar_vocabulary(self, vocab_size: int, stop_token_ids: Collection[int]) -> LLTokenizer:
        """See ``Tokenizer``; reserved pieces spell control tokens, so no grammar may use them."""
        pieces = [str(self._pieces.id_to_piece(i)) for i in range(self.vocab_size)]
        special = [
            i
            for i, piece in enumerate(pieces)
            if i in self._control_ids.values() or _RESERVED.fullmatch(piece)
        ]
        return ByteVocabulary(
            [self._bytes_of(i, piece) for i, piece in enumerate(pieces)],
            special,
            self._pieces.eos_id(),
            self.encode,
        ).build(vocab_size, stop_token_ids)

    def _bytes_of(self, token: int, piece: str) -> bytes:
        if self._pieces.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # <0xE4>
        return piece.replace("\u2581", " ").encode()


class TransformersTokenizer:
    """Any tokenizer of transformers, with its chat template."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._inner: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"{directory}: the tokenizer cannot be loaded: {error}") from error
        self.vocab_size: int = len(self._inner)
        first = self._inner.bos_token_id
        self.first_token_id: int = self._inner.eos_token_id if first is None else first
        self._special = tuple(self._inner.get_added_vocab())

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint says how messages become a prompt."""
        return self._inner.chat_template is not None

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """See ``Tokenizer``."""
        return self._encode(text, add_special_tokens=False, split_special_tokens=not allow_special)

    def encode_prompt(self, text: str, *, allow_special: bool = False) -> list[int]:
        """See ``Tokenizer``."""
        return self._encode(text, add_special_tokens=True, split_special_tokens=not allow_special)

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Tokenizer``."""
        return cast(str, self._inner.decode(list(ids), skip_special_tokens=True))

    def grammar_vocabulary(self, vocab_size: int, stop_token_ids: Collection[int]) -> LLTokenizer:
        """See ``Tokenizer``.

        Raises:
            ModelError: the checkpoint has no fast tokenizer, whose bytes are the only known ones.
        """
        from llguidance.hf import from_tokenizer

        try:
            return from_tokenizer(self._inner, vocab_size, sorted(stop_token_ids) or None)
        except ValueError as error:
            raise ModelError(f"structured_outputs: the tokenizer cannot be used: {error}") from error

    def encode_chat(self, messages: Sequence[Mapping[str, str]], *, allow_special: bool) -> list[int]:
        """Ids of a conversation by the checkpoint's template, ready for the assistant's answer.

        Contents that spell a special token are encoded apart from the template's own text, so
        that only the template can place one.
        """
        prefill = bool(messages) and messages[-1]["role"] == "assistant"
        text = self._render(messages, prefill)
        if allow_special or not any(token in m["content"] for m in messages for token in self._special):
            return self._encode(text, add_special_tokens=False, split_special_tokens=False)
        marks = [f"\ue000{index}\ue001" for index in range(len(messages))]
        marked = [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)]
        rendered = self._render(marked, prefill)
        ids: list[int] = []
        for part in re.split("(\ue000\\d+\ue001)", rendered):
            is_content = part.startswith("\ue000") and part in marks
            piece = messages[marks.index(part)]["content"] if is_content else part
            ids += self._encode(piece, add_special_tokens=False, split_special_tokens=is_content)
        return ids

    def _render(self, messages: Sequence[Mapping[str, str]], prefill: bool) -> str:
        return cast(
            str,
            self._inner.apply_chat_template(
                [dict(m) for m in messages],
                tokenize=False,
                add_generation_prompt=not prefill,
                continue_final_message=prefill,
            ),
        )

    def _encode(self, text: str, **options: bool) -> list[int]:
        return cast("list[int]", self._inner(text, **options)["input_ids"])
