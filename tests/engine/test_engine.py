"""The engine against upstream's own greedy tokens, however rows are batched, cut, shared and preempted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import VARIANTS, Golden, forward

from b2batch.engine.engine import Engine
from b2batch.engine.request import Finished, Request, ScoreRequest
from b2batch.models.loading import LoadedModel, load_model
from b2batch.rows import FinishReason
from b2batch.spec import ModelSpec, SamplingSpec
from engine.serving import MAX_MODEL_LEN, answer, engine_of, serve

every_variant = pytest.mark.parametrize("variant", VARIANTS)
GoldenOf = Callable[[str], Golden]
LoadedOf = Callable[[str], LoadedModel]


def greedy_requests(reference: Golden) -> list[Request]:
    return [
        Request(f"row-{i}", prompt, SamplingSpec(max_tokens=48, repetition_penalty=penalty))
        for i, (penalty, prompt, _) in enumerate(reference.greedy)
    ]


def assert_golden(results: dict[str, Finished], reference: Golden) -> None:
    """Every token of every case, and the reason why it ended."""
    assert len(results) == len(reference.greedy)
    for i, (_, prompt, tokens) in enumerate(reference.greedy):
        finished = results[f"row-{i}"]
        (completion,) = finished.completions
        assert list(completion.token_ids) == tokens, i
        assert finished.num_prompt_tokens == len(prompt)
        ended = tokens[-1] == 2
        assert completion.finish_reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
        assert completion.num_text_tokens == len(tokens) - ended


# -- greedy tokens do not depend on the batch --

SETTINGS = {
    "alone": {"max_num_seqs": 1},
    "mixed": {"max_num_seqs": 64},
    "mixed, no sharing": {"max_num_seqs": 64, "enable_prefix_caching": False},
    "chunked": {"max_num_seqs": 16, "max_num_batched_tokens": 64},
    "chunked, no sharing": {"max_num_seqs": 16, "max_num_batched_tokens": 64, "enable_prefix_caching": False},
}


@pytest.mark.parametrize("setting", SETTINGS)
@every_variant
def test_every_golden_token(variant: str, setting: str, golden: GoldenOf, loaded: LoadedOf) -> None:
    engine = engine_of(loaded(variant).model, **SETTINGS[setting])
    assert_golden(serve(engine, greedy_requests(golden(variant))), golden(variant))
    shared = engine.scheduler_stats.num_prefix_tokens_saved > 0  # each prompt is there once a penalty
    assert shared is SETTINGS[setting].get("enable_prefix_caching", True)


@pytest.mark.parametrize("sharing", [True, False])
@every_variant
def test_every_golden_token_under_preemption(
    variant: str, sharing: bool, golden: GoldenOf, loaded: LoadedOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("b2batch.engine.scheduler._FIRST_RESERVE", 1)
    engine = engine_of(loaded(variant).model, kv_cache_tokens=700, enable_prefix_caching=sharing)
    assert_golden(serve(engine, greedy_requests(golden(variant))), golden(variant))
    assert engine.scheduler_stats.num_preempted > 0
    assert engine.scheduler_stats.num_recomputed_tokens > 0


@every_variant
def test_rows_that_arrive_while_others_run(variant: str, golden: GoldenOf, loaded: LoadedOf) -> None:
    engine = engine_of(loaded(variant).model, max_num_seqs=8, max_num_batched_tokens=100)
    late, results = greedy_requests(golden(variant)), {}
    while late or engine.has_work:
        if late:
            engine.add(late.pop())
        results |= {finished.request_id: finished for finished in engine.step()}
    assert_golden(results, golden(variant))


@every_variant
def test_custom_end_tokens(variant: str, golden: GoldenOf, loaded: LoadedOf) -> None:
    reference = golden(variant)
    for case in reference.expected["greedy_custom_eos"]:
        ends = case["eos_token_id"]
        engine = engine_of(loaded(variant).model, stop_token_ids=ends if isinstance(ends, list) else [ends])
        (completion,) = answer(engine, reference.prompts[case["prompt"]], max_tokens=48).completions
        assert list(completion.token_ids) == case["tokens"]


# -- sampling does not depend on the batch --


def sampled_requests(reference: Golden, n: int = 1) -> list[Request]:
    sampling = SamplingSpec(temperature=1.0, seed=7, max_tokens=10, n=n, top_p=0.95)
    return [
        Request(f"row-{copy}-{i}", prompt, sampling)
        for i, prompt in enumerate(reference.prompts)
        for copy in range(3)
    ]


@pytest.mark.parametrize("variant", ["b2_7b", "b2_13b"])
def test_sampled_tokens_do_not_depend_on_batch_or_order(
    variant: str, golden: GoldenOf, loaded: LoadedOf
) -> None:
    model, requests = loaded(variant).model, sampled_requests(golden(variant))
    alone = serve(engine_of(model, max_num_seqs=1), requests)
    assert serve(engine_of(model, max_num_seqs=64), requests) == alone
    assert serve(engine_of(model, max_num_seqs=64), requests[::-1]) == alone
    chunked = engine_of(model, max_num_seqs=5, max_num_batched_tokens=40, enable_prefix_caching=False)
    assert serve(chunked, requests) == alone
    answers = {finished.completions[0].token_ids for finished in alone.values()}
    assert len(answers) > len(requests) // 2  # rows with one prompt have numbers of their own


def test_n_samples_are_in_order_and_the_first_is_that_of_n_1(golden: GoldenOf, loaded: LoadedOf) -> None:
    model, reference = loaded("b2_7b").model, golden("b2_7b")
    one = serve(engine_of(model), sampled_requests(reference)[:6])
    eight = serve(engine_of(model, max_num_seqs=3), sampled_requests(reference, n=8)[:6])
    for request_id, finished in eight.items():
        assert len(finished.completions) == 8
        assert len({completion.token_ids for completion in finished.completions}) > 4
        assert finished.completions[0] == one[request_id].completions[0]


def test_another_seed_gives_other_answers(golden: GoldenOf, loaded: LoadedOf) -> None:
    engine, prompt = engine_of(loaded("b2_7b").model), golden("b2_7b").prompts[4]
    answers = {
        answer(engine, prompt, temperature=1.0, seed=seed, max_tokens=12).completions[0].token_ids
        for seed in range(5)
    }
    assert len(answers) == 5


# -- where an answer ends --


class ScriptedModel:
    """The tiny model with its one answer replaced by the tokens of a text."""

    def __init__(self, model: Any, script: list[int]) -> None:
        self._model, self._script = model, iter(script)

    def __enter__(self) -> Any:
        self._hook = self._model.register_forward_hook(self._speak)
        return self._model

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _speak(self, module: Any, args: Any, output: Any) -> Any:
        output.logits.fill_(0.0)
        for logits in output.logits[0]:
            logits[next(self._script)] = 10.0
        return output


PROMPT = [7, 8, 9]


@pytest.fixture
def say(loaded: LoadedOf) -> Callable[..., Any]:
    """The completion of a model that would say ``text``, then end."""
    codec = loaded("b2_7b").codec

    def run(text: str, **sampling: Any) -> Any:
        script = [*codec.tokenizer.encode(text), 2, *[5] * 40]
        with ScriptedModel(loaded("b2_7b").model, script) as model:
            engine = engine_of(model, decode=codec.tokenizer.decode)
            return answer(engine, PROMPT, **{"max_tokens": 30, **sampling}).completions[0]

    return run


@pytest.mark.parametrize(
    ("text", "stop"),
    [
        ("你好，世界。再见", "。"),
        ("ab 龘靐齉 cd", "靐齉"),
        ("one two three", "wo t"),
        ("答案：正面\n\n理由", "\n\n"),
    ],
)
def test_a_stop_string_ends_the_answer(
    text: str, stop: str, say: Callable[..., Any], loaded: LoadedOf
) -> None:
    tokenizer = loaded("b2_7b").codec.tokenizer
    completion = say(text, stop=("never there", stop))
    assert completion.finish_reason is FinishReason.STOP
    assert completion.stop_text == stop
    written = tokenizer.decode(completion.token_ids)
    assert written[: len(written) - completion.num_cut_chars] == text[: text.find(stop)]
    assert stop not in tokenizer.decode(completion.token_ids[:-1])  # no token too many
    assert text.startswith(written)


def test_rare_characters_are_several_tokens(loaded: LoadedOf) -> None:
    """What makes the case above a case of a stop string across byte tokens."""
    assert len(loaded("b2_7b").codec.tokenizer.encode("靐齉")) == 6


def test_without_its_stop_string_an_answer_runs_to_its_end(say: Callable[..., Any]) -> None:
    completion = say("你好", stop=("再见",))
    assert (completion.finish_reason, completion.stop_text) == (FinishReason.STOP, None)
    assert completion.token_ids[-1] == 2


def test_stop_ids_and_the_end_token(say: Callable[..., Any], loaded: LoadedOf) -> None:
    ids = loaded("b2_7b").codec.tokenizer.encode("你好世界")
    stopped = say("你好世界", stop_token_ids=(ids[1],))
    assert list(stopped.token_ids) == ids[:2]
    assert (stopped.num_text_tokens, stopped.finish_reason) == (1, FinishReason.STOP)
    ended = say("你好世界")
    assert list(ended.token_ids) == [*ids, 2]
    assert (ended.num_text_tokens, ended.finish_reason) == (len(ids), FinishReason.STOP)
    cut = say("你好世界", max_tokens=2)
    assert list(cut.token_ids) == ids[:2]
    assert (cut.num_text_tokens, cut.finish_reason) == (2, FinishReason.LENGTH)


def test_ignore_eos_goes_on_but_keeps_the_callers_own_stops(say: Callable[..., Any]) -> None:
    completion = say("你好", ignore_eos=True, max_tokens=12)
    assert len(completion.token_ids) == 12
    assert completion.finish_reason is FinishReason.LENGTH
    assert say("你好", ignore_eos=True, stop_token_ids=(5,)).token_ids[-2:] == (2, 5)


def test_min_tokens_holds_back_every_kind_of_stop(say: Callable[..., Any], loaded: LoadedOf) -> None:
    ids = loaded("b2_7b").codec.tokenizer.encode("好")
    completion = say("好", min_tokens=8)
    assert len(completion.token_ids) >= 8
    assert 2 not in completion.token_ids[:7]
    early = say("好好好好好好", stop=("好",), min_tokens=3)
    assert len(early.token_ids) == max(3, len(ids))


def test_a_stop_string_before_min_tokens_is_text(say: Callable[..., Any], loaded: LoadedOf) -> None:
    tokenizer = loaded("b2_7b").codec.tokenizer
    num_first = len(tokenizer.encode("a.b"))
    unmet = say("a.bcdefg", stop=(".",), min_tokens=num_first)
    assert (unmet.stop_text, unmet.num_cut_chars) == (None, 0)
    assert tokenizer.decode(unmet.token_ids) == "a.bcdefg"
    later = say("a.bcd.efg", stop=(".",), min_tokens=num_first)
    written = tokenizer.decode(later.token_ids)
    assert written[: len(written) - later.num_cut_chars] == "a.bcd"


def test_max_tokens_null_fills_the_context(loaded: LoadedOf) -> None:
    engine = engine_of(loaded("b2_7b").model, max_model_len=40)
    (completion,) = answer(engine, PROMPT, ignore_eos=True).completions
    assert (len(completion.token_ids), completion.finish_reason) == (37, FinishReason.LENGTH)


# -- numbers --


@every_variant
def test_logprobs_are_those_of_a_full_forward_pass(
    variant: str, golden: GoldenOf, loaded: LoadedOf, plain: LoadedOf
) -> None:
    """Of the model's own distribution, whatever penalties chose the token."""
    engine = engine_of(loaded(variant).model, max_num_batched_tokens=64)
    sampling = SamplingSpec(max_tokens=10, logprobs=5, repetition_penalty=1.3, temperature=0.7, seed=1)
    prompts = golden(variant).prompts
    results = serve(engine, [Request(str(i), prompt, sampling) for i, prompt in enumerate(prompts)])
    for i, prompt in enumerate(prompts):
        (completion,) = results[str(i)].completions
        ids = list(completion.token_ids)
        expected = forward(plain(variant).model, prompt + ids)[len(prompt) - 1 : -1].log_softmax(-1)
        assert completion.logprobs is not None
        assert [entry.token_id for entry in completion.logprobs] == ids
        for entry, row in zip(completion.logprobs, expected, strict=True):
            assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=3e-4)
            values = row.topk(5).values.tolist()
            assert list(entry.top.values()) == pytest.approx(values, abs=3e-4)
            assert all(value == pytest.approx(row[t].item(), abs=3e-4) for t, value in entry.top.items())


