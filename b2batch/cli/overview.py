"""A run's standing in lines for people, for ``status`` and the end of ``run``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from b2batch.cli.printing import count, duration, plural, share, shorten

if TYPE_CHECKING:
    from b2batch.outputs.overview import Overview

_SHOWN_KINDS = 5
_MESSAGE_CHARS = 160
_SHOWN_LABELS = 12


def overview_facts(view: Overview) -> Iterator[tuple[str, str]]:
    """What is worth saying of ``view``, as names and values."""
    yield "run", f"{view.run_id[:8]}: {_state(view)}"
    yield "output", view.output
    if view.generation > 1 or view.tick:
        yield "generation", f"{view.generation}" + (f", tick {view.tick}" if view.tick else "")
    if view.reason:
        yield "reason", shorten(view.reason, _MESSAGE_CHARS)
    counts = view.counts
    planned = f" of {count(view.num_rows_planned)}" if view.num_rows_planned > counts.num_rows else ""
    yield "rows", f"{count(counts.num_rows)}{planned}: {_shares(view)}"
    if counts.num_length:
        yield "", "cut answers end early (finish_reason = length): raise sampling.max_tokens"
    yield "units", f"{count(view.num_units_committed)} of {count(view.num_units)} committed"
    yield "tokens", f"{count(counts.num_input_tokens)} in, {count(counts.num_generated_tokens)} out"
    if view.num_replicas:
        speed = f"{view.rows_per_s:.1f} rows/s, {view.tokens_per_s:.0f} tokens/s"
        left = "?" if view.eta_s is None else duration(view.eta_s)
        yield "speed", f"{speed} on {plural(view.num_replicas, 'replica')}, ETA {left}"
    if view.num_reused_rows:
        yield "reused", f"{plural(view.num_reused_rows, 'row')} got the answer to an identical request"
    extra = list(_extra_work(view))
    if extra:
        yield "extra work", ", ".join(extra)
    if view.started:
        yield "time", f"started {view.started}, last news {view.updated}"
    yield from _failure_facts(view)
    if view.metrics:
        yield from metrics_facts(view.metrics)


def _state(view: Overview) -> str:
    if view.state is None:
        return "began, and was not heard of since; the same run command goes on"
    if view.is_silent:
        silence = f"its driver was not heard of for {duration(view.silent_s)}"
        return f"{view.state}, but {silence}; the same run command goes on"
    return str(view.state) if not view.exit_code else f"{view.state} (exit {view.exit_code})"


def _shares(view: Overview) -> str:
    counts = view.counts
    parts = [f"{count(counts.num_ok)} ok", plural(counts.num_error, "error")]
    if counts.num_length:
        cut = share(counts.num_length, counts.num_rows)
        parts.append(f"{count(counts.num_length)} cut by max_tokens or the context ({cut})")
    if view.num_skipped_blank:
        parts.append(f"{plural(view.num_skipped_blank, 'blank line')} left out")
    return ", ".join(parts)


def _extra_work(view: Overview) -> Iterator[str]:
    """What was lost and made good, or done twice so as to end sooner, in the last start of the driver."""
    if view.num_replicas_lost:
        yield f"{plural(view.num_replicas_lost, 'replica')} lost"
    if view.num_rows_again:
        yield f"up to {plural(view.num_rows_again, 'row')} computed again"
    if view.num_out_of_memory:
        yield f"out of memory {plural(view.num_out_of_memory, 'time')}: lower engine.max_num_seqs"


def _failure_facts(view: Overview) -> Iterator[tuple[str, str]]:
    for index, kind in enumerate(view.failures[:_SHOWN_KINDS]):
        place = f"{kind.row_id} of {kind.file}" if kind.file else kind.row_id
        what = (
            f"{count(kind.num_rows)} {kind.type}; the first, {place}: {shorten(kind.message, _MESSAGE_CHARS)}"
        )
        yield "" if index else "errors", what
    if len(view.failures) > _SHOWN_KINDS:
        yield "", f"and {plural(len(view.failures) - _SHOWN_KINDS, 'more kind')}"


def metrics_facts(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """A run's labels against gold, on a screen."""
    told = [f"accuracy {metrics['accuracy']:.4f}", f"macro-F1 {metrics['macro_f1']:.4f}"]
    told += [
        f"{name.upper()} {metrics[name]:.4f}" for name in ("ece", "auroc") if metrics.get(name) is not None
    ]
    yield "gold", f"{', '.join(told)} over {plural(metrics['num_rows'], 'row')}"
    unscored = {"answer": metrics["num_unanswered"], "gold label": metrics["num_without_gold"]}
    left_out = [f"{count(number)} without {what}" for what, number in unscored.items() if number]
    if left_out:
        yield "", f"left out: {', '.join(left_out)}"
    for index, label in enumerate(metrics["labels"][:_SHOWN_LABELS]):
        row, predicted = metrics["per_label"][label], metrics["confusion"][index][:_SHOWN_LABELS]
        scores = f"precision {row['precision']:.3f}, recall {row['recall']:.3f}, F1 {row['f1']:.3f}"
        yield "" if index else "labels", f"{label}: {scores}; given as {predicted}"
    if len(metrics["labels"]) > _SHOWN_LABELS:
        yield "", f"and {plural(len(metrics['labels']) - _SHOWN_LABELS, 'more label')} in metrics.json"
    for index, row in enumerate(metrics.get("thresholds", ())):
        kept = f"confidence of {row['threshold']:g} or more: {share(row['coverage'], 1)} of rows"
        yield "" if index else "thresholds", f"{kept}, accuracy {row['accuracy']:.4f}"
