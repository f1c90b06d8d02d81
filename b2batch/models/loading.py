"""A checkpoint → a model on a device, ready for the engine."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from b2batch.errors import ModelError
from b2batch.models.baichuan import wide_linear
from b2batch.models.checkpoint import Checkpoint, open_checkpoint
from b2batch.models.families import PromptCodec, family_of
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


def load_model(spec: ModelSpec) -> LoadedModel:
    """Load a checkpoint for inference; transformers' own loading, and never any remote code.

    Raises:
        ModelError: the files are damaged, or the architecture cannot run on the engine.
    """
    checkpoint = open_checkpoint(spec, weights=True)
    _refuse_quantized(checkpoint)
    family = family_of(checkpoint)
    codec = family.codec(checkpoint, spec)
    device = pick_device(spec)
    dtype = pick_dtype(spec, checkpoint, device)
    overrides = family.config_overrides(checkpoint, spec)
    model = _from_pretrained(checkpoint, device, dtype, overrides)
    if not model._supports_attention_backend:
        raise ModelError(
            f"{checkpoint.source}: {type(model).__name__} does not go through transformers' attention "
            "interface, so the engine cannot run it"
        )
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and dtype != torch.float32:
        model.set_output_embeddings(WideHead(head))
    return LoadedModel(model.eval().requires_grad_(False), codec, checkpoint)


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    settings = checkpoint.config.get("quantization_config")
    if settings:
        method = settings.get("quant_method", "4-bit" if settings.get("load_in_4bit") else "unknown")
        raise ModelError(
            f"{checkpoint.source}: the weights are quantised ({method}), which this version cannot load; "
            "use the full-precision checkpoint of the same model"
        )


def _from_pretrained(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, overrides: dict[str, Any]
) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()  # a replica's stderr is nobody's terminal
    try:
        config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False, **overrides)
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint.directory,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
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
    return cast(PreTrainedModel, model.to(device))
