from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from b2batch.errors import Fenced, OutputError, StorageError, StorageFull
from b2batch.outputs.store import LocalStore, open_store, prove_exclusive_creation

from .memory_store import MemoryStore

STAGING = "__b2batch/1f3a9c7e/tmp"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "out", STAGING)
    store.probe()
    return store


def staged(store: LocalStore) -> list[str]:
    return [key for key, _ in store.list(STAGING)]


def test_second_creation_is_refused_and_changes_nothing(store: LocalStore) -> None:
    assert store.put_if_absent("a", b"first")
    assert not store.put_if_absent("a", b"second")
    assert store.read("a") == b"first"
    assert staged(store) == []


def test_put_replaces(store: LocalStore) -> None:
    store.put("x/status", b"1")
    store.put("x/status", b"22")
    assert store.read("x/status") == b"22"
    assert list(store.list("x")) == [("x/status", 2)]
    assert staged(store) == []


def test_listing_is_by_prefix_at_any_depth(store: LocalStore) -> None:
    for key in ("part-1", "part-2", "other", "d/e/part-3"):
        store.put(key, b"")
    assert [key for key, _ in store.list("part-")] == ["part-1", "part-2"]
    assert [key for key, _ in store.list("")] == ["d/e/part-3", "other", "part-1", "part-2"]
    assert [key for key, _ in store.list("d/")] == ["d/e/part-3"]
    assert list(store.list("nowhere/")) == []


def test_missing_keys(store: LocalStore) -> None:
    assert not store.exists("a")
    store.delete("a")
    store.delete_tree("d")
    for call in (store.read, store.open, store.age_s):
        with pytest.raises(FileNotFoundError):
            call("a")


def test_age_is_by_the_file_systems_clock(store: LocalStore, tmp_path: Path) -> None:
    store.put("a", b"")
    assert store.age_s("a") < 30
    written = (tmp_path / "out/a").stat().st_mtime
    os.utime(tmp_path / "out/a", (written - 500, written - 500))
    assert 499 < store.age_s("a") < 530


@pytest.mark.parametrize("key", ["", "..", "a/../b", "/etc/passwd", "a//b", "./a", "a\0b", "../x"])
def test_keys_that_are_no_names_inside_are_refused(store: LocalStore, key: str) -> None:
    for call in (store.read, store.delete, store.delete_tree, lambda key: store.put(key, b"")):
        with pytest.raises(OutputError):
            call(key)


def test_links_that_lead_outside_are_refused(store: LocalStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"keep")
    (tmp_path / "out/link").symlink_to(outside)
    for call in (store.read, store.delete, lambda key: store.put_if_absent(key, b"")):
        with pytest.raises(OutputError):
            call("link/secret")
    assert "link/secret" not in [key for key, _ in store.list("")]
    assert (outside / "secret").read_bytes() == b"keep"


def test_no_staging_directory_means_fenced(store: LocalStore) -> None:
    store.delete_tree(STAGING)
    with pytest.raises(Fenced):
        store.put_if_absent("a", b"")
    with pytest.raises(Fenced):
        store.put("a", b"")
    assert list(store.list("")) == []


def test_staging_removed_under_a_writer(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def too_late(source: Path, target: Path) -> None:
        store.delete_tree(STAGING)
        link(source, target)

    monkeypatch.setattr(os, "link", too_late)
    with pytest.raises(Fenced):
        store.put_if_absent("a", b"")
    assert not store.exists("a")


def test_lost_reply_of_an_nfs_link(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def link_twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)  # the client's retransmission

    monkeypatch.setattr(os, "link", link_twice)
    assert store.put_if_absent("a", b"mine")


def test_opened_without_a_run_it_can_be_read_only(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    store = open_store(str(tmp_path))
    assert store.read("a") == b"1"
    with pytest.raises(OutputError, match="reading only"):
        store.put("a", b"2")


def test_full_disk_leaves_nothing_behind(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull, match="No space left") as raised:
        store.put_if_absent("a", b"data")
    assert raised.value.errno == errno.ENOSPC
    assert list(store.list("")) == []


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("mkdir", OSError(errno.EROFS, "Read-only file system"), "cannot be written: Read-only"),
        ("open", OSError(errno.EACCES, "Permission denied"), "cannot be written: Permission"),
        ("link", OSError(errno.EPERM, "Operation not permitted", "a", None, "b"), "no hard links"),
    ],
)
def test_preflight_says_why_a_place_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: OSError, message: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(os, function, refuse)
    with pytest.raises(OutputError, match=message):
        LocalStore(tmp_path / "out", STAGING).probe()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_disk_that_fills_up_takes_the_next_part_once_there_is_room(small_disk: Path) -> None:
    store = LocalStore(small_disk / "out", STAGING)
    store.probe()
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (700 << 10))
    with pytest.raises(StorageFull, match="No space left"):
        store.put_if_absent("part-1", b"y" * (600 << 10))
    with pytest.raises(StorageFull):
        store.put("status", b"y" * (600 << 10))
    assert list(store.list("")) == [], "nothing torn, staged or visible"
    ballast.unlink()
    assert store.put_if_absent("part-1", b"y" * (600 << 10))


