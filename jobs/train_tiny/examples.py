"""Training examples: a review asked about in one form, its answer, and which predictions count."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import sentencepiece
import torch
from torch import Tensor

from .reviews import FORMS, Form, Review
from .tokenizer import EOS_ID, UNK_ID, prompt_ids

BATCH_SIZE = 32
MAX_CHARS = 240
"""Longer reviews are cropped to a window of this many characters while training, never when asked."""
CROP_RATE = 0.3
WORD_DROPOUT = 0.15
LM_RATE = 0.4
BATCHES_SORTED = 16
"""Batches drawn together and sorted by length, so that little of a batch is padding."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence; the review's pieces are ``ids[start:stop]``, the answer's follow the prompt."""

    ids: tuple[int, ...]
    start: int
    stop: int
    num_prompt: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs and next tokens, (B, T); the masks say which next tokens each term of the loss counts."""

    inputs: Tensor
    targets: Tensor
    answer: Tensor
    eos: Tensor
    review: Tensor

    @classmethod
    def empty(cls, num_rows: int, length: int) -> Self:
        """All padding, nothing counted."""
        ids = torch.zeros(num_rows, length, dtype=torch.long)
        return cls(ids, ids.clone(), ids.bool(), ids.bool(), ids.bool())


class ExampleMaker:
    """Turns reviews into batches; all choices come from one seeded generator."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, seed: int) -> None:
        self._tokenizer = tokenizer
        self._random = random.Random(seed)
        self._edges = {
            form: (len(tokenizer.encode(form.before)), len(tokenizer.encode(form.after))) for form in FORMS
        }

    def batches(self, reviews: Sequence[Review]) -> Iterator[Batch]:
        """Epoch after epoch, without end; each epoch in a new order and with new forms and crops."""
        while True:
            order = self._random.sample(reviews, len(reviews))
            chunks = [
                order[i : i + BATCH_SIZE * BATCHES_SORTED]
                for i in range(0, len(order), BATCH_SIZE * BATCHES_SORTED)
            ]
            for chunk in chunks:
                yield from self._sorted_batches([self.example(review) for review in chunk])

    def _sorted_batches(self, examples: list[Example]) -> Iterator[Batch]:
        examples.sort(key=lambda example: len(example.ids))
        groups = [examples[i : i + BATCH_SIZE] for i in range(0, len(examples), BATCH_SIZE)]
        self._random.shuffle(groups)
        for group in groups:
            yield self._batch(group)

    def example(self, review: Review) -> Example:
        form = self._form()
        message = form.message(self._crop(review.text))
        prompt = prompt_ids(self._tokenizer, message)
        num_before, num_after = self._edges[form]
        ids = (*prompt, *self._tokenizer.encode(review.label), EOS_ID)
        return Example(ids, 1 + num_before, len(prompt) - 1 - num_after, len(prompt))

    def _form(self) -> Form:
        return FORMS[0] if self._random.random() < 0.5 else self._random.choice(FORMS[1:])

    def _crop(self, text: str) -> str:
        size = min(len(text), MAX_CHARS)
        if self._random.random() < CROP_RATE:
            size = max(1, int(size * self._random.uniform(0.5, 1.0)))
        start = self._random.randint(0, len(text) - size)
        return text[start : start + size]

    def _batch(self, examples: Sequence[Example]) -> Batch:
        batch = Batch.empty(len(examples), max(len(example.ids) for example in examples) - 1)
        for row, example in enumerate(examples):
            self._fill(batch, row, example)
        return batch

    def _fill(self, batch: Batch, row: int, example: Example) -> None:
        last = len(example.ids) - 1
        batch.inputs[row, :last] = torch.tensor(self._drop_words(example)[:-1])
        batch.targets[row, :last] = torch.tensor(example.ids[1:])
        batch.answer[row, example.num_prompt - 1 : last - 1] = True
        batch.eos[row, last - 1] = True
        # Position p predicts p + 1, so the review's own pieces are predicted one position earlier.
        for position in range(example.start - 1, example.stop - 1):
            batch.review[row, position] = self._random.random() < LM_RATE

    def _drop_words(self, example: Example) -> list[int]:
        ids = list(example.ids)
        for position in range(example.start, example.stop):
            if self._random.random() < WORD_DROPOUT:
                ids[position] = UNK_ID
        return ids
