"""Dataset → rows → work units. To add a format: a module with ``scan`` and ``open_rows``, and a line here."""

from b2batch.inputs import jsonl, openai_batch, parquet
from b2batch.inputs.reader import Format

READERS: dict[str, Format] = {
    "jsonl": jsonl,
    "parquet": parquet,
    "openai-batch": openai_batch,
}
