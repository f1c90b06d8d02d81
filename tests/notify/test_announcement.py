"""Who is told of which end, and what stands in the message."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from cli.command import b2batch
from cli.finished_job import finish_job

from b2batch.errors import (
    B2BatchError,
    ClusterError,
    Drained,
    DriftError,
    ErrorBudgetExceeded,
    Fenced,
    InputError,
    RunLocked,
    StorageFull,
    UnitFailed,
)
from b2batch.job import run_job
from b2batch.notify import announcement as announcement_module
from b2batch.notify.announcement import Announcement
from b2batch.notify.order import Message, Outcome
from b2batch.outputs.store import open_store
from b2batch.spec import JobSpec, WebhookSpec, load_spec, parse_spec

from .webhook_server import WebhookServer

EVENTS = ("finish", "failure", "budget", "stopped")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[WebhookSpec, Message]]:
    """What would be sent."""
    sent: list[tuple[WebhookSpec, Message]] = []

    def keep(messages: Sequence[tuple[WebhookSpec, Message]]) -> list[Outcome]:
        sent.extend(messages)
        return [Outcome(False, "JSON", "HTTP 500") for _ in messages]

    monkeypatch.setattr(announcement_module, "deliver", keep)
    monkeypatch.setenv("B2_HOOK", "https://bots.example/hook/canary")
    return sent


def spec_with(job_file: Path, *hooks: dict[str, Any]) -> JobSpec:
    document = json.loads(job_file.read_text(encoding="utf-8"))
    document["notify"] = [{"url": "${env:B2_HOOK}", **hook} for hook in hooks]
    return parse_spec(document)


def end(spec: JobSpec, error: BaseException | None, output: str | None = None) -> None:
    with Announcement(spec) as announcement:
        announcement.store = open_store(output) if output else None
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("error", "event"),
    [
        (None, "finish"),
        (ErrorBudgetExceeded("x"), "budget"),
        (Drained("x"), "stopped"),
        (InputError("x"), "failure"),
        (DriftError("x"), "failure"),
        (ClusterError("x"), "failure"),
        (Fenced("x"), "failure"),
        (ZeroDivisionError("x"), "failure"),
        (RunLocked("x"), None),
        (SystemExit(130), None),
        (KeyboardInterrupt(), None),
    ],
)
def test_each_end_is_told_to_those_who_asked_for_it(
    tmp_path: Path, told: list[tuple[WebhookSpec, Message]], error: BaseException | None, event: str | None
) -> None:
    spec = spec_with(finish_job(tmp_path, 2), {}, *({"events": name} for name in EVENTS))
    with pytest.raises(type(error)) if error is not None else nullcontext():
        end(spec, error)
    default = [] if event in (None, "stopped") else [spec.notify[0].events]
    asked_for = [] if event is None else [(event,)]
    assert [hook.events for hook, _ in told] == default + asked_for
    assert {message.facts["event"] for _, message in told} == ({event} if event else set())


def test_the_message_tells_figures_and_no_row(
    tmp_path: Path, told: list[tuple[WebhookSpec, Message]]
) -> None:
    spec = spec_with(finish_job(tmp_path), {}, {"include_sample": 2}).model_copy(update={"name": "label"})
    out = str(tmp_path / "out")
    end(spec, None, out)
    (_, plain), (_, sampled) = told
    assert plain.title == "b2batch label: finished"
    for words in (out, "10 ok, 0 failed, of 10", "succeeded"):
        assert words in plain.body
    assert (plain.facts["num_ok"], plain.facts["exit_code"], plain.severity) == (10, 0, "success")
    assert len(plain.facts["run_id"]) == 64
    assert "正面" not in repr(plain)
    assert "row 0:0: 正面 0:0\nrow 0:1: 正面 0:1" in sampled.body
    assert "0:2" not in sampled.body
    assert len(sampled.facts["sample"]) == 2


def test_an_errors_words_are_told_where_they_hold_no_row(
    tmp_path: Path, told: list[tuple[WebhookSpec, Message]]
) -> None:
    spec = spec_with(finish_job(tmp_path, 2), {}, {"include_sample": 1})
    for error in (UnitFailed("unit 3: KeyError: 这是一行"), InputError("rows.jsonl: there is no such file")):
        with pytest.raises(B2BatchError):
            end(spec, error)
    reasons = [message.facts["reason"] for _, message in told]
    assert reasons[0] == "UnitFailed"
    assert reasons[1] == "UnitFailed: unit 3: KeyError: 这是一行"
    assert reasons[2] == reasons[3] == "InputError: rows.jsonl: there is no such file"


def test_a_message_fits_every_service_and_holds_no_secret(
    tmp_path: Path, told: list[tuple[WebhookSpec, Message]]
) -> None:
    spec = spec_with(finish_job(tmp_path, 8), {"include_sample": 8})
    with pytest.raises(InputError):
        end(
            spec,
            InputError("https://bots.example/hook/canary s3://key:canary@b/x " + "行" * 3000),
            str(tmp_path / "out"),
        )
    ((_, message),) = told
    assert len(f"{message.title}\r\n{message.body}".encode()) <= 2048
    assert "canary" not in repr(message)
    assert "${env:B2_HOOK}" in message.body


def test_a_store_that_failed_is_not_asked_again(
    tmp_path: Path, told: list[tuple[WebhookSpec, Message]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> None:
        raise AssertionError("the store was asked")

    monkeypatch.setattr(announcement_module, "overview", ask)
    monkeypatch.setattr(announcement_module, "sample_rows", ask)
    spec = spec_with(finish_job(tmp_path, 2), {"include_sample": 1})
    with pytest.raises(StorageFull):
        end(spec, StorageFull("no space left"), str(tmp_path / "out"))
    with pytest.raises(Drained):
        end(spec, Drained("nobody listens"), str(tmp_path / "out"))
    assert [message.facts["reason"] for _, message in told] == ["StorageFull: no space left"]


def test_what_goes_wrong_in_telling_is_logged_and_nothing_else(
    tmp_path: Path,
    told: list[tuple[WebhookSpec, Message]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = spec_with(finish_job(tmp_path, 2), {})
    end(spec, None, str(tmp_path / "out"))
    assert "notify.0 (JSON) was not told: HTTP 500" in caplog.text

    def fail(messages: object) -> list[Outcome]:
        raise OSError("no more processes")

    monkeypatch.setattr(announcement_module, "deliver", fail)
    end(spec, None, str(tmp_path / "gone"))
    assert "the webhooks could not be told: OSError: no more processes" in caplog.text


def test_a_run_tells_why_it_failed_and_not_that_nothing_was_left_to_do(
    tmp_path: Path, server: WebhookServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("B2_HOOK", server.url("/hook"))
    job_file = finish_job(tmp_path, 2)
    spec = spec_with(job_file, {"allow_private": True})
    assert run_job(spec).counts.num_ok == 2
    assert server.received == []
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(InputError):
        run_job(spec)
    ((_, payload),) = server.received
    assert (payload["event"], payload["exit_code"], payload["type"]) == ("failure", 2, "failure")
    assert "rows.jsonl" in payload["reason"]


def test_the_settings_of_webhooks_do_not_make_another_run(tmp_path: Path) -> None:
    job_file = finish_job(tmp_path, 2)
    assert spec_with(job_file, {}).result_config() == load_spec(job_file).result_config()


def test_the_verbs_show_what_a_webhook_lacks(
    tmp_path: Path, server: WebhookServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_file = finish_job(tmp_path, 2)
    document = json.loads(job_file.read_text(encoding="utf-8"))
    document["notify"] = [{"url": "${env:B2_HOOK}", "allow_private": True}, {"url": "${env:B2_HOOK}"}]
    job_file.write_text(json.dumps(document), encoding="utf-8")
    monkeypatch.delenv("B2_HOOK", raising=False)
    for verb in ("validate", "run", "notify"):
        refused = b2batch(verb, job_file)
        assert refused.exit_code == 2
        assert "B2_HOOK" in refused.stderr
    monkeypatch.setenv("B2_HOOK", server.url("/canary"))
    checked = b2batch("validate", job_file)
    assert checked.exit_code == 0, checked.output
    assert "notify: JSON, JSON" in checked.stdout
    tried = b2batch("notify", job_file)
    assert tried.exit_code == 1
    assert "notify.0: JSON was told" in tried.stdout
    assert "notify.1: JSON was not told: 127.0.0.1 is not a public address" in tried.stdout
    assert "canary" not in tried.output + checked.output
    assert len(server.received) == 1
    document["notify"] = [{"url": server.url("/canary")}]
    job_file.write_text(json.dumps(document), encoding="utf-8")
    plain = b2batch("validate", job_file)
    assert plain.exit_code == 2
    assert "${env:NAME}" in plain.stderr
    assert "canary" not in plain.output
