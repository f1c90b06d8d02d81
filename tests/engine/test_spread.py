"""A model over two devices: every tensor of a step lies where it is used.

A CPU has no second device. But torch can compute with tensors that have a device and no numbers, and then
refuses, as a GPU would, whatever mixes two devices; what the numbers are does not depend on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from b2batch.engine.cuda_runner import CudaRunner
from b2batch.engine.guard import reference_logits
from b2batch.engine.kv import PrefixSpan, Span
from b2batch.engine.memory import resolve_limits
from b2batch.engine.runner import Runner, layer_devices
from b2batch.engine.scheduler import Chunk, Move, Step
from b2batch.engine.sequence import Sequence as TokenSequence
from b2batch.engine.spans import StepRows
from b2batch.models.baichuan import BaichuanConfig, register
from b2batch.models.spreading import carry_between_blocks, spread_by_layers
from b2batch.spec import EngineSpec, SamplingSpec

VOCAB, ARENA = 97, 200
KINDS = ("rope", "alibi", "llama", "tied")
LAYERS = [1, 2, 1]  # of three devices


def config_of(kind: str) -> PreTrainedConfig:
    register()
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
    }
    if kind in ("rope", "alibi"):
        return BaichuanConfig(**sizes, model_max_length=ARENA, position=kind, norm_head=True)
    return LlamaConfig(**sizes, max_position_embeddings=ARENA, tie_word_embeddings=kind == "tied")


@pytest.fixture(autouse=True)
def _devices_without_numbers() -> Iterator[None]:
    with FakeTensorMode():
        yield


def spread_model(kind: str) -> Any:
    """A model whose blocks are on devices 0, 1 and 2, as ``spread_by_layers`` says."""
    config = config_of(kind)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    device_map = spread_by_layers(config, LAYERS)
    for name, index in device_map.items():
        _put(model.get_submodule(name), torch.device("meta", index))
    if kind == "tied":
        model.tie_weights()
    carry_between_blocks(model, {name: torch.device("meta", index) for name, index in device_map.items()})
    return model


def _put(block: nn.Module, device: torch.device) -> None:
    for module in block.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(weight.shape, device=device), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, device=device))


def mixed_step() -> Step:
    """A move, a prefix, a prompt behind it, one that goes on, and a row that decodes."""
    prefix = PrefixSpan(tuple(range(8)), Span(0, 8))
    prompts = [TokenSequence(str(i), 0, list(range(12)), SamplingSpec(), 1) for i in range(3)]
    chunks = [
        Chunk(prefix, 0, 8, 0, 0),
        Chunk(prompts[0], 8, 4, 20, 0, prefix),
        Chunk(prompts[1], 4, 8, 44, 4),
        Chunk(prompts[2], 11, 1, 111, 11),
    ]
    return Step(chunks=chunks, moves=[Move(150, 160, 5)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_layers_keys_lie_with_the_layer_and_every_operand_with_its_partner(kind: str) -> None:
    model = spread_model(kind)
    assert [logits.shape for logits in reference_logits(model)] == [(VOCAB,)] * 2
    runner = Runner(model, ARENA)
    assert [keys.device.index for keys, _ in runner.caches] == [0, 1, 1, 2]
    assert [values.device.index for _, values in runner.caches] == [0, 1, 1, 2]
    logits = runner.run(mixed_step())
    runner.scrub(Span(3, 7))
    assert logits.shape == (3, VOCAB)
    assert logits.device.index == (0 if kind == "tied" else 2), "logits stay where the head is"


def test_without_what_carries_activations_it_would_be_noticed() -> None:
    model = spread_model("rope")
    for module in model.modules():
        module._forward_pre_hooks.clear()
    with pytest.raises(RuntimeError, match="same device"):
        Runner(model, ARENA).run(mixed_step())


class _Kernels:
    """Attention that only brings together what kernels would read."""

    has_kernels, is_usable = True, True

    def plan(self, rows: StepRows, prefix_tiles: int | None = None) -> Any:
        return self

    @property
    def tables(self) -> list[list[int]]:
        return [[1, 2, 3]]

    def attention(self, positions_T: Tensor, tables: Sequence[Tensor]) -> Any:
        return _Attention([positions_T, *tables])


class _Attention:
    def __init__(self, numbers: list[Tensor]) -> None:
        self._numbers = numbers

    def begin(self) -> None:
        """Nothing is kept."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float, slopes: Any) -> Tensor:
        brought = [keys, values, *self._numbers, *([] if slopes is None else [slopes])]
        return query + sum(tensor.sum() * torch.ones_like(tensor).sum() for tensor in brought)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gpus_runner_uploads_a_steps_numbers_to_each_device(kind: str) -> None:
    runner = CudaRunner(spread_model(kind), ARENA, 4, _Kernels())  # type: ignore[arg-type]
    assert runner.num_graphs == 0
    assert runner._graphs is None, "a CUDA graph is of one device"
    assert [len(keys) for keys, _ in runner.caches] == [ARENA + 1] * 4
    assert runner.run(mixed_step()).shape == (3, VOCAB)


@pytest.mark.parametrize("kind", KINDS)
def test_what_all_layers_share_is_brought_once_a_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from b2batch.models import spreading

    brought: list[Any] = []
    send = spreading.send_to_device
    monkeypatch.setattr(
        spreading, "send_to_device", lambda value, device: (brought.append(value), send(value, device))[1]
    )
    runner = Runner(spread_model(kind), ARENA)
    runner.run(mixed_step())
    rotary = [value for value in brought if isinstance(value, tuple) and len(value) == 2]
    assert len(rotary) == (0 if kind == "alibi" else 3)


def test_the_fullest_device_says_how_many_tokens_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    from b2batch.engine import memory

    model = spread_model("rope")
    assert [device.index for device in layer_devices(model)] == [0, 1, 1, 2]
    free = {0: 70_000_000, 1: 30_000_000, 2: 90_000_000}
    monkeypatch.setattr(memory, "_free_bytes", lambda device: free[device.index])
    spec = EngineSpec(max_num_seqs=64, max_num_batched_tokens=64, gpu_memory_utilization=0.5)
    limits = resolve_limits(spec, model, 200, torch.device("meta", 0))
    work = memory.workspace_bytes(memory.Architecture.of(model.config.to_dict()), "float32", 64, 64)
    assert limits.kv_cache_tokens == min(64 * 200, int((30_000_000 - work) * 0.5) // (2 * 2 * 48 * 4))
