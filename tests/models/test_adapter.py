"""LoRA adapters, trained here: what they add to the logits, and adapters that belong elsewhere."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from golden import Golden, forward
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from b2batch.errors import CallerError, ModelError, SpecError
from b2batch.models.checkpoint import open_checkpoint
from b2batch.models.loading import load_model
from b2batch.spec import ModelSpec

TARGETS = ["W_pack", "o_proj", "down_proj"]
SCALE = 2.0  # lora_alpha / r


def spec(golden: Callable[[str], Golden], variant: str = "b2_7b", **settings: Any) -> ModelSpec:
    return golden(variant).spec().model_copy(update=settings)


@pytest.fixture(scope="module")
def adapter(golden: Callable[[str], Golden], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of training on one prompt; the base's name is a directory and so says nothing."""
    torch.manual_seed(0)
    model = golden("b2_7b").load().model
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, lora_dropout=0.0))
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-2)
    ids = torch.tensor([golden("b2_7b").prompts[4]])
    for _ in range(4):
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    directory = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(directory)
    return directory


@pytest.fixture
def copy_of(adapter: Path, tmp_path: Path) -> Callable[..., str]:
    """The adapter's directory with settings changed."""

    def make(**changes: Any) -> str:
        copy = tmp_path / "adapter"
        shutil.copytree(adapter, copy)
        config = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(config | changes))
        return str(copy)

    return make


def add_by_hand(model: Any, adapter: Path) -> Any:
    """W + scale · B·A in each layer, with the plain weights of ``model``."""
    weights = load_file(adapter / "adapter_model.safetensors")
    for name, a in weights.items():
        if "lora_A" in name:
            layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            delta = SCALE * weights[name.replace("lora_A", "lora_B")] @ a
            layer.weight = torch.nn.Parameter(layer.weight.detach() + delta, requires_grad=False)
    return model


def test_an_adapter_is_merged_into_full_weights(golden: Callable[[str], Golden], adapter: Path) -> None:
    prompt = golden("b2_7b").prompts[3]
    base = golden("b2_7b").load().model
    before = forward(base, prompt)
    tuned = load_model(spec(golden, adapter=str(adapter))).model
    assert not [name for name, _ in tuned.named_parameters() if "lora" in name]
    torch.testing.assert_close(
        forward(tuned, prompt), forward(add_by_hand(base, adapter), prompt), atol=1e-4, rtol=0
    )
    assert (forward(tuned, prompt) - before).abs().max() > 0.1, "it changes the answer"


def test_an_adapter_stays_beside_quantised_weights(golden: Callable[[str], Golden], adapter: Path) -> None:
    prompt = golden("b2_7b").prompts[3]
    tuned = load_model(spec(golden, adapter=str(adapter), quantization="nf4")).model
    bare = load_model(spec(golden, quantization="nf4")).model
    for name, layer in list(bare.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight.data = layer.forward(torch.eye(layer.in_features)).T.contiguous().detach()
            bare.set_submodule(name, plain)
    kept = [layer for layer in tuned.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    assert len(kept) == 5 * tuned.config.num_hidden_layers
    torch.testing.assert_close(
        forward(tuned, prompt), forward(add_by_hand(bare, adapter), prompt), atol=1e-3, rtol=0
    )


def test_the_adapter_is_part_of_the_runs_identity(golden: Callable[[str], Golden], copy_of: Any) -> None:
    path = copy_of()
    with_it = open_checkpoint(spec(golden, adapter=path), weights=False).digest()
    assert with_it != open_checkpoint(spec(golden), weights=False).digest()
    weights = load_file(Path(path) / "adapter_model.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in weights.items()}, Path(path) / "adapter_model.safetensors"
    )
    assert open_checkpoint(spec(golden, adapter=path), weights=False).digest() != with_it


def refused(given: ModelSpec, error: type[CallerError] = ModelError) -> str:
    with pytest.raises(error) as caught:
        load_model(given)
    assert "model.adapter" in str(caught.value)
    return str(caught.value)


def test_an_adapter_of_another_size(golden: Callable[[str], Golden], adapter: Path) -> None:
    assert "does not fit this model" in refused(spec(golden, "b2_13b", adapter=str(adapter)))


def test_an_adapter_for_layers_that_are_not_there(golden: Callable[[str], Golden], copy_of: Any) -> None:
    assert "q_proj" in refused(spec(golden, adapter=copy_of(target_modules=["q_proj"])))


def test_an_adapter_that_lacks_a_layer(golden: Callable[[str], Golden], copy_of: Any) -> None:
    path = Path(copy_of()) / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "layers.2" in name)
    save_file({key: tensor for key, tensor in weights.items() if key != name}, path)
    assert "layers.2" in refused(spec(golden, adapter=str(path.parent)))


def test_a_damaged_adapter(golden: Callable[[str], Golden], copy_of: Any) -> None:
    path = Path(copy_of()) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert "damaged" in refused(spec(golden, adapter=str(path.parent)))


def test_another_kind_of_adapter(golden: Callable[[str], Golden], copy_of: Any) -> None:
    assert "PREFIX_TUNING" in refused(spec(golden, adapter=copy_of(peft_type="PREFIX_TUNING")))


def test_a_directory_without_an_adapter(golden: Callable[[str], Golden], tmp_path: Path) -> None:
    assert "adapter_config.json" in refused(spec(golden, adapter=str(tmp_path)))


def test_an_adapter_that_names_another_hub_model() -> None:
    from b2batch.models.adapter import Adapter, check_adapter

    def adapter_for(base: str) -> Adapter:
        config = {"peft_type": "LORA", "base_model_name_or_path": base}
        return Adapter(Path(), "me/labels", config)

    with pytest.raises(SpecError, match=r"trained on .*7B-Base, and model\.model is .*7B-Chat"):
        check_adapter(adapter_for("baichuan-inc/Baichuan2-7B-Base"), "baichuan-inc/Baichuan2-7B-Chat")
    for base in ("baichuan-inc/Baichuan2-7B-Chat", "mirror/baichuan2-7b-chat", "/home/me/anything", ""):
        for name in (
            "baichuan-inc/Baichuan2-7B-Chat-4bits",
            "ms://baichuan-inc/Baichuan2-7B-Chat",
            "./local",
        ):
            check_adapter(adapter_for(base), name)
