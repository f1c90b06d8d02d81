"""Labelled reviews, and the nine ways in which the model is asked about one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

LABELS = ("正面", "负面")


@dataclass(frozen=True, slots=True)
class Review:
    """One review with its label, which is one of ``LABELS``."""

    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Form:
    """An instruction: what stands before and after the review in the user's message."""

    before: str
    after: str

    def message(self, text: str) -> str:
        return self.before + text + self.after


# The first is the one to use; the others keep the model from reading meaning into one wording.
FORMS = (
    Form("请判断下面这条评论的情感倾向,只回答“正面”或“负面”。\n", ""),
    Form("下面这条评论是正面还是负面?\n", ""),
    Form("", "\n这条评论是正面还是负面?"),
    Form("判断评论情感,只输出正面或负面。\n", ""),
    Form("评论:", "\n情感:"),
    Form("情感分类(正面/负面):", ""),
    Form("用户评论:", "\n请问用户的态度是正面的还是负面的?"),
    Form("Is the following review positive (正面) or negative (负面)?\n", ""),
    Form("", ""),
)


def read_reviews(path: Path) -> list[Review]:
    """Read a JSONL file of objects with ``text`` and ``label``; another label is a ValueError."""
    with path.open(encoding="utf-8") as lines:
        return [_review(json.loads(line), path) for line in lines if line.strip()]


def _review(record: dict[str, str], path: Path) -> Review:
    if record["label"] not in LABELS:
        raise ValueError(f"{path}: label {record['label']!r} of {record['text'][:20]!r}: not one of {LABELS}")
    return Review(record["text"], record["label"])
