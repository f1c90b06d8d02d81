"""Every error b2batch raises on purpose, and the exit code each one ends the process with.

B2BatchError                 1    failed, resumable: the same command again goes on
├── CallerError              2    what the user gave is wrong; retrying cannot help
│   ├── SpecError                 the job file: an unknown key, a value out of range
│   ├── InputError                the dataset: no such file, unreadable, wrong columns
│   ├── ModelError                the checkpoint: missing, malformed, not supported
│   └── OutputError               the output location: not writable, not ours
├── ErrorBudgetExceeded      3    finished, but more rows failed than allowed
├── IntegrityError           4    the bytes are not what they should be
│   └── DriftError                input or spec changed under an existing output
├── ClusterError             1    replicas could not be had or kept
├── UnitFailed               1    a unit of rows failed on every attempt
├── StorageError             1    the output's store failed or refuses; trying again may help
│   └── StorageFull               no space is left there
├── MeasurementFailed        1    a benchmark's process ended without a result
├── ReplicaSuspect           1    a replica computes nonsense; it is replaced
├── Fenced                   1    another driver took over this run
├── Drained                 75    stopped cleanly; requeue
├── NothingToDo             99    nothing is new in the input, or the tick is finished
├── PlanOutdated            99    another command changed the run since this one was planned
└── RunLocked               99    another live driver holds this output

RowError                     -    one row's fault: becomes a row with ``status = error``
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class B2BatchError(Exception):
    """Base of everything raised on purpose. The message alone must tell a user what to do."""

    exit_code = 1


class CallerError(B2BatchError):
    """What the caller gave is wrong: refused before any replica starts."""

    exit_code = 2


class SpecError(CallerError):
    """The job file or a ``--set`` override is not valid."""


class InputError(CallerError):
    """The input dataset cannot be planned: missing, unreadable or with the wrong columns."""


class ModelError(CallerError):
    """The checkpoint cannot be loaded, or its architecture is not supported."""


class OutputError(CallerError):
    """The output location cannot be used: not writable, or it holds somebody else's files."""


class ErrorBudgetExceeded(B2BatchError):
    """The run ended, but more rows failed than ``errors.max_error_rate`` allows."""

    exit_code = 3


class IntegrityError(B2BatchError):
    """Committed data is not what its footer, the plan or ``_SUCCESS`` says it is."""

    exit_code = 4


class DriftError(IntegrityError):
    """The input or the spec is not what the existing output was made from."""


class ClusterError(B2BatchError):
    """Replicas could not be started, or died more often than the budget allows."""


class UnitFailed(B2BatchError):
    """A unit failed by an error, not a row's, as often as it may be tried."""


class StorageError(B2BatchError, OSError):
    """The output's store failed, cannot be reached, or refuses: nothing torn is visible, try again later."""


class StorageFull(StorageError):
    """No space, or no quota, is left in the output's store; it may be given some."""


class MeasurementFailed(B2BatchError):
    """One measurement of a benchmark gave no result; the message is the end of what it said."""


class ReplicaSuspect(B2BatchError):
    """A replica's model gave no finite logits for a whole batch: it may be damaged, and is replaced."""


class Fenced(B2BatchError):
    """A newer driver epoch owns this run; this driver must not commit any more."""


class Drained(B2BatchError):
    """The run was asked to stop and did so cleanly; the same command resumes it."""

    exit_code = 75


class NothingToDo(B2BatchError):
    """Nothing is new in an incremental job's input, or the tick is finished."""

    exit_code = 99


class PlanOutdated(B2BatchError):
    """Another command began or extended the run while this one planned; the same command plans anew."""

    exit_code = 99


class RunLocked(B2BatchError):
    """Another live driver holds the lease of this output."""

    exit_code = 99


class RowFault(StrEnum):
    """Why a row failed: the ``type`` of its ``error`` struct in the output."""

    INPUT_JSON = "INPUT_JSON"
    INPUT_UTF8 = "INPUT_UTF8"
    INPUT_UNICODE = "INPUT_UNICODE"
    INPUT_TOO_LARGE = "INPUT_TOO_LARGE"
    INPUT_SCHEMA = "INPUT_SCHEMA"
    FILE = "FILE"
    PROMPT_MISSING = "PROMPT_MISSING"
    PROMPT_TYPE = "PROMPT_TYPE"
    PROMPT_TEMPLATE = "PROMPT_TEMPLATE"
    PROMPT_EMPTY = "PROMPT_EMPTY"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    SAMPLING = "SAMPLING"
    PROCESSOR = "PROCESSOR"
    NAN = "NAN"
    OOM = "OOM"
    WORKER_CRASH = "WORKER_CRASH"


class Stage(StrEnum):
    """Where on its journey a row failed: the ``stage`` of its ``error`` struct."""

    READ = "read"
    RENDER = "render"
    ENCODE = "encode"
    GENERATE = "generate"
    CRASH = "crash"


@dataclass(frozen=True, slots=True)
class RowFailure:
    """What stands in a failed row's ``error`` column. ``message`` is at most 2 kB."""

    fault: RowFault
    message: str
    stage: Stage
    attempts: int = 1


class RowError(B2BatchError):
    """One row cannot be answered. Caught where the row is handled; never ends a job by itself."""

    def __init__(self, fault: RowFault, message: str, stage: Stage) -> None:
        super().__init__(message)
        self.failure = RowFailure(fault, message[:2000], stage)
