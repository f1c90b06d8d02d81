from __future__ import annotations

import json
from pathlib import Path

import pytest

from b2batch.bench.prompts import make_rows, read_rows, warmup_rows
from b2batch.bench.workload import GenerateWorkload, PromptShape, ScoreWorkload
from b2batch.errors import InputError

GENERATE = GenerateWorkload(
    kind="generate",
    description="",
    model="random-tiny",
    rows=5,
    max_tokens=7,
    peers=("engine",),
    prompts=PromptShape(shared_words=30, min_words=3, max_words=6),
)
SCORE = ScoreWorkload(
    kind="score", description="", model="m", rows=3, choices=(" a", " b"), peers=("score-engine",)
)


def contents(rows):
    return [row.messages[0]["content"] for row in rows]


def test_made_up_rows_share_an_instruction_and_differ_after_it():
    rows = make_rows(GENERATE)
    heads, tails = zip(*(text.split("\n") for text in contents(rows)), strict=True)

    assert len(set(heads)) == 1
    assert len(heads[0].split()) == 30
    assert all(3 <= len(tail.split()) <= 6 for tail in tails)
    assert len(set(tails)) == 5
    assert {row.max_tokens for row in rows} == {7}


def test_the_same_seed_gives_the_same_rows():
    other = GENERATE.model_copy(update={"prompts": PromptShape(shared_words=30, seed=1)})

    assert make_rows(GENERATE) == make_rows(GENERATE)
    assert contents(make_rows(GENERATE)) != contents(make_rows(other))


def test_warm_up_shares_no_beginning_with_the_timed_rows():
    warm = contents(warmup_rows(GENERATE))

    assert len(warm) == GENERATE.warmup
    assert not {text.split()[0] for text in warm} & {
        text.split()[0] for text in contents(make_rows(GENERATE))
    }


def write_prompts(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_file_says_what_it_says_and_the_workload_the_rest(tmp_path: Path):
    message = {"role": "user", "content": "hi"}
    path = write_prompts(
        tmp_path / "prompts.jsonl",
        [
            {"id": "r0", "messages": [message], "max_new_tokens": 3, "choices": [" x", " y"]},
            {"messages": [message]},
            {"messages": [message]},
        ],
    )
    rows = read_rows(path, SCORE)

    assert [row.row_id for row in rows] == ["r0", "1", "2"]
    assert [tuple(row.choices) for row in rows] == [(" x", " y"), (" a", " b"), (" a", " b")]
    assert rows[0].max_tokens == 3


@pytest.mark.parametrize(
    ("records", "said"),
    [([{"messages": []}], "1 rows, the workload asks for 3"), ([{"text": "x"}], "row 0: KeyError")],
)
def test_an_unfit_file_is_refused(records: list[dict], said: str, tmp_path: Path):
    with pytest.raises(InputError, match=said):
        read_rows(write_prompts(tmp_path / "prompts.jsonl", records), SCORE)
