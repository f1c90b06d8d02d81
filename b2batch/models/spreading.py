"""A model over several GPUs of one node, layer after layer.

    embeddings     the first device
    layers         neighbours together, so many on each that the devices hold about the same
    norm, head     the last device; a head that is the embeddings' weight, the first

transformers loads by such a map and has accelerate hook every module. The engine needs less: a block's
inputs are brought to its device when it begins, and what all layers share (rotary angles) once a device
and step. Logits stay where the head is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import send_to_device
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from b2batch.errors import ModelError
from b2batch.models.layers import find_layers


def spread_by_layers(config: PreTrainedConfig, layer_counts: Sequence[int]) -> dict[str, int]:
    """Block of the model → index of its device, which has so many of the layers as ``layer_counts`` says.

    Raises:
        ModelError: its layers cannot be told.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = find_layers(model, sum(layer_counts))
    if found is None:
        raise ModelError(
            f"cluster.gpus_per_replica: {type(model).__name__} has no list of {sum(layer_counts)} layers to "
            "spread"
        )
    path, _ = found
    places = [device for device, count in enumerate(layer_counts) for _ in range(count)]
    device_map = {f"{path}.{index}": device for index, device in enumerate(places)}
    tied_head = model.get_output_embeddings() if config.get_text_config().tie_word_embeddings else None
    is_behind = False
    for name, module in model.named_modules():
        is_behind = is_behind or name == path
        if name.startswith(f"{path}.") or not _has_own_tensors(module):
            continue
        has_weights = any(True for _ in module.parameters(recurse=False))
        is_last = is_behind and has_weights and module is not tied_head
        device_map[name] = len(layer_counts) - 1 if is_last else 0
    return device_map


def _has_own_tensors(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def carry_between_blocks(model: nn.Module, device_map: Mapping[str, torch.device]) -> None:
    """Let the model run over the devices of its blocks, on which its weights are already."""
    remove_hook_from_submodules(model)
    carriers = {device: _Carrier(device) for device in device_map.values()}
    for name, device in device_map.items():
        model.get_submodule(name).register_forward_pre_hook(carriers[device].carry, with_kwargs=True)


class _Carrier:
    """Brings the inputs of the blocks of one device to it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._brought: dict[str, tuple[Any, Any]] = {}  # argument → what came, and its copy here

    def carry(
        self, block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A forward pre-hook: the same arguments, on the device, which is the current one from now on."""
        if self._device.type == "cuda":  # Triton launches on the current one, wherever its tensors are
            torch.cuda.set_device(self._device)
        carried = {name: self._bring(name, value) for name, value in named.items()}
        return send_to_device(arguments, self._device), carried

    def _bring(self, name: str, value: Any) -> Any:
        came, copy = self._brought.get(name, (None, None))
        if value is not came:
            copy = send_to_device(value, self._device)
            self._brought[name] = value, copy
        return copy
