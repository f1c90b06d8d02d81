"""Continuous batching on one device: *schedule, run, postprocess*, once a step.

    engine.add(Request(...))
    while engine.has_work:
        for finished in engine.step(): ...

Requests may be added at any time; each step's batch is filled from what is waiting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import torch
from llguidance import LLTokenizer
from torch import Tensor
from transformers import PreTrainedModel

from b2batch.engine.cuda_runner import make_runner
from b2batch.engine.heap import release_freed_memory
from b2batch.engine.in_flight import InFlight, NewToken
from b2batch.engine.intake import Intake
from b2batch.engine.pooling import Pool
from b2batch.engine.request import (
    AnyRequest,
    Completion,
    EmbedRequest,
    Finished,
    Score,
    ScoreRequest,
)
from b2batch.engine.sampling import put, sample
from b2batch.engine.scheduler import Chunk, Limits, Scheduler, SchedulerStats
from b2batch.engine.sequence import Sequence
from b2batch.rows import FinishReason

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
    needed for stop strings only, and ``make_vocabulary`` for grammars. With ``runs_ahead`` a step is read
    after the next one was launched (see ``in_flight``): for a device that computes beside the host.
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
        runs_ahead: bool = False,
    ) -> None:
        if limits.kv_cache_tokens < max_model_len:
            raise ValueError(
                f"{limits.kv_cache_tokens} tokens of KV cannot hold a context of {max_model_len}"
            )
        if limits.max_num_batched_tokens < limits.max_num_seqs:
            raise ValueError("max_num_batched_tokens is less than max_num_seqs: some sequences would starve")
        self.stats = EngineStats()
        vocab_size: int = model.config.get_text_config().vocab_size
        self._intake = Intake(max_model_len, vocab_size, stop_token_ids, make_vocabulary)
        self._grammars = self._intake.grammars
        self._full_limits = limits
        self._scheduler = Scheduler(limits)
        self.runner = make_runner(model, limits.kv_cache_tokens, limits.max_num_seqs)
        self._decode = decode
        self._runs_ahead = runs_ahead
        self._in_flight: InFlight | None = None
        self._ready: list[Finished] = []  # found by what waited for the step in flight
        self._pending: dict[str, _Pending] = {}

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or bool(self._ready)

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
        sequences = self._intake.sequences(request)
        if isinstance(request, EmbedRequest):
            self.runner.keep_hidden()
        self._pending[request.request_id] = _Pending(request, len(sequences), {}, {})
        for sequence in sequences:
            self._scheduler.add(sequence)

    def step(self) -> list[Finished]:
        """Launch a step; return the requests that are found done, one step late where it runs ahead."""
        if not self._can_run_ahead:
            self._settle()
        launched = self._launch()
        self._settle()
        if launched is not None:
            launched.begin(self._is_over)
            self._in_flight = launched
            if not self._runs_ahead:
                self._settle()
        ready, self._ready = self._ready, []
        return ready

    @property
    def _can_run_ahead(self) -> bool:
        """Whether nobody on the host must know the tokens that are in flight before the next step."""
        if self._in_flight is None:
            return True
        in_flight = self._in_flight.sequences.values()
        return self._scheduler.can_run_ahead and all(sequence.constraint is None for sequence in in_flight)

    def _launch(self) -> InFlight | None:
        """Start a step, and return what gets a token in it. What is scored or embedded is read at once."""
        step = self._scheduler.schedule()
        if not step.chunks:
            if self._scheduler.has_work:
                raise RuntimeError("the scheduler found nothing to run although there is work")
            return None
        unread = self._in_flight.tokens if self._in_flight else None
        self._begin_masks(step.chunks)
        logits = self.runner.run(step, unread)
        self._scheduler.advance(step)
        launched = self._sample(step.chunks, logits, unread)
        self.stats.num_steps += 1
        self.stats.num_computed_tokens += sum(chunk.num_tokens for chunk in step.chunks)
        self.stats.sum_running += sum(isinstance(chunk.owner, Sequence) for chunk in step.chunks)
        self._end(self._score(step.chunks, logits) + self._embed(step.chunks))
        return launched

    def _settle(self) -> None:
        """Read the step in flight, if there is one, and end what is over with it."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is None:
            return
        ended = []
        for new in in_flight.read():
            completion = self._append(new)
            if completion is not None:
                self._pending[new.sequence.request_id].completions[new.sequence.index] = completion
                ended.append(new.sequence)
        self.stats.num_generated_tokens += len(in_flight.sequences)
        self._end(ended)

    def _end(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if sequence.span is not None and self._is_spoilt(sequence):
                self.runner.scrub(sequence.span)
        self._scheduler.finish(sequences)
        self._ready += [finished for sequence in sequences if (finished := self._collect(sequence))]

    def _is_over(self, sequence: Sequence) -> bool:
        pending = self._pending.get(sequence.request_id)
        return pending is None or sequence.index in pending.done

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
        limits, num_running = self._scheduler.limits, self.num_running
        alone = (self._scheduler.running or self._scheduler.waiting)[0]
        self._settle()  # before the answers are sent back to the queue
        if limits.max_num_seqs > 1 or limits.max_num_batched_tokens > _LEAST_TOKENS:
            num_seqs = max(1, min(limits.max_num_seqs, num_running) // 2)
            num_tokens = max(num_seqs, _LEAST_TOKENS, limits.max_num_batched_tokens // 2)
            self._scheduler.restart(replace(limits, max_num_seqs=num_seqs, max_num_batched_tokens=num_tokens))
            return None
        self._scheduler.restart(self._full_limits)
        if self._is_over(alone):
            return None
        self.cancel(alone.request_id)
        return alone.request_id

    def cancel(self, request_id: str) -> None:
        """Forget a request, wherever it is; nothing if it is not here."""
        self._settle()
        self._ready = [finished for finished in self._ready if finished.request_id != request_id]
        if self._pending.pop(request_id, None) is not None:
            self._scheduler.cancel(request_id)

    # -- logits to tokens --

    @torch.inference_mode()
    def _sample(self, chunks: Seq[Chunk], logits: Tensor, unread: Tensor | None) -> InFlight | None:
        """Choose the tokens of the sequences that go on; they stay on the device."""
        found = [(row, sequence) for row, sequence, _ in _wanted(chunks) if sequence.probes is None]
        if not found:
            return None
        rows, sequences = map(list, zip(*found, strict=True))
        if len(rows) < len(logits):
            logits = logits.index_select(0, put(rows, logits))
        tokens = sample(self._constrain(sequences, logits), sequences, unread)
        return InFlight.of(sequences, logits, tokens)

    def _score(self, chunks: Seq[Chunk], logits: Tensor) -> list[Sequence]:
        """Read the probed positions; return the sequences that ended."""
        ended = []
        for row, sequence, positions in _wanted(chunks):
            if sequence.probes is not None:
                _read_probes(sequence, positions, logits[row : row + len(positions)])
                if sequence.num_pending == 0:
                    ended.append(sequence)
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

    def _append(self, new: NewToken) -> Completion | None:
        """Give a sequence its next token; a Completion if it ended with it."""
        sequence, token = new.sequence, new.token
        if token is None:
            return _complete(
                sequence,
                FinishReason.ERROR,
                error="the model gave no finite logits, or penalties and bias left none",
            )
        sequence.tokens.append(token)
        if new.logprob is not None:
            sequence.logprobs.append(new.logprob)
        if sequence.constraint is not None:
            refusal = sequence.constraint.accept(token)
            if refusal is not None:
                return _complete(sequence, FinishReason.ERROR, error=f"the grammar failed: {refusal}")
        if token in sequence.stops:
            return _complete(sequence, FinishReason.STOP, num_stop_tokens=1)
        if sequence.constraint is not None and sequence.constraint.is_complete:
            return _complete(sequence, FinishReason.STOP)
        stop = self._stop_text(sequence)
        if stop is not None:
            return _complete(sequence, FinishReason.STOP, stop=stop)
        if sequence.num_generated >= sequence.max_tokens:
            return _complete(sequence, FinishReason.LENGTH)
        return None

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


def _wanted(chunks: Seq[Chunk]) -> Iterator[tuple[int, Sequence, list[int]]]:
    """The first row of logits, the sequence and the positions of each chunk that has some."""
    row = 0
    for chunk in chunks:
        positions = chunk.logit_positions
        if positions and isinstance(chunk.owner, Sequence):
            yield row, chunk.owner, positions
        row += len(positions)


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
