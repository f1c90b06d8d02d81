"""A sentencepiece BPE tokenizer laid out as Baichuan 2's, and the chat prompt in its ids."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import sentencepiece

from .reviews import FORMS, Review

VOCAB_SIZE = 6000
UNK_ID, BOS_ID, EOS_ID, USER_ID, ASSISTANT_ID = 0, 1, 2, 195, 196
NUM_FIXED = 201
"""Ids below this one are fixed by the layout; the bytes and the learned pieces follow."""


def train_tokenizer(reviews: Sequence[Review]) -> bytes:
    """Learn the pieces from the reviews, the labels and the instructions; returns ``tokenizer.model``."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_corpus(reviews),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=0.998,
        max_sentencepiece_length=8,
        split_digits=True,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=_user_defined_pieces(),
        unk_id=UNK_ID,
        bos_id=BOS_ID,
        eos_id=EOS_ID,
        pad_id=-1,
        num_threads=1,  # the order of equally frequent pieces must not depend on the machine
        minloglevel=2,
    )
    return model.getvalue()


def _user_defined_pieces() -> list[str]:
    """Ids 3 to 200: newline and tab at 5 and 6, the role tokens at 195 and 196, as in Baichuan 2."""
    pieces = {index: f"<extra_{index}>" for index in range(3, 89)}
    pieces |= {index: f"<reserved_{index - 89}>" for index in range(89, NUM_FIXED)}
    pieces |= {5: "\n", 6: "\t"}
    return [pieces[index] for index in sorted(pieces)]


def _corpus(reviews: Sequence[Review]) -> Iterator[str]:
    """Every review, and its label and an instruction beside it, so that these become few, long pieces."""
    for index, review in enumerate(reviews):
        form = FORMS[index % len(FORMS)]
        yield from (review.text, review.label)
        yield from (part.strip() for part in (form.before, form.after) if part)


def prompt_ids(tokenizer: sentencepiece.SentencePieceProcessor, message: str) -> list[int]:
    """The chat prompt of one user message, ready for the assistant's answer."""
    return [USER_ID, *tokenizer.encode(message), ASSISTANT_ID]
