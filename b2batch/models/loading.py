"""A checkpoint → a model on a device, ready for the engine."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict
from transformers.utils import logging as transformers_logging

from b2batch.errors import ModelError, SpecError
from b2batch.models import quantized
from b2batch.models.adapter import apply_adapter
from b2batch.models.baichuan import BaichuanConfig, BaichuanForCausalLM, NormHead, wide_linear
from b2batch.models.checkpoint import Checkpoint, open_checkpoint
from b2batch.models.families import PromptCodec, family_of
from b2batch.models.footprint import Architecture, stages
from b2batch.models.spreading import carry_between_blocks, spread_by_layers
from b2batch.spec import ModelSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode, and how its prompts are written."""

    model: PreTrainedModel
    codec: PromptCodec
    checkpoint: Checkpoint


class WideHead(nn.Module):
    """An output projection whose logits are float32 though its weight is not."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, C) → (…, V) float32."""
        logits = wide_linear(hidden, self.weight)
        return logits if self.bias is None else logits + self.bias.float()


def pick_device(spec: ModelSpec) -> torch.device:
    """The device the spec asks for; ``auto`` is the first visible GPU, else the CPU."""
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device: cuda was asked for, but torch sees no CUDA device here")
    if spec.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda")


def refuse_missing_gpus(spec: ModelSpec, num_gpus: int) -> None:
    """ModelError unless the model can be spread over ``num_gpus`` here; one is always right."""
    found = torch.cuda.device_count() if pick_device(spec).type == "cuda" else 0
    if num_gpus > max(1, found):
        where = "the model is on a CPU" if not found else f"torch sees {found} of them here"
        raise ModelError(f"cluster.gpus_per_replica: {num_gpus} CUDA devices are wanted, but {where}")


def pick_dtype(spec: ModelSpec, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The weights' dtype. ``auto``: the checkpoint's on a GPU, float32 on a CPU.

    CPUs without bfloat16 units emulate it 6-8 times slower than float32, and float32 answers are
    the ones that equal the reference.
    """
    if spec.dtype != "auto":
        return cast(torch.dtype, getattr(torch, spec.dtype))
    if device.type == "cpu":
        return torch.float32
    declared = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "bfloat16"
    return cast(torch.dtype, getattr(torch, str(declared)))


def pick_quantization(spec: ModelSpec, checkpoint: Checkpoint) -> str | None:
    """``nf4``, ``int8`` or None: as the checkpoint is stored, or as the spec asks for.

    With ``int8-dynamic`` the full weights are loaded; it is the engine that repacks them.

    Raises:
        SpecError: the spec asks for another one than the checkpoint is stored in, or for a compute
            dtype where nothing is computed in one.
        ModelError: the checkpoint is quantised in a way that b2batch does not read.
    """
    stored = checkpoint.quantization
    if stored and spec.quantization not in (None, stored):
        raise SpecError(
            f"model.quantization: {spec.quantization}, but the weights of {checkpoint.source} are stored as "
            f"{stored}: leave the key out, or use the full-precision checkpoint"
        )
    found = stored or spec.quantization
    if found != "nf4" and spec.compute_dtype != "auto":
        raise SpecError(
            f"model.compute_dtype: {spec.compute_dtype}, but only nf4 weights are computed in one"
        )
    return None if found == "int8-dynamic" else found


def pick_compute_dtype(
    spec: ModelSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> torch.dtype:
    """What nf4 layers compute in. ``auto``: the checkpoint's on a GPU where it says one, else ``dtype``."""
    if spec.compute_dtype != "auto":
        return cast(torch.dtype, getattr(torch, spec.compute_dtype))
    stored = (checkpoint.config.get("quantization_config") or {}).get("bnb_4bit_compute_dtype")
    return getattr(torch, str(stored)) if stored and device.type == "cuda" else dtype


def load_model(spec: ModelSpec, num_gpus: int = 1) -> LoadedModel:
    """Load a checkpoint for inference; transformers' own loading, and never any remote code.

    Weights go to the device one tensor at a time, and are quantised there where that is asked for. On
    several GPUs the layers are spread over the first ``num_gpus`` that are visible.

    Raises:
        ModelError: the files are damaged, or the architecture cannot run on the engine.
        SpecError: the spec asks for what the checkpoint cannot be.
    """
    refuse_missing_gpus(spec, num_gpus)
    checkpoint = open_checkpoint(spec, weights=True)
    family = family_of(checkpoint)
    codec = family.codec(checkpoint, spec)
    model = read_model(spec, checkpoint, family.config_overrides(checkpoint, spec), num_gpus)
    if checkpoint.adapter is not None:
        dtype, is_quantized = model.dtype, pick_quantization(spec, checkpoint) is not None
        model = _in_dtype(apply_adapter(model, checkpoint.adapter, merge=not is_quantized), dtype)
    if not model._supports_attention_backend:
        raise ModelError(
            f"{checkpoint.source}: {type(model).__name__} does not go through transformers' attention "
            "interface, so the engine cannot run it"
        )
    head = model.get_output_embeddings()
    if isinstance(head, NormHead):
        head.is_wide = spec.head_dtype == "float32"
    elif isinstance(head, nn.Linear) and model.dtype != torch.float32 and spec.head_dtype == "float32":
        model.set_output_embeddings(WideHead(head))
    if num_gpus > 1:
        places = cast("dict[str, Any]", model.hf_device_map)
        carry_between_blocks(model, {name: torch.device("cuda", index) for name, index in places.items()})
    return LoadedModel(model.eval().requires_grad_(False), codec, checkpoint)


def read_model(
    spec: ModelSpec, checkpoint: Checkpoint, overrides: dict[str, Any], num_gpus: int = 1
) -> PreTrainedModel:
    """The checkpoint's model with its weights on their device, quantised as asked; its head is its own."""
    device = pick_device(spec)
    dtype = pick_dtype(spec, checkpoint, device)
    method = pick_quantization(spec, checkpoint)
    compute_dtype = pick_compute_dtype(spec, checkpoint, device, dtype)
    config = _read_config(checkpoint, overrides)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    if device.type == "cuda":
        options["device_map"] = {"": device} if num_gpus == 1 else _spread(config, dtype, method, num_gpus)
    if method is not None:
        settings = quantized.quantization_settings(method, compute_dtype)
        if checkpoint.quantization is None:
            options["quantization_config"] = settings
        else:
            config.quantization_config = settings.to_dict()
    model = _from_pretrained(checkpoint, options)
    if method is not None:
        quantized.check_quantized(model, checkpoint.source)
        quantized.settle_on_cpu(model, compute_dtype)
    return _in_dtype(model, dtype)


def _spread(
    config: PreTrainedConfig, dtype: torch.dtype, method: str | None, num_gpus: int
) -> dict[str, int]:
    shape = Architecture.of(config.to_dict())
    parts = stages(shape, str(dtype).removeprefix("torch."), method, num_gpus)
    return spread_by_layers(config, [part.num_layers for part in parts])


def _read_config(checkpoint: Checkpoint, overrides: dict[str, Any]) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False, **overrides)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{checkpoint.source}: the checkpoint cannot be loaded: {error}") from error


