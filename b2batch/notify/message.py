"""What is told of the end of a job: figures, and row content only where a webhook asks for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from b2batch.errors import (
    B2BatchError,
    CallerError,
    Drained,
    ErrorBudgetExceeded,
    Fenced,
    IntegrityError,
    StorageError,
)
from b2batch.notify.order import Message
from b2batch.outputs.overview import Overview
from b2batch.spec import Event, mask_env
from b2batch.storage import mask_credentials

# WeCom takes 2,048 bytes, with the title.
_MOST_BYTES = 1900
_REASON_CHARS = 400
_HEADLINES: Mapping[Event, tuple[str, str]] = {
    "finish": ("finished", "success"),
    "failure": ("failed", "failure"),
    "budget": ("finished, with more failed rows than allowed", "warning"),
    "stopped": ("stopped, and goes on when it is run again", "info"),
}
_EVENT_OF_CODE: Mapping[int, Event | None] = {3: "budget", 75: "stopped", 99: None}
# What these say is of the job, its files and its figures; the words of others may quote a row.
_WITHOUT_ROWS = (CallerError, Drained, ErrorBudgetExceeded, Fenced, IntegrityError, StorageError)


@dataclass(frozen=True, slots=True)
class JobEnd:
    """How a job ended. ``view`` is its output's standing where there is one by now."""

    job: str
    output: str
    elapsed_s: float
    error: Exception | None = None
    view: Overview | None = None

    @property
    def exit_code(self) -> int:
        """What the process ends with."""
        if self.error is None:
            return 0
        return self.error.exit_code if isinstance(self.error, B2BatchError) else 1

    @property
    def event(self) -> Event | None:
        """Whom it concerns; None: nobody, since another driver works on it."""
        return _EVENT_OF_CODE.get(self.exit_code, "failure") if self.error else "finish"


def compose(end: JobEnd, sample: Sequence[str] = (), *, with_reason: bool = False) -> Message:
    """The message of an end that concerns somebody.

    ``sample`` are lines of rows; ``with_reason`` tells the error's words also where they may quote a row.
    """
    if end.event is None:
        raise ValueError("this end concerns nobody")
    headline, severity = _HEADLINES[end.event]
    facts = {"event": end.event, **_facts(end), **_reason(end.error, with_reason)}
    if sample:
        facts["sample"] = list(sample)
    title = f"b2batch {end.job}: {headline}" + (f" (exit {end.exit_code})" if end.exit_code else "")
    return Message(title, _fitting("\n".join(_lines(facts))), severity, facts)


def trial(job: str) -> Message:
    """A message that only shows that a webhook works."""
    return Message(
        f"b2batch {job}: a test", "This webhook will be told how the job ends.", facts={"job": job}
    )


def _facts(end: JobEnd) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "job": end.job,
        "exit_code": end.exit_code,
        "output": _masked(end.output),
        "elapsed_s": round(end.elapsed_s, 1),
    }
    view = end.view
    if view is None:
        return facts
    counts = view.counts
    return facts | {
        "run_id": view.run_id,
        "state": None if view.state is None else str(view.state),
        "num_rows": max(view.num_rows_planned, counts.num_rows),
        "num_ok": counts.num_ok,
        "num_error": counts.num_error,
        "tokens_per_s": round(view.tokens_per_s, 1),
    }


def _reason(error: Exception | None, with_words: bool) -> dict[str, str]:
    if error is None:
        return {}
    words = f": {_masked(str(error))}" if with_words or isinstance(error, _WITHOUT_ROWS) else ""
    return {"reason": f"{type(error).__name__}{words}"[:_REASON_CHARS]}


def _lines(facts: Mapping[str, Any]) -> list[str]:
    lines = [f"output: {facts['output']}"]
    if "run_id" in facts:
        lines.insert(0, f"run: {facts['run_id'][:8]}, {facts['state'] or 'not begun'}")
        lines.append(f"rows: {facts['num_ok']:,} ok, {facts['num_error']:,} failed, of {facts['num_rows']:,}")
    speed = f", {facts['tokens_per_s']:,} tokens/s" if facts.get("tokens_per_s") else ""
    lines.append(f"time: {facts['elapsed_s']:,} s{speed}")
    if "reason" in facts:
        lines.append(f"reason: {facts['reason']}")
    return [*lines, *facts.get("sample", ())]


def _masked(text: str) -> str:
    return mask_credentials(mask_env(text))


def _fitting(text: str) -> str:
    """As much of ``text`` as every service takes."""
    return text.encode()[:_MOST_BYTES].decode(errors="ignore")
