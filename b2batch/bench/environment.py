"""Where and with what a measurement was made."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("b2batch", "torch", "transformers", "ray", "pyarrow")


@dataclass(frozen=True, slots=True)
class Environment:
    """``git_commit`` ends with ``+`` where the checkout has changes; it is empty outside a checkout.

    ``load_before`` is the one-minute load average at the start: far above 0, the machine was busy and
    wall-clock figures mean little.
    """

    git_commit: str
    cpu_model: str
    num_cpus: int
    load_before: float
    platform: str
    python: str
    versions: dict[str, str]

    @classmethod
    def here(cls) -> Environment:
        """This machine, now."""
        return cls(
            git_commit=_git_commit(),
            cpu_model=_cpu_model(),
            num_cpus=os.cpu_count() or 1,
            load_before=round(os.getloadavg()[0], 2),
            platform=platform.platform(),
            python=platform.python_version(),
            versions={name: _version(name) for name in _PACKAGES},
        )

    @property
    def was_busy(self) -> bool:
        """Whether others kept a noticeable part of the cores busy."""
        return self.load_before > 0.25 * self.num_cpus


def _git_commit() -> str:
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + "+" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
