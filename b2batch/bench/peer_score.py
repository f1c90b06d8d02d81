"""Scoring as lm-eval does it through transformers: one request a choice, whole prompts in padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from b2batch.bench.batches import batched
from b2batch.bench.peer_engine import encode_prompt
from b2batch.bench.peer_job import Answer, Answers, BenchRow, PeerJob
from b2batch.bench.peer_transformers import PlainModel, load_plain


@dataclass(frozen=True, slots=True)
class _Choice:
    """One continuation of one row's prompt."""

    row: int
    prompt: Sequence[int]
    ids: Sequence[int]

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.ids)


def load(job: PeerJob) -> ScorePeer:
    """See ``Peer``."""
    return ScorePeer(job, load_plain(job))


class ScorePeer:
    """``score-loop<B>``: B requests a forward pass, longest first."""

    def __init__(self, job: PeerJob, plain: PlainModel) -> None:
        self._job = job
        self._plain = plain

    def answer(self, rows: Sequence[BenchRow]) -> Answers:
        """See ``Peer``."""
        choices = [choice for index, row in enumerate(rows) for choice in self._choices(index, row)]
        order = sorted(range(len(choices)), key=lambda i: -choices[i].num_tokens)
        scores = [0.0] * len(choices)
        for indexes in batched(order, self._job.size):
            for i, score in zip(indexes, self._score([choices[i] for i in indexes]), strict=True):
                scores[i] = score
        by_row: dict[int, list[float]] = {}
        for choice, score in zip(choices, scores, strict=True):
            by_row.setdefault(choice.row, []).append(score)
        lengths = {choice.row: len(choice.prompt) for choice in choices}
        return Answers([Answer(lengths[i], label=by_row[i].index(max(by_row[i]))) for i in range(len(rows))])

    def _choices(self, index: int, row: BenchRow) -> list[_Choice]:
        codec = self._plain.codec
        prompt = encode_prompt(codec, row) + codec.tokenizer.encode(self._job.answer_prefix)
        return [_Choice(index, prompt, codec.tokenizer.encode(choice)) for choice in row.choices]

    @torch.inference_mode()
    def _score(self, choices: Sequence[_Choice]) -> list[float]:
        """Log-likelihoods of one padded batch."""
        width = max(choice.num_tokens for choice in choices)
        pad, device = self._plain.pad_token_id, self._job.device
        ids = [[*c.prompt, *c.ids, *([pad] * (width - c.num_tokens))] for c in choices]
        mask = [[1] * c.num_tokens + [0] * (width - c.num_tokens) for c in choices]
        logits_BTV = self._plain.model(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            use_cache=False,
        ).logits
        scores = []
        for choice, logits_TV in zip(choices, logits_BTV, strict=True):
            own = logits_TV[len(choice.prompt) - 1 : choice.num_tokens - 1].float().log_softmax(-1)
            tokens = torch.tensor(choice.ids, device=device)[:, None]
            scores.append(float(own.gather(1, tokens).sum()))
        return scores
