"""llama.cpp's server in this process, with continuous batching over slots; its weights may be 4-bit."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp

from b2batch.bench.peer_job import Answer, Answers, BenchRow, PeerJob


def load(job: PeerJob) -> LlamaCppPeer:
    """See ``Peer``."""
    settings = xllamacpp.CommonParams()
    settings.model.path = job.gguf
    settings.n_parallel = job.size
    settings.n_ctx = job.max_model_len * job.size
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = job.threads
    return LlamaCppPeer(job, xllamacpp.Server(settings))


class LlamaCppPeer:
    """``llamacpp<slots>``. The server tells how many tokens it made, not which."""

    def __init__(self, job: PeerJob, server: Any) -> None:
        self._job = job
        self._server = server

    def answer(self, rows: Sequence[BenchRow]) -> Answers:
        """See ``Peer``."""
        with ThreadPoolExecutor(self._job.size) as pool:
            return Answers(list(pool.map(self._answer, rows)))

    def _answer(self, row: BenchRow) -> Answer:
        found = self._server.handle_chat_completions(
            {
                "messages": [dict(message) for message in row.messages],
                "max_tokens": row.max_tokens,
                "temperature": self._job.temperature,
                "seed": self._job.seed,
                "ignore_eos": self._job.ignore_eos,
                "cache_prompt": True,
            }
        )
        usage = found["usage"]
        return Answer(
            usage["prompt_tokens"],
            [[-1] * usage["completion_tokens"]],
            [found["choices"][0]["message"]["content"]],
        )