def _from_pretrained(checkpoint: Checkpoint, options: dict[str, Any]) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()  # a replica's stderr is nobody's terminal
    try:
        weights = _hub_layout_weights(checkpoint)
        if weights is None:
            model, report = AutoModelForCausalLM.from_pretrained(
                checkpoint.directory, trust_remote_code=False, weights_only=True, **options
            )
        elif isinstance(options["config"], BaichuanConfig):
            model, report = BaichuanForCausalLM.from_pretrained(None, state_dict=weights, **options)
        else:
            raise ModelError(
                f"{checkpoint.source}: 4-bit weights of bitsandbytes 0.41 are read for Baichuan only"
            )
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, ImportError) as error:
        raise ModelError(f"{checkpoint.source}: the checkpoint cannot be loaded: {error}") from error
    except Exception as error:  # safetensors' and pickle's own exception types
        name = type(error).__name__
        raise ModelError(
            f"{checkpoint.source}: the weights are damaged or refused: {name}: {error}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing or report["mismatched_keys"]:
        names = ", ".join(missing[:5] or [str(key) for key in sorted(report["mismatched_keys"])[:5]])
        raise ModelError(f"{checkpoint.source}: weights are missing or of the wrong shape: {names}")
    return cast(PreTrainedModel, model)


def _hub_layout_weights(checkpoint: Checkpoint) -> dict[str, Tensor] | None:
    """The weights of a ``-4bits`` checkpoint as today's state dict; None for any other checkpoint.

    The files are mapped, not read: a tensor's pages come in when it goes to its device.
    """
    if checkpoint.quantization != "nf4" or any(checkpoint.directory.glob("*.safetensors")):
        return None
    weights: dict[str, Any] = {}
    for path in sorted(checkpoint.directory.glob("*.bin")):
        weights.update(load_state_dict(path, weights_only=True))
    return quantized.from_hub_layout(weights) if quantized.is_hub_layout(weights) else None


def _in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """What is not quantised in ``dtype``: transformers leaves it as stored where the rest is quantised."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    return model
