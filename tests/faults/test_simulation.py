"""Hundreds of schedules of crashes, strays, stopped drivers and lost replies: each row exactly once."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from b2batch.cluster.policy import Loss
from b2batch.errors import B2BatchError

from .mutants import MUTANTS, planted
from .simulation import ProcessStore, Violation, World

NUM_SEEDS = 250
KINDS = {
    "driver died at a write",
    "driver died at start",
    "driver killed",
    "driver stopped or continued",
    "fenced",
    "locked out",
    "poison taken",
    "replica died at a write",
    "replica lost",
    "replica stopped or continued",
    "reply lost or doubled",
    "stray commit",
}


def run_seeds(num_seeds: int) -> Counter[str]:
    """How often each kind of fault came; the first violation is raised with its seed."""
    total: Counter[str] = Counter()
    for seed in range(num_seeds):
        world = World(Random(seed))
        try:
            world.run(150)
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        total += world.num_events
    return total


def test_seeded_schedules_keep_every_row_once() -> None:
    assert run_seeds(NUM_SEEDS).keys() == KINDS, "each kind of fault has come"


@settings(max_examples=50)
@given(random=st.randoms(use_true_random=False))
def test_any_schedule_keeps_every_row_once(random: Random) -> None:
    World(random).run(60)


class CalmWorld(World):
    """Nothing goes wrong but what the test does."""

    def choose_poison(self) -> frozenset[tuple[int, int]]:
        return frozenset()

    def new_process(self) -> ProcessStore:
        return ProcessStore(self.store)


def let_a_zombie_commit_last() -> None:
    """A replica is written off with a unit that it has generated, and commits after the run has ended."""
    world = CalmWorld(Random(0))
    world.start_a_driver_in_peace()
    [driver] = world.drivers
    victim = driver.replicas[0]
    world.work(victim)
    driver.hear(0)
    world.work(victim)
    assert victim.staged, "generated and not committed"
    driver.lose(0, Loss.HANG)
    [zombie], world.strays = world.strays, []
    while not world.num_successes:
        world.calm_round()
    world.commit(zombie)
    world.look()
    world.prove_end()


def test_the_commit_of_a_late_zombie_loses() -> None:
    let_a_zombie_commit_last()


@pytest.mark.parametrize("mutant", MUTANTS)
def test_schedules_turn_red_on_a_planted_bug(mutant: str) -> None:
    with planted(mutant), pytest.raises((Violation, B2BatchError, OSError)):
        run_seeds(NUM_SEEDS)


def test_the_late_zombie_turns_red_on_names_of_attempts() -> None:
    with planted("attempt-unique names"), pytest.raises(Violation, match="I2"):
        let_a_zombie_commit_last()
