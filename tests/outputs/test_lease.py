from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from b2batch.errors import Fenced, RunLocked, StorageFull
from b2batch.outputs.layout import RunKeys
from b2batch.outputs.lease import BEAT_INTERVAL_S, LEASE_TTL_S, Epoch, take_epoch
from b2batch.outputs.store import LocalStore

from .memory_store import MemoryStore

RUN8 = "1f3a9c7e"
KEYS = RunKeys(RUN8)


def test_second_driver_is_told_who_holds_the_lease(memory: MemoryStore) -> None:
    take_epoch(memory, RUN8, job_id="raysubmit_7")
    memory.now_s += 12
    with pytest.raises(RunLocked) as raised:
        take_epoch(memory, RUN8)
    assert raised.value.exit_code == 99
    for told in (f"pid {os.getpid()}", os.uname().nodename, "raysubmit_7", "12 s ago", "60 s", "--takeover"):
        assert told in str(raised.value)


def test_released_lease_is_free_at_once(memory: MemoryStore) -> None:
    with take_epoch(memory, RUN8) as first:
        assert first.number == 1
    assert take_epoch(memory, RUN8).number == 2


def test_silent_driver_is_replaced_after_the_ttl(memory: MemoryStore) -> None:
    first = take_epoch(memory, RUN8)
    memory.now_s += LEASE_TTL_S
    with pytest.raises(RunLocked):
        take_epoch(memory, RUN8)
    memory.now_s += 1
    assert take_epoch(memory, RUN8).number == 2
    with pytest.raises(Fenced):
        first.check_not_fenced()


def test_takeover_does_not_wait(memory: MemoryStore) -> None:
    first = take_epoch(memory, RUN8)
    take_epoch(memory, RUN8, takeover=True)
    with pytest.raises(Fenced, match="epoch 2"):
        first.check_not_fenced()


def test_fenced_driver_cannot_release_its_successors_lease(memory: MemoryStore) -> None:
    first = take_epoch(memory, RUN8)
    take_epoch(memory, RUN8, takeover=True)
    first.close()
    with pytest.raises(RunLocked):
        take_epoch(memory, RUN8)


def test_closing_twice(memory: MemoryStore) -> None:
    epoch = take_epoch(memory, RUN8)
    epoch.close()
    epoch.close()
    second = take_epoch(memory, RUN8)
    epoch.close()
    second.check_not_fenced()
    with pytest.raises(RunLocked):
        take_epoch(memory, RUN8)


def test_beats_keep_the_lease_and_are_written_now_and_then(memory: MemoryStore) -> None:
    take_epoch(memory, RUN8)
    epoch = Epoch(memory, RUN8, 1, clock=lambda: memory.now_s)
    start_s = memory.now_s
    beats = set()
    for _ in range(100):
        memory.now_s += 1
        epoch.beat()
        beats.add(memory.written_s[KEYS.heartbeat])
        with pytest.raises(RunLocked):
            take_epoch(memory, RUN8)
    assert memory.now_s - start_s > LEASE_TTL_S
    assert len(beats) == 100 / BEAT_INTERVAL_S


def test_beat_of_a_fenced_driver(memory: MemoryStore) -> None:
    take_epoch(memory, RUN8)
    epoch = Epoch(memory, RUN8, 1, clock=lambda: memory.now_s)
    take_epoch(memory, RUN8, takeover=True)
    with pytest.raises(Fenced):
        epoch.beat()
    assert json.loads(memory.read(KEYS.heartbeat))["epoch"] == 2


def test_run_that_was_erased_fences_its_driver(memory: MemoryStore) -> None:
    epoch = take_epoch(memory, RUN8)
    memory.delete_tree(KEYS.root)
    with pytest.raises(Fenced, match="gone"):
        epoch.check_not_fenced()
    epoch.close()
    assert memory.objects == {}, "closing must not bring the erased run back"


def test_race_for_the_next_epoch_has_one_winner(memory: MemoryStore) -> None:
    class Racing(MemoryStore):
        def put_if_absent(self, key: str, data: bytes) -> bool:
            # Another driver, between the listing and the creation.
            super().put_if_absent(key, data.replace(b'"token": "', b'"token": "x'))
            return super().put_if_absent(key, data)

    with pytest.raises(RunLocked, match="a moment faster"):
        take_epoch(Racing(), RUN8)


def test_driver_that_died_before_its_first_beat_holds_the_lease_until_the_ttl(memory: MemoryStore) -> None:
    take_epoch(memory, RUN8)
    memory.delete(KEYS.heartbeat)
    with pytest.raises(RunLocked):
        take_epoch(memory, RUN8)
    memory.now_s += LEASE_TTL_S + 1
    assert take_epoch(memory, RUN8).number == 2


