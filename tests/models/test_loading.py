"""Loading a checkpoint: every layout, and every damaged or hostile file refused by name."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import Golden, forward
from safetensors.torch import save_file

from b2batch.errors import CallerError, ModelError, SpecError
from b2batch.models.loading import LoadedModel, load_model
from b2batch.spec import ModelSpec


@pytest.fixture
def directory(shared_dir: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be spoilt."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(shared_dir / "golden" / "ckpt" / "b2_7b-tiny", copy, copy_function=shutil.copyfile)
    copy.chmod(0o755)
    return copy


def load(directory: Path, **settings: Any) -> LoadedModel:
    return load_model(ModelSpec(model=str(directory), device="cpu", **settings))


def edit_config(directory: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in remove}
    (directory / "config.json").write_text(json.dumps(kept | changes))


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return torch.load(directory / "pytorch_model.bin", weights_only=True)


def refused(directory: Path, expected: type[CallerError] = ModelError, **settings: Any) -> str:
    """The message of the refusal, which names the checkpoint or the setting."""
    with pytest.raises(expected) as caught:
        load(directory, **settings)
    message = str(caught.value)
    assert str(directory) in message or "model." in message
    return message


# -- what loads --


def test_safetensors_give_the_same_model(directory: Path, golden: Callable[[str], Golden]) -> None:
    prompt = golden("b2_7b").prompts[3]
    from_bin = forward(load(directory).model, prompt)
    weights = {name: tensor.contiguous() for name, tensor in weights_of(directory).items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "pytorch_model.bin").unlink()
    assert torch.equal(forward(load(directory).model, prompt), from_bin)


def test_switches_can_be_overridden(directory: Path) -> None:
    config = load(directory, position="alibi", norm_head=False).model.config
    assert (config.position, config.norm_head) == ("alibi", False)


def test_bfloat16_keeps_its_logits_in_float32(directory: Path, golden: Callable[[str], Golden]) -> None:
    model = load(directory, dtype="bfloat16").model
    assert model.dtype == torch.bfloat16
    assert forward(model, golden("b2_7b").prompts[0]).dtype == torch.float32


def test_a_context_may_be_shortened(directory: Path) -> None:
    assert load(directory, max_model_len=100).codec.max_model_len == 100
    assert load(directory).codec.max_model_len == 256


# -- what is refused --


@pytest.mark.parametrize("num_bytes", [0, 100, 500_000])
def test_a_truncated_bin_file(directory: Path, num_bytes: int) -> None:
    file = directory / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:num_bytes])
    refused(directory)


@pytest.mark.parametrize("num_bytes", [0, 100, 500_000])
def test_a_truncated_safetensors_file(directory: Path, num_bytes: int) -> None:
    weights = {name: tensor.contiguous() for name, tensor in weights_of(directory).items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    refused(directory)


def test_a_shard_that_is_not_there(shared_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "sharded"
    source = shared_dir / "golden" / "ckpt" / "b2_13b-tiny-sharded"
    shutil.copytree(source, copy, copy_function=shutil.copyfile)
    copy.chmod(0o755)
    (copy / "pytorch_model-00002-of-00002.bin").unlink()
    refused(copy)


def test_a_missing_weight_is_named(directory: Path) -> None:
    weights = weights_of(directory)
    del weights["model.layers.1.self_attn.W_pack.weight"]
    torch.save(weights, directory / "pytorch_model.bin")
    assert "layers.1.self_attn.W_pack" in refused(directory)


def test_a_weight_of_another_shape(directory: Path) -> None:
    edit_config(directory, intermediate_size=95)
    refused(directory)


class _Exploit:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "owned")


def test_a_pickle_that_runs_code_is_refused_and_not_run(directory: Path, tmp_path: Path) -> None:
    target = tmp_path / "owned.txt"
    pickle.loads(pickle.dumps(_Exploit(target)))
    assert target.exists()  # the attack works on a plain unpickler
    target.unlink()
    torch.save({**weights_of(directory), "x": _Exploit(target)}, directory / "pytorch_model.bin")
    refused(directory)
    assert not target.exists()
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(_Exploit(target)))
    refused(directory)
    assert not target.exists()


def test_safetensors_are_preferred_to_a_pickle(directory: Path, tmp_path: Path) -> None:
    target = tmp_path / "owned.txt"
    weights = {name: tensor.contiguous() for name, tensor in weights_of(directory).items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(_Exploit(target)))
    load(directory)
    assert not target.exists()


@pytest.mark.parametrize("header", [1 << 62, 1 << 40, 99_000_000, 8])
def test_a_header_that_claims_more_than_there_is(directory: Path, header: int) -> None:
    (directory / "pytorch_model.bin").unlink()
    (directory / "model.safetensors").write_bytes(header.to_bytes(8, "little") + b'{"a":[[[' * 100)
    refused(directory)


@pytest.mark.parametrize("model_type", ["baichuan", "no_such_family"])
def test_code_in_the_checkpoint_is_never_run(directory: Path, tmp_path: Path, model_type: str) -> None:
    target = tmp_path / "owned.txt"
    code = f"open({str(target)!r}, 'w').write('owned')\n"
    for name in ("configuration_baichuan", "modeling_baichuan", "tokenization_baichuan"):
        (directory / f"{name}.py").write_text(code)
    auto_map = {
        "AutoConfig": "configuration_baichuan.BaichuanConfig",
        "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        "AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None],
    }
    edit_config(directory, model_type=model_type, auto_map=auto_map)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"auto_map": auto_map}))
    if model_type == "baichuan":
        load(directory)
    else:
        refused(directory)
    assert not target.exists()


def test_a_tokenizer_larger_than_the_vocabulary(directory: Path) -> None:
    edit_config(directory, vocab_size=700)
    assert "768" in refused(directory)


def test_a_config_without_vocab_size(directory: Path) -> None:
    edit_config(directory, remove=("vocab_size",))
    assert "vocab_size" in refused(directory)


def test_a_config_that_names_no_family(directory: Path) -> None:
    edit_config(directory, remove=("model_type", "architectures"))
    refused(directory)


def test_no_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.model").unlink()
    assert "tokenizer.model" in refused(directory)


def test_a_context_longer_than_trained(directory: Path) -> None:
    assert "max_model_len" in refused(directory, SpecError, max_model_len=257)


@pytest.mark.parametrize("setting", [{"position": "rope"}, {"norm_head": True}, {"norm_head": False}])
def test_baichuan_switches_on_another_family(shared_dir: Path, setting: dict[str, Any]) -> None:
    llama = shared_dir / "golden" / "lm_eval" / "tiny_llama"
    message = refused(llama, SpecError, **setting)
    assert f"model.{next(iter(setting))}" in message
    assert "llama" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(directory: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.device"):
        load_model(ModelSpec(model=str(directory), device="cuda"))
