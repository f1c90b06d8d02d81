"""How values are written for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from typing import Any

import typer


def print_json(value: Any) -> None:
    """One JSON document on stdout, from a dataclass or plain values."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    text = json.dumps(plain, ensure_ascii=False, indent=1, default=str)
    typer.echo(text.encode("utf-8", "backslashreplace").decode())  # paths may hold bytes that are not UTF-8


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """``name   value`` lines on stdout, values aligned; an empty name goes on with the line above."""
    for name, value in facts:
        typer.echo(f"{name:<12} {value}".rstrip())


def count(number: float) -> str:
    """1234567 → ``1,234,567``."""
    return f"{number:,.0f}"


def plural(number: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def magnitude(number: float) -> str:
    """``7.51 billion``, ``3.78 million``, ``950``."""
    for limit, name in ((1e9, " billion"), (1e6, " million")):
        if number >= limit:
            return f"{number / limit:.3g}{name}"
    return count(number)


def share(part: float, whole: float) -> str:
    """``12.5 %``; of nothing ``0 %``."""
    return f"{100 * part / whole:.3g} %" if whole else "0 %"


def duration(seconds: float) -> str:
    """``0:42``, ``12:05``, ``3:00:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(num_bytes: float) -> str:
    """``1.5 MiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}" if unit != "bytes" else f"{num_bytes:.0f} bytes"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"


def gigabytes(num_bytes: float) -> str:
    """``15.0 GB``, of a billion bytes each: as weights and GPUs are sold."""
    return f"{num_bytes / 1e9:.1f} GB"


def shorten(text: str, num_chars: int) -> str:
    """At most ``num_chars`` of ``text`` on one line."""
    line = " ".join(text.split())
    return line if len(line) <= num_chars else f"{line[: num_chars - 1]}…"
