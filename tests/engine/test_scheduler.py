"""The scheduler under random loads, with a model that only counts.

The arena is played by a list that says which token of whom stands in each slot, so that a key that
was overwritten, or never written, is seen when it is attended to.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from b2batch.engine.kv import PrefixSpan
from b2batch.engine.scheduler import Chunk, Limits, Scheduler, Step
from b2batch.engine.sequence import Sequence
from b2batch.spec import SamplingSpec

SAMPLING = SamplingSpec()


@dataclass
class FakeModel:
    """Holds the arena's content as (position, token history up to it), and checks every step."""

    limits: Limits
    arena: list[tuple[int, ...] | None] = field(default_factory=list)
    num_moves: int = 0

    def __post_init__(self) -> None:
        self.arena = [None] * self.limits.kv_cache_tokens

    def run(self, step: Step, running: list[Sequence]) -> None:
        assert step.chunks, "a step without work"
        assert sum(chunk.num_tokens for chunk in step.chunks) <= self.limits.max_num_batched_tokens
        assert all(chunk.num_tokens > 0 for chunk in step.chunks)
        assert len(running) <= self.limits.max_num_seqs
        for move in step.moves:
            stretch = self.arena[move.source : move.source + move.num_tokens]
            self.arena[move.target : move.target + move.num_tokens] = stretch
            self.num_moves += 1
        written: set[int] = set()
        for chunk in step.chunks:
            for offset in range(chunk.num_tokens):
                slot = chunk.slot + offset
                assert slot not in written, "two chunks write to one slot"
                written.add(slot)
                self.arena[slot] = tuple(chunk.owner.tokens[: chunk.start + offset + 1])
        for chunk in step.chunks:
            self.check_keys(chunk)

    def check_keys(self, chunk: Chunk) -> None:
        """Each key that the chunk attends to is that of its own history, in order, from 0 on."""
        prefix = chunk.prefix
        own = self.arena[chunk.slot - chunk.num_past : chunk.slot + chunk.num_tokens]
        shared = self.arena[prefix.span.start : prefix.span.start + prefix.length] if prefix else []
        history = tuple(chunk.owner.tokens[: chunk.start + chunk.num_tokens])
        assert [*shared, *own] == [history[: i + 1] for i in range(len(history))]
        if isinstance(chunk.owner, Sequence):
            assert (prefix.length if prefix else 0) + chunk.num_past == chunk.start


@dataclass(frozen=True)
class Load:
    """What is asked of the scheduler: (arrival step, prompt, tokens it will write, its max_tokens)."""

    limits: Limits
    arrivals: list[tuple[int, list[int], int, int]]


@st.composite
def loads(draw: st.DrawFn) -> Load:
    max_num_seqs = draw(st.integers(1, 6))
    templates = [[t] * draw(st.integers(0, 60)) for t in (1000, 2000)]
    arrivals = []
    for index in range(draw(st.integers(1, 10))):
        template = draw(st.sampled_from(templates))
        prompt = template + [index * 100 + i for i in range(draw(st.integers(1, 30)))]
        max_tokens = draw(st.integers(1, 150))
        answer = draw(st.integers(1, max_tokens))
        arrivals.append((draw(st.integers(0, 20)), prompt, answer, max_tokens))
    longest = max(len(prompt) + max_tokens for _, prompt, _, max_tokens in arrivals)
    limits = Limits(
        max_num_seqs,
        draw(st.integers(max_num_seqs, 80)),
        longest + draw(st.integers(0, 200)),
        draw(st.booleans()),
    )
    return Load(limits, arrivals)


def play(load: Load, runs_ahead: bool = False) -> tuple[Scheduler, FakeModel]:
    """Run a load to its end, checking every step.

    Where it ``runs_ahead``, which answers are over is told after the next step was chosen and ran.
    """
    scheduler, model = Scheduler(load.limits), FakeModel(load.limits)
    late = sorted(load.arrivals, key=lambda arrival: arrival[0])
    answers: dict[Sequence, int] = {}
    num_finished = num_steps = 0
    unread: list[Sequence] = []  # that got a token in the last step
    longest_wait = 50 * sum(len(prompt) + answer for _, prompt, answer, _ in load.arrivals) + 100
    while late or scheduler.has_work:
        while late and (late[0][0] <= num_steps or not scheduler.has_work):
            _, prompt, answer, max_tokens = late.pop(0)
            sequence = Sequence(str(len(answers)), 0, list(prompt), SAMPLING, max_tokens)
            answers[sequence] = answer
            scheduler.add(sequence)
        is_ahead = runs_ahead and scheduler.can_run_ahead
        if not is_ahead:
            num_finished += finish(scheduler, unread, answers)
            unread = []
        step = scheduler.schedule()
        assert step.chunks or (unread and not is_ahead) or not scheduler.has_work
        if step.chunks:
            model.run(step, scheduler.running)
        assert not (is_ahead and step.moves)
        scheduler.check_integrity()
        scheduler.advance(step)
        num_finished += finish(scheduler, unread, answers)
        unread = [owner for chunk in step.chunks if (owner := give_token(chunk, answers)) is not None]
        if not runs_ahead:
            num_finished += finish(scheduler, unread, answers)
            unread = []
        num_steps += 1
        assert num_steps < longest_wait, "no progress"
    assert num_finished == len(load.arrivals)
    assert all(sequence.num_generated == answer for sequence, answer in answers.items())
    return scheduler, model


