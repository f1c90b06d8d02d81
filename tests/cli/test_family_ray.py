"""A job with each kind of weights on real Ray: it answers as transformers' generate does with the same."""

from __future__ import annotations

import json
import os
import shutil
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
def checkpoints(shared_dir: Path) -> Path:
    return shared_dir / "golden" / "ckpt"


@pytest.fixture(scope="module")
def adapter(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained here for a few steps, until the answers change."""
    import torch
    from peft import LoraConfig, get_peft_model

    from b2batch.models.loading import load_model
    from b2batch.spec import ModelSpec

    torch.manual_seed(0)
    loaded = load_model(ModelSpec(model=str(checkpoints / "b2_7b-tiny"), device="cpu"))
    tuned = get_peft_model(loaded.model, LoraConfig(r=4, target_modules=["W_pack", "down_proj"]))
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=3e-2)
    ids = torch.tensor([loaded.codec.tokenizer.encode("今天天气很好" * 4)])
    for _ in range(6):
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    directory = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "model",
    [
        {"model": "b2_7b-tiny", "dtype": "bfloat16"},
        {"model": "b2_7b-tiny", "quantization": "int8"},
        {"model": "b2_13b-tiny", "quantization": "nf4"},
        {"model": "b2_13b-tiny-4bits"},
    ],
    ids=["bf16", "int8", "nf4", "hub-4bits"],
)
def test_a_job_with_each_kind_of_weights(model: dict[str, Any], checkpoints: Path, tmp_path: Path) -> None:
    model = model | {"model": str(checkpoints / model["model"])}
    run(tmp_path, model)
    assert answers_of(tmp_path / "out") == generated(model)


def test_a_job_with_4_bits_and_an_adapter_beside_them(
    checkpoints: Path, adapter: Path, tmp_path: Path
) -> None:
    model = {"model": str(checkpoints / "b2_7b-tiny"), "quantization": "nf4", "adapter": str(adapter)}
    run(tmp_path, model)
    assert answers_of(tmp_path / "out") == generated(model)
    assert answers_of(tmp_path / "out") != generated(model | {"adapter": None})


def test_a_job_whose_replica_is_two_processes(checkpoints: Path, tmp_path: Path) -> None:
    model = {"model": str(checkpoints / "b2_13b-tiny")}
    run(tmp_path, model, engine={"tensor_parallel_size": 2}, cluster={"cpus_per_replica": 2})
    assert answers_of(tmp_path / "out") == generated(model)


def test_a_job_for_each_revision_of_a_hubs_model(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the hub's client had left in its cache, as the replicas find it too: they have the same home."""
    from huggingface_hub import constants

    cache = Path(os.environ["HOME"], ".cache", "huggingface", "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    stored = {"train_00220B": "b2_7b-tiny", "train_00440B": "b2_13b-tiny"}
    repository = cache / "models--owner--checkpoints"
    (repository / "refs").mkdir(parents=True)
    for number, (revision, name) in enumerate(stored.items()):
        commit = str(number) * 40
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(checkpoints / name, repository / "snapshots" / commit, copy_function=shutil.copyfile)
    run(tmp_path, {"model": "owner/checkpoints", "revision": list(stored)})
    for revision, name in stored.items():
        assert answers_of(tmp_path / "out" / revision) == generated({"model": str(checkpoints / name)})
        again = {"model": "owner/checkpoints", "revision": revision}
        assert answers_of(tmp_path / "out" / revision) == generated(again)
