"""Which tokens of which sequences run in the next step. Deques and ints, no tensors, no clock.

Each step: every running sequence gets its next token's worth of work, then waiting sequences are
admitted while there are tokens in the budget, places in the batch and room in the arena. A long
prompt runs in chunks over several steps. A span that must grow and cannot sends the youngest
sequence back to the queue; its tokens stay known and only their keys and values are computed again.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from b2batch.engine.kv import PrefixCache, PrefixSpan, SpanAllocator
from b2batch.engine.prefixes import shared_prefix_lengths
from b2batch.engine.sequence import Sequence

_FIRST_RESERVE = 64  # tokens reserved for an answer before any answer's length is known
_PREFIX_WINDOW = 4096  # waiting sequences that are searched for common beginnings at once


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step may hold and what the arena can. All in tokens but ``max_num_seqs``."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_tokens: int
    enable_prefix_caching: bool = True


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, start + num_tokens) of one sequence, or of a prefix, that run in a step.

    Their keys and values go to the arena from ``slot`` on; before them, ``num_past`` own tokens
    stand there already, and ``prefix`` (if any) is attended to as well.
    """

    owner: Sequence | PrefixSpan
    start: int
    num_tokens: int
    slot: int
    num_past: int
    prefix: PrefixSpan | None = None

    @property
    def tokens(self) -> list[int]:
        return list(self.owner.tokens[self.start : self.start + self.num_tokens])

    @property
    def logit_positions(self) -> list[int]:
        """Positions of the owner whose logits are wanted: those probed, or the last known one."""
        if isinstance(self.owner, PrefixSpan):
            return []
        stop = self.start + self.num_tokens
        if self.owner.probes is not None:
            return [position for position in self.owner.probes if self.start <= position < stop]
        return [stop - 1] if stop == len(self.owner.tokens) else []


@dataclass(frozen=True, slots=True)
class Move:
    """``num_tokens`` of keys and values to be copied within the arena before the step runs."""

    source: int
    target: int
    num_tokens: int


@dataclass(slots=True)
class Step:
    """One step's work. Chunks that attend to the same prefix stand next to each other."""

    chunks: list[Chunk] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)


@dataclass(slots=True)
class SchedulerStats:
    """Running totals, for reports and tests."""

    num_preempted: int = 0
    num_prefix_tokens_saved: int = 0
    num_recomputed_tokens: int = 0


