from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from b2batch.bench import steps
from b2batch.bench.bench import steps_job
from b2batch.bench.comparison import Setting
from b2batch.bench.steps import ModelCost
from b2batch.bench.table import steps_tables
from b2batch.bench.workload import StepsWorkload

H200 = {"bytes_per_s": 4.3e12, "flops_per_s": 790e12}
COST_7B = ModelCost(
    num_layer_parameters=32 * (4 * 4096**2 + 3 * 4096 * 11_008),
    num_head_parameters=125_696 * 4096,
    bytes_per_parameter=2,
    kv_bytes_per_token=512 * 1024,
)


@pytest.mark.parametrize(
    ("batch", "context", "tokens_per_s"), [(1, 512, 301), (128, 512, 11_385), (256, 1024, 7_269)]
)
def test_the_roofline_is_the_one_worked_out_by_hand(batch: int, context: int, tokens_per_s: float):
    floor_s = COST_7B.decode_floor_s(batch, context, **H200)

    assert batch / floor_s == pytest.approx(tokens_per_s, rel=0.01)


def test_prefill_is_bound_by_the_layers_products():
    assert COST_7B.prefill_tokens_per_s(H200["flops_per_s"]) == pytest.approx(60_000, rel=0.03)


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_every_point_is_measured(tiny_model: Path, quantization: str | None):
    workload = StepsWorkload(
        kind="steps",
        description="",
        model="",
        max_model_len=256,
        batches=(1, 3),
        contexts=(32, 128),
        num_steps=2,
        prefill_tokens=256,
        quantization=quantization,
        kv="needed",
    )
    job = steps_job(workload, Setting(tiny_model, "cpu", "float32"))
    found = steps.run({"workload": workload.model_dump(mode="json"), "job": asdict(job)})

    points = [(point["batch"], point["context"]) for point in found["decode"]]
    assert points == [(1, 32), (3, 32), (1, 128), (3, 128)]
    assert all(point["tokens_per_s"] > 0 for point in found["decode"] + found["prefill"])
    assert all(point["roofline_share"] is None for point in found["decode"] + found["prefill"])
    assert 0 < found["load_host_peak_bytes"] <= found["peak_bytes"]
    prefill, decode, memory = steps_tables(found, "title")
    assert (prefill.row_count, decode.row_count, memory.row_count) == (2, 4, 2)
    assert list(decode.columns[-1].cells)[:2] == ["1.00", "1.00"]
