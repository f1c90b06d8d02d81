"""Which row of a unit takes replicas down: the search, death by death. Offsets only.

A unit that took a replica down is run again in pieces, one after the other, and the driver is told
which piece comes next before it begins. So a death names its piece:

    first death     the unit as a whole; nobody knows which row          → 8 pieces
    next death      one of the 8 pieces                                  → its rows, one by one
    next death      a row that ran alone                                 → the same row again
    next death      the same row, alone: it is condemned                 → the others go on

A row is condemned only when it took down a replica *twice while it ran alone*: once may be bad luck (a
machine's operator, another process on the node). That is four replicas for a row in a unit of up to
256, and what a piece survived is not run alone again. The condemned row's error is written with the
rest of its unit, so nothing is condemned for good on a machine on which nothing else works either.
"""

from __future__ import annotations

from collections import Counter

from b2batch.rows import Caution, CondemnedRow

Piece = tuple[int, ...]  # offsets of rows within their unit

_NUM_PIECES = 8
_FEW_ROWS = 32  # of a piece that took a replica down: from here on each of its rows is run alone
_DEATHS_ALONE = 2
_BLIND_DEATHS = 2


class Quarantine:
    """What is known about the rows of one unit that took a replica down."""

    def __init__(self, num_rows: int) -> None:
        self._condemned: list[CondemnedRow] = []
        self._suspects: list[Piece] = _split(tuple(range(num_rows)))
        self._cleared: Piece = ()
        self._deaths_alone: Counter[int] = Counter()
        self._num_blind_deaths = 0
        self._is_running = False
        self._num_begun = 0  # pieces of the attempt under way

    @property
    def num_condemned(self) -> int:
        """Rows that took a replica down twice while they ran alone."""
        return len(self._condemned)

    @property
    def is_hopeless(self) -> bool:
        """Replicas die before the first piece: reading the unit kills them, and no row can be blamed."""
        return self._num_blind_deaths >= _BLIND_DEATHS

    def begin(self) -> Caution:
        """How the next attempt is to be made."""
        self._is_running = True
        self._num_begun = 0
        return Caution(tuple(self._condemned), tuple(self._pieces))

    def on_piece_begun(self, number: int) -> bool:
        """The replica tells that this piece comes next; whether it has survived one before."""
        survived = 0 < self._num_begun <= number
        self._num_begun = max(self._num_begun, number + 1)
        return survived

    def on_death(self, detail: str) -> None:
        """The attempt took its replica down; ``detail`` is what is known of the death.

        Nothing follows when it was a copy, begun before the search.
        """
        if not self._is_running:
            return
        culprit = self._settle()
        if culprit is None:
            self._num_blind_deaths += 1
            return
        self._num_blind_deaths = 0
        if len(culprit) > 1:
            self._suspects[:0] = _split(culprit)
        elif not self._is_condemned(culprit[0], detail):
            self._suspects.insert(0, culprit)

    def on_interrupted(self) -> None:
        """The attempt ended, and not by a row."""
        culprit = self._settle()
        if culprit is not None:
            self._suspects.insert(0, culprit)

    @property
    def _pieces(self) -> list[Piece]:
        """Suspects first: they decide, and what is known to be safe is run in one go at the end."""
        return [*self._suspects, self._cleared] if self._cleared else list(self._suspects)

    def _settle(self) -> Piece | None:
        """Clear what the attempt survived; the piece that was running is taken out and returned."""
        pieces, num_begun = self._pieces, self._num_begun
        self._is_running, self._num_begun = False, 0
        if num_begun == 0:
            return None
        survived, culprit = pieces[: num_begun - 1], pieces[num_begun - 1]
        if num_begun > len(self._suspects):  # the last piece: what had been cleared before
            self._cleared = ()
        self._suspects = self._suspects[num_begun:]
        self._cleared = tuple(sorted([*self._cleared, *(row for piece in survived for row in piece)]))
        return culprit

    def _is_condemned(self, row: int, detail: str) -> bool:
        self._deaths_alone[row] += 1
        if self._deaths_alone[row] < _DEATHS_ALONE:
            return False
        self._condemned.append(CondemnedRow(row, self._deaths_alone[row], detail))
        return True


def _split(piece: Piece) -> list[Piece]:
    if len(piece) <= _FEW_ROWS:
        return [(row,) for row in piece]
    size = -(-len(piece) // _NUM_PIECES)
    return [piece[start : start + size] for start in range(0, len(piece), size)]
