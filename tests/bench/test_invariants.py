"""What the checks of a disturbed run find, each on an output that is wrong in one way."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from b2batch.bench.invariants import OutputWatch, check_exit, check_finished, read_rows

ROWS = [{"row_id": f"0:{n}", "status": "ok", "generated_text": f"answer {n}"} for n in range(12)]


def write_part(output: Path, number: int, rows: list[dict[str, str]], epoch: str = "") -> None:
    path = output / f"part-{number:06d}{epoch}-0123abcd.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, write_page_checksum=True)


def sign(output: Path) -> None:
    parts = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in output.glob("part-*")
    }
    (output / "_SUCCESS").write_text(json.dumps({"parts": parts}))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    for number in range(3):
        write_part(tmp_path, number, ROWS[4 * number : 4 * number + 4])
    sign(tmp_path)
    return tmp_path


def found(problems: list[str]) -> set[str]:
    return {problem.partition(":")[0] for problem in problems}


def test_a_sound_output(output: Path) -> None:
    watch = OutputWatch(output)
    assert [*watch.look(), *watch.look(), *check_finished(output, ROWS)] == []
    assert (watch.num_parts, watch.num_rows) == (3, 12)
    assert read_rows(output) == ROWS


def test_a_part_that_disappears(output: Path) -> None:
    watch = OutputWatch(output)
    watch.look()
    next(output.glob("part-000001*")).unlink()
    assert found(watch.look()) == {"I4"}
    assert found(check_finished(output, ROWS)) == {"I1", "I7"}


def test_a_part_that_is_written_again(output: Path) -> None:
    watch = OutputWatch(output)
    watch.look()
    next(output.glob("part-000001*")).unlink()
    write_part(output, 1, ROWS[4:8])
    assert found(watch.look()) == {"I4"}


def test_a_torn_part(output: Path) -> None:
    path = next(output.glob("part-000002*"))
    path.write_bytes(path.read_bytes()[:100])
    assert "I3" in found(OutputWatch(output).look())


def test_a_row_that_stands_twice(output: Path) -> None:
    write_part(output, 1, ROWS[4:8], epoch="-2")
    sign(output)
    assert found(OutputWatch(output).look()) == {"I2"}
    assert found(check_finished(output, ROWS)) == {"I2"}


def test_a_row_that_differs(output: Path) -> None:
    other = [dict(row, status="error") for row in ROWS[:1]] + ROWS[1:]
    assert found(check_finished(output, other)) == {"I5"}


def test_a_row_of_nobody(output: Path) -> None:
    assert found(check_finished(output, ROWS[:-1])) == {"I1"}


def test_success_before_all_is_there(output: Path) -> None:
    write_part(output, 3, [{"row_id": "0:12", "status": "ok", "generated_text": "late"}])
    assert found(OutputWatch(output).look()) == {"I7"}


def test_no_success(output: Path) -> None:
    (output / "_SUCCESS").unlink()
    assert found(check_finished(output, ROWS)) == {"I7"}


def test_leftovers(output: Path) -> None:
    staging = output / "__b2batch" / "0123abcd" / "tmp"
    staging.mkdir(parents=True)
    (staging / "half").touch()
    assert found(check_finished(output, ROWS)) == {"I11"}


def test_an_exit_code_that_the_status_does_not_tell(output: Path) -> None:
    run = output / "__b2batch" / "0123abcd"
    run.mkdir(parents=True)
    (run / "status.json").write_text('{"exit_code": 75}')
    assert check_exit(output, 75) == []
    assert found(check_exit(output, 0)) == {"I10"}
