"""What loading takes of the host's memory: never the weights in full precision beside those that stay."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from b2batch.assets import EMBEDDED_MODELS
from b2batch.models.baichuan import BaichuanConfig, BaichuanForCausalLM

# A process of its own. Pages of the mapped files are the system's to take back, so they are not counted.
LOAD = """
import json, sys, threading, time
from b2batch.spec import parse_spec
from b2batch.engine_start import load_part

def anonymous_bytes():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def spec_of(model):
    return parse_spec({
        "model": {"model": model, "device": "cpu", "dtype": "bfloat16", "quantization": sys.argv[2]},
        "input": {"path": "x"}, "prompt": {"column": "x"}, "output": {"path": "x"},
    })

load_part(spec_of("baichuan2-tiny"), 0)  # imports everything
before, seen, is_loaded = anonymous_bytes(), [], threading.Event()

def watch():
    while not is_loaded.wait(0.0005):
        seen.append(anonymous_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
try:
    loaded = load_part(spec_of(sys.argv[1]), 0)
finally:
    is_loaded.set()
watcher.join()
kept = sum(weight.nbytes for weight in loaded.model.parameters())
print(json.dumps({"peak": max(seen) - before, "kept": kept}))
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """230 MB in bfloat16, in shards of 30 MB."""
    directory = tmp_path_factory.mktemp("sharded")
    config = BaichuanConfig(
        vocab_size=6000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=256,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        BaichuanForCausalLM(config).save_pretrained(directory, max_shard_size="30MB")
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(EMBEDDED_MODELS["baichuan2-tiny"] / name, directory / name)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_weights_are_quantised_one_by_one_and_their_room_given_back(sharded: Path, method: str) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 5
    full = sum(path.stat().st_size for path in shards)
    found = subprocess.run(
        [sys.executable, "-c", LOAD, str(sharded), method],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    taken = json.loads(found.stdout.splitlines()[-1])
    assert taken["kept"] < 0.6 * full
    assert taken["peak"] < taken["kept"] + full / 4
