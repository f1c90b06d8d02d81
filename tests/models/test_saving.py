"""`models quantize`: what it writes loads as the same model, and nothing is quantised twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import forward
from safetensors import safe_open

from b2batch.cli.main import app
from b2batch.errors import ModelError, OutputError
from b2batch.models.loading import load_model
from b2batch.models.saving import quantize_checkpoint
from b2batch.spec import ModelSpec

PROMPT = list(range(3, 40))


def spec(directory: Path, **settings: Any) -> ModelSpec:
    return ModelSpec(model=str(directory), device="cpu", **settings)


@pytest.mark.parametrize("variant", ["b2_7b", "b2_13b"])
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_what_is_written_loads_as_what_was_quantised(
    shared_dir: Path, tmp_path: Path, variant: str, method: str
) -> None:
    source = shared_dir / "golden" / "ckpt" / f"{variant}-tiny"
    quantize_checkpoint(spec(source, quantization=method), tmp_path / "small")
    again = load_model(spec(tmp_path / "small"))
    direct = load_model(spec(source, quantization=method))
    assert torch.equal(forward(again.model, PROMPT), forward(direct.model, PROMPT))
    assert again.codec.chat is not None
    assert again.checkpoint.generation_config == direct.checkpoint.generation_config


def test_a_hub_checkpoint_gets_todays_format_and_keeps_its_weights(shared_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "golden" / "ckpt" / "b2_13b-tiny-4bits"
    quantize_checkpoint(spec(source), tmp_path / "small")
    assert not list((tmp_path / "small").glob("*.bin"))
    packed = torch.load(source / "pytorch_model.bin", weights_only=True)
    with safe_open(tmp_path / "small" / "model.safetensors", "pt") as file:
        name = "model.layers.0.mlp.down_proj.weight"
        assert torch.equal(file.get_tensor(name), packed[f"{name}.data"])
        assert file.get_tensor("lm_head.weight").dtype == torch.float16, "stored as it was"
    ours, theirs = load_model(spec(tmp_path / "small")).model, load_model(spec(source)).model
    assert torch.equal(forward(ours, PROMPT), forward(theirs, PROMPT))


def test_a_model_saved_by_transformers_itself_loads(shared_dir: Path, tmp_path: Path) -> None:
    model = load_model(spec(shared_dir / "golden" / "lm_eval" / "tiny_llama", quantization="nf4")).model
    quantize_checkpoint(
        spec(shared_dir / "golden" / "lm_eval" / "tiny_llama", quantization="nf4"), tmp_path / "small"
    )
    assert torch.equal(forward(load_model(spec(tmp_path / "small")).model, PROMPT), forward(model, PROMPT))


def test_the_verb_writes_a_checkpoint_that_no_code_comes_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    app(
        ["models", "quantize", "baichuan2-tiny", str(tmp_path / "small"), "--to", "nf4"],
        standalone_mode=False,
    )
    assert "of weights" in capsys.readouterr().out
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert "auto_map" not in config
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert not (tmp_path / "small.partial").exists()


def test_an_existing_directory_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is there already"):
        quantize_checkpoint(ModelSpec(model="baichuan2-tiny", quantization="nf4"), tmp_path)


def test_how_must_be_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="say nf4 or int8"):
        quantize_checkpoint(ModelSpec(model="baichuan2-tiny"), tmp_path / "small")
