"""Where everything stands in an output directory; every key the package writes is named here.

part-000123-1f3a9c7e.parquet       unit 123 of run 1f3a9c7e…; exists exactly when it is committed
_SUCCESS                           last
__b2batch/gen-0001.json            which run this directory holds (highest number)
__b2batch/1f3a9c7e/run.json        what the run was made from
__b2batch/1f3a9c7e/plan.parquet    its units
__b2batch/1f3a9c7e/plan-7c0be41d.parquet  those of a run that grew: the whole plan of its newest generation
__b2batch/1f3a9c7e/keys-55d0a1f3.parquet  the keys of the rows that one generation added
__b2batch/1f3a9c7e/epoch/00000003.json    one a driver start
__b2batch/1f3a9c7e/heartbeat.json  the lease of the newest epoch
__b2batch/1f3a9c7e/status.json     progress, exit reason
__b2batch/1f3a9c7e/errors.jsonl    the first failed rows, for eyes
__b2batch/1f3a9c7e/metrics.json    the labels measured against gold
__b2batch/1f3a9c7e/review/         rows that people should look at
__b2batch/1f3a9c7e/tmp/            staging; removing it fences the writers of a replaced run
__b2batch/5b1e77d0/merge.json      which parts a compaction replaces by which; 5b1e77d0 is in their names
__b2batch/quarantine/              parts of no run of this directory, set aside by ``verify --quarantine``
"""

from __future__ import annotations

import re
from typing import NamedTuple

META = "__b2batch"
QUARANTINE = f"{META}/quarantine"
SUCCESS = "_SUCCESS"
PART_PREFIX = "part-"
_PART_NAME = re.compile(r"part-(\d{6,})-([0-9a-f]{8})\.parquet")
_GENERATION_KEY = re.compile(rf"{META}/gen-(\d{{4,}})\.json")


class PartName(NamedTuple):
    """What the name of a part says."""

    unit_index: int
    run8: str


def part_name(unit_index: int, run8: str) -> str:
    """The one name under which a unit of a run can be committed."""
    return f"{PART_PREFIX}{unit_index:06d}-{run8}.parquet"


def parse_part_name(key: str) -> PartName | None:
    """The unit and run that ``key`` names, or None where it is not a part's name."""
    match = _PART_NAME.fullmatch(key)
    name = match and PartName(int(match[1]), match[2])
    return name if name and part_name(*name) == key else None


def generation_key(number: int) -> str:
    """The key of generation ``number`` (from 1)."""
    return f"{META}/gen-{number:04d}.json"


def parse_generation_key(key: str) -> int | None:
    """The generation number that ``key`` names, or None."""
    match = _GENERATION_KEY.fullmatch(key)
    return int(match[1]) if match else None


class RunKeys:
    """The keys of one run under ``__b2batch/``."""

    def __init__(self, run8: str) -> None:
        self.root = f"{META}/{run8}"
        self.record = f"{self.root}/run.json"
        self.plan = f"{self.root}/plan.parquet"
        self.epochs = f"{self.root}/epoch/"
        self.heartbeat = f"{self.root}/heartbeat.json"
        self.status = f"{self.root}/status.json"
        self.errors = f"{self.root}/errors.jsonl"
        self.metrics = f"{self.root}/metrics.json"
        self.review = f"{self.root}/review"
        self.staging = f"{self.root}/tmp"
        self.merge = f"{self.root}/merge.json"
        self._later_plans = f"{self.root}/plan-"

    def later_plan(self, digest: str) -> str:
        """The key of a plan that the run grew to, by its digest."""
        return f"{self._later_plans}{digest[:8]}.parquet"

    def is_later_plan(self, key: str) -> bool:
        """Whether ``key`` is that of a plan that the run grew to."""
        return key.startswith(self._later_plans)

    def row_keys(self, digest: str) -> str:
        """The key of an object that holds keys of rows, by its content's digest."""
        return f"{self.root}/keys-{digest[:8]}.parquet"

    def epoch(self, number: int) -> str:
        """The key of epoch ``number`` (from 1)."""
        return f"{self.epochs}{number:08d}.json"
