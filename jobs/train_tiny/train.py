"""Train the embedded model from labelled reviews.

    python -m jobs.train_tiny.train --data DIR --out DIR

``--data`` holds reviews_train.jsonl and reviews_valid.jsonl: one object a line with ``text`` and ``label``
(正面 or 负面). The run is fixed by its steps and its seed, not by time; on another machine, torch or number
of threads the last digits of a sum differ, and with them a few answers in a thousand.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import sentencepiece
import torch

from .answers import accuracy
from .checkpoint import load_checkpoint, save_checkpoint
from .embeddings import ppmi_vectors
from .network import Network, NetworkSize
from .reviews import Review, read_reviews
from .tokenizer import train_tokenizer
from .training import Schedule, train

EMBEDDING_RMS = 0.5
DROPOUT = 0.2


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    train_reviews = read_reviews(arguments.data / "reviews_train.jsonl")
    valid_reviews = read_reviews(arguments.data / "reviews_valid.jsonl")
    tokenizer_model = train_tokenizer(train_reviews)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=tokenizer_model)
    size = NetworkSize(vocab_size=tokenizer.vocab_size())
    network = new_network(size, tokenizer, train_reviews, arguments.seed)
    schedule = Schedule(arguments.steps, arguments.eval_every, arguments.seed)
    best = train(network, tokenizer, train_reviews, valid_reviews, schedule)
    save_checkpoint(arguments.out, best, size, tokenizer_model)
    print(f"{arguments.out}: valid accuracy {accuracy(*load_checkpoint(arguments.out), valid_reviews):.4f}")


def new_network(
    size: NetworkSize, tokenizer: sentencepiece.SentencePieceProcessor, reviews: list[Review], seed: int
) -> Network:
    """A network whose embedding and head know which pieces of the reviews stand near which."""
    vectors = ppmi_vectors(
        [tokenizer.encode(review.text) for review in reviews], size.vocab_size, size.hidden_size, seed
    )
    torch.manual_seed(seed)
    unseen = vectors.abs().sum(dim=1) == 0
    vectors[unseen] = torch.randn(int(unseen.sum()), size.hidden_size)
    network = Network(size, DROPOUT)
    with torch.no_grad():
        network.model.embed_tokens.weight.copy_(vectors * EMBEDDING_RMS)
        network.lm_head.weight.copy_(vectors * EMBEDDING_RMS)
    return network


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="directory of the review files")
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--steps", type=int, default=1179, help="optimiser steps of 32 reviews")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--eval-every", type=int, default=100, help="steps between looks at the valid reviews"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    return parser.parse_args()


if __name__ == "__main__":
    main()
