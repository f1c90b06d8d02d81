"""The end of a job, told to its webhooks whichever way it came."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from b2batch.errors import B2BatchError, StorageError
from b2batch.notify.delivery import check_webhooks, deliver
from b2batch.notify.message import JobEnd, compose
from b2batch.notify.order import Message
from b2batch.notify.sample import sample_rows
from b2batch.outputs.overview import Overview, overview
from b2batch.outputs.store import Store
from b2batch.spec import JobSpec, WebhookSpec

_log = logging.getLogger(__name__)


class Announcement:
    """A context around a job. Entered, it checks the webhooks; left, it tells them how the job ended.

    Nobody is told where the job was cut short by force, by a second signal. ``store`` is the output, as
    soon as there is one. What goes wrong in telling is logged, and never raised.

    Raises:
        SpecError: on entering; see ``check_webhooks``.
    """

    def __init__(self, spec: JobSpec) -> None:
        self.store: Store | None = None
        self._spec = spec
        self._is_news = True
        self._started_s = time.monotonic()

    def nothing_new(self) -> None:
        """The job was done already: nobody needs to hear it again."""
        self._is_news = False

    def __enter__(self) -> Self:
        check_webhooks(self._spec.notify)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._spec.notify or not self._is_news or not isinstance(error, Exception | None):
            return
        try:
            self._tell(error)
        except Exception as failure:  # whatever it is, it is not the job's
            _log.warning("the webhooks could not be told: %s: %s", type(failure).__name__, failure)

    def _tell(self, error: Exception | None) -> None:
        elapsed_s = time.monotonic() - self._started_s
        end = JobEnd(self._spec.name, self._spec.output.path, elapsed_s, error)
        hooks = {index: hook for index, hook in enumerate(self._spec.notify) if end.event in hook.events}
        if not hooks:
            return
        store = None if isinstance(error, StorageError) else self.store  # to ask it again takes minutes
        if store is not None:
            end = replace(end, output=store.uri, view=_view(store))
        messages = [(hook, _message(end, hook, store)) for hook in hooks.values()]
        for index, outcome in zip(hooks, deliver(messages), strict=True):
            if outcome.is_done:
                _log.info("notify.%d: %s was told: %s", index, outcome.service, end.event)
            else:
                name = f" ({outcome.service})" if outcome.service else ""
                _log.warning("notify.%d%s was not told: %s", index, name, outcome.detail)


def _message(end: JobEnd, hook: WebhookSpec, store: Store | None) -> Message:
    wants_rows = hook.include_sample > 0
    sample = sample_rows(store, hook.include_sample) if store is not None and wants_rows else []
    return compose(end, sample, with_reason=wants_rows)


def _view(store: Store) -> Overview | None:
    """How the output stands; None where it cannot be read, which the error may be about."""
    try:
        return overview(store, datetime.now(UTC))
    except (B2BatchError, OSError):
        return None
