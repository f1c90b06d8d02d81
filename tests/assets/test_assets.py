"""The embedded model and the review sample are complete, small, and laid out as a hub model is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from safetensors import safe_open

from b2batch.assets import EMBEDDED_MODELS, REVIEWS_SAMPLE

HUB_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer_config.json",
}
MAX_BYTES = 8 * 1000 * 1000
PER_LAYER = (
    "input_layernorm",
    "post_attention_layernorm",
    "self_attn.W_pack",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@pytest.fixture(params=sorted(EMBEDDED_MODELS))
def model_dir(request: pytest.FixtureRequest) -> Path:
    return EMBEDDED_MODELS[request.param]


@pytest.fixture
def tokenizer(model_dir: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(model_dir / "tokenizer.model"))


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_directory_is_a_hub_layout_with_a_model_card_and_nothing_else(model_dir: Path) -> None:
    assert {path.name for path in model_dir.iterdir()} == HUB_FILES | {"README.md"}


def test_the_directory_is_at_most_8_mb(model_dir: Path) -> None:
    assert sum(path.stat().st_size for path in model_dir.iterdir()) <= MAX_BYTES


def test_the_config_describes_the_rotary_member_of_the_family(model_dir: Path) -> None:
    config = read_json(model_dir / "config.json")
    assert config["model_type"] == "baichuan"
    assert config["architectures"] == ["BaichuanForCausalLM"]
    assert config["max_position_embeddings"] == config["model_max_length"] == 1024
    assert (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]) == (0, 1, 2)


def test_the_tensors_are_those_the_config_promises(model_dir: Path) -> None:
    config = read_json(model_dir / "config.json")
    expected = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(config["num_hidden_layers"]):
        expected |= {f"model.layers.{layer}.{name}.weight" for name in PER_LAYER}
    with safe_open(model_dir / "model.safetensors", framework="np") as tensors:
        assert set(tensors.keys()) == expected
        slices = {name: tensors.get_slice(name) for name in expected}
        assert {piece.get_dtype() for piece in slices.values()} == {"BF16"}
        assert slices["lm_head.weight"].get_shape() == [config["vocab_size"], config["hidden_size"]]
        num_parameters = sum(_size(piece.get_shape()) for piece in slices.values())
    assert f"{num_parameters:,}" in (model_dir / "README.md").read_text(encoding="utf-8")


def _size(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


@pytest.mark.parametrize(
    ("index", "piece"),
    [(0, "<unk>"), (1, "<s>"), (2, "</s>"), (195, "<reserved_106>"), (196, "<reserved_107>")],
)
def test_control_pieces_have_baichuan_2s_ids(
    tokenizer: sentencepiece.SentencePieceProcessor, index: int, piece: str
) -> None:
    assert tokenizer.id_to_piece(index) == piece
    assert tokenizer.piece_to_id(piece) == index


def test_roles_and_answers_are_what_the_generation_config_says(
    model_dir: Path, tokenizer: sentencepiece.SentencePieceProcessor
) -> None:
    config = read_json(model_dir / "generation_config.json")
    assert tokenizer.id_to_piece(config["user_token_id"]) == "<reserved_106>"
    assert tokenizer.id_to_piece(config["assistant_token_id"]) == "<reserved_107>"
    assert len(tokenizer.encode("正面")) < config["max_new_tokens"]
    assert len(tokenizer.encode("负面")) < config["max_new_tokens"]


@pytest.mark.parametrize(
    "text", ["酒店很好,下次还会来。", " two  spaces ", "line\n\ttab", "2026 年", "😀 龘"]
)
def test_text_comes_back_from_its_ids(tokenizer: sentencepiece.SentencePieceProcessor, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_id() not in ids


def test_vocabulary_sizes_agree(model_dir: Path, tokenizer: sentencepiece.SentencePieceProcessor) -> None:
    assert tokenizer.vocab_size() == read_json(model_dir / "config.json")["vocab_size"]


def test_the_sample_has_reviews_of_both_labels_under_distinct_ids() -> None:
    rows = [json.loads(line) for line in REVIEWS_SAMPLE.read_text(encoding="utf-8").splitlines()]
    assert 0 < len(rows) <= 200
    assert all(set(row) == {"id", "text", "label"} and row["text"].strip() for row in rows)
    assert {row["label"] for row in rows} == {"正面", "负面"}
    assert len({row["id"] for row in rows}) == len(rows)
