"""LoRA adapters, as peft saves them: found and checked without torch, applied by peft.

On weights of full precision an adapter is merged, and costs nothing from then on. On quantised
weights it stays beside them, as it was trained (QLoRA): merging would round it away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from b2batch.errors import ModelError, SpecError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's directory, what the user called it, and its ``adapter_config.json``."""

    directory: Path
    source: str
    config: Mapping[str, Any]

    @property
    def weights_file(self) -> Path:
        """The one with the trained matrices."""
        found = [self.directory / name for name in WEIGHT_FILES if (self.directory / name).exists()]
        if not found:
            raise ModelError(f"model.adapter: {self.directory} holds no {' or '.join(WEIGHT_FILES)}")
        return found[0]

    def digest(self) -> str:
        """sha256 of the settings and the weights."""
        total = hashlib.sha256()
        for path in (self.directory / "adapter_config.json", self.weights_file):
            total.update(hashlib.sha256(path.read_bytes()).digest())
        return total.hexdigest()


def check_adapter(adapter: Adapter, base_name: str) -> Adapter:
    """The adapter, unless it is of another kind or says that it was trained on another model.

    Two hub ids are compared by their last part, so that a mirror will do, without ``-4bits``: an
    adapter for the full weights serves the quantised ones. A directory's name says nothing.

    Raises:
        ModelError: not a LoRA adapter.
        SpecError: it belongs to another base model.
    """
    kind = str(adapter.config.get("peft_type", "none"))
    if kind != "LORA":
        raise ModelError(f"model.adapter: {adapter.source} is of type {kind}; b2batch applies LORA")
    trained_on = str(adapter.config.get("base_model_name_or_path") or "")
    if _is_hub_id(trained_on) and _is_hub_id(base_name) and _plain(trained_on) != _plain(base_name):
        raise SpecError(
            f"model.adapter: {adapter.source} was trained on {trained_on}, and model.model is {base_name}"
        )
    return adapter


def _is_hub_id(name: str) -> bool:
    return name.removeprefix("ms://").count("/") == 1 and not name.startswith((".", "/", "~"))


def _plain(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower().removesuffix("-4bits")


def apply_adapter(model: PreTrainedModel, adapter: Adapter, *, merge: bool) -> PreTrainedModel:
    """``model`` with the adapter merged into its weights, or kept beside them.

    Raises:
        ModelError: it does not fit this model: other layers, other sizes.
    """
    try:
        from peft import LoraConfig, PeftModel, set_peft_model_state_dict
    except ImportError as error:
        raise ModelError("model.adapter needs the package peft: pip install 'b2batch[lora]'") from error
    weights = _read_weights(adapter.weights_file)
    try:
        config = LoraConfig.from_pretrained(str(adapter.directory))
        if config.modules_to_save and not merge:
            names = ", ".join(config.modules_to_save)
            raise ValueError(f"it replaces whole modules ({names}), which quantised weights do not let it")
        config.inference_mode = True
        wrapped = PeftModel(model, config)
        result: Any = set_peft_model_state_dict(wrapped, weights)
    except (ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
        raise ModelError(_misfit(adapter, str(error).strip().splitlines()[-1].strip())) from error
    absent = [name for name in result.missing_keys if "lora_" in name]
    if result.unexpected_keys or absent:
        name, where = (result.unexpected_keys or absent)[0], "it" if result.unexpected_keys else "the model"
        raise ModelError(_misfit(adapter, f"{name} is only in {where}"))
    return wrapped.merge_and_unload() if merge else wrapped.base_model.model


def _read_weights(path: Path) -> dict[str, Tensor]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise ModelError(f"model.adapter: {path} is damaged: {error}") from error
    except Exception as error:  # pickle's own exception types
        raise ModelError(f"model.adapter: {path} is refused: {type(error).__name__}: {error}") from error


def _misfit(adapter: Adapter, why: str) -> str:
    base = adapter.config.get("base_model_name_or_path") or "a model that it does not name"
    return f"model.adapter: {adapter.source}, trained on {base}, does not fit this model: {why[:500]}"
