"""The search for rows that take replicas down: which attempts it takes, whom it condemns."""

from hypothesis import given
from hypothesis import strategies as st

from b2batch.cluster.quarantine import Quarantine


def search(num_rows, poison, luck=()):
    """Attempts at a unit that took a replica down once, until one survives.

    ``luck``: numbers of pieces, over all attempts, that take the replica down without being to blame.
    """
    quarantine, num_attempts, num_pieces = Quarantine(num_rows), 0, 0
    while True:
        caution = quarantine.begin()
        num_attempts += 1
        run = [row for piece in caution.pieces for row in piece]
        condemned = [row.offset for row in caution.condemned]
        assert sorted(run + condemned) == list(range(num_rows)), "every row once"
        for number, piece in enumerate(caution.pieces):
            quarantine.on_piece_begun(number)
            num_pieces += 1
            if poison & set(piece) or num_pieces in luck:
                quarantine.on_death("signal 11")
                break
        else:
            return num_attempts, set(condemned)


def test_one_row_of_256_costs_four_replicas():
    num_attempts, condemned = search(256, {77})
    assert condemned == {77}
    assert num_attempts == 4, "and the death that started the search: four deaths, five attempts"


@given(st.integers(1, 600), st.data())
def test_exactly_the_poison_is_condemned_within_a_bound(num_rows, data):
    poison = data.draw(st.sets(st.integers(0, num_rows - 1), max_size=6))
    num_attempts, condemned = search(num_rows, poison)
    assert condemned == poison
    assert num_attempts <= 1 + 5 * len(poison)


@given(st.integers(1, 300), st.sets(st.integers(1, 400), max_size=8))
def test_bad_luck_condemns_nobody_unless_it_strikes_a_lone_row_twice_running(num_rows, luck):
    luck = {strike for strike in luck if strike + 1 not in luck}
    num_attempts, condemned = search(num_rows, set(), luck)
    assert condemned == set()
    assert num_attempts <= 1 + len(luck)


def test_an_interrupted_attempt_blames_nobody_and_keeps_what_was_cleared():
    quarantine = Quarantine(256)
    quarantine.begin()
    for number in (0, 1, 2):
        quarantine.on_piece_begun(number)
    quarantine.on_interrupted()
    pieces = quarantine.begin().pieces
    assert pieces[0] == tuple(range(64, 96)), "the piece under way comes next"
    assert pieces[-1] == tuple(range(64)), "what survived is run in one go, at the end"


def test_the_death_of_a_copy_begun_before_the_search_is_part_of_the_first():
    quarantine = Quarantine(64)
    for _ in range(5):
        quarantine.on_death("signal 11")
    assert not quarantine.is_hopeless
    assert len(quarantine.begin().pieces) == 8


def test_deaths_before_any_piece_are_nobodys():
    quarantine = Quarantine(4)
    for _ in range(2):
        assert not quarantine.is_hopeless
        quarantine.begin()
        quarantine.on_death("signal 9")
    assert quarantine.is_hopeless
    assert quarantine.num_condemned == 0
