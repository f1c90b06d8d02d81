"""Parquet is read on the thread that asks: nothing of Arrow's is left to trip over when a process ends."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import b2batch
from b2batch.parquet_bytes import read_parquet

PACKAGE = Path(b2batch.__file__).parent
READS = re.compile(r"pq\.read_table\(.*|ParquetFile\(.*\)\.read\(.*|parquet\.read\(.*|\.iter_batches\(.*")


def test_damaged_pages_are_noticed() -> None:
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": list(range(1000))}), sink, compression="none", write_page_checksum=True)
    data = bytearray(sink.getvalue())
    assert read_parquet(bytes(data)).num_rows == 1000
    data[len(data) // 4] ^= 1
    with pytest.raises((pa.ArrowException, OSError)):
        read_parquet(bytes(data))


def test_nothing_reads_parquet_by_other_threads() -> None:
    """Such a process aborts when it ends, one time in twenty-five: too seldom for a test to see."""
    sources = [path for path in PACKAGE.rglob("*.py") if "bench" not in path.parts]
    reads = {(path.name, found) for path in sources for found in READS.findall(path.read_text("utf-8"))}
    assert len(reads) >= 7
    assert [read for read in sorted(reads) if "use_threads=False" not in read[1]] == []
