"""Values as each manifest's own language needs them, so that they come out as they were put in."""

from __future__ import annotations

import json
import shlex

from b2batch.errors import CallerError

MOST_CRON_BYTES = 990  # of a crontab's line; Debian's cron cuts at 998


def require_printable(what: str, value: str) -> str:
    """``value``, unless a line break or something else unseen is in it, which no manifest holds safely.

    Raises:
        CallerError: it does.
    """
    if not value.isprintable():
        raise CallerError(f"{what}: {value!r} has a control character or a line break in it")
    return value


def shell(*words: str) -> str:
    """Words of a POSIX shell."""
    return shlex.join(words)


def crontab(command: str) -> str:
    """A shell command on a crontab's line, where ``%`` is a line break.

    Raises:
        CallerError: a backslash, which crons read differently, or a line that is too long for cron.
    """
    if "\\" in command:
        raise CallerError(f"a crontab's line cannot hold a backslash safely: {command}")
    line = command.replace("%", "\\%")
    if len(line.encode()) > MOST_CRON_BYTES:
        raise CallerError(f"{len(line.encode())} bytes are too long for a crontab; at most {MOST_CRON_BYTES}")
    return line


def systemd_word(value: str) -> str:
    """One word of ``ExecStart=:``, whose colon keeps ``$`` as it is."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def systemd_path(value: str) -> str:
    """A path that is all of a unit's setting, where quotes are not special.

    Raises:
        CallerError: systemd would read its end as something else.
    """
    if value.endswith(("\\", " ")):
        raise CallerError(f"{value!r}: systemd has no way to write a path that ends so")
    return value.replace("%", "%%")


def literal(value: object) -> str:
    """A value in YAML, and of text in Python: both read JSON's."""
    return json.dumps(value, ensure_ascii=False)


def kubernetes_argument(value: str) -> str:
    """A container's argument in YAML, in which Kubernetes would put in ``$(NAME)``."""
    return literal(value.replace("$", "$$"))
