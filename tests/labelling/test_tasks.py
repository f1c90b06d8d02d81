"""Classify, score and embed as jobs, against lm-evaluation-harness and plain passes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from b2batch.errors import SpecError
from b2batch.models.loading import LoadedModel, load_model
from b2batch.spec import ModelSpec, parse_spec
from labelling.running import REVIEW_TEMPLATE, REVIEWS, make_spec, run

LABELS = ["正面", "负面"]


@pytest.fixture(scope="module")
def reference(shared_dir: Path) -> list[dict[str, Any]]:
    lines = (shared_dir / "golden" / "lm_eval" / "reference.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def lm_eval_job(shared_dir: Path) -> dict[str, Any]:
    return {
        "model": {"model": str(shared_dir / "golden" / "lm_eval" / "tiny_b2_equiv")},
        "prompt": {"column": "context", "chat": False},
    }


def test_scores_are_those_of_lm_eval(tmp_path, shared_dir, reference, lm_eval_model) -> None:
    rows = [
        {"context": item["context"], "choice": choice}
        for item in reference
        for choice in item["continuations"]
    ]
    spec = make_spec(tmp_path, rows, task="score", score={"column": "choice"}, **lm_eval_job(shared_dir))
    found = run(spec, lm_eval_model).rows
    expected = [value for item in reference for value in item["loglikelihoods"]]
    assert [row["loglikelihood"] for row in found] == pytest.approx(expected, abs=2e-4)
    assert [row["is_greedy"] for row in found] == [g for item in reference for g in item["is_greedy"]]


@pytest.mark.parametrize("choices", [["A", "B", "C", "D"], [" A", " B", " C", " D"]])
def test_labels_are_chosen_as_lm_eval_chooses(
    tmp_path, shared_dir, reference, lm_eval_model, choices
) -> None:
    items = [item for item in reference if item["continuations"] == choices]
    rows = [{"context": item["context"]} for item in items]
    labels = {name.strip(): {"text": name} for name in choices}
    spec = make_spec(tmp_path, rows, task="classify", labels=labels, **lm_eval_job(shared_dir))
    found = run(spec, lm_eval_model).rows
    best = [item["loglikelihoods"].index(max(item["loglikelihoods"])) for item in items]
    assert items
    assert [row["label"] for row in found] == [list(labels)[index] for index in best]
    for row, item in zip(found, items, strict=True):
        weights = [math.exp(value) for value in item["loglikelihoods"]]
        shares = [weight / sum(weights) for weight in weights]
        assert [share for _, share in row["label_probs"]] == pytest.approx(shares, abs=2e-4)


def test_reviews_are_classified_in_one_pass_a_row(tmp_path, tiny) -> None:
    spec = make_spec(tmp_path, [{"text": text} for text in REVIEWS], task="classify", labels=LABELS)
    ran = run(spec, tiny)
    assert [row["label"] for row in ran.rows] == ["正面", "负面", "正面", "负面"]
    for row in ran.rows:
        probabilities = dict(row["label_probs"])
        best, second = sorted(probabilities.values(), reverse=True)
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-12)
        assert (row["label_score"], row["label_margin"]) == (best, best - second)
        assert row["label_entropy"] == pytest.approx(-sum(p * math.log(p) for p in probabilities.values()))
        assert "generated_text" not in row
    assert ran.engine.stats.num_computed_tokens <= sum(row["num_input_tokens"] for row in ran.rows)


def test_longer_labels_that_share_a_beginning_are_scored_as_alone(tmp_path, tiny) -> None:
    """Against a plain pass over prompt and label, which shares nothing."""
    labels = ["非常正面的评价", "非常正面", "非常负面的评价", "负面"]
    spec = make_spec(tmp_path, [{"text": REVIEWS[0]}], task="classify", labels=labels)
    (row,) = run(spec, tiny).rows
    plain = load_model(ModelSpec(model="baichuan2-tiny"))
    chat, tokenizer = plain.codec.chat, plain.codec.tokenizer
    assert chat is not None
    prompt = REVIEW_TEMPLATE.replace("{{ text }}", REVIEWS[0])
    ids = chat.encode([{"role": "user", "content": prompt}])
    scores = [plain_loglikelihood(plain, ids, tokenizer.encode(label)) for label in labels]
    shares = torch.tensor(scores, dtype=torch.float64).softmax(0).tolist()
    assert [share for _, share in row["label_probs"]] == pytest.approx(shares, abs=1e-5)


@torch.inference_mode()
def plain_loglikelihood(loaded: LoadedModel, prompt: list[int], continuation: list[int]) -> float:
    ids = torch.tensor([[*prompt, *continuation]])
    logprobs = loaded.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return sum(float(logprobs[len(prompt) - 1 + i, token]) for i, token in enumerate(continuation))


def test_calibration_takes_out_what_the_prompt_alone_prefers(tmp_path, tiny) -> None:
    """On the text that calibrates, the calibrated labels are equally likely."""
    rows = [{"text": text} for text in ["好", *REVIEWS]]
    plain = run(make_spec(tmp_path / "a", rows, task="classify", labels=LABELS), tiny).rows
    settings = {"calibrate_with": ["好"]}
    spec = make_spec(tmp_path / "b", rows, task="classify", labels=LABELS, classify=settings)
    calibrated = run(spec, tiny).rows
    assert plain[0]["label_score"] > 0.55
    assert calibrated[0]["label_score"] == pytest.approx(0.5, abs=1e-5)
    odds = [dict(row["label_probs"]) for row in (plain[0], plain[1], calibrated[1])]
    divided = {name: odds[1][name] / odds[0][name] for name in LABELS}
    assert odds[2]["正面"] == pytest.approx(divided["正面"] / sum(divided.values()), abs=1e-6)


def test_several_labels_hold_from_a_threshold_on(tmp_path, tiny) -> None:
    rows = [{"text": text} for text in REVIEWS]
    low = make_spec(
        tmp_path / "a",
        rows,
        task="classify",
        labels=LABELS,
        classify={"threshold": 1e-9, "normalize": "tokens"},
    )
    high = make_spec(tmp_path / "b", rows, task="classify", labels=LABELS, classify={"threshold": 0.5})
    assert [row["labels"] for row in run(low, tiny).rows] == [LABELS] * 4
    assert [row["labels"] for row in run(high, tiny).rows] == [["正面"], ["负面"], ["正面"], ["负面"]]


def test_a_prompt_may_show_the_labels_and_what_they_mean(tmp_path, tiny) -> None:
    template = "{{ text }}\n{% for label in labels %}{{ label.name }}:{{ label.description }}\n{% endfor %}"
    labels = {"正面": "好评", "负面": {"description": "差评", "text": "负面"}}
    spec = make_spec(
        tmp_path, [{"text": "好"}], task="classify", labels=labels, prompt={"template": template}
    )
    (row,) = run(spec, tiny).rows
    assert row["num_input_tokens"] > 10
    with pytest.raises(SpecError, match="labels"):
        run(
            make_spec(
                tmp_path / "b",
                [{"text": "好", "labels": 1}],
                task="classify",
                labels=labels,
                prompt={"template": template},
            ),
            tiny,
        )


def test_a_text_without_a_prompt_is_scored_from_its_beginning(tmp_path, shared_dir, lm_eval_model) -> None:
    job = lm_eval_job(shared_dir) | {"prompt": {"template": "", "chat": False}}
    rows = [{"text": "这是一本书。"}, {"text": None}, {"text": ""}, {"text": "很好" * 3000}]
    found = run(make_spec(tmp_path, rows, task="score", score={"column": "text"}, **job), lm_eval_model).rows
    ids = lm_eval_model.codec.tokenizer.encode("这是一本书。")
    assert found[0]["num_scored_tokens"] == len(ids)
    assert found[0]["perplexity"] == pytest.approx(math.exp(-found[0]["loglikelihood"] / len(ids)))
    assert [row["error"]["type"] for row in found[1:]] == [
        "PROMPT_MISSING",
        "PROMPT_EMPTY",
        "PROMPT_TOO_LONG",
    ]


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 16, "max_num_seqs": 4}])
def test_embeddings_are_the_last_hidden_states(tmp_path, tiny, pooling, limits) -> None:
    spec = make_spec(
        tmp_path,
        [{"text": text} for text in REVIEWS],
        task="embed",
        embed={"pooling": pooling, "normalize": False},
        prompt={"column": "text", "chat": False},
        engine=limits,
    )
    found = run(spec, tiny).rows
    plain = load_model(ModelSpec(model="baichuan2-tiny"))
    for row, text in zip(found, REVIEWS, strict=True):
        ids = torch.tensor([plain.codec.tokenizer.encode_prompt(text)])
        with torch.inference_mode():
            hidden = plain.model.base_model(input_ids=ids, use_cache=False)[0][0]
        expected = hidden.mean(0) if pooling == "mean" else hidden[-1]
        assert row["embedding"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_embeddings_are_a_fixed_size_list_of_length_one(tmp_path, tiny) -> None:
    spec = make_spec(tmp_path, [{"text": REVIEWS[0]}, {"text": None}], task="embed")
    found = run(spec, tiny).rows
    schema = pq.read_table(spec.output.path).schema
    size = tiny.model.config.hidden_size
    assert schema.field("embedding").type == pa.list_(pa.float32(), size)
    assert math.hypot(*found[0]["embedding"]) == pytest.approx(1, abs=1e-5)
    assert (found[1]["embedding"], found[1]["error"]["type"]) == (None, "PROMPT_MISSING")


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"task": "classify"}, "labels: task: classify needs at least two, found 0"),
        ({"task": "classify", "labels": ["a", "a"]}, "stands twice"),
        ({"task": "classify", "labels": [True, False]}, "quotes"),
        ({"labels": ["a", "b"]}, "labels: only for task: classify"),
        ({"task": "score"}, "score.column"),
        ({"task": "embed", "embed": {"pooling": "max"}}, "embed.pooling"),
        (
            {"task": "classify", "labels": ["a", "b"], "input": {"sampling_column": "how"}},
            "nothing is sampled",
        ),
    ],
)
def test_settings_that_do_not_fit_the_task_are_refused(document, told) -> None:
    base = {"model": {"model": "m/n"}, "prompt": {"column": "text"}, "output": {"path": "out"}}
    with pytest.raises(SpecError, match=told):
        parse_spec({**base, **document, "input": {"path": "x", **document.get("input", {})}})
