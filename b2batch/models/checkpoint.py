"""Where a checkpoint's files are and what its config says; nothing here loads a weight.

A model is named by a local directory, a Hugging Face id, `ms://owner/name` for ModelScope, or the
name of a model that ships with the package.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from b2batch.assets import EMBEDDED_MODELS
from b2batch.errors import ModelError
from b2batch.models.adapter import Adapter, check_adapter
from b2batch.models.config import check_config
from b2batch.models.download_lock import only_download
from b2batch.spec import ModelSpec, resolve_env

SMALL_FILES = ("*.json", "*.model", "*.jinja", "*.txt")
_WEIGHT_FILES = ("*.safetensors", "*.bin")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HASH_THREADS = 8


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint's directory, its parsed configs and where it came from.

    ``source`` is what the user wrote, with the revision that a hub resolved; ``is_local`` says that
    no hub was asked, so that the files themselves are all there is to identify it by.
    """

    directory: Path
    source: str
    is_local: bool
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    adapter: Adapter | None = None

    @property
    def model_type(self) -> str:
        """The family's key in ``MODELS``, or transformers' own."""
        return str(self.config.get("model_type", "unknown"))

    @property
    def commit(self) -> str | None:
        """The commit of a Hugging Face model; None for all that has no such fixed name."""
        if self.is_local or self.source.startswith("ms://"):
            return None
        return self.directory.name  # of a snapshot

    @property
    def quantization(self) -> str | None:
        """How the weights are stored: ``nf4`` or ``int8`` of bitsandbytes, or None in full precision.

        Raises:
            ModelError: quantised in a way that b2batch does not read.
        """
        settings = self.config.get("quantization_config")
        if not settings:
            return None
        is_4bit, is_8bit = bool(settings.get("load_in_4bit")), bool(settings.get("load_in_8bit"))
        method = str(settings.get("quant_method") or ("bitsandbytes" if is_4bit or is_8bit else "unknown"))
        kind = str(settings.get("bnb_4bit_quant_type") or "nf4")  # the hub's -4bits need not say it
        if method != "bitsandbytes" or is_4bit == is_8bit or (is_4bit and kind != "nf4"):
            found = f"{method}, {kind}" if method == "bitsandbytes" else method
            raise ModelError(
                f"{self.source}: the weights are quantised ({found}), and b2batch reads nf4 and int8 of "
                "bitsandbytes only; use the full-precision checkpoint of the same model"
            )
        return "nf4" if is_4bit else "int8"

    def digest(self) -> str:
        """sha256 of what makes the answers: configs, tokenizer, weights and the adapter.

        A hub's weights count by the revision, which the hub keeps; local ones by their content.
        """
        total = hashlib.sha256(b"" if self.is_local else self.source.encode())
        patterns = SMALL_FILES + _WEIGHT_FILES if self.is_local else SMALL_FILES
        for name, digest in _digests(self.directory, patterns).items():
            total.update(f"{name}\0{digest}\n".encode())
        if self.adapter is not None:
            total.update(f"adapter\0{self.adapter.digest()}\n".encode())
        return total.hexdigest()

    def weight_digests(self) -> dict[str, str]:
        """File name → sha256 of local weights; none of a hub's, which ``source`` names by their revision."""
        return _digests(self.directory, _WEIGHT_FILES) if self.is_local else {}


def open_checkpoint(spec: ModelSpec, *, weights: bool) -> Checkpoint:
    """Find (and if need be download) a checkpoint and read its configs.

    ``weights=False`` fetches configs and tokenizer only, which is all that planning needs. Of the
    processes that want the weights of one model only one downloads them, and the others wait for it.

    Raises:
        ModelError: there is no such checkpoint, or its files are not what a checkpoint needs.
    """
    directory, source, is_local = _locate(resolve_env(spec.model), spec.revision, weights)
    config = read_json(directory / "config.json")
    if config is None:
        found = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"model.model: {directory} holds no config.json, so it is no checkpoint; found {found}"
        )
    if (weights or is_local) and not any(p for pattern in _WEIGHT_FILES for p in directory.glob(pattern)):
        raise ModelError(f"model.model: {directory} holds no weights (*.safetensors or *.bin)")
    if weights or is_local:
        _check_shards(directory)
    check_config(directory / "config.json", config)
    generation_config = read_json(directory / "generation_config.json") or {}
    check_config(directory / "generation_config.json", generation_config)
    return Checkpoint(directory, source, is_local, config, generation_config, _open_adapter(spec))


