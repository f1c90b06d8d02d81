"""``auto`` becomes a number by a trial, and nothing but that number stays of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from b2batch.engine import calibration
from b2batch.engine.calibration import Calibration
from b2batch.engine.engine import EngineStats
from b2batch.engine.memory import resolve_limits
from b2batch.engine.memory_plan import StepSize
from b2batch.engine.runner import Runner
from b2batch.engine.scheduler import SchedulerStats, Step
from b2batch.engine_start import make_engine
from b2batch.models.loading import LoadedModel, load_model
from b2batch.spec import EngineSpec, JobSpec, ModelSpec, parse_spec
from engine.serving import answer

CPU = torch.device("cpu")
PROMPT = list(range(10, 40))


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    torch.set_num_threads(1)
    return load_model(ModelSpec(model="baichuan2-tiny"))


class Clock:
    """Time goes on by what the steps that ran are said to cost. Their logits are zeros, unless computed."""

    def __init__(self) -> None:
        self.computes = False
        self.now_s = 0.0
        self.sizes: list[int] = []
        self.fixed_s, self.row_s = 0.005, 0.00005

    def perf_counter(self) -> float:
        return self.now_s

    def note(self, step: Step) -> None:
        num_rows = sum(chunk.num_tokens for chunk in step.chunks)
        self.sizes.append(num_rows)
        self.now_s += self.fixed_s + self.row_s * num_rows


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    compute = Runner.run

    def run(runner: Runner, step: Step, unread: torch.Tensor | None = None) -> torch.Tensor:
        clock.note(step)
        if clock.computes:
            return compute(runner, step, unread)
        return torch.zeros(sum(len(chunk.logit_positions) for chunk in step.chunks), 9)

    monkeypatch.setattr(Runner, "run", run)
    monkeypatch.setattr(calibration.time, "perf_counter", clock.perf_counter)
    return clock


def settle(loaded: LoadedModel, **settings: Any) -> EngineSpec:
    max_model_len = settings.pop("max_model_len", 1024)
    return Calibration(loaded.model, max_model_len, CPU).settle(EngineSpec(**settings))


def test_a_small_models_step_grows(
    loaded: LoadedModel, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        settled = settle(loaded)
    assert (settled.max_num_seqs, settled.max_num_batched_tokens) == (256, "auto")
    assert sorted(set(clock.sizes)) == [16, 64, 128, 256]
    assert "engine.max_num_seqs: auto is 256 here" in caplog.text
    assert "at 64" in caplog.text


def test_rows_that_cost_all_keep_the_default(loaded: LoadedModel, clock: Clock) -> None:
    clock.fixed_s = 0.0
    assert settle(loaded).max_num_seqs == 64


def test_long_steps_are_not_tried(loaded: LoadedModel, clock: Clock) -> None:
    clock.fixed_s = 3.0
    assert settle(loaded).max_num_seqs == 64
    assert clock.sizes == [16, 16]


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"kv_cache_tokens": 64 * 512}, set()),  # no room for more than the default
        ({"kv_cache_tokens": 128 * 512}, {16, 64, 128}),
        ({"max_num_batched_tokens": 128}, {16, 64, 128}),
        ({"kv_cache_tokens": 256 * 40, "max_model_len": 40}, {16, 64, 128, 256}),
    ],
)
def test_only_what_the_limits_allow_is_tried(
    loaded: LoadedModel, clock: Clock, settings: dict[str, Any], sizes: set[int]
) -> None:
    settled = settle(loaded, **settings)
    assert set(clock.sizes) == sizes
    assert settled.max_num_seqs == max(sizes, default=64)
    StepSize.of(settled, on_cpu=True)  # raises where the tokens of a step are too few for its sequences


def test_a_trial_that_runs_out_of_memory_keeps_the_default(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(runner: Runner, step: Step, unread: torch.Tensor | None = None) -> torch.Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Runner, "run", run)
    assert settle(loaded).max_num_seqs == 64


def test_another_fault_of_the_model_is_not_hidden(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(runner: Runner, step: Step, unread: torch.Tensor | None = None) -> torch.Tensor:
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(Runner, "run", run)
    with pytest.raises(RuntimeError, match="tensor a"):
        settle(loaded)


def test_prompt_steps_are_tried_where_the_device_wants_it(
    loaded: LoadedModel, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU's method does, on a CPU: both numbers, the tokens for the sequences that were chosen."""
    monkeypatch.setattr(calibration, "_CPU", calibration._CUDA)
    clock.fixed_s, clock.row_s = 0.03, 0.000_01
    settled = settle(loaded, kv_cache_tokens=200_000)
    assert (settled.max_num_seqs, settled.max_num_batched_tokens) == (256, 4096)
    assert {16, 64, 128, 256, 1024, 2048, 4096} == set(clock.sizes)
    limits = resolve_limits(settled, loaded.model, 1024, CPU)
    assert (limits.max_num_seqs, limits.max_num_batched_tokens) == (256, 4096)


def test_a_number_switches_its_own_trial_off(
    loaded: LoadedModel, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_CPU", calibration._CUDA)
    settled = settle(loaded, max_num_seqs=8, kv_cache_tokens=200_000)
    assert settled.max_num_seqs == 8
    assert {256, 1024} < set(clock.sizes)


def job(**sections: Any) -> JobSpec:
    return parse_spec(
        {
            "model": {"model": "baichuan2-tiny"},
            "input": {"path": "x"},
            "prompt": {"column": "x"},
            "output": {"path": "x"},
            **sections,
        }
    )


def test_an_engine_after_a_trial_is_as_new(loaded: LoadedModel, clock: Clock) -> None:
    clock.computes = True
    plain = make_engine(job(), loaded)
    expected = answer(plain, PROMPT, max_tokens=12)
    engine = make_engine(job(), loaded, calibrates=True)
    assert (plain.limits.max_num_seqs, engine.limits.max_num_seqs) == (64, 256)
    assert (engine.stats, engine.scheduler_stats) == (EngineStats(), SchedulerStats())
    assert not engine.has_work
    assert not any(tensor[:4096].any() for pair in engine.runner.caches for tensor in pair)
    assert answer(engine, PROMPT, max_tokens=12) == expected


@pytest.mark.parametrize(
    "sections",
    [{"engine": {"max_num_seqs": 64}}, {"task": "embed"}],
    ids=["a number", "nothing to decode"],
)
def test_what_needs_no_trial_has_none(loaded: LoadedModel, clock: Clock, sections: dict[str, Any]) -> None:
    clock.computes = True
    plain = make_engine(job(**sections), loaded)
    num_steps = len(clock.sizes)
    engine = make_engine(job(**sections), loaded, calibrates=True)
    assert engine.limits == plain.limits
    assert len(clock.sizes) == 2 * num_steps


def test_processes_that_share_a_model_keep_the_defaults(loaded: LoadedModel) -> None:
    wanted = Calibration(loaded.model, 1024, CPU).is_wanted
    assert wanted(EngineSpec())
    assert not wanted(EngineSpec(tensor_parallel_size=2))
    assert not wanted(EngineSpec(max_num_seqs=8))
