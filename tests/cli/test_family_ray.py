"""A job with quantised and adapted weights on real Ray: it answers as transformers' generate does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from .command import b2batch, write_job

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
TEXTS = ["今天天气很好", "the quick brown fox", "一二三四五"]
ROWS = [json.dumps({"text": text}) for text in TEXTS]
NUM_TOKENS = 8


def answers_of(output: Path) -> list[str]:
    rows = pq.read_table(output).to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * len(TEXTS)
    return [row["generated_text"] for row in rows]


def generated(model: dict[str, Any]) -> list[str]:
    """What transformers' generate answers with the same weights."""
    import torch

    from b2batch.models.loading import load_model
    from b2batch.spec import ModelSpec

    loaded = load_model(ModelSpec(**model, device="cpu"))
    texts = []
    for text in TEXTS:
        assert loaded.codec.chat is not None
        prompt = loaded.codec.chat.encode([{"role": "user", "content": text}])
        row = loaded.model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=2,
            pad_token_id=0,
            repetition_penalty=1.0,
        )[0, len(prompt) :].tolist()
        texts.append(loaded.codec.tokenizer.decode([token for token in row if token != 2]))
    return texts


def run(tmp_path: Path, model: dict[str, Any], **sections: dict[str, object]) -> Path:
    job = write_job(
        tmp_path, ROWS, model={**model, "device": "cpu"}, sampling={"max_tokens": NUM_TOKENS}, **sections
    )
    ended = b2batch("run", job)
    assert ended.exit_code == 0, ended.output
    return job


@pytest.fixture(scope="module")
def adapter(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model

    from b2batch.models.loading import load_model
    from b2batch.spec import ModelSpec

    model = load_model(
        ModelSpec(model=str(shared_dir / "golden" / "ckpt" / "b2_7b-tiny"), device="cpu")
    ).model
    config = LoraConfig(r=2, target_modules=["W_pack", "down_proj"], init_lora_weights=False)
    directory = tmp_path_factory.mktemp("adapter")
    get_peft_model(model, config).save_pretrained(directory)
    return directory


def test_a_job_with_4_bits_and_an_adapter_beside_them(
    shared_dir: Path, adapter: Path, tmp_path: Path
) -> None:
    checkpoint = shared_dir / "golden" / "ckpt" / "b2_7b-tiny"
    model = {"model": str(checkpoint), "quantization": "nf4", "adapter": str(adapter)}
    run(tmp_path, model)
    assert answers_of(tmp_path / "out") == generated(model)
    assert answers_of(tmp_path / "out") != generated(model | {"adapter": None})
