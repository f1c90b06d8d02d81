"""A checkpoint → the same model with its weights quantised, as files that load without quantising again."""

from __future__ import annotations

import shutil
from pathlib import Path

from b2batch.errors import ModelError, OutputError
from b2batch.models.checkpoint import SMALL_FILES, Checkpoint, open_checkpoint
from b2batch.models.facts import gpu_dtype
from b2batch.models.families import family_of
from b2batch.models.loading import read_model
from b2batch.spec import ModelSpec


def quantize_checkpoint(spec: ModelSpec, destination: Path) -> int:
    """Write ``spec``'s model, quantised as it says, into a new directory; return the bytes of its weights.

    A ``-4bits`` checkpoint of the hub keeps its weights and gets today's format. What is not
    quantised keeps the checkpoint's dtype, also on a CPU.

    Raises:
        ModelError: the checkpoint cannot be loaded, or nothing says how to quantise it.
        OutputError: the directory is there already, or cannot be written.
    """
    checkpoint = open_checkpoint(spec, weights=True)
    if checkpoint.quantization is None and spec.quantization is None:
        raise ModelError(f"{checkpoint.source}: its weights are of full precision; say nf4 or int8")
    if destination.exists():
        raise OutputError(f"{destination}: is there already; name a directory that is not")
    overrides = family_of(checkpoint).config_overrides(checkpoint, spec)
    model = read_model(_as_on_a_gpu(spec, checkpoint), checkpoint, overrides)
    if hasattr(model.config, "auto_map"):
        del model.config.auto_map  # the code that it names is not needed, and not copied
    partial = destination.with_name(destination.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial, save_original_format=False)  # that of stored 4 bits is not known
        for path in (path for pattern in SMALL_FILES for path in checkpoint.directory.glob(pattern)):
            if path.name != "config.json" and not path.name.endswith(".index.json"):
                shutil.copyfile(path, partial / path.name)
        partial.rename(destination)
    except OSError as error:
        raise OutputError(f"{destination}: cannot be written: {error}") from error
    return sum(path.stat().st_size for path in destination.glob("*.safetensors"))


def _as_on_a_gpu(spec: ModelSpec, checkpoint: Checkpoint) -> ModelSpec:
    """Dtypes that do not depend on where the weights are quantised."""
    dtype = gpu_dtype(checkpoint, spec.model_copy(update={"device": "auto"}))
    is_4bit = "nf4" in (checkpoint.quantization, spec.quantization)
    compute = dtype if is_4bit and spec.compute_dtype == "auto" else spec.compute_dtype
    return spec.model_copy(update={"dtype": dtype, "compute_dtype": compute})
