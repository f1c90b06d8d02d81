"""What pydantic says of a job file, in words for who wrote it."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel

from b2batch.spec.job import JobSpec
from b2batch.spec.sampling import SAMPLING_ALIASES, SamplingSpec
from b2batch.spec.secrets import holds_secret


def explain(fault: Any) -> str:
    """One line for one pydantic fault: the dotted field, what is wrong, the nearest known name."""
    location = [str(part) for part in fault["loc"]]
    dotted = ".".join(location) or "the job file"
    if fault["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{dotted}: unknown key{hint} (known here: {', '.join(sorted(known))})"
    if fault["type"] == "missing":
        return f"{dotted}: is needed and not given"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{dotted}: {message}" if location else message  # a whole-job check names its field itself
    found = repr(fault["input"])
    return f"{dotted}: {message}" + ("" if holds_secret(found) else f", found {found}")


def _known_keys(location: list[str]) -> list[str]:
    section: Any = JobSpec
    for part in location:
        if part.isdigit():
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        candidates += [arg for c in candidates for arg in getattr(c, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    keys = list(section.model_fields)
    return keys + list(SAMPLING_ALIASES) if section is SamplingSpec else keys
