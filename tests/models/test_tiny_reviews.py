"""A trained Baichuan 2 of 7.7 MB: every answer of 1,000 real reviews, exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from b2batch.engine.engine import Engine
from b2batch.engine.request import Request
from b2batch.engine.scheduler import Limits
from b2batch.models.loading import load_model
from b2batch.spec import ModelSpec, SamplingSpec

INSTRUCTION = "请判断下面这条评论的情感倾向,只回答“正面”或“负面”。\n"


@pytest.mark.slow
def test_every_greedy_answer(shared_dir: Path) -> None:
    root = shared_dir / "tiny-reviews"
    loaded = load_model(ModelSpec(model=str(root), device="cpu", dtype="float32"))
    assert loaded.codec.chat is not None
    expected = [json.loads(line) for line in (root / "greedy_reviews_test.jsonl").read_text().splitlines()]
    lines = (shared_dir / "data" / "reviews_test.jsonl").read_text().splitlines()
    texts = {row["id"]: row["text"] for row in map(json.loads, lines)}
    length = loaded.codec.max_model_len
    engine = Engine(
        loaded.model,
        Limits(max_num_seqs=64, max_num_batched_tokens=1024, kv_cache_tokens=16 * length),
        max_model_len=length,
        stop_token_ids=loaded.codec.stop_token_ids,
    )
    for row in expected:
        prompt = loaded.codec.chat.encode([{"role": "user", "content": INSTRUCTION + texts[row["id"]]}])
        engine.add(Request(row["id"], prompt, SamplingSpec(max_tokens=8)))
    answers: dict[str, list[int]] = {}
    while engine.has_work:
        for finished in engine.step():
            answers[finished.request_id] = list(finished.completions[0].token_ids)
    assert len(answers) == len(expected) == 1000
    assert answers == {row["id"]: row["ids"] for row in expected}
    right = sum(loaded.codec.tokenizer.decode(answers[row["id"]]) == row["label"] for row in expected)
    assert right >= 850
