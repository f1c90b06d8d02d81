"""Naming a checkpoint: what is found, what is refused, and what identifies it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from b2batch.errors import ModelError, SpecError
from b2batch.models.checkpoint import open_checkpoint
from b2batch.models.families import family_of, has_norm_head
from b2batch.spec import ModelSpec


@pytest.fixture
def directory(shared_dir: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be spoilt."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(shared_dir / "golden" / "ckpt" / "b2_7b-tiny", copy, copy_function=shutil.copyfile)
    copy.chmod(0o755)
    return copy


def digest(directory: Path) -> str:
    return open_checkpoint(ModelSpec(model=str(directory)), weights=True).digest()


def test_a_checkpoint_is_its_directory_and_configs(directory: Path) -> None:
    checkpoint = open_checkpoint(ModelSpec(model=str(directory)), weights=True)
    assert checkpoint.directory == directory
    assert checkpoint.source == str(directory)
    assert checkpoint.model_type == "baichuan"
    assert checkpoint.config["vocab_size"] == 768
    assert checkpoint.generation_config["user_token_id"] == 195


@pytest.mark.parametrize("name", ["./not/here", "/not/here", "~/not-here", "not-here", "three/part/name"])
def test_a_wrong_path_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=r"model\.model") as caught:
        open_checkpoint(ModelSpec(model=name), weights=True)
    assert name in str(caught.value)


def test_an_environment_variable_can_name_it(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("B2BATCH_TEST_CHECKPOINT", str(directory))
    spec = ModelSpec(model="${env:B2BATCH_TEST_CHECKPOINT}")
    assert open_checkpoint(spec, weights=True).directory == directory
    monkeypatch.delenv("B2BATCH_TEST_CHECKPOINT")
    with pytest.raises(SpecError, match="B2BATCH_TEST_CHECKPOINT"):
        open_checkpoint(spec, weights=True)


def test_a_directory_without_config_says_what_it_holds(directory: Path) -> None:
    (directory / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json.*tokenizer\.model"):
        open_checkpoint(ModelSpec(model=str(directory)), weights=True)


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"a": \xff}'])
def test_a_config_that_is_no_object_is_named(directory: Path, content: str) -> None:
    (directory / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        open_checkpoint(ModelSpec(model=str(directory)), weights=True)


def test_a_directory_without_weights_is_refused(directory: Path) -> None:
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="no weights"):
        open_checkpoint(ModelSpec(model=str(directory)), weights=True)


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        ("generation_config.json", "user_token_id", "x", "expected a token id, found 'x'"),
        ("generation_config.json", "user_token_id", 99_999, "beyond the 768 embeddings"),
        ("generation_config.json", "eos_token_id", "x", "expected a token id, or a list of them"),
        ("generation_config.json", "eos_token_id", [2, "x"], "expected a token id, or a list of them"),
        ("generation_config.json", "eos_token_id", {}, "expected a token id, or a list of them"),
        ("config.json", "vocab_size", "x", "expected a positive integer, found 'x'"),
        ("config.json", "vocab_size", None, "has no vocab_size"),
        ("config.json", "vocab_size", 700, "has 768 pieces, but the model only 700"),
        ("config.json", "max_position_embeddings", -1, "expected a positive integer, found '-1'"),
        ("config.json", "num_attention_heads", 0, "expected a positive integer"),
        ("config.json", "hidden_size", True, "expected a positive integer"),
        ("config.json", "architectures", 5, "expected a list of names"),
        ("config.json", "model_type", ["baichuan"], "expected text"),
        ("config.json", "text_config", 5, "expected an object"),
        ("config.json", "text_config", {"vocab_size": []}, "text_config: vocab_size: expected"),
        ("config.json", "quantization_config", "gptq", "expected an object"),
    ],
)
def test_an_odd_config_is_refused_by_file_and_key_before_a_replica_starts(
    directory: Path, name: str, key: str, value: object, said: str
) -> None:
    config = json.loads((directory / name).read_text())
    (directory / name).write_text(json.dumps({**config, key: value}))
    with pytest.raises(ModelError) as caught:
        plan(directory)
    assert said in str(caught.value)


def plan(directory: Path) -> None:
    """What planning a job does with its model."""
    spec = ModelSpec(model=str(directory))
    checkpoint = open_checkpoint(spec, weights=False)
    family_of(checkpoint).codec(checkpoint, spec)


def test_role_tokens_go_together(directory: Path) -> None:
    config = json.loads((directory / "generation_config.json").read_text())
    del config["assistant_token_id"]
    (directory / "generation_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="assistant_token_id go together"):
        open_checkpoint(ModelSpec(model=str(directory)), weights=False)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (
            {"weight_map": {"a": "part-1.bin", "b": "gone.bin"}},
            "names the shard gone.bin, which is not there",
        ),
        ({"weight_map": {"a": "../outside.bin"}}, "'../outside.bin' is not a name in its own directory"),
        ({"weight_map": {"a": "/etc/passwd"}}, "is not a name in its own directory"),
        ({"weight_map": ["part-1.bin"]}, "no index of weights"),
        ({"weight_map": {"a": 1}}, "no index of weights"),
        ({}, "no index of weights"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused_before_a_replica_starts(
    directory: Path, index: dict[str, object], said: str
) -> None:
    (directory / "part-1.bin").write_bytes(b"")
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"index\.json: ") as caught:
        open_checkpoint(ModelSpec(model=str(directory)), weights=False)
    assert said in str(caught.value)


def test_the_digests_of_weights_are_told(directory: Path) -> None:
    checkpoint = open_checkpoint(ModelSpec(model=str(directory)), weights=True)
    expected = hashlib.sha256((directory / "pytorch_model.bin").read_bytes()).hexdigest()
    assert checkpoint.weight_digests() == {"pytorch_model.bin": expected}


def test_the_digest_is_of_contents(directory: Path, tmp_path: Path) -> None:
    before = digest(directory)
    (directory / "README.md").write_text("not part of the model")
    moved = tmp_path / "moved"
    directory.rename(moved)
    assert digest(moved) == before


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tokenizer.model", "config.json"])
def test_one_changed_byte_is_another_digest(directory: Path, name: str) -> None:
    before = digest(directory)
    content = (directory / name).read_bytes()
    if name == "config.json":
        content = content.replace(b"768", b"769")
    else:
        middle = len(content) // 2
        content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    (directory / name).write_bytes(content)
    assert digest(directory) != before


@pytest.mark.parametrize(
    ("vocab_size", "architecture", "expected"),
    [
        (125_696, "BaichuanForCausalLM", True),
        (64_000, "BaichuanForCausalLM", False),  # Baichuan 1 13B
        (64_000, "BaiChuanForCausalLM", False),  # Baichuan 1 7B
        (130_000, "BaichuanForCausalLM", True),  # a Baichuan 2 with an extended vocabulary
    ],
)
def test_the_head_of_released_models_is_told(vocab_size: int, architecture: str, expected: bool) -> None:
    assert has_norm_head(vocab_size, [architecture]) is expected
