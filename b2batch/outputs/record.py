"""What a run was made from: ``run.json``, and the identity that follows from it.

Three kinds of settings: those that decide the result (``config``: another value is another run), those
that may change bits (``provenance``: recorded, warned about), and those that never matter (the rest of
``spec``, kept for the reader).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from b2batch.errors import IntegrityError
from b2batch.spec import JobSpec, config_digest
from b2batch.storage import mask_credentials

# Raised when the same spec, model and rows would give other rows than the version before.
RESULT_VERSION = 1


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The content of ``run.json``.

    ``files`` are the input's fingerprints (path, size, sha256 …), kept to say what changed.
    No value holds a secret: ``${env:…}`` stays a reference, and credentials in URIs are masked.
    """

    run_id: str
    config: Mapping[str, Any]
    plan_digest: str
    num_units: int
    files: Sequence[Mapping[str, Any]]
    spec: Mapping[str, Any]
    provenance: Mapping[str, Any]

    @classmethod
    def make(
        cls,
        spec: JobSpec,
        *,
        plan_digest: str,
        num_units: int,
        files: Sequence[Mapping[str, Any]],
        model_digest: str,
        provenance: Mapping[str, Any],
    ) -> Self:
        """The record of a job on a planned input; ``model_digest`` covers weights and tokenizer."""
        config = {
            **spec.result_config(),
            "model_digest": model_digest,
            "result_version": RESULT_VERSION,
        }
        return cls(
            run_id=config_digest({"config": config, "plan": plan_digest}),
            config=_masked(config),
            plan_digest=plan_digest,
            num_units=num_units,
            files=_masked([dict(file) for file in files]),
            spec=_masked(spec.model_dump(mode="json")),
            provenance=_masked(dict(provenance)),
        )

    @property
    def run8(self) -> str:
        """The short id that stands in part names."""
        return self.run_id[:8]

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read it back; IntegrityError when it is damaged."""
        try:
            return cls(**document)
        except TypeError as error:
            raise IntegrityError(f"run.json is damaged: {error}") from error


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return mask_credentials(value)
    if isinstance(value, Mapping):
        return {key: _masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(item) for item in value]
    return value