def _open_adapter(spec: ModelSpec) -> Adapter | None:
    if spec.adapter is None:
        return None
    name, base_name = resolve_env(spec.adapter), resolve_env(spec.model)
    directory, source, _ = _locate(name, None, True, "model.adapter")
    config = read_json(directory / "adapter_config.json")
    if config is None:
        raise ModelError(f"model.adapter: {directory} holds no adapter_config.json, so it is no adapter")
    return check_adapter(Adapter(directory, source, config), base_name)


def _check_shards(directory: Path) -> None:
    """Refuse an index that names shards which are not there, or lie elsewhere."""
    for path in directory.glob("*.index.json"):
        shards = (read_json(path) or {}).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ModelError(f"{path}: no index of weights: its weight_map does not name a file for each")
        for shard in sorted(set(shards.values())):
            if Path(shard).name != shard:
                raise ModelError(f"{path}: the shard {shard!r} is not a name in its own directory")
            if not (directory / shard).is_file():
                raise ModelError(f"{path}: names the shard {shard}, which is not there")


def _locate(
    name: str, revision: str | None, weights: bool, field: str = "model.model"
) -> tuple[Path, str, bool]:
    path = EMBEDDED_MODELS.get(name, Path(name).expanduser())
    if path.is_dir():
        if revision is not None:
            raise ModelError(
                f"model.revision: {revision!r}, but {name} is a directory, which has no revisions"
            )
        return path, name, True
    if name.startswith("ms://"):
        directory = _from_modelscope(name.removeprefix("ms://"), revision, weights, field)
        return directory, f"{name}@{revision or 'master'}", False
    if name.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(name):
        embedded = ", ".join(sorted(EMBEDDED_MODELS))
        raise ModelError(
            f"{field}: {name!r} is not a directory here, and not a hub id (owner/name), "
            f"a ms://owner/name or an embedded model ({embedded})"
        )
    directory = _from_huggingface(name, revision, weights, field)
    return directory, f"{name}@{directory.name}", False  # a snapshot's directory is named by its commit


def _from_huggingface(name: str, revision: str | None, weights: bool, field: str) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = list(SMALL_FILES + _WEIGHT_FILES) if weights else list(SMALL_FILES)
    lock = only_download(Path(constants.HF_HUB_CACHE), name) if weights else nullcontext()
    try:
        with lock:
            return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{field}: {name!r} (revision {revision or 'main'}) is no local directory and cannot be had "
            f"from the Hugging Face hub: {_first_line(error)}"
        ) from error


def _from_modelscope(name: str, revision: str | None, weights: bool, field: str) -> Path:
    try:
        from modelscope import snapshot_download
        from modelscope.utils.file_utils import get_modelscope_cache_dir
    except ImportError as error:
        raise ModelError(
            f"{field}: ms:// needs the modelscope package: pip install 'b2batch[modelscope]'"
        ) from error
    patterns = list(SMALL_FILES + _WEIGHT_FILES) if weights else list(SMALL_FILES)
    lock = only_download(Path(get_modelscope_cache_dir()), name) if weights else nullcontext()
    try:
        with lock:
            return Path(snapshot_download(name, revision=revision, allow_file_pattern=patterns))
    except Exception as error:  # modelscope raises bare exceptions of many kinds
        raise ModelError(
            f"{field}: ms://{name} (revision {revision or 'master'}) cannot be had from ModelScope: "
            f"{_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where there is no file; ModelError when it is not readable."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(document, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document


def _digests(directory: Path, patterns: Iterable[str]) -> dict[str, str]:
    """File name → sha256, by name. All bytes are read: one flipped bit of a weight loads without a word."""
    paths = sorted({path for pattern in patterns for path in directory.glob(pattern)}, key=lambda p: p.name)
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        digests = pool.map(
            lambda path: _file_digest(path, path.stat().st_mtime_ns, path.stat().st_ino), paths
        )
        return dict(zip((path.name for path in paths), digests, strict=True))


@lru_cache(maxsize=256)
def _file_digest(path: Path, modified_ns: int, inode: int) -> str:
    """sha256 of a file; the version is there so that the same file is read once a process."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
