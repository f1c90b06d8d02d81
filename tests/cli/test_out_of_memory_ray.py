"""A job whose replica runs out of memory in the middle: the allocator really fails, and no row does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from b2batch.engine.runner import Runner

from .command import b2batch, write_job

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

HEADROOM_BYTES = 24 << 20

# A user's function runs in the replica's process. A step may map so much more than was mapped before: enough
# for short prompts and for the code that oneDNN makes, not for a full step of long ones.
LIMITED = f"""
import resource
from pathlib import Path
from b2batch.engine.runner import Runner

compute = Runner.run

def mapped():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

def compute_in_less(runner, *args):
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped() + {HEADROOM_BYTES}, hard))
    try:
        return compute(runner, *args)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

def keep(row):
    Runner.run = compute_in_less  # not when it is imported, which the driver does as well
    return row
"""


def answers(directory: Path, texts: list[str], **sections: Any) -> list[str]:
    directory.mkdir()
    job = write_job(
        directory,
        [json.dumps({"text": text}) for text in texts],
        input={"rows_per_unit": 8},
        prompt={"column": "text", "chat": False},
        sampling={"max_tokens": 6, "ignore_eos": True},
        engine={"max_num_seqs": 64, "max_num_batched_tokens": 8192, "enable_prefix_caching": False},
        **sections,
    )
    ended = b2batch("run", job)
    assert ended.exit_code == 0, ended.output
    rows = pq.read_table(directory / "out").to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * len(texts)
    return [row["generated_text"] for row in sorted(rows, key=lambda row: int(row["row_id"].split(":")[1]))]


def test_a_real_allocation_that_fails_costs_half_the_batch_and_no_row(tmp_path: Path) -> None:
    chance = random.Random(0)
    texts = ["".join(chance.choices("好坏服务很差天气不错", k=k)) for k in [20] * 16 + [900] * 8]
    compute = Runner.run
    calm = answers(tmp_path / "calm", texts)
    short = answers(tmp_path / "short", texts, preprocess={"function": "limited:keep", "source": LIMITED})
    assert Runner.run is compute, "the limit is the replica's alone"
    assert short == calm
    found = b2batch("status", tmp_path / "short" / "out", "--json")
    status = json.loads(found.stdout)
    assert (status["state"], status["num_replicas_lost"]) == ("succeeded", 0)
    assert status["num_out_of_memory"] >= 1
    assert "out of memory" in b2batch("status", tmp_path / "short" / "out").stdout
