"""Votes, gold and review: from the answers of a job to what people read of its labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from b2batch.cli.overview import metrics_facts
from b2batch.errors import SpecError
from b2batch.labelling.metrics import Tally, expected_calibration_error
from b2batch.labelling.votes import majority
from b2batch.outputs.schema import voted_type
from b2batch.preflight import prepare_job
from labelling.running import REVIEWS, make_spec, run

LABELS = ["正面", "负面"]
GOLD = ["正面", "负面", "负面", None]


def document_of(spec: Any, name: str) -> Path:
    (path,) = Path(spec.output.path).glob(f"__b2batch/*/{name}")
    return path


@pytest.mark.parametrize(
    ("values", "winner", "share", "agreement"),
    [
        (["a", "b", "a"], "a", 2 / 3, 1 / 3),
        (["b", "a", "a", "b"], "b", 0.5, 1 / 3),
        ([None, "a"], "a", 0.5, 0.0),
        ([None, None], None, 0.0, 0.0),
        ([3, 3, 3], 3, 1.0, 1.0),
    ],
)
def test_most_answers_win(values, winner, share, agreement) -> None:
    vote = majority(values)
    assert (vote.value, vote.share, vote.agreement) == (
        winner,
        pytest.approx(share),
        pytest.approx(agreement),
    )


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=9))
def test_a_vote_counts_every_answer(values) -> None:
    vote = majority(values)
    most = max((values.count(v) for v in values if v is not None), default=0)
    assert vote.share == most / len(values)
    assert 0 <= vote.agreement <= 1
    assert (vote.agreement == 1) == (most == len(values))


def test_samples_vote_on_a_member_of_the_parsed_answer(tmp_path, tiny) -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "object", "properties": {"label": {"enum": LABELS}}, "required": ["label"]}
        },
        "required": ["a"],
    }
    rows = [{"text": text} for text in REVIEWS[:2]]
    job: dict[str, Any] = {
        "structured_outputs": {"json": schema},
        "sampling": {"n": 5, "temperature": 8.0, "seed": 4, "max_tokens": 40},
        "vote": "majority",
        "vote_on": "parsed.a.label",
        "review": {"below": 0.99},
    }
    calm = run(make_spec(tmp_path / "a", rows, **job), tiny).rows
    crowded = run(make_spec(tmp_path / "b", rows, **job, engine={"max_num_seqs": 4}), tiny).rows
    assert [row["vote"] for row in calm] == [row["vote"] for row in crowded]
    for row in calm:
        votes = [json.loads(s["text"])["a"]["label"] for s in row["samples"] if s["finish_reason"] == "stop"]
        assert row["vote_share"] == max(map(votes.count, votes)) / 5
        assert votes.count(row["vote"]) == row["vote_share"] * 5
        assert row["needs_review"] == (row["vote_share"] < 0.99)


def test_the_type_of_a_vote_is_that_of_the_member(tmp_path) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "xs": {"type": "array", "items": {"type": "string"}}},
    }
    job: dict[str, Any] = {"structured_outputs": {"json": schema}, "sampling": {"n": 3}, "vote": "majority"}
    assert voted_type(make_spec(tmp_path, [], **job, vote_on="parsed.n")) == pa.int64()
    for member, told in (("xs", "can be voted on"), ("no", "no member 'no'")):
        with pytest.raises(SpecError, match=told):
            voted_type(make_spec(tmp_path, [], **job, vote_on=f"parsed.{member}"))


def random_rows(seed: int, num_rows: int) -> tuple[list[str], list[str], list[float]]:
    rng = np.random.default_rng(seed)
    names = np.array(["甲", "乙", "丙", "丁"])
    gold = names[rng.integers(0, 4, num_rows)]
    predicted = np.where(rng.random(num_rows) < 0.6, gold, names[rng.integers(0, 3, num_rows)])
    confidence = np.round(rng.random(num_rows) * 0.5 + 0.5 * (gold == predicted), 2)  # with ties
    return gold.tolist(), predicted.tolist(), confidence.tolist()


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_scikit_learn(seed) -> None:
    gold, predicted, confidence = random_rows(seed, 500)
    tally = Tally(["丙", "甲"])
    tally.add(gold[:100], predicted[:100], confidence[:100])
    tally.add(gold[100:], predicted[100:], confidence[100:])
    found = tally.metrics()
    labels = found["labels"]
    hits = np.array(gold) == np.array(predicted)
    assert labels[:2] == ["丙", "甲"]
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(gold, predicted))
    assert found["macro_f1"] == pytest.approx(sk.f1_score(gold, predicted, average="macro"))
    assert found["confusion"] == sk.confusion_matrix(gold, predicted, labels=labels).tolist()
    assert found["auroc"] == pytest.approx(sk.roc_auc_score(hits, confidence))
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        gold, predicted, labels=labels, zero_division=0
    )
    for i, label in enumerate(labels):
        assert list(found["per_label"][label].values()) == pytest.approx(
            [precision[i], recall[i], f1[i], support[i]]
        )
    kept = np.array(confidence) >= 0.8
    assert found["thresholds"][3]["accuracy"] == pytest.approx(hits[kept].mean())
    assert found["thresholds"][3]["coverage"] == pytest.approx(kept.mean())
    slow = (
        sum(
            abs((np.array(confidence)[b] - hits[b]).sum()) / 500
            for low in range(15)
            if (b := (np.array(confidence) > low / 15) & (np.array(confidence) <= (low + 1) / 15)).any()
            or low == 0
        )
        + abs((np.array(confidence) - hits)[np.array(confidence) == 0].sum()) / 500
    )
    assert expected_calibration_error(np.array(confidence), hits) == pytest.approx(slow, abs=5e-3)


def test_labels_are_measured_against_gold_and_the_unsure_set_aside(tmp_path, tiny) -> None:
    rows = [{"text": text, "gold": gold} for text, gold in zip(REVIEWS, GOLD, strict=True)] + [
        {"text": None, "gold": "正面"},
        {"text": "还", "gold": "正面"},
    ]
    spec = make_spec(
        tmp_path,
        rows,
        task="classify",
        labels=LABELS,
        gold="gold",
        review={"below": 0.9},
        input={"rows_per_unit": 2},
    )
    found = run(spec, tiny).rows
    metrics = json.loads(document_of(spec, "metrics.json").read_text(encoding="utf-8"))
    assert (metrics["num_rows"], metrics["num_unanswered"], metrics["num_without_gold"]) == (4, 1, 1)
    assert metrics["confusion"][1] == [1, 1], "one gold 负面 was called 正面"
    told = dict(metrics_facts(metrics))
    assert f"accuracy {metrics['accuracy']:.4f}" in told["gold"]
    unsure = [row for row in found if row["needs_review"]]
    assert [row["needs_review"] for row in found] == [
        None if row["status"] == "error" else row["label_score"] < 0.9 for row in found
    ]
    review = pq.read_table(document_of(spec, "review/*.parquet")).to_pylist()
    assert [row["row_id"] for row in review] == [row["row_id"] for row in unsure]
    assert review, "a text of one character decides nothing"
    assert review[-1]["prompt"] == spec.prompt.template.replace("{{ text }}", "还")
    lines = document_of(spec, "review/*.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["label_probs"] == dict(review[-1]["label_probs"])
    tasks = json.loads(document_of(spec, "review/*.label-studio.json").read_text(encoding="utf-8"))
    assert [task["data"]["row_id"] for task in tasks] == [row["row_id"] for row in unsure]
    prediction = tasks[-1]["predictions"][0]
    assert prediction["score"] == unsure[-1]["label_score"]
    assert prediction["result"][0]["value"] == {"choices": [unsure[-1]["label"]]}


def test_generated_labels_are_measured_without_a_confidence(tmp_path, tiny) -> None:
    rows = [{"text": text, "gold": gold} for text, gold in zip(REVIEWS, GOLD, strict=True)]
    spec = make_spec(tmp_path, rows, gold="gold", sampling={"max_tokens": 8})
    run(spec, tiny)
    metrics = json.loads(document_of(spec, "metrics.json").read_text(encoding="utf-8"))
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert "ece" not in metrics


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"vote": "majority"}, "sampling.n"),
        ({"vote_on": "parsed"}, "only with vote"),
        ({"vote": "majority", "sampling": {"n": 2}, "vote_on": "parsed"}, "structured_outputs"),
        ({"review": {"below": 0.5}}, "confidence"),
        ({"gold": "nope"}, "no column 'nope'"),
        ({"gold": "text", "output": {"path": "out", "columns": []}}, "among output.columns"),
        ({"gold": "text", "task": "embed"}, "gives no labels"),
    ],
)
def test_what_cannot_be_judged_is_refused(tmp_path, document, told) -> None:
    with pytest.raises(SpecError, match=told):
        prepare_job(make_spec(tmp_path, [{"text": "好"}], **document))