_HOLDER = """
import sys
from b2batch.outputs.lease import take_epoch
from b2batch.outputs.store import LocalStore
take_epoch(LocalStore(sys.argv[1], sys.argv[2]), sys.argv[3])
print("taken", flush=True)
sys.stdin.read()
"""


def test_dead_process_on_this_host_frees_the_lease_at_once(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, KEYS.staging)
    store.probe()
    arguments = [sys.executable, "-c", _HOLDER, str(tmp_path), KEYS.staging, RUN8]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "taken\n"
        with pytest.raises(RunLocked, match=f"pid {holder.pid} "):
            take_epoch(store, RUN8)
        holder.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, but not reaped by us yet
        assert take_epoch(store, RUN8).number == 2


@pytest.fixture
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def _held_by(memory: MemoryStore, process: subprocess.Popen[bytes]) -> Epoch:
    epoch = take_epoch(memory, RUN8)
    owner = json.loads(memory.read(KEYS.epoch(1)))
    start = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    memory.put(KEYS.epoch(1), json.dumps({**owner, "pid": process.pid, "pid_start": start}).encode())
    return epoch


@pytest.mark.parametrize("jump_s", [86_400.0, -86_400.0])
def test_clock_that_jumps_does_not_end_a_lease_that_beats(
    memory: MemoryStore,
    monkeypatch: pytest.MonkeyPatch,
    other_process: subprocess.Popen[bytes],
    jump_s: float,
) -> None:
    _held_by(memory, other_process)
    memory.now_s += jump_s
    beats = itertools.count(2)

    def the_other_beats(seconds: float) -> None:
        memory.objects[KEYS.heartbeat] = json.dumps({"epoch": 1, "beat": next(beats)}).encode()

    monkeypatch.setattr(time, "sleep", the_other_beats)
    with pytest.raises(RunLocked):
        take_epoch(memory, RUN8)


@pytest.mark.parametrize("jump_s", [86_400.0, -86_400.0])
def test_clock_that_jumps_does_not_keep_a_lease_that_beats_no_more(
    memory: MemoryStore,
    monkeypatch: pytest.MonkeyPatch,
    other_process: subprocess.Popen[bytes],
    jump_s: float,
) -> None:
    first = _held_by(memory, other_process)
    memory.now_s += jump_s
    clock = itertools.count(0, 5)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert take_epoch(memory, RUN8).number == 2
    with pytest.raises(Fenced):
        first.check_not_fenced()


def test_stopped_driver_is_replaced_after_the_ttl_and_fenced_when_it_goes_on(
    memory: MemoryStore, other_process: subprocess.Popen[bytes]
) -> None:
    stopped = _held_by(memory, other_process)
    other_process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, other_process.pid, os.WSTOPPED | os.WNOWAIT)
    with pytest.raises(RunLocked):
        take_epoch(memory, RUN8)
    memory.now_s += LEASE_TTL_S + 1
    assert take_epoch(memory, RUN8).number == 2
    with pytest.raises(Fenced, match="epoch 2 took it over"):
        stopped.check_not_fenced()


def test_store_that_fails_does_not_end_the_lease(
    memory: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    take_epoch(memory, RUN8)
    epoch = Epoch(memory, RUN8, 1, clock=lambda: memory.now_s)

    def full(key: str, data: bytes) -> None:
        raise StorageFull("no space left")

    memory.put = full  # type: ignore[method-assign]
    epoch.beat()
    assert "no space left" in caplog.text
    del memory.put  # type: ignore[method-assign]
    memory.now_s += 3
    epoch.beat()
    assert memory.written_s[KEYS.heartbeat] == memory.now_s


def test_pid_of_another_host_says_nothing(memory: MemoryStore) -> None:
    take_epoch(memory, RUN8)
    owner = json.loads(memory.read(KEYS.epoch(1)))
    memory.put(KEYS.epoch(1), json.dumps({**owner, "host_id": "elsewhere", "pid": 2**30}).encode())
    with pytest.raises(RunLocked):
        take_epoch(memory, RUN8)


def test_pid_that_was_given_to_another_process(memory: MemoryStore) -> None:
    take_epoch(memory, RUN8)
    owner = json.loads(memory.read(KEYS.epoch(1)))
    memory.put(KEYS.epoch(1), json.dumps({**owner, "pid_start": "1"}).encode())
    assert take_epoch(memory, RUN8).number == 2


def test_staged_orphans_go_when_nobody_can_be_writing_them(memory: MemoryStore) -> None:
    memory.put(f"{KEYS.staging}/old", b"")
    memory.now_s += LEASE_TTL_S + 1
    memory.put(f"{KEYS.staging}/young", b"")
    take_epoch(memory, RUN8)
    assert [key for key, _ in memory.list(KEYS.staging)] == [f"{KEYS.staging}/young"]
