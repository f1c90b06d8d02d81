"""``constraints.txt`` pins all that the README's install brings, with what that brings in turn."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
PINNED_BY_TORCH = ("nvidia-", "cuda-", "triton")  # exactly, each build of torch its own


def pins() -> dict[str, str]:
    lines = [line.strip() for line in CONSTRAINTS.read_text().splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") for pin in found)
    return {canonicalize_name(pin.name): str(pin.specifier) for pin in found}


def needed(package: str, extras: frozenset[str], seen: dict[str, frozenset[str]]) -> None:
    """Collect into ``seen`` what ``package`` with ``extras`` brings on this machine."""
    name = canonicalize_name(package)
    if name in seen and extras <= seen[name]:
        return
    seen[name] = seen.get(name, frozenset()) | extras
    try:
        requirements = [Requirement(text) for text in requires(package) or ()]
    except PackageNotFoundError:
        return
    for requirement in requirements:
        if requirement.marker is None or any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        ):
            needed(requirement.name, frozenset(requirement.extras), seen)


def test_everything_that_is_installed_is_pinned() -> None:
    seen: dict[str, frozenset[str]] = {}
    needed("b2batch", frozenset({"dev"}), seen)
    del seen["b2batch"]
    assert len(seen) > 50
    assert sorted(name for name in seen.keys() - pins().keys() if not name.startswith(PINNED_BY_TORCH)) == []
