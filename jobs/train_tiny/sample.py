"""Draw the review sample b2batch/assets/reviews-sample.jsonl, half of each label, from held-out reviews.

python -m jobs.train_tiny.sample --reviews FILE --out FILE
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from .reviews import LABELS

FIELDS = ("id", "text", "label")


def main() -> None:
    arguments = _arguments()
    records = [json.loads(line) for line in arguments.reviews.read_text(encoding="utf-8").splitlines()]
    drawn = draw(records, arguments.rows, arguments.seed)
    lines = [json.dumps({field: record[field] for field in FIELDS}, ensure_ascii=False) for record in drawn]
    arguments.out.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def draw(records: Sequence[dict[str, str]], num_rows: int, seed: int) -> list[dict[str, str]]:
    """``num_rows`` records, evenly from the labels, in mixed order."""
    chooser = random.Random(seed)
    drawn = []
    for label in LABELS:
        drawn += chooser.sample(
            [record for record in records if record["label"] == label], num_rows // len(LABELS)
        )
    chooser.shuffle(drawn)
    return drawn


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reviews", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
