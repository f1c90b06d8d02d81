"""Identical requests run once: those in the engine at the same time, and those answered not long ago.

Only requests whose answer is the same whoever asks: greedy ones, scores and embeddings. What is drawn
depends on the request's id, so that each row of a sampled job has a draw of its own.
"""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict, deque
from dataclasses import replace

import xxhash

from b2batch.engine.engine import Engine
from b2batch.engine.request import AnyRequest, EmbedRequest, Finished, ScoreRequest

_MAX_KEPT_VALUES = 1_000_000  # tokens, scores and numbers of answers that are kept


class Deduplicator:
    """An engine that answers a repeated request from the first one's answer."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._kept: OrderedDict[bytes, Finished] = OrderedDict()  # the most recently used last
        self._num_kept_values = 0
        self._leaders: dict[bytes, AnyRequest] = {}  # what runs now
        self._followers: dict[bytes, list[AnyRequest]] = {}  # and who waits for it
        self._key_of: dict[str, bytes] = {}  # of leaders and followers
        self._ready: deque[Finished] = deque()
        self.num_reused = 0

    @property
    def has_work(self) -> bool:
        return self._engine.has_work or bool(self._ready)

    @property
    def num_waiting(self) -> int:
        """Sequences that are not in the batch yet."""
        return self._engine.num_waiting

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return self._engine.num_running

    @property
    def max_num_seqs(self) -> int:
        """Sequences that the batch holds at most."""
        return self._engine.max_num_seqs

    def add(self, request: AnyRequest) -> None:
        """As ``Engine.add``."""
        key = _key(request)
        if key is None:
            self._engine.add(request)
        elif key in self._kept:
            self._kept.move_to_end(key)
            self._ready.append(replace(self._kept[key], request_id=request.request_id))
            self.num_reused += 1
        elif key in self._leaders:
            self._followers.setdefault(key, []).append(request)
            self._key_of[request.request_id] = key
        else:
            self._lead(key, request)

    def step(self) -> list[Finished]:
        """As ``Engine.step``, and the answers that need none."""
        finished = list(self._ready)
        self._ready.clear()
        if self._engine.has_work:
            for done in self._engine.step():
                finished += self._share(done)
        return finished

    def shrink(self) -> str | None:
        """As ``Engine.shrink``; what was the same as the request taken out is tried by itself."""
        alone = self._engine.shrink()
        if alone is not None:
            self._succeed(alone)
        return alone

    def cancel(self, request_id: str) -> None:
        """As ``Engine.cancel``."""
        self._ready = deque(done for done in self._ready if done.request_id != request_id)
        key = self._key_of.get(request_id)
        if key is not None and self._leaders[key].request_id != request_id:
            del self._key_of[request_id]
            self._followers[key] = [r for r in self._followers[key] if r.request_id != request_id]
            return
        self._engine.cancel(request_id)
        self._succeed(request_id)

    def _lead(self, key: bytes, request: AnyRequest) -> None:
        self._engine.add(request)
        self._leaders[key] = request
        self._key_of[request.request_id] = key

    def _succeed(self, request_id: str) -> None:
        """A leader is gone without an answer: the first of those who wait for it takes its place."""
        key = self._key_of.pop(request_id, None)
        if key is None:
            return
        del self._leaders[key]
        followers = self._followers.pop(key, [])
        if followers:
            self._followers[key] = followers[1:]
            self._lead(key, followers[0])

    def _share(self, done: Finished) -> list[Finished]:
        """The answer for its own request and for all that wait for it."""
        key = self._key_of.pop(done.request_id, None)
        if key is None:
            return [done]
        del self._leaders[key]
        followers = self._followers.pop(key, [])
        for follower in followers:
            del self._key_of[follower.request_id]
        self.num_reused += len(followers)
        self._keep(key, done)
        return [done, *(replace(done, request_id=follower.request_id) for follower in followers)]

    def _keep(self, key: bytes, done: Finished) -> None:
        if not _is_sound(done):
            return  # what went wrong once is not repeated from memory
        self._kept[key] = done
        self._num_kept_values += _num_values(done)
        while self._num_kept_values > _MAX_KEPT_VALUES:
            _, oldest = self._kept.popitem(last=False)
            self._num_kept_values -= _num_values(oldest)


def _key(request: AnyRequest) -> bytes | None:
    """What two requests have in common exactly if their answers are the same; None where draws differ."""
    digest = xxhash.xxh3_128(array("q", request.prompt).tobytes())
    if isinstance(request, ScoreRequest):
        digest.update(repr([list(tokens) for tokens in request.continuations]).encode())
    elif isinstance(request, EmbedRequest):
        digest.update(request.pooling.encode())
    elif request.sampling.temperature > 0:
        return None
    else:
        digest.update(f"{request.sampling.model_dump_json()}{request.grammar}".encode())
    return digest.digest()


def _is_sound(done: Finished) -> bool:
    numbers = [score.loglikelihood for score in done.scores] + list(done.embedding[:1])
    return all(map(math.isfinite, numbers)) and not any(c.error for c in done.completions)


def _num_values(done: Finished) -> int:
    num_tokens = sum(len(completion.token_ids) for completion in done.completions)
    return 1 + num_tokens + len(done.scores) + len(done.embedding)
