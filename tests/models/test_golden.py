"""The registered classes against what upstream's own code computed, float32 on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import LOGIT_TOLERANCE, VARIANTS, Golden, forward

from b2batch.engine.sampling import distribution
from b2batch.engine.sequence import Sequence
from b2batch.models.baichuan import NormHead, RMSNorm, alibi_slopes, eager_attention, rotary_tables, rotate
from b2batch.models.loading import LoadedModel
from b2batch.spec import SamplingSpec

every_variant = pytest.mark.parametrize("variant", VARIANTS)
GoldenOf = Callable[[str], Golden]
LoadedOf = Callable[[str], LoadedModel]


def generate(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """transformers' own generate on a left-padded batch; each answer up to and with its end token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    settings = {"do_sample": False, "max_new_tokens": 48, "pad_token_id": 0, "eos_token_id": 2} | options
    rows = model.generate(ids, attention_mask=mask, **settings)[:, width:].tolist()
    ends = (
        settings["eos_token_id"] if isinstance(settings["eos_token_id"], list) else [settings["eos_token_id"]]
    )
    return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), None)] for row in rows]


@every_variant
def test_the_variant_is_told_from_the_config(variant: str, golden: GoldenOf, plain: LoadedOf) -> None:
    meta = golden(variant).expected["meta"]
    assert plain(variant).model.config.position == meta["position"]
    assert plain(variant).model.config.norm_head is meta["norm_head"]


@every_variant
def test_logits_equal_upstreams(variant: str, golden: GoldenOf, plain: LoadedOf) -> None:
    reference, model = golden(variant), plain(variant).model
    for i, prompt in enumerate(reference.prompts):
        logits = forward(model, prompt).numpy()[reference.arrays[f"positions_{i}"]]
        np.testing.assert_allclose(logits, reference.arrays[f"logits_{i}"], rtol=0, atol=LOGIT_TOLERANCE)


@every_variant
def test_hidden_states_and_cache_equal_upstreams(variant: str, golden: GoldenOf, plain: LoadedOf) -> None:
    reference, model = golden(variant), plain(variant).model
    hidden: list[torch.Tensor] = []
    inner = model.model
    parts = [inner.embed_tokens, *inner.layers[:-1], inner.norm]
    hooks = [part.register_forward_hook(lambda _m, _i, out: hidden.append(out[0])) for part in parts]
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([reference.prompts[0]]), use_cache=True)
    for hook in hooks:
        hook.remove()
    np.testing.assert_allclose(
        torch.stack(hidden).numpy(), reference.arrays["hidden_0"], rtol=0, atol=LOGIT_TOLERANCE
    )
    layer = output.past_key_values.layers[0]
    for ours, name in ((layer.keys, "kv_k_layer0_prompt0"), (layer.values, "kv_v_layer0_prompt0")):
        np.testing.assert_allclose(ours[0].numpy(), reference.arrays[name], rtol=0, atol=LOGIT_TOLERANCE)


@every_variant
def test_generate_writes_every_greedy_token(variant: str, golden: GoldenOf, plain: LoadedOf) -> None:
    """All prompts in one left-padded batch a penalty, and those of one penalty alone."""
    reference, model = golden(variant), plain(variant).model
    for penalty, group in groupby(reference.greedy, key=lambda case: case[0]):
        _, prompts, answers = zip(*group, strict=True)
        assert generate(model, list(prompts), repetition_penalty=penalty) == list(answers)
        if penalty == 1.1 and "sharded" not in variant:
            alone = [generate(model, [prompt], repetition_penalty=penalty)[0] for prompt in prompts]
            assert alone == list(answers)


@every_variant
def test_generate_on_left_padded_batches(variant: str, golden: GoldenOf, plain: LoadedOf) -> None:
    reference, model = golden(variant), plain(variant).model
    for batch in reference.expected["greedy_batch"]:
        prompts = [reference.prompts[i] for i in batch["prompts"]]
        assert generate(model, prompts, repetition_penalty=batch["repetition_penalty"]) == batch["tokens"]


@every_variant
def test_padding_does_not_move_the_logits(variant: str, golden: GoldenOf, plain: LoadedOf) -> None:
    reference, model = golden(variant), plain(variant).model
    members = [0, 2, 3, 4, 5]
    prompts = [reference.prompts[i] for i in members]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        last = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1].numpy()
    expected = np.stack([reference.arrays[f"batch_last_{i}"] for i in members])
    np.testing.assert_allclose(last, expected, rtol=0, atol=LOGIT_TOLERANCE)


@every_variant
def test_custom_end_tokens(variant: str, golden: GoldenOf, plain: LoadedOf) -> None:
    reference, model = golden(variant), plain(variant).model
    for case in reference.expected["greedy_custom_eos"]:
        prompt, ends = reference.prompts[case["prompt"]], case["eos_token_id"]
        assert generate(model, [prompt], eos_token_id=ends, repetition_penalty=1.0) == [case["tokens"]]


