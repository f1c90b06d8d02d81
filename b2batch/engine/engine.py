"""Continuous batching on one device: *schedule, run, postprocess*, once a step.

    engine.add(Request(...))
    while engine.has_work:
        for finished in engine.step(): ...

Requests may be added at any time; each step's batch is filled from what is waiting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import torch
from llguidance import LLTokenizer
from torch import Tensor
from transformers import PreTrainedModel

from b2batch.engine.cuda_runner import make_runner
from b2batch.engine.heap import release_freed_memory
from b2batch.engine.pooling import Pool
from b2batch.engine.request import (
    AnyRequest,
    Completion,
    EmbedRequest,
    Finished,
    Request,
    Score,
    ScoreRequest,
)
from b2batch.engine.sampling import sample, token_logprobs
from b2batch.engine.scheduler import Chunk, Limits, Scheduler, SchedulerStats
from b2batch.engine.sequence import Sequence
from b2batch.engine.structured import Constraint, Grammars
from b2batch.rows import FinishReason
from b2batch.spec import SamplingSpec

_SCORING = SamplingSpec()
_LEAST_TOKENS = 16  # of a step, where memory is short


@dataclass(slots=True)
class EngineStats:
    """Running totals since the engine was made."""

    num_steps: int = 0
    num_computed_tokens: int = 0
    num_generated_tokens: int = 0
    sum_running: int = 0  # over steps; divided by num_steps it is the mean batch

    @property
    def mean_batch(self) -> float:
        return self.sum_running / self.num_steps if self.num_steps else 0.0


@dataclass(slots=True)
class _Pending:
    """A request whose sequences are on their way; ``done`` holds those that ended, by index."""

    request: AnyRequest
    num_sequences: int
    done: dict[int, Sequence]
    completions: dict[int, Completion]
    pool: Pool = field(default_factory=Pool)


class Engine:
    """Requests in, tokens out.

    ``stop_token_ids`` end an answer (unless ``ignore_eos``); ``decode`` turns ids into text and is
    needed for stop strings only, and ``make_vocabulary`` for grammars.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        limits: Limits,
        *,
        max_model_len: int,
        stop_token_ids: frozenset[int] = frozenset(),
        decode: Callable[[Seq[int]], str] | None = None,
        make_vocabulary: Callable[[], LLTokenizer] | None = None,
    ) -> None:
        if limits.kv_cache_tokens < max_model_len:
            raise ValueError(
                f"{limits.kv_cache_tokens} tokens of KV cannot hold a context of {max_model_len}"
            )
        if limits.max_num_batched_tokens < limits.max_num_seqs:
            raise ValueError("max_num_batched_tokens is less than max_num_seqs: some sequences would starve")
        self.stats = EngineStats()
        self._full_limits = limits
        self._scheduler = Scheduler(limits)
        self.runner = make_runner(model, limits.kv_cache_tokens, limits.max_num_seqs)
        self._max_model_len = max_model_len
        self._vocab_size: int = model.config.get_text_config().vocab_size
        self._stop_token_ids = stop_token_ids
        self._decode = decode
        self._grammars = (
            Grammars(make_vocabulary, self._vocab_size, num_threads=torch.get_num_threads())
            if make_vocabulary
            else None
        )
        self._pending: dict[str, _Pending] = {}

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def limits(self) -> Limits:
        """As the engine was made; ``shrink`` changes what holds at the moment."""
        return self._full_limits

    @property
    def max_num_seqs(self) -> int:
        """Sequences that the batch holds at most."""
        return self._scheduler.limits.max_num_seqs

    @property
    def num_waiting(self) -> int:
        """Sequences that are not in the batch yet."""
        return len(self._scheduler.waiting)

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._scheduler.running)

    @property
    def scheduler_stats(self) -> SchedulerStats:
        return self._scheduler.stats

    def add(self, request: AnyRequest) -> None:
        """Queue a request.

        Raises:
            ValueError: the prompt is empty or leaves no room for a token, it or the sampling names a
                token that the model does not have, or the id is in use.
        """
        if request.request_id in self._pending:
            raise ValueError(f"request {request.request_id} is in the engine already")
        if not request.prompt:
            raise ValueError("the prompt has no tokens")
        self._check_tokens("the prompt", request.prompt)
        sequences = self._sequences(request)
        self._pending[request.request_id] = _Pending(request, len(sequences), {}, {})
        for sequence in sequences:
            self._scheduler.add(sequence)

    def step(self) -> list[Finished]:
        """Run one step; return the requests that are done with it."""
        step = self._scheduler.schedule()
        if not step.chunks:
            if self.has_work:
                raise RuntimeError("the scheduler found nothing to run although there is work")
            return []
        self._begin_masks(step.chunks)
        logits = self.runner.run(step)
        self._scheduler.advance(step)
        ended = self._postprocess(step.chunks, logits) + self._embed(step.chunks)
        self.stats.num_steps += 1
        self.stats.num_computed_tokens += sum(chunk.num_tokens for chunk in step.chunks)
        self.stats.sum_running += self.num_running
        for sequence in ended:
            if sequence.span is not None and self._is_spoilt(sequence):
                self.runner.scrub(sequence.span)
        self._scheduler.finish(ended)
        return [finished for sequence in ended if (finished := self._collect(sequence))]

    def _is_spoilt(self, sequence: Sequence) -> bool:
        """Whether numbers that are not finite came out of a sequence that ended."""
        completion = self._pending[sequence.request_id].completions.get(sequence.index)
        if completion is not None:
            return completion.error is not None
        return not all(math.isfinite(logprob) for logprob, _ in sequence.scores.values())

    def shrink(self) -> str | None:
        """After a step that ran out of memory: compute what ran again, with half as much in a step.

        Where a lone sequence with few tokens a step is too much, its request is taken out and returned,
        and the steps have their full size again.
        """
        torch.cuda.empty_cache()
        release_freed_memory()
        limits = self._scheduler.limits
        if limits.max_num_seqs > 1 or limits.max_num_batched_tokens > _LEAST_TOKENS:
            num_seqs = max(1, min(limits.max_num_seqs, self.num_running) // 2)
            num_tokens = max(num_seqs, _LEAST_TOKENS, limits.max_num_batched_tokens // 2)
            self._scheduler.restart(replace(limits, max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens))
            return None
        alone = (self._scheduler.running or self._scheduler.waiting)[0].request_id
        self._scheduler.restart(self._full_limits)
        self.cancel(alone)
        return alone

    def cancel(self, request_id: str) -> None:
        """Forget a request, wherever it is; nothing if it is not here."""
        if self._pending.pop(request_id, None) is not None:
            self._scheduler.cancel(request_id)

    # -- requests to sequences --

    def _check_tokens(self, where: str, tokens: Iterable[int]) -> None:
        """One row's impossible token must not end the step of all."""
        for token in tokens:
            if not 0 <= token < self._vocab_size:
                raise ValueError(f"{where}: there is no token {token} in a vocabulary of {self._vocab_size}")

    def _sequences(self, request: AnyRequest) -> list[Sequence]:
        if isinstance(request, ScoreRequest):
            return self._score_paths(request)
        if isinstance(request, EmbedRequest):
            return self._embedded(request)
        return self._samples(request)

    def _embedded(self, request: EmbedRequest) -> list[Sequence]:
        if len(request.prompt) > self._max_model_len:
            raise ValueError(f"the prompt exceeds the context of {self._max_model_len}")
        self.runner.keep_hidden()
        prompt = list(request.prompt)
        return [Sequence(request.request_id, 0, prompt, _SCORING, 0, probes={}, pooling=request.pooling)]

    def _samples(self, request: Request) -> list[Sequence]:
        self._check_tokens("logit_bias", request.sampling.logit_bias)
        self._check_tokens("stop_token_ids", request.sampling.stop_token_ids)
        prompt = list(request.prompt)
        room = self._max_model_len - len(prompt)
        if room < 1:
            raise ValueError(f"a prompt of {len(prompt)} tokens fills the context of {self._max_model_len}")
        max_tokens = min(request.sampling.max_tokens or room, room)
        return [
            Sequence(
                request.request_id,
                index,
                list(prompt),
                request.sampling,
                max_tokens,
                constraint=self._constraint(request),
            )
            for index in range(request.sampling.n)
        ]

    def _constraint(self, request: Request) -> Constraint | None:
        if request.grammar is None:
            return None
        if self._grammars is None:
            raise ValueError("a grammar needs the engine to know the vocabulary")
        return self._grammars.constraint(request.grammar)

    def _score_paths(self, request: ScoreRequest) -> list[Sequence]:
        """The longest token paths that cover every continuation; a shorter one is probed on the way.

        So labels of one token each cost one forward pass of the prompt, not one a label.
        """
        if not request.continuations:
            raise ValueError("there is no continuation to score")
        paths: dict[tuple[int, ...], dict[int, set[int]]] = {}
        for continuation in sorted(request.continuations, key=len, reverse=True):
            if not continuation:
                raise ValueError("a continuation has no tokens")
            self._check_tokens("a continuation", continuation)
            if len(request.prompt) + len(continuation) > self._max_model_len:
                raise ValueError(f"prompt and continuation exceed the context of {self._max_model_len}")
            head = tuple(continuation[:-1])
            path = next((p for p in paths if p[: len(head)] == head), head)
            probes = paths.setdefault(path, {})
            for offset, token in enumerate(continuation):
                probes.setdefault(len(request.prompt) - 1 + offset, set()).add(token)
        return [
            Sequence(
                request.request_id,
                index,
                [*request.prompt, *path],
                _SCORING,
                max_tokens=0,
                probes={position: tuple(sorted(tokens)) for position, tokens in sorted(probes.items())},
            )
            for index, (path, probes) in enumerate(paths.items())
        ]

    # -- logits to tokens --

    def _postprocess(self, chunks: Seq[Chunk], logits: Tensor) -> list[Sequence]:
        """Sample or score every wanted position; return the sequences that ended."""
        ended: list[Sequence] = []
        sampled: list[Sequence] = []
        sampled_rows: list[int] = []
        row = 0
        for chunk in chunks:
            positions = chunk.logit_positions
            if positions and isinstance(chunk.owner, Sequence):
                if chunk.owner.probes is None:
                    sampled.append(chunk.owner)
                    sampled_rows.append(row)
                else:
                    _read_probes(chunk.owner, positions, logits[row : row + len(positions)])
                    if chunk.owner.num_pending == 0:
                        ended.append(chunk.owner)
            row += len(positions)
        if sampled:
            own = logits if len(sampled) == len(logits) else logits[sampled_rows]
            ended += self._append_tokens(sampled, own)
        return ended

    def _embed(self, chunks: Seq[Chunk]) -> list[Sequence]:
        """Take in the hidden states of the sequences that are embedded; return those that ended."""
        ended = []
        row = 0
        for chunk in chunks:
            owner = chunk.owner
            if isinstance(owner, Sequence) and owner.pooling is not None:
                hidden = self.runner.hidden[row : row + chunk.num_tokens]
                self._pending[owner.request_id].pool.take(hidden, chunk.start)
                if owner.num_pending == 0:
                    ended.append(owner)
            row += chunk.num_tokens
        return ended

    def _begin_masks(self, chunks: Seq[Chunk]) -> None:
        """Have the masks of the sequences that get a token in this step filled while the model runs."""
        if self._grammars is not None:
            owners = [chunk.owner for chunk in chunks if chunk.logit_positions]
            constraints = [o.constraint for o in owners if isinstance(o, Sequence) and o.constraint]
            self._grammars.begin_masks(constraints)

    @torch.inference_mode()
    def _constrain(self, sequences: list[Sequence], logits: Tensor) -> Tensor:
        """``logits`` without the tokens that grammars forbid."""
        rows = [row for row, sequence in enumerate(sequences) if sequence.constraint]
        if not rows:
            return logits
        assert self._grammars is not None
        forbidden = torch.from_numpy(self._grammars.masks()).to(logits.device)
        if len(rows) == len(sequences):
            if any(sequence.sampling.logprobs is not None for sequence in sequences):
                return logits.masked_fill(forbidden, float("-inf"))  # they are told as the model gave them
            return logits.masked_fill_(forbidden, float("-inf"))
        logits = logits.clone()
        logits[rows] = logits[rows].masked_fill(forbidden, float("-inf"))
        return logits

    def _append_tokens(self, sequences: list[Sequence], logits: Tensor) -> list[Sequence]:
        stops = [self._stops_of(sequence.sampling) for sequence in sequences]
        tokens = sample(self._constrain(sequences, logits), sequences, stops)
        self._append_logprobs(sequences, logits, tokens)
        ended = []
        for sequence, token, stop_ids in zip(sequences, tokens, stops, strict=True):
            completion = self._append(sequence, token, stop_ids)
            if completion is not None:
                self._pending[sequence.request_id].completions[sequence.index] = completion
                ended.append(sequence)
        self.stats.num_generated_tokens += len(tokens)
        return ended

    def _append(self, sequence: Sequence, token: int | None, stop_ids: frozenset[int]) -> Completion | None:
        """Give a sequence its next token; a Completion if it ended with it."""
        if token is None:
            return _complete(
                sequence,
                FinishReason.ERROR,
                error="the model gave no finite logits, or penalties and bias left none",
            )
        sequence.tokens.append(token)
        if sequence.constraint is not None:
            refusal = sequence.constraint.accept(token)
            if refusal is not None:
                return _complete(sequence, FinishReason.ERROR, error=f"the grammar failed: {refusal}")
        if token in stop_ids:
            return _complete(sequence, FinishReason.STOP, num_stop_tokens=1)
        if sequence.constraint is not None and sequence.constraint.is_complete:
            return _complete(sequence, FinishReason.STOP)
        stop = self._stop_text(sequence)
        if stop is not None:
            return _complete(sequence, FinishReason.STOP, stop=stop)
        if sequence.num_generated >= sequence.max_tokens:
            return _complete(sequence, FinishReason.LENGTH)
        return None

    def _stops_of(self, sampling: SamplingSpec) -> frozenset[int]:
        eos = frozenset() if sampling.ignore_eos else self._stop_token_ids
        return eos.union(sampling.stop_token_ids) if sampling.stop_token_ids else eos

    def _stop_text(self, sequence: Sequence) -> tuple[str, int] | None:
        """The stop string that the newest token completed, and the characters from its start on.

        The earliest in the text if there are several; one that was written before ``min_tokens`` is text.
        """
        sampling = sequence.sampling
        if not sampling.stop or sequence.num_generated < sampling.min_tokens:
            return None
        if self._decode is None:
            raise ValueError("stop strings need a decode function")
        reach = 4 * max(map(len, sampling.stop)) + 4  # a character is at most four byte tokens
        generated = sequence.generated[-reach:]
        tail = self._decode(generated)
        candidates = [stop for stop in sampling.stop if stop in tail]
        if not candidates:
            return None
        before = self._decode(generated[:-1])
        found = [(start, stop) for stop in candidates if (start := _find_new(stop, tail, before)) >= 0]
        if not found:
            return None
        start, stop = min(found)
        return stop, len(tail) - start

    def _append_logprobs(self, sequences: list[Sequence], logits: Tensor, tokens: list[int | None]) -> None:
        wanted = [
            i for i, s in enumerate(sequences) if s.sampling.logprobs is not None and tokens[i] is not None
        ]
        if not wanted:
            return
        found = token_logprobs(
            logits[wanted],
            [token for i in wanted if (token := tokens[i]) is not None],
            [sequences[i].sampling.logprobs or 0 for i in wanted],
        )
        for i, logprob in zip(wanted, found, strict=True):
            sequences[i].logprobs.append(logprob)

    # -- sequences to results --

    def _collect(self, sequence: Sequence) -> Finished | None:
        """Book an ended sequence; the request's result if it was the last one."""
        pending = self._pending[sequence.request_id]
        pending.done[sequence.index] = sequence
        if len(pending.done) < pending.num_sequences:
            return None
        del self._pending[sequence.request_id]
        if isinstance(pending.request, ScoreRequest):
            scores = _scores(pending.request, pending.done)
            return Finished(sequence.request_id, len(pending.request.prompt), scores=scores)
        if isinstance(pending.request, EmbedRequest):
            embedding = pending.pool.vector(pending.request.pooling)
            return Finished(sequence.request_id, len(pending.request.prompt), embedding=embedding)
        completions = tuple(pending.completions[i] for i in range(pending.num_sequences))
        return Finished(sequence.request_id, len(pending.request.prompt), completions)


def _complete(
    sequence: Sequence,
    reason: FinishReason,
    *,
    num_stop_tokens: int = 0,
    stop: tuple[str, int] = ("", 0),
    error: str | None = None,
) -> Completion:
    generated = tuple(sequence.generated)
    logprobs = tuple(sequence.logprobs) if sequence.sampling.logprobs is not None else None
    num_text_tokens = len(generated) - num_stop_tokens
    stop_text, num_cut_chars = stop
    return Completion(generated, num_text_tokens, reason, stop_text or None, num_cut_chars, logprobs, error)


def _find_new(stop: str, text: str, before: str) -> int:
    """Where ``stop`` first stands in ``text`` without having stood there in ``before``, or -1."""
    start = text.find(stop)
    while start >= 0 and before.startswith(stop, start):
        start = text.find(stop, start + 1)
    return start


def _read_probes(sequence: Sequence, positions: list[int], logits_RV: Tensor) -> None:
    """Note the log-probability of every probed token, and whether it was the most likely."""
    assert sequence.probes is not None
    logprobs = logits_RV.log_softmax(dim=-1)
    best = logits_RV.argmax(dim=-1).tolist()
    for row, position in enumerate(positions):
        tokens = sequence.probes[position]
        values = logprobs[row, list(tokens)].tolist()
        for token, value in zip(tokens, values, strict=True):
            sequence.scores[position, token] = (value, token == best[row])


def _scores(request: ScoreRequest, done: dict[int, Sequence]) -> tuple[Score, ...]:
    first = len(request.prompt) - 1
    scores = []
    for continuation in request.continuations:
        path = [*request.prompt, *continuation[:-1]]
        sequence = next(done[i] for i in sorted(done) if done[i].tokens[: len(path)] == path)
        parts = [sequence.scores[first + i, token] for i, token in enumerate(continuation)]
        scores.append(Score(sum(p[0] for p in parts), len(parts), all(p[1] for p in parts)))
    return tuple(scores)
