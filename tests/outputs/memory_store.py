"""A store in memory with the failings of a real one: it can lose replies, and its clock is set by hand."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import BinaryIO

from b2batch.errors import StorageError
from b2batch.outputs.store import prove_exclusive_creation


class LostReplyError(StorageError):
    """The write happened; whoever asked for it does not know."""


class MemoryStore:
    uri = "memory:"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.written_s: dict[str, float] = {}
        self.now_s = 1000.0
        self.lose_next_reply = False

    def put_if_absent(self, key: str, data: bytes) -> bool:
        created = key not in self.objects
        if created:
            self.put(key, data)
        if self.lose_next_reply:
            self.lose_next_reply = False
            raise LostReplyError(key)
        return created

    def put(self, key: str, data: bytes) -> None:
        self.objects[key] = data
        self.written_s[key] = self.now_s

    def read(self, key: str) -> bytes:
        try:
            return self.objects[key]
        except KeyError:
            raise FileNotFoundError(key) from None

    def open(self, key: str) -> BinaryIO:
        return io.BytesIO(self.read(key))

    def exists(self, key: str) -> bool:
        return key in self.objects

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        yield from [(key, len(data)) for key, data in sorted(self.objects.items()) if key.startswith(prefix)]

    def delete(self, key: str) -> None:
        self.objects.pop(key, None)

    def delete_tree(self, key: str) -> None:
        for below, _ in self.list(f"{key}/"):
            self.delete(below)

    def age_s(self, key: str) -> float:
        self.read(key)
        return self.now_s - self.written_s[key]

    def probe(self) -> None:
        prove_exclusive_creation(self)


class CrashError(Exception):
    """Stands for kill -9."""


class CrashingStore(MemoryStore):
    """Dies before its n-th write or removal; what was done until then stays."""

    def __init__(self, shared: MemoryStore, num_steps: int) -> None:
        super().__init__()
        self.objects, self.written_s = shared.objects, shared.written_s
        self._num_steps_left = num_steps

    def _step(self) -> None:
        if not self._num_steps_left:
            raise CrashError
        self._num_steps_left -= 1

    def put(self, key: str, data: bytes) -> None:
        self._step()
        super().put(key, data)

    def delete(self, key: str) -> None:
        self._step()
        super().delete(key)
