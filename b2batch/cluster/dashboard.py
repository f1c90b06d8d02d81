"""Ray's Jobs API over HTTP: where a cluster's dashboard is, and the calls that ``JobsClient`` names."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import aiohttp
import requests
from packaging.requirements import Requirement
from ray.dashboard.utils import get_address_for_submission_client
from ray.exceptions import AuthenticationError, RpcError
from ray.job_submission import JobSubmissionClient

from b2batch.cluster.placement import address_of_ray_start
from b2batch.cluster.submission import OUTPUT_KEY, JobRequest, JobState, SubmittedJob, Unreachable
from b2batch.errors import B2BatchError, CallerError, ClusterError, Drained

logger = logging.getLogger(__name__)
for _chatty in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
    logging.getLogger(_chatty).setLevel(logging.WARNING)  # they tell of each connection on stderr

_TIMEOUT_S = 10.0
_ERRNO = re.compile(r"\[Errno -?\d+\] ([\w ]+)")
_RUN_COMMAND = "b2batch run "
_URL_VARIABLE = "RAY_API_SERVER_ADDRESS"
_ADDRESS_VARIABLE = "RAY_ADDRESS"


def find_dashboard(address: str | None) -> str:
    """The URL of a cluster's dashboard.

    Args:
        address: the URL, ``host:port`` of the dashboard or of the cluster, or None: as
            ``RAY_API_SERVER_ADDRESS`` or ``RAY_ADDRESS`` says, or of the cluster that ``ray start`` left
            on this machine.

    Raises:
        CallerError: no cluster is named, or by an address that no dashboard has.
        ClusterError: there is none at that address now.
    """
    named = address or os.environ.get(_URL_VARIABLE) or os.environ.get(_ADDRESS_VARIABLE) or "auto"
    if named.startswith(("http://", "https://")):
        return named.rstrip("/")
    if "://" in named:
        raise CallerError(f"--address {named}: is no dashboard; give its URL, such as http://HOST:8265")
    found = address_of_ray_start() if named == "auto" else named
    if found is None:
        raise CallerError(
            f"no Ray cluster runs on this machine: give --address http://HOST:8265, or set {_URL_VARIABLE}"
        )
    return _url_of(found)


def _url_of(place: str) -> str:
    """``host:port`` may be the dashboard's own, or the cluster's, which knows where its dashboard is."""
    host, _, port = place.rpartition(":")
    if not (host and port.isdecimal()):
        raise CallerError(f"--address {place}: expected http://HOST:8265, or HOST:PORT")
    url = f"http://{place}"
    try:
        socket.create_connection((host, int(port)), _TIMEOUT_S).close()
        if requests.get(f"{url}/api/version", timeout=_TIMEOUT_S).status_code < 500:
            return url
    except requests.RequestException:
        pass  # it speaks no HTTP: the cluster's port
    except OSError as error:
        raise ClusterError(f"--address {place}: nobody answers: {error}") from error
    try:
        with _addresses_unset():
            return get_address_for_submission_client(place)  # type: ignore[no-any-return]
    except (RuntimeError, ValueError, ConnectionError, RpcError, AuthenticationError) as error:
        if "AuthToken" in str(error):
            raise CallerError(_unauthorised(place, error)) from error
        raise ClusterError(f"--address {place}: names no dashboard: {_first_line(error)}") from error


@contextmanager
def _addresses_unset() -> Iterator[None]:
    """Ray lets these variables win over an address that was given."""
    before = {name: os.environ.pop(name, None) for name in (_URL_VARIABLE, _ADDRESS_VARIABLE)}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


class Dashboard:
    """A ``JobsClient`` of a real cluster.

    With ``RAY_AUTH_MODE=token`` each request carries the token of the environment (``RAY_AUTH_TOKEN``,
    ``RAY_AUTH_TOKEN_PATH`` or ``~/.ray/auth_token``).
    """

    def __init__(self, url: str) -> None:
        """Connect; nothing is sent but the question for the version.

        Raises:
            CallerError: something else answers, Ray there is too old, or wants a token.
            Unreachable: nobody answers.
        """
        self.url = url
        with self._asking(), _addresses_unset():
            _check_version(url)
            self._client = JobSubmissionClient(url)

    def submit(self, request: JobRequest) -> None:
        """Send the package, if the cluster has not got it, and start the job."""
        with tempfile.TemporaryDirectory() as directory, self._asking(request.submission_id):
            working_dir = request.working_dir
            if isinstance(working_dir, bytes):
                package = Path(directory) / "package.zip"
                package.write_bytes(working_dir)
                working_dir = str(package)
            try:
                self._client.submit_job(
                    entrypoint=request.entrypoint,
                    submission_id=request.submission_id,
                    runtime_env={**request.runtime_env, "working_dir": working_dir},
                    metadata={OUTPUT_KEY: request.output},
                )
            except (ValueError, TypeError) as error:  # what Ray refuses before it sends anything
                raise CallerError(f"the job's runtime_env: {_first_line(error)}") from error

    def jobs(self) -> list[SubmittedJob]:
        """b2batch's jobs that the cluster remembers, KubeRay's too, the oldest first."""
        with self._asking():
            found = [job for job in self._client.list_jobs() if _is_ours(job)]
        return [_submitted_job(job) for job in sorted(found, key=lambda job: job.start_time or 0)]

    def job(self, submission_id: str) -> SubmittedJob:
        """One job of any origin."""
        with self._asking(submission_id):
            return _submitted_job(self._client.get_job_info(submission_id))

    def logs(self, submission_id: str) -> str:
        """The whole log of the driver."""
        with self._asking(submission_id):
            return str(self._client.get_job_logs(submission_id))

    def follow(self, submission_id: str) -> Iterator[str]:
        """The log of the driver as it grows."""
        pieces = self._client.tail_job_logs(submission_id)

        async def next_piece() -> str | None:
            return await anext(pieces, None)

        with asyncio.Runner() as runner:
            while True:
                with self._asking(submission_id):
                    piece = runner.run(next_piece())
                if piece is None:
                    return
                yield piece

    def stop(self, submission_id: str) -> None:
        """Ray signals the driver, and waits for it as long as its environment says."""
        with self._asking(submission_id):
            self._client.stop_job(submission_id)

    @contextmanager
    def _asking(self, submission_id: str = "") -> Iterator[None]:
        """What can go wrong with a request, as errors of b2batch."""
        try:
            yield
        except (requests.RequestException, aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise Unreachable(f"the dashboard at {self.url} does not answer: {_cause(error)}") from error
        except AuthenticationError as error:
            raise CallerError(_unauthorised(self.url, error)) from error
        except RuntimeError as error:
            raise self._refused(str(error), submission_id) from error

    def _refused(self, text: str, submission_id: str) -> B2BatchError:
        if "status code 404" in text:
            return CallerError(
                f"there is no job {submission_id} at {self.url}: `b2batch list` names those there"
            )
        if "already exists" in text:
            return CallerError(f"the submission id {submission_id} was used before, and Ray takes an id once")
        if "WebSocket" in text:
            return Unreachable(f"the dashboard at {self.url} hung up")
        return ClusterError(f"the dashboard at {self.url} refused: {text.strip().splitlines()[-1][:500]}")


def _check_version(url: str) -> None:
    """Refuse what is no dashboard of Ray, or of one that b2batch cannot run on."""
    reply = requests.get(f"{url}/api/version", timeout=_TIMEOUT_S)
    if reply.status_code in (401, 403):
        return  # told apart by the client, which has the token
    try:
        found = str(reply.json()["ray_version"])
    except (ValueError, KeyError, TypeError):
        raise CallerError(f"{url} answers, but is no dashboard of Ray (HTTP {reply.status_code})") from None
    needed = next(need for text in requires("b2batch") or () if (need := Requirement(text)).name == "ray")
    if not needed.specifier.contains(found, prereleases=True):
        raise CallerError(f"{url}: Ray {found} runs there, and b2batch needs ray{needed.specifier}")
    if found != version("ray"):
        logger.warning("Ray %s runs there, %s here", found, version("ray"))


def _is_ours(details: Any) -> bool:
    return OUTPUT_KEY in (details.metadata or {}) or _RUN_COMMAND in details.entrypoint


def _submitted_job(details: Any) -> SubmittedJob:
    state = JobState(str(details.status).lower())
    if details.driver_exit_code == Drained.exit_code:
        state = JobState.STOPPED
    return SubmittedJob(
        submission_id=details.submission_id or details.job_id,
        state=state,
        output=(details.metadata or {}).get(OUTPUT_KEY, ""),
        exit_code=details.driver_exit_code,
        message=details.message or "",
        started=_time(details.start_time),
        ended=_time(details.end_time),
        has_driver=details.driver_agent_http_address is not None,
    )


def _time(milliseconds: int | None) -> str:
    if not milliseconds:
        return ""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def _unauthorised(url: str, error: Exception) -> str:
    what = "wants a token" if "required" in str(error).lower() else "does not take this token"
    return (
        f"{url} {what}: set RAY_AUTH_MODE=token, and the cluster's token as RAY_AUTH_TOKEN or in the file "
        "that RAY_AUTH_TOKEN_PATH names (default ~/.ray/auth_token)"
    )


def _cause(error: Exception) -> str:
    """The system's own words, which requests wraps in five layers of its own."""
    found = _ERRNO.search(str(error))
    if found:
        return found[1]
    return f"{type(error).__name__}; the cluster's own port speaks no HTTP, the dashboard's (8265) does"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
