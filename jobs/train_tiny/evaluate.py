"""Measure a trained model on labelled reviews: the share of greedy answers that are exactly the label.

    python -m jobs.train_tiny.evaluate --model DIR --reviews FILE [FILE ...]

For each file and over all of them: the first instruction with the weights in float32 and in bfloat16, then
the other instructions in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch

from .answers import accuracy
from .checkpoint import load_checkpoint
from .network import Network
from .reviews import FORMS, Review, read_reviews


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    network, tokenizer = load_checkpoint(arguments.model)
    reviews_by_file = {str(path): read_reviews(path) for path in arguments.reviews}
    reviews_by_file["all"] = [review for reviews in reviews_by_file.values() for review in reviews]
    for name, reviews in reviews_by_file.items():
        print(
            f"{name}: {len(reviews)} reviews, float32 {accuracy(network, tokenizer, reviews):.4f}", flush=True
        )
    _print_other_forms(network, tokenizer, reviews_by_file["all"])
    network.bfloat16()
    for name, reviews in reviews_by_file.items():
        print(
            f"{name}: {len(reviews)} reviews, bfloat16 {accuracy(network, tokenizer, reviews):.4f}",
            flush=True,
        )


def _print_other_forms(
    network: Network, tokenizer: sentencepiece.SentencePieceProcessor, reviews: Sequence[Review]
) -> None:
    for form in FORMS[1:]:
        print(f"{form.message('…')!r}: {accuracy(network, tokenizer, reviews, form):.4f}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--reviews", type=Path, nargs="+", required=True)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    return parser.parse_args()


if __name__ == "__main__":
    main()
