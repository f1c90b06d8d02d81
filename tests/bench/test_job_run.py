"""The engine's side of ``bench job``; the job's is a run like any other."""

from __future__ import annotations

import json
from pathlib import Path

from b2batch.bench import job_run
from b2batch.bench.prompts import write_reviews


def test_the_engine_alone_answers_every_row_of_numbered_reviews(tmp_path: Path) -> None:
    reviews = tmp_path / "reviews.jsonl"
    write_reviews(reviews, 9)
    texts = [json.loads(line)["text"] for line in reviews.read_text("utf-8").splitlines()]
    assert len(set(texts)) == 9
    assert texts[8].startswith("(8) ")

    found = job_run.run(
        {
            "input": str(reviews),
            "output": str(tmp_path / "out"),
            "replicas": 0,
            "rows_per_unit": 4,
            "max_tokens": 3,
        }
    )

    assert found["rows_per_s"] == 9 / found["wall_s"]
    assert 0 < found["occupancy"] <= 1
