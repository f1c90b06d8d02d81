"""Where a model keeps its decoder layers."""

from __future__ import annotations

from torch import nn


def find_layers(model: nn.Module, num_layers: int) -> tuple[str, nn.ModuleList] | None:
    """The path and the list of a model's ``num_layers`` layers; None where they do not stand in one list.

    Of several lists so long, as of a layer's experts, the outermost, which comes first.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return path, module
    return None
