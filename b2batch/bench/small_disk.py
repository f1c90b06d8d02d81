"""A disk that can be filled: a tmpfs where this process may mount one, else a store that says it is full."""

from __future__ import annotations

import contextlib
import errno
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from b2batch.bench.flaky_store import StoreFault, StoreSwitch

_SIZE = "64m"
_BLOCK = bytes(1 << 16)


class SmallDisk:
    """Where outputs are written. A context: leaving it takes the disk away, with all that is on it."""

    def __init__(self, path: Path, switch: StoreSwitch) -> None:
        self.path = path
        self._switch = switch
        self._ballast = path / ".ballast"
        self.is_real = False

    def __enter__(self) -> Self:
        self.path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "b2batch-faults", str(self.path)]
        with contextlib.suppress(FileNotFoundError):  # a machine without mount(8)
            self.is_real = subprocess.run(command, capture_output=True, check=False).returncode == 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_real:
            subprocess.run(["umount", "--lazy", str(self.path)], check=False)

    def fill(self) -> None:
        """Leave no room."""
        if not self.is_real:
            self._switch.turn_on(StoreFault.FULL)
            return
        try:
            with self._ballast.open("ab", buffering=0) as file:
                while file.write(_BLOCK):
                    pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise

    def free(self) -> None:
        """Make room again."""
        self._ballast.unlink(missing_ok=True)
        self._switch.turn_off()
