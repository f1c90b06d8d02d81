"""transformers' own continuous batching, ``generate_batch``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from b2batch.bench.peer_engine import encode_prompt
from b2batch.bench.peer_job import Answers, BenchRow, PeerJob
from b2batch.bench.peer_transformers import PlainModel, load_plain, read_answer

_PAGE_TOKENS = 32
_STEP_TOKENS = 1024


def load(job: PeerJob) -> ContinuousPeer:
    """See ``Peer``."""
    return ContinuousPeer(job, load_plain(job))


class ContinuousPeer:
    """``hf-continuous<B>``: at most B requests at once on a CPU, its own settings on a GPU.

    Without flash-attn it runs one packed row under a dense mask, so on a CPU more requests at once
    cost more than they gain; sixteen were best there.
    """

    def __init__(self, job: PeerJob, plain: PlainModel) -> None:
        self._job = job
        self._plain = plain

    def answer(self, rows: Sequence[BenchRow]) -> Answers:
        """See ``Peer``."""
        prompts = [encode_prompt(self._plain.codec, row) for row in rows]
        longest = max(map(len, prompts)) + max(row.max_tokens for row in rows)
        config = self._plain.model.generation_config
        found = self._plain.model.generate_batch(
            inputs=prompts,
            generation_config=GenerationConfig(
                do_sample=self._job.temperature > 0,
                temperature=self._job.temperature or None,
                max_new_tokens=max(row.max_tokens for row in rows),
                eos_token_id=-1 if self._job.ignore_eos else config.eos_token_id,
                pad_token_id=config.pad_token_id,
                num_return_sequences=self._job.n,
            ),
            continuous_batching_config=ContinuousBatchingConfig(**self._limits(longest)),
            progress_bar=False,
            warmup=False,
        )
        outputs = [output.generated_tokens for output in found.values()]
        samples = [outputs[at : at + self._job.n] for at in range(0, len(outputs), self._job.n)]
        return Answers(
            [
                read_answer(self._plain, row, len(prompt), own)
                for row, prompt, own in zip(rows, prompts, samples, strict=True)
            ]
        )

    def _limits(self, longest: int) -> dict[str, Any]:
        if self._job.device != "cpu":
            return {}
        pages = math.ceil(longest / _PAGE_TOKENS) * self._job.size
        return {
            "page_size": _PAGE_TOKENS,
            "num_blocks": pages,
            "max_batch_tokens": _STEP_TOKENS,
            "max_requests_per_batch": self._job.size,
        }
