"""The rows of a workload: from a file of prompts, or made up from a seed."""

from __future__ import annotations

import json
import random
from pathlib import Path

from b2batch.assets import REVIEWS_SAMPLE
from b2batch.bench.peer_job import BenchRow
from b2batch.bench.workload import GenerateWorkload, PromptShape, ScoreWorkload
from b2batch.errors import InputError

_WARMUP_TOKENS = 8
WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
    "problem",
    "hand",
    "part",
    "place",
    "case",
    "week",
    "company",
    "system",
    "program",
    "question",
    "work",
    "government",
    "number",
    "night",
    "point",
    "home",
    "water",
    "room",
    "mother",
    "area",
    "money",
    "story",
    "fact",
    "month",
    "lot",
    "right",
    "study",
    "book",
    "eye",
    "job",
    "word",
    "business",
    "issue",
    "side",
    "kind",
    "head",
    "house",
    "service",
    "friend",
    "father",
    "power",
    "hour",
    "game",
    "line",
    "end",
    "member",
    "law",
    "car",
    "city",
    "community",
]


def read_rows(path: Path, workload: GenerateWorkload | ScoreWorkload) -> list[BenchRow]:
    """The first ``workload.rows`` rows of a JSONL file: ``messages``, and where given ``id``,
    ``max_new_tokens`` and ``choices``; the workload's own hold elsewhere.

    Raises:
        InputError: it has fewer rows, or a row is not of that form.
    """
    rows: list[BenchRow] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in zip(range(workload.rows), lines, strict=False):
                rows.append(_read_row(json.loads(line), number, workload))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}, row {len(rows)}: {type(error).__name__}: {error}") from error
    if len(rows) < workload.rows:
        raise InputError(f"{path} has {len(rows)} rows, the workload asks for {workload.rows}")
    return rows


def make_rows(workload: GenerateWorkload | ScoreWorkload) -> list[BenchRow]:
    """Made-up rows; the same seed and shape give the same rows everywhere."""
    shape = workload.prompts
    chance = random.Random(shape.seed)
    shared = _text(chance, shape.shared_words)
    return [_make_row(index, shared, chance, shape, workload) for index in range(workload.rows)]


def warmup_rows(workload: GenerateWorkload | ScoreWorkload) -> list[BenchRow]:
    """Rows that share no beginning with the timed ones, so that they warm no prefix cache."""
    return [
        BenchRow(
            f"warmup-{index}",
            ({"role": "user", "content": f"{index}: {_text(random.Random(index), 20)}"},),
            _WARMUP_TOKENS,
            _choices(workload),
        )
        for index in range(workload.warmup)
    ]


def _read_row(record: dict[str, object], number: int, workload: GenerateWorkload | ScoreWorkload) -> BenchRow:
    default = workload.max_tokens if isinstance(workload, GenerateWorkload) else 1
    messages, choices = record["messages"], record.get("choices", _choices(workload))
    if not isinstance(messages, list) or not isinstance(choices, list | tuple):
        raise TypeError("messages and choices must be lists")
    max_tokens = int(str(record.get("max_new_tokens", default)))
    return BenchRow(str(record.get("id", number)), messages, max_tokens, choices)


def _make_row(
    index: int,
    shared: str,
    chance: random.Random,
    shape: PromptShape,
    workload: GenerateWorkload | ScoreWorkload,
) -> BenchRow:
    own = _text(chance, chance.randint(shape.min_words, max(shape.min_words, shape.max_words)))
    max_tokens = workload.max_tokens if isinstance(workload, GenerateWorkload) else 1
    return BenchRow(
        str(index),
        ({"role": "user", "content": f"{shared}\n{own}" if shared else own},),
        max_tokens,
        _choices(workload),
    )


def _choices(workload: GenerateWorkload | ScoreWorkload) -> tuple[str, ...]:
    return workload.choices if isinstance(workload, ScoreWorkload) else ()


def _text(chance: random.Random, num_words: int) -> str:
    return " ".join(chance.choices(WORDS, k=num_words))


def write_reviews(path: Path, num_rows: int) -> None:
    """The sample of reviews again and again, each with its number before it, as rows of a dataset are:

    they share the job's template and nothing more, so no text is computed once for many rows.
    """
    texts = [json.loads(line)["text"] for line in REVIEWS_SAMPLE.read_text("utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for i in range(num_rows):
            row = {"text": f"({i}) {texts[i % len(texts)]}"}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
