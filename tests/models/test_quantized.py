"""4 and 8 bits against what upstream's own code computed, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from golden import LOGIT_TOLERANCE, Golden, forward

from b2batch.errors import CallerError, ModelError, SpecError
from b2batch.models.loading import LoadedModel, load_model
from b2batch.models.quantized import dequantize_nf4
from b2batch.spec import ModelSpec

from .test_golden import generate

both_sizes = pytest.mark.parametrize("variant", ["b2_7b", "b2_13b"])
LINEARS = {"W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"}


def checkpoint(shared_dir: Path, name: str) -> Path:
    return shared_dir / "golden" / "ckpt" / name


@pytest.fixture(scope="module")
def quantized(shared_dir: Path) -> Callable[..., LoadedModel]:
    """A checkpoint by its directory's name, loaded once with each set of settings."""

    def load(name: str, **settings: Any) -> LoadedModel:
        return load_model(ModelSpec(model=str(checkpoint(shared_dir, name)), device="cpu", **settings))

    return cache(load)


@pytest.fixture
def expected(shared_dir: Path) -> Callable[[str], dict[str, np.ndarray]]:
    return lambda variant: dict(np.load(shared_dir / "golden" / "expected" / f"{variant}-4bits.npz"))


def last_logits(model: Any, prompts: list[list[int]]) -> list[np.ndarray]:
    return [forward(model, prompt)[-1].numpy() for prompt in prompts]


# -- the hub's 4-bit checkpoints --


@both_sizes
def test_hub_checkpoint_is_recognised_and_equals_the_float32_reference(
    variant: str, golden: Callable[[str], Golden], quantized: Any, expected: Any
) -> None:
    model, arrays = quantized(f"{variant}-tiny-4bits").model, expected(variant)
    for i, prompt in enumerate(golden(variant).prompts):
        logits = forward(model, prompt).numpy()[arrays[f"positions_{i}"]]
        np.testing.assert_allclose(logits, arrays[f"logits_fp32_{i}"], rtol=0, atol=LOGIT_TOLERANCE)


@both_sizes
def test_hub_checkpoint_writes_every_greedy_token(
    variant: str, shared_dir: Path, golden: Callable[[str], Golden], quantized: Any
) -> None:
    text = (shared_dir / "golden" / "expected" / f"{variant}-4bits.json").read_text()
    cases = json.loads(text)["greedy_fp32"]
    prompts = [golden(variant).prompts[case["prompt"]] for case in cases]
    answers = generate(quantized(f"{variant}-tiny-4bits").model, prompts, max_new_tokens=48)
    assert answers == [case["tokens"] for case in cases]


@both_sizes
def test_float16_compute_stays_as_near_to_float32_as_upstreams_does(
    variant: str, golden: Callable[[str], Golden], quantized: Any, expected: Any
) -> None:
    model, arrays = quantized(f"{variant}-tiny-4bits", compute_dtype="float16").model, expected(variant)
    for i, logits in enumerate(last_logits(model, golden(variant).prompts)):
        reference = arrays[f"logits_fp32_{i}"][-1]
        theirs = np.abs(arrays[f"last_original_{i}"] - reference).max()
        assert np.abs(logits - reference).max() < 2 * theirs
        assert np.abs(logits - reference).max() > LOGIT_TOLERANCE, "computed in float32 after all"


def test_every_stored_weight_dequantises_bit_for_bit(shared_dir: Path) -> None:
    arrays = np.load(shared_dir / "golden" / "expected" / "nf4_unit.npz")
    for case in ("a", "b", "c", "zeros"):
        parts = {key.removeprefix(f"{case}_"): torch.from_numpy(np.array(arrays[key])) for key in arrays}
        state = bnb.functional.QuantState(
            absmax=parts["absmax_q"],
            shape=parts["weight"].shape,
            code=parts["nf4_code"],
            blocksize=64,
            quant_type="nf4",
            dtype=torch.float16,
            offset=parts["offset"],
            state2=bnb.functional.QuantState(
                absmax=parts["nested_absmax"], code=parts["nested_code"], blocksize=256, dtype=torch.float32
            ),
        )
        assert torch.equal(dequantize_nf4(parts["packed"], state), parts["dequant_fp16"])
        packed, _ = bnb.functional.quantize_4bit(
            parts["weight"], quant_type="nf4", compress_statistics=True, blocksize=64
        )
        assert torch.equal(packed, parts["packed"])


# -- quantised while loading --


