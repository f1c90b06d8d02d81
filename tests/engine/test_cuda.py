"""What only a GPU can show: real kernels, graphs, FlashAttention, waits. Run with ``pytest -m gpu``."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from b2batch.bench.random_model import build
from b2batch.engine.calibration import Calibration
from b2batch.engine.cuda_attention import CudaAttention, HeadShape, is_right
from b2batch.engine.cuda_runner import CudaRunner, head_shape, make_runner
from b2batch.engine.flash_attention import FlashPlan, torch_flash
from b2batch.engine.in_flight import InFlight
from b2batch.engine.runner import Runner, layer_devices
from b2batch.engine.sampling import sample
from b2batch.engine.sequence import Sequence
from b2batch.models.baichuan import wide_linear
from b2batch.models.loading import load_model
from b2batch.spec import EngineSpec, ModelSpec, SamplingSpec
from engine.serving import engine_of, serve
from engine.test_cuda_runner import KINDS, MAX_SEQS, decode_step, random_model, requests
from engine.test_in_flight import LOADS, compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
ARENA = 1000
GPU = torch.device("cuda")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernels_are_right_on_this_device(kind: str, dtype: torch.dtype, head_dim: int) -> None:
    num_key_heads = 2 if kind == "grouped" else 8
    assert CudaAttention(HeadShape(8, num_key_heads, head_dim, dtype, kind == "alibi"), GPU).has_kernels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_key_heads", [8, 2])
def test_torchs_flash_attention_reads_spans(dtype: torch.dtype, num_key_heads: int) -> None:
    flash = torch_flash()
    assert flash is not None
    shape = HeadShape(8, num_key_heads, 128, dtype, has_slopes=False)
    assert is_right("flash", lambda rows: FlashPlan(flash, rows.own, rows.prefixes), shape, GPU)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gets_the_runner_of_a_gpu(kind: str) -> None:
    assert isinstance(make_runner(random_model(kind).to(GPU), ARENA, MAX_SEQS), CudaRunner)


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_equal_the_cpus(kind: str) -> None:
    """The same shape again and again, so that it is recorded, with other rows each time."""
    model = random_model(kind)
    on_cpu = Runner(copy.deepcopy(model).cpu(), ARENA)
    on_gpu = make_runner(model.to(GPU), ARENA, MAX_SEQS)
    assert isinstance(on_gpu, CudaRunner)
    for number in range(8):
        num_rows = 3 + number % 3  # all padded to five
        expected = on_cpu.run(decode_step(on_cpu, num_rows))
        found = on_gpu.run(decode_step(on_gpu, num_rows)).cpu()
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert on_gpu.num_graphs > 0


def test_a_trial_settles_both_numbers_and_leaves_no_memory() -> None:
    model = random_model("rotary").to(GPU)
    Calibration(model, ARENA, GPU).settle(EngineSpec())  # what CUDA keeps for itself is there now
    before = torch.cuda.memory_allocated()
    settled = Calibration(model, ARENA, GPU).settle(EngineSpec())
    assert settled.max_num_seqs in (256, 512, 1024)
    assert settled.max_num_batched_tokens in (8192, 16384, 32768)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_float32_answers_are_the_cpus(kind: str) -> None:
    found = []
    for device in ("cpu", "cuda"):
        limits = {"max_num_seqs": MAX_SEQS, "max_num_batched_tokens": 64, "kv_cache_tokens": ARENA}
        engine = engine_of(random_model(kind).to(device), **limits)
        answers = serve(engine, [request for request in requests() if request.request_id != "sampled"])
        found.append({name: [c.token_ids for c in answer.completions] for name, answer in answers.items()})
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 7, 256])
def test_float32_logits_come_from_half_weights_without_a_copy(dtype: torch.dtype, num_rows: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(20_000, 512, device=GPU, dtype=dtype) * 0.05
    hidden = torch.randn(1, num_rows, 512, device=GPU, dtype=dtype)
    expected = (hidden.double() @ weight.double().t()).float()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logits = wide_linear(hidden, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    grown = torch.cuda.max_memory_allocated() - before
    assert grown < logits.nbytes + weight.nbytes  # a float32 copy alone would be twice the weight


def sampled_rows(count: int, **sampling: Any) -> list[Sequence]:
    return [
        Sequence(f"row {i}", 0, [5, 9, i], SamplingSpec(**sampling), 8, frozenset({2})) for i in range(count)
    ]


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.8, "seed": 3},
        {"temperature": 0.0, "repetition_penalty": 1.2, "presence_penalty": 0.5, "logit_bias": {7: 2.0}},
    ],
)
def test_tokens_are_drawn_as_on_a_cpu(sampling: dict[str, Any]) -> None:
    logits = torch.randn(33, 1000, generator=torch.Generator().manual_seed(0)) * 3
    rows = sampled_rows(33, **sampling)
    assert sample(logits.to(GPU), rows).tolist() == sample(logits, rows).tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_tokens": 2, "repetition_penalty": 1.1},
        {"temperature": 1.0, "top_p": 0.8, "frequency_penalty": 0.5, "logprobs": 3},
    ],
)
def test_the_host_does_not_wait_before_it_reads_the_tokens(sampling: dict[str, Any]) -> None:
    logits = torch.randn(8, 1000, device=GPU)
    rows = sampled_rows(8, **sampling)
    unread = sample(logits, rows)  # compiles and allocates
    for row, sequence in enumerate(rows):
        sequence.tokens.append(-1 - row)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            InFlight.of(rows, logits, sample(logits, rows, unread))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not [str(w.message) for w in caught if "synchroniz" in str(w.message)]


@pytest.mark.parametrize("name", LOADS)
def test_a_gpu_that_is_a_step_ahead_answers_as_one_that_is_waited_for(name: str) -> None:
    """Padded and replayed steps take their tokens from the device, and others their KV's places."""
    compare(LOADS[name])


def test_head_shapes_are_read_from_the_model() -> None:
    shapes = [head_shape(random_model(kind)) for kind in KINDS]
    assert [shape.has_slopes for shape in shapes] == [False, False, True]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_a_model_over_two_gpus_answers_as_over_one(tmp_path: Path, quantization: str | None) -> None:
    build("random-tiny", "cpu", "float32", tmp_path)
    spec = ModelSpec(model=str(tmp_path), device="cuda", dtype="float32", quantization=quantization)
    found = []
    for num_gpus in (1, 2):
        loaded = load_model(spec, num_gpus)
        assert len(set(layer_devices(loaded.model))) == num_gpus
        limits = {"max_num_seqs": MAX_SEQS, "max_num_batched_tokens": 64, "kv_cache_tokens": ARENA}
        answers = serve(engine_of(loaded.model, **limits), requests())
        found.append({name: [c.token_ids for c in answer.completions] for name, answer in answers.items()})
    assert found[0] == found[1]