def give_token(chunk: Chunk, answers: dict[Sequence, int]) -> Sequence | None:
    """Append a token where the chunk reached the end; the sequence if its answer was not over before."""
    owner = chunk.owner
    if isinstance(owner, PrefixSpan) or not chunk.logit_positions or owner.num_generated == answers[owner]:
        return None
    owner.tokens.append(10_000 + owner.num_generated)
    return owner


def finish(scheduler: Scheduler, read: list[Sequence], answers: dict[Sequence, int]) -> int:
    """Take out those whose last token was read; how many."""
    done = [sequence for sequence in read if sequence.num_generated == answers[sequence]]
    scheduler.finish(done)
    scheduler.check_integrity()
    return len(done)


@settings(max_examples=250)
@given(load=loads(), runs_ahead=st.booleans())
def test_any_load_ends_with_every_key_in_its_place(load: Load, runs_ahead: bool) -> None:
    play(load, runs_ahead)


def answers_of(num: int, prompt_tokens: int, answer: int) -> list[tuple[int, list[int], int, int]]:
    return [(0, [i * 1000 + j for j in range(prompt_tokens)], answer, answer) for i in range(num)]


def test_a_full_arena_preempts_and_moves_and_still_ends() -> None:
    scheduler, model = play(Load(Limits(8, 64, 400), answers_of(8, 10, 180)))
    assert scheduler.stats.num_preempted > 0
    assert model.num_moves > 0


def test_a_sequence_grows_past_its_first_reservation_when_alone() -> None:
    """Shorter neighbours came and went before and after it, so it stands in the arena's middle."""
    arrivals = [*answers_of(1, 100, 20), (0, [7] * 20, 170, 170), *answers_of(1, 60, 40)]
    play(Load(Limits(4, 300, 260), arrivals))


def test_a_warm_prefix_gives_way_to_a_growing_sequence() -> None:
    template = list(range(40))
    shared = [(0, [*template, 100 + i], 1, 1) for i in range(3)]
    play(Load(Limits(4, 300, 110), [*shared, (1, [7] * 10, 100, 100)]))


def test_a_shared_beginning_is_computed_once() -> None:
    template = list(range(50))
    limits = Limits(16, 4096, 4096)
    scheduler = Scheduler(limits)
    for i in range(8):
        scheduler.add(Sequence(str(i), 0, [*template, 100 + i], SAMPLING, 1))
    step = scheduler.schedule()
    assert sum(chunk.num_tokens for chunk in step.chunks) == 50 + 8
    without = Scheduler(Limits(16, 4096, 4096, enable_prefix_caching=False))
    for i in range(8):
        without.add(Sequence(str(i), 0, [*template, 100 + i], SAMPLING, 1))
    assert sum(chunk.num_tokens for chunk in without.schedule().chunks) == 8 * 51


def test_a_short_warm_beginning_does_not_hide_a_long_new_one() -> None:
    """Rows of a template come first; then documents under the same template, ten questions each."""
    template, document = list(range(40)), list(range(1000, 1200))
    scheduler = Scheduler(Limits(16, 4096, 4096))
    first = [Sequence(f"first-{i}", 0, [*template, 100 + i], SAMPLING, 1) for i in range(4)]
    then = [Sequence(f"then-{i}", 0, [*template, *document, 100 + i], SAMPLING, 1) for i in range(10)]
    single = [Sequence("single", 0, [*template, 7, 7], SAMPLING, 1)]
    num_computed = []
    for sequences in (first, then, single):
        for sequence in sequences:
            scheduler.add(sequence)
        step = scheduler.schedule()
        num_computed.append(sum(chunk.num_tokens for chunk in step.chunks))
        scheduler.advance(step)
        scheduler.finish(sequences)
    assert num_computed == [40 + 4, 240 + 10, 2]


def test_a_long_prompt_runs_in_chunks_in_order() -> None:
    scheduler = Scheduler(Limits(4, 16, 256))
    sequence = Sequence("long", 0, list(range(40)), SAMPLING, 4)
    scheduler.add(sequence)
    starts = []
    while not starts or starts[-1][1] < 40:
        step = scheduler.schedule()
        (chunk,) = step.chunks
        starts.append((chunk.start, chunk.start + chunk.num_tokens))
        scheduler.advance(step)
    assert starts == [(0, 16), (16, 32), (32, 40)]
