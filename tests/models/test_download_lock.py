"""Replicas of a node that want the same model: one downloads it, also if the first one dies of it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection, wait
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from b2batch.models.checkpoint import open_checkpoint
from b2batch.models.download_lock import only_download
from b2batch.spec import ModelSpec

CONTEXT = multiprocessing.get_context("spawn")
NAME = "owner/name"


class FakeHub:
    """Stands in for ``snapshot_download``: says what it does, and waits to be told to go on."""

    def __init__(self, cache: Path, test: Connection) -> None:
        self.snapshot, self.test = cache / "snapshots" / "c0ffee", test

    def __call__(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        is_there = (self.snapshot / "model.safetensors").exists()
        self.test.send("found" if is_there else "downloads")
        if not is_there:
            self.test.recv()
            self.snapshot.mkdir(parents=True, exist_ok=True)
            (self.snapshot / "config.json").write_text('{"model_type": "llama"}')
            (self.snapshot / "model.safetensors").touch()
        return str(self.snapshot)


def open_as_a_replica(cache: Path, test: Connection) -> None:
    constants.HF_HUB_CACHE = str(cache)
    vars(huggingface_hub)["snapshot_download"] = FakeHub(cache, test)
    checkpoint = open_checkpoint(ModelSpec(model=NAME), weights=True)
    test.send((checkpoint.source, checkpoint.commit))


@pytest.mark.parametrize("dies", [False, True])
def test_processes_of_a_node_download_a_model_once(tmp_path: Path, dies: bool) -> None:
    process_of = {}
    for _ in range(3):
        ours, theirs = CONTEXT.Pipe()
        process_of[ours] = CONTEXT.Process(target=open_as_a_replica, args=(tmp_path, theirs), daemon=True)
        process_of[ours].start()
        theirs.close()
    waiting = set(process_of)
    if dies:
        first = hears(waiting, "downloads")
        pid = process_of[first].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        waiting.remove(first)
    downloads = hears(waiting, "downloads")
    waiting.remove(downloads)
    assert not wait(waiting, timeout=0.5), "the others wait"
    downloads.send("go on")
    assert downloads.recv() == (f"{NAME}@c0ffee", "c0ffee")
    for pipe in waiting:
        assert [pipe.recv(), pipe.recv()] == ["found", (f"{NAME}@c0ffee", "c0ffee")]


def hears(pipes: set[Connection], word: str) -> Connection:
    """The first that speaks, which says this."""
    ready = wait(pipes, timeout=120)
    assert ready, "nobody speaks"
    pipe = next(pipe for pipe in pipes if pipe is ready[0])
    assert pipe.recv() == word
    return pipe


def test_a_cache_that_cannot_be_locked_is_used_without(tmp_path: Path) -> None:
    (tmp_path / ".locks").write_text("in the way")
    with only_download(tmp_path, NAME), only_download(tmp_path, NAME):
        pass


def test_models_do_not_wait_for_one_another(tmp_path: Path) -> None:
    with only_download(tmp_path, "a/b"), only_download(tmp_path, "b/c"):
        pass