@both_sizes
@pytest.mark.parametrize(("method", "key"), [("nf4", "online4"), ("int8", "online8")])
def test_quantised_while_loading_equals_upstreams_quantize(
    variant: str, method: str, key: str, golden: Callable[[str], Golden], quantized: Any, expected: Any
) -> None:
    """Upstream multiplied by dequantised weights on a CPU, in float32, and so do we: no wider tolerance."""
    model, arrays = quantized(f"{variant}-tiny", quantization=method).model, expected(variant)
    for i, logits in enumerate(last_logits(model, golden(variant).prompts)):
        np.testing.assert_allclose(logits, arrays[f"{key}_last_{i}"], rtol=0, atol=LOGIT_TOLERANCE)


@pytest.mark.parametrize("settings", [{"quantization": "nf4"}, {"quantization": "int8"}])
def test_only_the_decoders_linear_layers_change(
    settings: dict[str, str], golden: Callable[[str], Golden], plain: Any, quantized: Any
) -> None:
    before = dict(plain("b2_7b").model.named_parameters())
    after = dict(quantized("b2_7b-tiny", **settings).model.named_parameters())
    assert before.keys() == after.keys()
    for name, weight in after.items():
        if name.split(".")[-2] in LINEARS:
            assert weight.dtype in (torch.uint8, torch.int8)
        else:
            assert torch.equal(weight, before[name])


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_another_family_is_quantised_too(shared_dir: Path, method: str) -> None:
    directory = shared_dir / "golden" / "lm_eval" / "tiny_llama"
    full, small = (
        load_model(ModelSpec(model=str(directory), device="cpu", quantization=given)).model
        for given in (None, method)
    )
    prompt = list(range(5, 45))
    distance = (forward(full, prompt) - forward(small, prompt)).norm() / forward(full, prompt).norm()
    assert 0 < distance < 0.5
    assert not isinstance(small.get_output_embeddings(), bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)


@both_sizes
def test_bfloat16_weights_are_quantised_and_keep_float32_logits(variant: str, quantized: Any) -> None:
    model = quantized(f"{variant}-tiny", quantization="nf4", dtype="bfloat16").model
    assert model.dtype == torch.bfloat16
    assert forward(model, [5, 6, 7]).dtype == torch.float32


# -- what is refused --


@pytest.fixture
def spoilt(shared_dir: Path, tmp_path: Path) -> Callable[..., str]:
    """The refusal of a checkpoint whose config was changed."""

    def refusal(name: str, error: type[CallerError], config_says: Any = None, **settings: Any) -> str:
        copy = tmp_path / "checkpoint"
        shutil.copytree(checkpoint(shared_dir, name), copy, copy_function=shutil.copyfile)
        copy.chmod(0o755)
        config = json.loads((copy / "config.json").read_text())
        config |= {} if config_says is None else {"quantization_config": config_says}
        (copy / "config.json").write_text(json.dumps(config))
        with pytest.raises(error) as caught:
            load_model(ModelSpec(model=str(copy), device="cpu", **settings))
        return str(caught.value)

    return refusal


@pytest.mark.parametrize(
    ("quantization", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
    ],
)
def test_other_ways_of_quantising_are_named(spoilt: Any, quantization: dict[str, Any], named: str) -> None:
    assert re.search(rf"quantised \(.*{named}\)", spoilt("b2_7b-tiny", ModelError, quantization))


@pytest.mark.parametrize("quantization", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_a_config_that_calls_plain_weights_quantised(spoilt: Any, quantization: dict[str, Any]) -> None:
    assert "is not" in spoilt("b2_7b-tiny", ModelError, quantization)


def test_quantising_again_in_another_way(shared_dir: Path) -> None:
    spec = ModelSpec(model=str(checkpoint(shared_dir, "b2_7b-tiny-4bits")), device="cpu", quantization="int8")
    with pytest.raises(SpecError, match=r"model\.quantization: int8.*stored as nf4"):
        load_model(spec)


def test_a_compute_dtype_without_4_bits(spoilt: Any) -> None:
    assert "model.compute_dtype" in spoilt("b2_7b-tiny", SpecError, compute_dtype="float16")


def test_a_list_that_is_no_quantisation_state(shared_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint(shared_dir, "b2_7b-tiny-4bits"), copy, copy_function=shutil.copyfile)
    copy.chmod(0o755)
    weights = torch.load(copy / "pytorch_model.bin", weights_only=True)
    weights["model.layers.1.mlp.up_proj.weight.quant_state"].pop()
    torch.save(weights, copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.*not a double-quantised state"):
        load_model(ModelSpec(model=str(copy), device="cpu"))
