"""transformers' ``generate``: row by row as model cards show it, and in static padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from b2batch.bench.batches import batched
from b2batch.bench.peer_engine import encode_prompt, make_spec
from b2batch.bench.peer_job import Answer, Answers, BenchRow, PeerJob
from b2batch.models.checkpoint import open_checkpoint
from b2batch.models.families import PromptCodec, family_of


@dataclass(frozen=True, slots=True)
class PlainModel:
    """A model as transformers loads it, with nothing of the engine's, and its codec."""

    model: PreTrainedModel
    codec: PromptCodec
    stop_token_ids: frozenset[int]
    pad_token_id: int


def load_plain(job: PeerJob, **options: Any) -> PlainModel:
    """``from_pretrained`` with transformers' defaults but for ``options``."""
    torch.set_num_threads(job.threads)
    spec = make_spec(job).model
    checkpoint = open_checkpoint(spec, weights=True)
    family = family_of(checkpoint)
    codec = family.codec(checkpoint, spec)
    family.config_overrides(checkpoint, spec)  # makes transformers know the family
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.directory, dtype=getattr(torch, job.dtype), trust_remote_code=False, **options
    )
    model = model.to(job.device).eval()
    stops = frozenset() if job.ignore_eos else codec.stop_token_ids
    if job.ignore_eos:
        model.generation_config.eos_token_id = None
    pad = model.generation_config.pad_token_id
    model.generation_config.pad_token_id = pad = 0 if pad is None else pad
    return PlainModel(model, codec, stops, pad)


def load(job: PeerJob) -> BatchPeer:
    """See ``Peer``."""
    return BatchPeer(job, load_plain(job))


class BatchPeer:
    """``loop``, ``static<B>`` and ``sorted<B>``, which differ in size and order of their batches."""

    def __init__(self, job: PeerJob, plain: PlainModel) -> None:
        self._job = job
        self._plain = plain

    def answer(self, rows: Sequence[BenchRow]) -> Answers:
        """See ``Peer``."""
        prompts = [encode_prompt(self._plain.codec, row) for row in rows]
        order = list(range(len(rows)))
        if self._job.kind == "sorted":
            order.sort(key=lambda index: -len(prompts[index]))
        found: dict[int, Answer] = {}
        for indexes in batched(order, self._job.size):
            batch = self._generate([rows[i] for i in indexes], [prompts[i] for i in indexes])
            found.update(zip(indexes, batch, strict=True))
        return Answers([found[index] for index in range(len(rows))])

    @torch.inference_mode()
    def _generate(self, rows: Sequence[BenchRow], prompts: Sequence[Sequence[int]]) -> Iterator[Answer]:
        width = max(map(len, prompts))
        pad = self._plain.pad_token_id
        device = self._job.device
        ids = torch.tensor(
            [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device
        )
        mask = torch.tensor(
            [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device
        )
        is_greedy = self._job.temperature == 0
        sampling = {} if is_greedy else {"temperature": self._job.temperature, "top_k": 0, "top_p": 1.0}
        out = self._plain.model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=not is_greedy,
            max_new_tokens=max(row.max_tokens for row in rows),
            num_return_sequences=self._job.n,
            **sampling,
        )
        samples = batched(out[:, width:].tolist(), self._job.n)
        return (
            read_answer(self._plain, row, len(prompt), own)
            for row, prompt, own in zip(rows, prompts, samples, strict=True)
        )


def read_answer(
    plain: PlainModel, row: BenchRow, num_prompt_tokens: int, samples: Sequence[Sequence[int]]
) -> Answer:
    """Samples cut where the row's own answer ends, and their text."""
    cut = [_cut(ids, plain.stop_token_ids, row.max_tokens) for ids in samples]
    return Answer(num_prompt_tokens, cut, [plain.codec.tokenizer.decode(ids) for ids in cut])


def _cut(ids: Sequence[int], stops: frozenset[int], max_tokens: int) -> list[int]:
    kept = list(ids[:max_tokens])
    end = next((place for place, token in enumerate(kept) if token in stops), len(kept))
    return kept[: end + 1]
