"""Models by name: ``configs/models/NAME.yaml``, laid under a job's own keys, and embedded models."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from b2batch.assets import EMBEDDED_MODELS
from b2batch.errors import SpecError
from b2batch.spec.document import read_yaml
from b2batch.spec.explanation import explain
from b2batch.spec.model import ModelSpec

_FRAGMENT_DIRECTORY = Path("configs", "models")
_FRAGMENT_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def find_fragments(directories: Iterable[Path]) -> dict[str, Path]:
    """Name → file of each ``configs/models/NAME.yaml`` in or above the directories; the nearest counts."""
    found: dict[str, Path] = {}
    for directory in directories:
        start = directory.absolute()
        for place in (start, *start.parents):
            for path in sorted((place / _FRAGMENT_DIRECTORY).glob("*.yaml")):
                found.setdefault(path.stem, path)
    return found


def apply_fragment(document: Mapping[str, Any], directories: Iterable[Path]) -> dict[str, Any]:
    """``document`` with the fragment that its ``model.model`` names laid under its own keys.

    A name is looked up as a fragment first, then as an embedded model, then as a local directory
    (``./NAME`` is always a directory); anything with a slash is no name, and left alone.

    Raises:
        SpecError: nothing has that name, or the fragment has sections that are not a fragment's.
    """
    model = document.get("model")
    name = model.get("model") if isinstance(model, Mapping) else None
    if not isinstance(name, str) or not _FRAGMENT_NAME.fullmatch(name):
        return dict(document)
    fragments = find_fragments(directories)
    if name in fragments:
        return _laid_under(document, name, fragments[name])
    if name not in EMBEDDED_MODELS and not Path(name).is_dir():
        raise SpecError(f"model.model: nothing is named {name!r}: {_known_models(name, fragments)}")
    return dict(document)


def find_model(name: str, directories: Iterable[Path], **keys: Any) -> ModelSpec:
    """The model of a job that says only ``model.model: name``, and ``keys`` that are not None.

    Raises:
        SpecError: as ``apply_fragment``, or the fragment's model is not valid.
    """
    given = {key: value for key, value in keys.items() if value is not None}
    model = apply_fragment({"model": {"model": name, **given}}, directories)["model"]
    try:
        return ModelSpec.model_validate(model)
    except ValidationError as error:
        raise SpecError("\n".join(f"model.{explain(fault)}" for fault in error.errors())) from None


def named_models(directories: Iterable[Path]) -> dict[str, str]:
    """Name → what it stands for, of every fragment in or above the directories and every embedded model."""
    embedded = dict.fromkeys(EMBEDDED_MODELS, "embedded")
    fragments = find_fragments(directories)
    named = {name: str(read_yaml(path).get("model", {}).get("model")) for name, path in fragments.items()}
    return dict(sorted({**named, **embedded}.items()))


def _laid_under(document: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    fragment = read_yaml(path)
    unknown = sorted(fragment.keys() - {"model", "sampling"})
    sections = [section for section in fragment.values() if not isinstance(section, dict)]
    if unknown or sections or "model" not in fragment.get("model", {}):
        raise SpecError(
            f"{path}: a model fragment has the section model, with its key model, and may have sampling"
            + (f"; found {unknown[0]!r}" if unknown else "")
        )
    merged = dict(document)
    for key, defaults in fragment.items():
        own = document.get(key)
        if own is None or isinstance(own, Mapping):
            merged[key] = {**defaults, **(own or {})}
    merged["model"]["model"] = fragment["model"]["model"]
    return merged


def _known_models(name: str, fragments: Mapping[str, Path]) -> str:
    known = sorted({*fragments, *EMBEDDED_MODELS})
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return (
        f"{hint}Known names: {', '.join(sorted(EMBEDDED_MODELS))} (embedded)"
        + "".join(f", {other}" for other in sorted(fragments.keys() - EMBEDDED_MODELS.keys()))
        + "; or give a hub id (owner/name), ms://owner/name or a directory"
    )
