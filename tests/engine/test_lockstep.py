"""A replica of two processes answers as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from b2batch.errors import SpecError
from b2batch.models.loading import load_model
from b2batch.models.sharding import shard
from b2batch.spec import ModelSpec

# A process of its own, whose main module the second process can import.
ANSWERS = """
import json, sys
import torch
from b2batch.engine import lockstep
from b2batch.engine.request import Request
from b2batch.spec import SamplingSpec, parse_spec
from b2batch.engine_start import follow, load_part, make_engine

def answers(engine):
    greedy = SamplingSpec(max_tokens=12)
    sampled = SamplingSpec(max_tokens=12, temperature=0.7, seed=3, n=2)
    for i in range(4):
        engine.add(Request(str(i), tuple(range(5 + i, 25 + 2 * i)), sampled if i % 2 else greedy))
    engine.step()
    engine.cancel("2")
    done = {}
    while engine.has_work:
        for one in engine.step():
            done[one.request_id] = [completion.token_ids for completion in one.completions]
    return done

def spec_of(num_ranks):
    return parse_spec({
        "model": {"model": sys.argv[1], "device": "cpu"}, "input": {"path": "x"}, "prompt": {"column": "x"},
        "output": {"path": "x"}, "engine": {"tensor_parallel_size": num_ranks, "max_num_seqs": 2},
    })

if __name__ == "__main__":
    torch.set_num_threads(1)
    alone = answers(make_engine(spec_of(1), load_part(spec_of(1), 0)))
    lockstep.start_followers(2, follow, spec_of(2))
    engine = make_engine(spec_of(2), load_part(spec_of(2), 0))
    num_heads = {layer.self_attn.num_heads for layer in engine.runner.model.model.layers}
    print(json.dumps([alone, answers(engine), list(num_heads)], default=list))
"""


@pytest.mark.slow
def test_two_processes_answer_as_one(shared_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "answers.py"
    script.write_text(ANSWERS)
    model = shared_dir / "golden" / "ckpt" / "b2_13b-tiny"  # 6 heads, with a slope each
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = subprocess.run(
        [sys.executable, str(script), str(model)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "TMPDIR": str(scratch)},
    )
    assert found.returncode == 0, found.stderr
    alone, together, num_heads = json.loads(found.stdout.splitlines()[-1])
    assert num_heads == [3]
    assert sorted(together) == ["0", "1", "3"], "a cancelled request is forgotten by both"
    assert together == alone
    assert not list(scratch.glob("b2batch-*")), "where they met is gone"


@pytest.mark.parametrize(
    ("name", "num_ranks", "why"),
    [
        ("ckpt/b2_13b-tiny", 4, "4 does not divide num_attention_heads 6"),
        ("ckpt/b2_7b-tiny-4bits", 2, "quantised"),
        ("lm_eval/tiny_llama", 2, "only Baichuan"),
    ],
)
def test_what_cannot_be_split_is_refused(shared_dir: Path, name: str, num_ranks: int, why: str) -> None:
    model = load_model(ModelSpec(model=str(shared_dir / "golden" / name), device="cpu")).model
    with pytest.raises(SpecError, match=why):
        shard(model, 0, num_ranks)
