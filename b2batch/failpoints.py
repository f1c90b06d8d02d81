"""Places where a process can be told to die, so that each step of the commit is proved by a crash.

``B2BATCH_FAILPOINT="F8:kill"`` kills this process with SIGKILL when it first passes F8, ``"F8:kill:3"``
when it passes it the third time, and ``"F8:stop"`` stops it there with SIGSTOP, until somebody continues
it. Read once, at import; unset, a failpoint is an empty call.

    F1   before run.json                    F8   part staged and on disk, not yet linked
    F2   after run.json, before the plan    F9   after the link, before the reply
    F3   epoch taken, no heartbeat yet      F10  before finalise reads the parts
    F4   before a unit is read              F11  during finalise: parts counted, error list not written
    F5   in the middle of generation        F12  before _SUCCESS
    F6   unit generated, nothing staged     F13  after _SUCCESS
    F7   in the middle of the staged write

``B2BATCH_POISON=TEXT`` makes poison of every row of which some value contains the text: the replica that
has one in its engine is killed with SIGKILL at its next step.

F8 and F9 are passed at every exclusive creation, F7 at every staged write: in a replica these are its
parts, in a driver the files of a run.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import threading
from collections.abc import Callable, Mapping
from typing import Any

VARIABLE = "B2BATCH_FAILPOINT"
POISON_VARIABLE = "B2BATCH_POISON"
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def failpoint(name: str) -> None:
    """Suffer here what this process was told to suffer at ``name``; mostly nothing."""
    _pass_by(name)


def arm(setting: str) -> None:
    """Have this process suffer ``setting``, in place of what the environment said.

    Raises:
        ValueError: it is not of the form that the module describes.
    """
    global _pass_by
    _pass_by = _armed(setting)


def _armed(setting: str) -> Callable[[str], None]:
    match = re.fullmatch(r"(F(?:[1-9]|1[0-3])):(kill|stop)(?::([1-9]\d*))?", setting)
    if match is None:
        raise ValueError(f"{VARIABLE}={setting!r}: expected F1..F13, then :kill or :stop, then optionally :N")
    target, number, last_passing = match[1], _SIGNALS[match[2]], int(match[3] or 1)
    passings = itertools.count(1)

    def pass_by(name: str) -> None:
        if name == target and next(passings) == last_passing:
            # To this very thread: of a signal to the process it might notice nothing for a moment.
            signal.pthread_kill(threading.get_ident(), number)

    return pass_by


def _unarmed(name: str) -> None:
    """Nothing is asked for: go on."""


_pass_by: Callable[[str], None] = _armed(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else _unarmed


def is_poison(columns: Mapping[str, Any]) -> bool:
    """Whether a row with these values was declared to take its replica down."""
    marker = os.environ.get(POISON_VARIABLE, "")
    return marker != "" and any(marker in str(value) for value in columns.values())


def take_poison() -> None:
    """End this process as a fault in native code would."""
    os.kill(os.getpid(), signal.SIGKILL)