def test_logprobs_only_for_those_who_ask(golden: GoldenOf, loaded: LoadedOf) -> None:
    engine, prompt = engine_of(loaded("b2_7b").model), golden("b2_7b").prompts[0]
    settings = {"without": None, "own": 0, "five": 5}
    requests = [Request(k, prompt, SamplingSpec(max_tokens=3, logprobs=v)) for k, v in settings.items()]
    done = {k: finished.completions[0] for k, finished in serve(engine, requests).items()}
    assert done["without"].logprobs is None
    assert [len(entry.top) for entry in done["own"].logprobs or ()] == [0, 0, 0]
    assert [len(entry.top) for entry in done["five"].logprobs or ()] == [5, 5, 5]


def test_weights_that_are_not_numbers_give_an_error_not_a_token(golden: GoldenOf) -> None:
    reference = golden("b2_7b")
    broken = reference.load().model
    with torch.no_grad():
        broken.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    for sampling in ({}, {"temperature": 1.0}, {"repetition_penalty": 1.1}):
        (completion,) = answer(engine_of(broken), reference.prompts[0], max_tokens=5, **sampling).completions
        assert completion.finish_reason is FinishReason.ERROR
        assert completion.error is not None
        assert completion.token_ids == ()


# -- what is refused --


def refused(engine: Engine, prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.add(Request("bad", prompt, SamplingSpec(max_tokens=1)))
    assert not engine.has_work


def test_prompts_that_cannot_run_are_refused_and_leave_no_trace(loaded: LoadedOf) -> None:
    engine = engine_of(loaded("b2_7b").model)
    refused(engine, [], "no tokens")
    refused(engine, [5] * MAX_MODEL_LEN, str(MAX_MODEL_LEN))
    refused(engine, [5] * 10_000, "10000")
    (completion,) = answer(engine, [5] * (MAX_MODEL_LEN - 1), "bad", max_tokens=9).completions
    assert len(completion.token_ids) == 1


@pytest.mark.parametrize("token", [-1, 768, 125_000])
def test_tokens_that_the_model_does_not_have_are_refused(token: int, loaded: LoadedOf) -> None:
    """They would end the step of every row in the batch."""
    engine = engine_of(loaded("b2_7b").model)
    requests = [
        Request("bad", [5, token], SamplingSpec(max_tokens=1)),
        Request("bad", PROMPT, SamplingSpec(max_tokens=1, logit_bias={token: 1.0})),
        Request("bad", PROMPT, SamplingSpec(max_tokens=1, stop_token_ids=(token,))),
        ScoreRequest("bad", PROMPT, [[5], [token]]),
    ]
    for request in requests:
        with pytest.raises(ValueError, match=f"token {token} "):
            engine.add(request)
    assert not engine.has_work


def test_continuations_that_cannot_run_are_refused(loaded: LoadedOf) -> None:
    engine = engine_of(loaded("b2_7b").model)
    for continuations in ([[5], []], []):
        with pytest.raises(ValueError, match="continuation"):
            engine.add(ScoreRequest("bad", PROMPT, continuations))
    with pytest.raises(ValueError, match=str(MAX_MODEL_LEN)):
        engine.add(ScoreRequest("bad", PROMPT, [[5] * MAX_MODEL_LEN]))
    assert not engine.has_work


def test_an_id_that_is_in_use_is_refused(loaded: LoadedOf) -> None:
    engine = engine_of(loaded("b2_7b").model)
    engine.add(Request("row", PROMPT, SamplingSpec(max_tokens=1)))
    with pytest.raises(ValueError, match="row"):
        engine.add(Request("row", PROMPT, SamplingSpec(max_tokens=1)))


# -- scores --


def split(context: str, continuation: str, encode: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """As lm-evaluation-harness does: trailing spaces move, both are tokenised together, then cut."""
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole, head = encode(stripped + continuation), encode(stripped)
    return whole[: len(head)], whole[len(head) :]


def naive_score(model: Any, prompt: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-likelihood and greediness of a continuation by a plain forward pass."""
    rows = forward(model, prompt + continuation)[len(prompt) - 1 : -1].log_softmax(-1)
    total = rows.gather(1, torch.tensor(continuation)[:, None]).sum().item()
    return total, rows.argmax(-1).tolist() == continuation


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_b2_equiv"])
def test_scores_are_those_of_lm_eval(name: str, shared_dir: Path) -> None:
    root = shared_dir / "golden" / "lm_eval"
    loaded = load_model(ModelSpec(model=str(root / name), device="cpu", dtype="float32"))
    items = [json.loads(line) for line in (root / "reference.jsonl").read_text().splitlines()]
    items = [item for item in items if item["kind"] == "loglikelihood"]
    assert items
    length = loaded.codec.max_model_len
    engine = engine_of(loaded.model, max_model_len=length, kv_cache_tokens=8 * length)
    requests, keys = [], []
    for i, item in enumerate(items):
        for j, continuation in enumerate(item["continuations"]):
            head, tail = split(item["context"], continuation, loaded.codec.tokenizer.encode)
            requests.append(ScoreRequest(f"{i}/{j}", head, [tail]))
            keys.append((item["loglikelihoods"][j], item["is_greedy"][j]))
    results = serve(engine, requests)
    for request, (loglikelihood, is_greedy) in zip(requests, keys, strict=True):
        (score,) = results[request.request_id].scores
        assert score.loglikelihood == pytest.approx(loglikelihood, abs=2e-4)
        assert score.is_greedy is is_greedy
    for i, item in enumerate(items):
        ours = [results[f"{i}/{j}"].scores[0].loglikelihood for j in range(len(item["continuations"]))]
        theirs = item["loglikelihoods"]
        assert ours.index(max(ours)) == theirs.index(max(theirs))


@pytest.mark.parametrize("length", ["short", "long enough to be a shared prefix"])
def test_continuations_together_score_as_each_alone(
    length: str, golden: GoldenOf, loaded: LoadedOf, plain: LoadedOf
) -> None:
    prompt = golden("b2_13b").prompts[1 if length == "short" else 3]
    continuations = [[5], [6, 7, 8], [6, 7], [6, 9], [5], [11, 12]]
    engine = engine_of(loaded("b2_13b").model)
    scores = serve(engine, [ScoreRequest("row", prompt, continuations)])["row"].scores
    for continuation, score in zip(continuations, scores, strict=True):
        loglikelihood, is_greedy = naive_score(plain("b2_13b").model, prompt, continuation)
        assert score.loglikelihood == pytest.approx(loglikelihood, abs=2e-4)
        assert (score.num_tokens, score.is_greedy) == (len(continuation), is_greedy)


def test_labels_of_one_token_cost_one_pass_of_the_prompt(golden: GoldenOf, loaded: LoadedOf) -> None:
    prompt = golden("b2_7b").prompts[4]
    engine = engine_of(loaded("b2_7b").model)
    labels = [[token] for token in range(100, 120)]
    assert len(serve(engine, [ScoreRequest("row", prompt, labels)])["row"].scores) == 20
    assert engine.stats.num_steps == 1
    assert engine.stats.num_computed_tokens == len(prompt)
