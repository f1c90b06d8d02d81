"""What a network answers: greedy decoding, and how often the answer is exactly the label."""

from __future__ import annotations

from collections.abc import Sequence

import sentencepiece
import torch

from .network import Network
from .reviews import FORMS, Form, Review
from .tokenizer import EOS_ID, prompt_ids

MAX_NEW_TOKENS = 8
BATCH_SIZE = 32


def accuracy(
    network: Network,
    tokenizer: sentencepiece.SentencePieceProcessor,
    reviews: Sequence[Review],
    form: Form = FORMS[0],
) -> float:
    """The share of reviews whose greedy answer is the label, character for character."""
    texts = answer(network, tokenizer, [form.message(review.text) for review in reviews])
    return sum(text == review.label for text, review in zip(texts, reviews, strict=True)) / len(reviews)


def answer(
    network: Network, tokenizer: sentencepiece.SentencePieceProcessor, messages: Sequence[str]
) -> list[str]:
    """The greedy answers to ``messages``, up to ``</s>``; a prompt longer than the context loses its end."""
    prompts = [_fit(prompt_ids(tokenizer, message), network) for message in messages]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts = [""] * len(prompts)
    for start in range(0, len(order), BATCH_SIZE):
        group = order[start : start + BATCH_SIZE]
        for index, ids in zip(group, _greedy(network, [prompts[i] for i in group]), strict=True):
            texts[index] = tokenizer.decode(ids)
    return texts


def _fit(prompt: list[int], network: Network) -> list[int]:
    limit = network.model.rotary_2TD.shape[1] - MAX_NEW_TOKENS
    return prompt if len(prompt) <= limit else [*prompt[: limit - 1], prompt[-1]]


@torch.inference_mode()
def _greedy(network: Network, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Decode without a cache: an answer has two tokens, so reading the prompt again costs little."""
    sequences = [list(prompt) for prompt in prompts]
    open_rows = list(range(len(prompts)))
    for _ in range(MAX_NEW_TOKENS):
        for row, token in zip(
            open_rows, _next_tokens(network, [sequences[r] for r in open_rows]), strict=True
        ):
            sequences[row].append(token)
        open_rows = [row for row in open_rows if sequences[row][-1] != EOS_ID]
        if not open_rows:
            break
    answers = [sequence[len(prompt) :] for sequence, prompt in zip(sequences, prompts, strict=True)]
    return [ids[:-1] if ids[-1] == EOS_ID else ids for ids in answers]


def _next_tokens(network: Network, sequences: Sequence[list[int]]) -> list[int]:
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids_BT = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence)] = torch.tensor(sequence)
    last_BH = network(ids_BT)[torch.arange(len(sequences)), lengths - 1]
    return network.logits(last_BH).argmax(dim=-1).tolist()