@every_variant
def test_a_chat_answers_as_upstream(variant: str, golden: GoldenOf, plain: LoadedOf) -> None:
    reference, (model, codec) = golden(variant), (plain(variant).model, plain(variant).codec)
    assert (codec.chat is None) is (variant == "b1_7b")  # the one without role tokens
    for case in reference.expected.get("chat_greedy", []):
        assert codec.chat is not None
        prompt = codec.chat.encode(case["messages"])
        options = {key: case[key] for key in ("repetition_penalty", "max_new_tokens")}
        (answer,) = generate(model, [prompt], **options)
        assert codec.tokenizer.decode(answer) == case["text"]


@every_variant
def test_sampling_distributions(variant: str, golden: GoldenOf, plain: LoadedOf) -> None:
    """Penalty → temperature → top_k → top_p → softmax gives upstream's next-token distribution."""
    reference = golden(variant)
    for index, group in groupby(reference.expected["sampling"], key=lambda case: case["prompt"]):
        prompt = reference.prompts[index]
        logits = forward(plain(variant).model, prompt)[-1]
        for case in group:
            settings = {k: case[k] for k in ("temperature", "top_k", "top_p", "repetition_penalty")}
            ids, probabilities = next_token(logits, prompt, SamplingSpec(**settings))
            assert ids == case["ids"]
            np.testing.assert_allclose(probabilities, case["probs"], rtol=0, atol=2e-4)


def next_token(
    logits: torch.Tensor, prompt: list[int], sampling: SamplingSpec
) -> tuple[list[int], list[float]]:
    """Ids that may be drawn, most likely first, and their probabilities."""
    seen = torch.tensor(sorted(set(prompt)))
    penalty = sampling.repetition_penalty
    scores = logits.clone()
    scores[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    row = Sequence("row", 0, list(prompt), sampling, 1)
    probabilities, ids = distribution(scores[None] / sampling.temperature, [row])
    count = int((probabilities[0] > 0).sum())
    return ids[0, :count].tolist(), probabilities[0, :count].tolist()


# -- the parts by themselves --


@pytest.fixture(scope="module")
def units(shared_dir: Path) -> dict[str, np.ndarray]:
    return dict(np.load(shared_dir / "golden" / "expected" / "units.npz"))


def test_rotary_tables_and_rotation(units: dict[str, np.ndarray]) -> None:
    cos, sin = rotary_tables(torch.from_numpy(units["rope_positions"])[None], 128, 10_000.0)
    np.testing.assert_allclose(cos[0].numpy(), units["rope_cos"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(sin[0].numpy(), units["rope_sin"], rtol=0, atol=1e-4)
    tables = rotary_tables(torch.from_numpy(units["rope_apply_positions"]), 128, 10_000.0)
    for name in ("rope_q", "rope_k"):
        turned = rotate(torch.from_numpy(units[name]), *tables)
        np.testing.assert_allclose(turned.numpy(), units[f"{name}_out"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_heads", [1, 2, 4, 5, 6, 8, 12, 32, 40, 52, 64])
def test_alibi_slopes(units: dict[str, np.ndarray], num_heads: int) -> None:
    np.testing.assert_allclose(alibi_slopes(num_heads), units[f"alibi_slopes_{num_heads}"], rtol=1e-6)


def test_the_alibi_bias_is_upstreams_up_to_a_shift_of_each_row(units: dict[str, np.ndarray]) -> None:
    mask = torch.from_numpy(units["alibi_mask_40_len8"]).float()
    module = torch.nn.Module()
    module.alibi_slopes = torch.tensor(alibi_slopes(40))
    zeros = torch.zeros(1, 40, 8, 4)
    _, weights = eager_attention(module, zeros, zeros, zeros, None, 1.0)
    np.testing.assert_allclose(weights[0].numpy(), mask.softmax(-1).numpy(), rtol=0, atol=1e-6)


def test_norm_head(units: dict[str, np.ndarray]) -> None:
    vocab_size, hidden_size = units["normhead_weight"].shape
    head = NormHead(hidden_size, vocab_size, normalise=True).requires_grad_(False)
    head.weight.copy_(torch.from_numpy(units["normhead_weight"]))
    out = head(torch.from_numpy(units["normhead_x"]))
    np.testing.assert_allclose(out.numpy(), units["normhead_out"], rtol=0, atol=1e-5)
    head.weight.mul_(3.0)  # rows count by direction only, also after the weight has changed
    np.testing.assert_allclose(head(torch.from_numpy(units["normhead_x"])).numpy(), out.numpy(), atol=1e-5)


def test_rms_norm(units: dict[str, np.ndarray]) -> None:
    norm = RMSNorm(16, 1e-6).requires_grad_(False)
    norm.weight.copy_(torch.from_numpy(units["rms_w"]))
    x = torch.from_numpy(units["rms_x"])
    np.testing.assert_allclose(norm(x).numpy(), units["rms_out"], rtol=0, atol=1e-5)
    wide = norm.to(torch.bfloat16)(x.to(torch.bfloat16)).float().numpy()
    np.testing.assert_allclose(wide, units["rms_out_bf16"].astype(np.float32), rtol=0.02, atol=0.02)
