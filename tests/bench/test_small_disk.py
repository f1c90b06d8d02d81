"""A disk that is filled and freed, as the processes of a disturbed run find it."""

from __future__ import annotations

from pathlib import Path

import pytest

from b2batch.bench.flaky_store import StoreFault, StoreSwitch
from b2batch.bench.small_disk import SmallDisk
from b2batch.errors import StorageError, StorageFull
from b2batch.outputs.store import LocalStore


@pytest.fixture
def switch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoreSwitch:
    for name in ("put", "put_if_absent", "read", "open"):
        monkeypatch.setattr(LocalStore, name, getattr(LocalStore, name))  # put back at the end
    switch = StoreSwitch(tmp_path / "switch")
    switch.plant()
    return switch


def open_store(path: Path) -> LocalStore:
    store = LocalStore(path, "tmp")
    store.probe()
    return store


def test_a_full_disk_takes_nothing_until_there_is_room(tmp_path: Path, switch: StoreSwitch) -> None:
    with SmallDisk(tmp_path / "disk", switch) as disk:
        store = open_store(disk.path / "out")
        disk.fill()
        with pytest.raises(StorageFull):
            store.put_if_absent("part", b"x" * 100_000)
        assert not store.exists("part")
        disk.free()
        assert store.put_if_absent("part", b"x" * 100_000)


def test_a_lost_reply_leaves_what_was_done(tmp_path: Path, switch: StoreSwitch) -> None:
    store = open_store(tmp_path / "out")
    switch.turn_on(StoreFault.REPLY_LOST)
    with pytest.raises(StorageError):
        store.put_if_absent("part", b"first")
    switch.turn_off()
    assert not store.put_if_absent("part", b"second")
    assert store.read("part") == b"first"


def test_a_failing_store_does_nothing(tmp_path: Path, switch: StoreSwitch) -> None:
    store = open_store(tmp_path / "out")
    switch.turn_on(StoreFault.FAILING)
    with pytest.raises(StorageError):
        store.put_if_absent("part", b"first")
    switch.turn_off()
    assert not store.exists("part")