class Scheduler:
    """Owns the queues and the arena's bookkeeping."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.stats = SchedulerStats()
        self._allocator = SpanAllocator(limits.kv_cache_tokens)
        self._prefixes = PrefixCache(self._allocator)
        self._ungrouped = 0  # sequences at the end of the queue that no prefix was sought for yet
        self._longest_answer = _FIRST_RESERVE

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def can_run_ahead(self) -> bool:
        """Whether the next step can be chosen before the tokens of the last one are read.

        Not where all running answers may be over. Nor where a span must grow: a sequence may have to move
        for that, or another to go, and one whose numbers turn out not to be finite must leave its span clean.
        """
        return any(s.num_pending for s in self.running) and not any(map(self._must_grow, self.running))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. It must fit the arena alone (the engine checks)."""
        self.waiting.append(sequence)
        self._ungrouped += 1

    def schedule(self) -> Step:
        """The next step's work; every running sequence moves on by at least a token if budget allows."""
        if self._ungrouped and len(self.running) < self.limits.max_num_seqs:
            self._group_waiting()
        step = Step()
        num_preempted = self.stats.num_preempted
        budget = self._continue_running(step)
        # After a preemption the arena is full, unless the last sequence sent itself back: then it is empty.
        if self.stats.num_preempted == num_preempted or not self.running:
            self._admit_waiting(step, budget)
        step.chunks.sort(key=lambda chunk: chunk.prefix.span.start if chunk.prefix else -1)
        return step

    def advance(self, step: Step) -> None:
        """Book the step's keys and values as computed."""
        for chunk in step.chunks:
            chunk.owner.num_computed = chunk.start + chunk.num_tokens

    def finish(self, sequences: Iterable[Sequence]) -> None:
        """Take finished sequences out and free what they held."""
        done = set(map(id, sequences))
        for sequence in [s for s in self.running if id(s) in done]:
            self._longest_answer = max(self._longest_answer, sequence.num_generated)
            self._release(sequence)
        self.running = [s for s in self.running if id(s) not in done]

    def restart(self, limits: Limits) -> None:
        """Send all running sequences back to the queue, in their order, and go on within ``limits``.

        The arena keeps its size. What a step that failed half way wrote there is never read.
        """
        while self.running:
            self._preempt_youngest()
        self.limits = limits

    def cancel(self, request_id: str) -> None:
        """Forget the sequences of a request."""
        self.finish([sequence for sequence in self.running if sequence.request_id == request_id])
        first_new = len(self.waiting) - self._ungrouped
        kept: deque[Sequence] = deque()
        for position, sequence in enumerate(self.waiting):
            if sequence.request_id != request_id:
                kept.append(sequence)
                continue
            self._release(sequence)
            self._ungrouped -= position >= first_new
        self.waiting = kept

    def check_integrity(self) -> None:
        """Raise AssertionError unless spans are disjoint and account for the whole arena."""
        self._allocator.check_integrity()
        spans = [s.span for s in self.running if s.span] + [prefix.span for prefix in self._prefixes]
        spans.sort(key=lambda span: span.start)
        for before, after in pairwise(spans):
            assert before.stop <= after.start, (before, after)
        assert sum(span.size for span in spans) + self._allocator.num_free == self.limits.kv_cache_tokens

    # -- running sequences --

    def _continue_running(self, step: Step) -> int:
        """Put the running sequences' pending tokens into ``step``; return the budget that is left."""
        budget = self.limits.max_num_batched_tokens
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            num_tokens = min(sequence.num_pending, budget)
            if not num_tokens:
                index += 1
                continue
            if not self._make_room(sequence, num_tokens, step):
                if self._preempt_youngest() is sequence:
                    break
                continue
            self._append_chunk(step, sequence, num_tokens)
            budget -= num_tokens
            index += 1
        return budget

    @staticmethod
    def _must_grow(sequence: Sequence) -> bool:
        assert sequence.span is not None
        used = sequence.num_computed - sequence.prefix_length
        return used + sequence.num_pending > sequence.span.size

    def _make_room(self, sequence: Sequence, num_tokens: int, step: Step) -> bool:
        """Grow the span so that ``num_tokens`` more fit; copy it elsewhere if it cannot grow in place."""
        span = sequence.span
        assert span is not None
        used = sequence.num_computed - sequence.prefix_length
        if used + num_tokens <= span.size:
            return True
        size = min(sequence.max_own, max(used + num_tokens, 2 * span.size))
        if self._allocator.extend(span, size):
            return True
        larger = self._prefixes.allocate(size)
        if larger is None:
            return False
        step.moves.append(Move(span.start, larger.start, used))
        self._allocator.free(span)
        sequence.span = larger
        return True

    def _preempt_youngest(self) -> Sequence:
        """Send the sequence admitted last back to the head of the queue."""
        sequence = self.running.pop()
        self.stats.num_preempted += 1
        self.stats.num_recomputed_tokens += sequence.num_computed - sequence.prefix_length
        self._release(sequence)
        self.waiting.appendleft(sequence)
        return sequence

    def _give_back_span(self, sequence: Sequence) -> None:
        if sequence.span is not None:
            self._allocator.free(sequence.span)
            sequence.span = None

    def _release(self, sequence: Sequence) -> None:
        self._give_back_span(sequence)
        if sequence.prefix is not None:
            self._prefixes.release(sequence.prefix)
            sequence.prefix = None
        sequence.num_computed = 0

    # -- waiting sequences --

    def _admit_waiting(self, step: Step, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.limits.max_num_seqs:
            sequence = self.waiting[0]
            if not self._place(sequence):
                return
            prefix = sequence.prefix
            if prefix is not None:
                budget -= self._append_prefix(step, prefix, budget)
                if not self._is_complete(prefix, step):  # the budget ended inside the prefix:
                    self._give_back_span(sequence)  # hold on to it until the next step
                    return
                self.stats.num_prefix_tokens_saved += prefix.length
            sequence.num_computed = sequence.prefix_length
            self.waiting.popleft()
            self._ungrouped = min(self._ungrouped, len(self.waiting))
            self.running.append(sequence)
            num_tokens = min(sequence.num_pending, budget)
            if num_tokens:
                self._append_chunk(step, sequence, num_tokens)
                budget -= num_tokens

    def _place(self, sequence: Sequence) -> bool:
        """Find a span, and the shared prefix if there is room for both; False when there is none."""
        if sequence.prefix_tokens and sequence.prefix is None:
            sequence.prefix = self._prefixes.acquire(sequence.prefix_tokens)
        sequence.span = self._prefixes.allocate(self._reservation(sequence))
        if sequence.span is None and not self.running:
            # Alone and still no room: it is the prefixes that queued sequences hold, its own included.
            for holder in self.waiting:
                self._release(holder)
            sequence.span = self._prefixes.allocate(self._reservation(sequence))
        if sequence.span is None:
            self._release(sequence)
        return sequence.span is not None

    def _reservation(self, sequence: Sequence) -> int:
        """Own tokens to reserve: all known ones and the longest answer seen, at most what can come.

        The least is one token more than is known, so that an admitted sequence can always move on.
        """
        answer = max(1, self._longest_answer - sequence.num_generated)
        return min(sequence.max_own, sequence.num_own + answer)

    def _append_prefix(self, step: Step, prefix: PrefixSpan, budget: int) -> int:
        """Schedule what is left of a prefix; return the tokens it took."""
        scheduled = sum(c.num_tokens for c in step.chunks if c.owner is prefix)
        start = prefix.num_computed + scheduled
        num_tokens = min(prefix.length - start, budget)
        if num_tokens:
            step.chunks.append(Chunk(prefix, start, num_tokens, prefix.span.start + start, start))
        return num_tokens

    @staticmethod
    def _is_complete(prefix: PrefixSpan, step: Step) -> bool:
        scheduled = sum(c.num_tokens for c in step.chunks if c.owner is prefix)
        return prefix.num_computed + scheduled == prefix.length

    def _group_waiting(self) -> None:
        """Give the newly queued sequences the prefixes they share, and put them in a good order.

        Those of one prefix follow each other, so that few prefixes are in use at a time, and the
        longest answers come first, so that the last steps are not those of one late straggler.
        Nobody passes a sequence that was queued before: none waits for ever.
        """
        new = [self.waiting.pop() for _ in range(self._ungrouped)][::-1]
        self._ungrouped = 0
        for start in range(0, len(new), _PREFIX_WINDOW):
            for group in self._groups(new[start : start + _PREFIX_WINDOW]):
                self.waiting += sorted(group, key=lambda s: (-s.max_tokens, -s.num_prompt))

    def _groups(self, window: list[Sequence]) -> list[list[Sequence]]:
        """The sequences of ``window`` by the prefix that they now have, in order of appearance."""
        groups: dict[tuple[int, ...], list[Sequence]] = defaultdict(list)
        if not self.limits.enable_prefix_caching:
            return [window]
        lengths = shared_prefix_lengths([s.shareable for s in window])
        for sequence, length in zip(window, lengths, strict=True):
            groups[tuple(sequence.tokens[:length])].append(sequence)
        for prefix, members in groups.items():
            self._choose_prefix(prefix, members)
        return list(groups.values())

    def _choose_prefix(self, prefix: tuple[int, ...], members: list[Sequence]) -> None:
        """Give ``members`` the prefix they have in common, or what is warm of it where that saves more."""
        warm = [self._prefixes.longest_match(sequence.shareable) for sequence in members]
        is_new_better = (len(members) - 1) * len(prefix) > sum(map(len, warm))
        for sequence, warm_prefix in zip(members, warm, strict=True):
            sequence.prefix_tokens = prefix if is_new_better else warm_prefix

    def _append_chunk(self, step: Step, sequence: Sequence, num_tokens: int) -> None:
        assert sequence.span is not None
        past = sequence.num_computed - sequence.prefix_length
        slot = sequence.span.start + past
        step.chunks.append(Chunk(sequence, sequence.num_computed, num_tokens, slot, past, sequence.prefix))
