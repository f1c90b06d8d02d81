"""``python -m b2batch.bench.fault_driver SCRATCH VERB …``: b2batch with a store that fails on command.

The command is the real one, and so are driver, replicas and model; only the local store obeys the switch in
SCRATCH, and each replica notes there what it has generated, so that work done twice can be counted. With
FAULT_HOLD set, whoever commits first waits before it does so, until ``release_in(SCRATCH)`` is there.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from b2batch import job
from b2batch.bench.fault_scratch import HOLD_VARIABLE, ledger_in, release_in, switch_in, token_in
from b2batch.outputs.parts import commit_part
from b2batch.worker_args import WorkerArgs
from b2batch.worker_start import start_worker

_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class CountedWorkers:
    """Makes the workers of a run; with ``holds`` the first commit of all is a late one."""

    scratch: Path
    holds: bool = False

    def __call__(self, args: WorkerArgs) -> Any:
        """Plant and make one, in the replica's process."""
        switch_in(self.scratch).plant()
        made = start_worker(args)
        if self.holds:
            from b2batch import worker

            vars(worker)["commit_part"] = _held(commit_part, self.scratch)
        return _CountedWorker(made, ledger_in(self.scratch, os.getpid()))


def _held(commit: Callable[..., Any], scratch: Path) -> Callable[..., Any]:
    # Not by SIGSTOP: a stopped process whose parent dies is sent SIGHUP and SIGCONT by the kernel.
    def act(*arguments: Any) -> Any:
        if _is_first(token_in(scratch)):
            while not release_in(scratch).exists():
                time.sleep(_POLL_S)
        return commit(*arguments)

    return act


class _CountedWorker:
    """A worker that notes its progress after each step."""

    def __init__(self, inner: Any, path: Path) -> None:
        self._inner, self._path = inner, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def step(self) -> Any:
        reports = self._inner.step()
        done = self._inner.progress()
        self._path.write_text(json.dumps([done.num_rows, done.num_generated_tokens]))
        return reports


def _is_first(token: Path) -> bool:
    """Whether no other process asked before; the token then holds this one's pid."""
    try:
        with token.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True


def main() -> None:
    """Plant, then be ``b2batch``."""
    scratch = Path(sys.argv[1])
    switch_in(scratch).plant()
    vars(job)["start_worker"] = CountedWorkers(scratch, HOLD_VARIABLE in os.environ)
    sys.argv = ["b2batch", *sys.argv[2:]]
    runpy.run_module("b2batch", run_name="__main__")


if __name__ == "__main__":
    from b2batch.bench import fault_driver

    fault_driver.main()  # as a module of the package: what it makes is unpickled elsewhere
