"""``b2batch init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from b2batch.errors import OutputError

TEMPLATE = """\
# A b2batch job. Check it with `b2batch validate`, see its prompts with `b2batch preview`, run it with
# `b2batch run`; the same `run` again goes on after any stop. Keys left out have their defaults.

name: my-job

model:
  # A name from configs/models (baichuan2-7b-chat), the embedded baichuan2-tiny, a hub id (owner/name),
  # ms://owner/name on ModelScope, or a directory.
  model: baichuan2-tiny
  # revision: v2.0
  # dtype: auto                # auto | float32 | bfloat16 | float16
  # max_model_len: 4096        # tokens of prompt and answer

input:
  path: prompts.jsonl          # files, globs, directories; JSONL (plain, .gz, .zst) or Parquet
  # limit: 100                 # the first rows only
  # rows_per_unit: 256         # rows that are leased, retried and committed at once

prompt:
  template: "{{ text }}"       # jinja over the row's columns; or `column: NAME` (text or messages)
  # system: "Answer in one word."
  # chat: auto                 # auto | true | false; auto: the chat format for chat models
  # on_too_long: error         # error | truncate_left | truncate_right

sampling:
  max_tokens: 256              # answers that are longer are cut, and counted as cut
  temperature: 0               # 0: greedy
  # top_p: 0.85
  # seed: 0
  # from_model: true           # take what is not given here from the checkpoint's generation_config.json

output:
  path: out/my-job             # a new directory; read it with any Parquet reader
  # columns: [id, text]        # input columns to carry; all when left out

# cluster:
#   address: auto              # auto | local | host:port | ray://…
#   replicas: auto             # as many as the GPUs (or cores) carry
#   gpus_per_replica: auto

# errors:
#   max_error_rate: 0.01       # failed rows that are still a success

# notify:                      # told how the job ended; try it with `b2batch notify`
#   - url: ${env:MY_WEBHOOK}   # of Slack, Feishu, DingTalk, WeCom, or any that takes JSON
#     events: [finish, failure, budget]
"""


def init(
    path: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The file to write.")] = Path("job.yaml"),
) -> None:
    """Write a commented job file to start from; an existing file is never replaced."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE)
    except FileExistsError:
        raise OutputError(f"{path} exists; choose another name") from None
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error
    typer.echo(f"wrote {path}; next: b2batch validate {path}")