def test_preflight_on_a_full_disk_can_be_tried_again(small_disk: Path) -> None:
    with contextlib.suppress(OSError), (small_disk / "ballast").open("wb") as ballast:
        ballast.write(b"x" * (2 << 20))
    with pytest.raises(StorageFull) as raised:
        LocalStore(small_disk / "out", STAGING).probe()
    assert raised.value.exit_code == 1


def test_preflight_on_a_read_only_disk(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OutputError, match="Read-only") as raised:
        LocalStore(small_disk / "out", STAGING).probe()
    assert raised.value.exit_code == 2


def test_refused_after_preflight_it_is_the_storages_fault(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageError, match=r"out/a: Permission denied") as raised:
        store.put_if_absent("a", b"")
    assert raised.value.exit_code == 1


def test_preflight_on_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"")
    with pytest.raises(OutputError, match="not a directory"):
        LocalStore(tmp_path / "out", STAGING).probe()


def test_preflight_refuses_a_store_that_overwrites() -> None:
    class Overwriting(MemoryStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            self.put(key, data)
            return True

    store = Overwriting()
    with pytest.raises(OutputError, match="replace an existing object"):
        prove_exclusive_creation(store)
    assert store.objects == {}


def test_preflight_leaves_nothing(store: LocalStore) -> None:
    assert list(store.list("")) == []


@pytest.mark.parametrize(
    ("umask", "file_mode", "directory_mode"), [(0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_files_follow_the_umask(tmp_path: Path, umask: int, file_mode: int, directory_mode: int) -> None:
    before = os.umask(umask)
    try:
        store = LocalStore(tmp_path / "out", STAGING)
        store.probe()
        store.put_if_absent("d/a", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out/d/a").stat().st_mode) == file_mode
    for directory in ("out", "out/d", "out/__b2batch"):
        assert stat.S_IMODE((tmp_path / directory).stat().st_mode) == directory_mode
    assert stat.S_IMODE((tmp_path / "out" / STAGING).stat().st_mode) == 0o700


def test_directories_are_never_world_writable(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        LocalStore(tmp_path / "out", STAGING).probe()
    finally:
        os.umask(before)
    assert not (tmp_path / "out").stat().st_mode & stat.S_IWOTH


def test_one_of_many_threads_wins(store: LocalStore) -> None:
    barrier = threading.Barrier(8)
    wins: list[int] = []

    def race(number: int) -> None:
        for turn in range(20):
            barrier.wait()
            if store.put_if_absent(f"part-{turn}", str(number).encode() * 1000):
                wins.append(number)
                assert store.read(f"part-{turn}") == str(number).encode() * 1000

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 20


_RACER = """
import sys
from b2batch.outputs.store import LocalStore
store = LocalStore(sys.argv[1], sys.argv[2])
sys.stdin.readline()
print(sum(store.put_if_absent(f"part-{turn}", b"x" * 5000) for turn in range(200)))
"""


def test_processes_share_the_wins(store: LocalStore) -> None:
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _RACER, store.uri, STAGING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    assert sum(int(racer.communicate(timeout=60)[0]) for racer in racers) == 200


@pytest.mark.parametrize("uri", ["gs://bucket/out", "hdfs://host/out", "hf://datasets/a/b"])
def test_other_schemes_are_refused(uri: str) -> None:
    with pytest.raises(OutputError, match="local or NFS path"):
        open_store(uri, "1f3a9c7e" * 8)


def test_run8_in_the_path(tmp_path: Path) -> None:
    assert open_store(f"{tmp_path}/{{run8}}", "1f3a9c7e" * 8).uri == f"{tmp_path}/1f3a9c7e"
    assert open_store(f"file://{tmp_path}").uri == str(tmp_path)
    with pytest.raises(OutputError, match="run8"):
        open_store(f"{tmp_path}/{{run8}}")
