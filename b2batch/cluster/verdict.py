"""What an error means for the run: whether another attempt can mend it, and what the user is told."""

from __future__ import annotations

from b2batch.errors import B2BatchError, CallerError, ClusterError, Fenced, UnitFailed

ErrorText = tuple[str, str, str]  # code, message, traceback


def final_error_class(code: str) -> type[B2BatchError] | None:
    """The class of an error that another attempt cannot mend: the caller's, drift, a lost lease."""
    error_class = _error_classes(B2BatchError).get(code)
    if error_class is None or (error_class.exit_code == 1 and error_class is not Fenced):
        return None
    return error_class


def start_error(error: ErrorText) -> B2BatchError:
    """Why no replica could be started, in the words of the last one."""
    code, message, traceback = error
    error_class = final_error_class(code)
    if error_class is not None and issubclass(error_class, CallerError):
        return error_class(message)
    return ClusterError(f"no replica could be started: {code}: {message}\n{traceback}".rstrip())


def deaths_error(num_deaths: int, detail: str) -> ClusterError:
    """Too many replicas died."""
    return ClusterError(f"{num_deaths} replicas died in a row and no unit was committed; the last: {detail}")


def start_timeout_error(timeout_s: float, num_ready: int, num_needed: int, detail: str) -> ClusterError:
    """Too few replicas came up; ``detail`` is why the last one did not, where that is known."""
    found = "no replica was" if not num_ready else f"{num_ready} of the {num_needed} replicas needed were"
    because = f"; one could not start: {detail}" if detail else ""
    return ClusterError(f"{found} ready within {timeout_s:.0f} s (cluster.start_timeout_s){because}")


def kills_error(unit: str, num_kills: int, detail: str) -> ClusterError:
    """A unit takes replicas down, and no row of it can be blamed."""
    return ClusterError(f"{unit}: {num_kills} replicas died before a row of it began; the last one: {detail}")


def condemned_error(unit: str, num_condemned: int, detail: str) -> ClusterError:
    """So many rows take replicas down that it cannot be the rows."""
    return ClusterError(
        f"{num_condemned} rows took their replicas down, each twice and alone: more than "
        f"errors.max_error_rate allows; the last one in {unit}: {detail}"
    )


def unit_error(unit: str, num_failures: int, error: ErrorText) -> UnitFailed:
    """A unit failed as often as it may be tried."""
    code, message, traceback = error
    return UnitFailed(
        f"{unit}: failed {num_failures} times, last with {code}: {message}\n{traceback}".rstrip()
    )


def _error_classes(root: type[B2BatchError]) -> dict[str, type[B2BatchError]]:
    classes = {root.__name__: root}
    for subclass in root.__subclasses__():
        classes.update(_error_classes(subclass))
    return classes
