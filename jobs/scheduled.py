"""What a schedule's pod runs: it creates the RayJob of a manifest and waits until that has ended.

The RayJob is called as the pod's Job is. A pod that takes the place of another therefore finds the run that is there,
and the schedule's next date does not come (`concurrencyPolicy: Forbid`) before the run has ended. The Job owns it: who
deletes the one, or the CronJob, deletes the other.

Exit status: 0 the run succeeded; 1 it failed; 2 the cluster refuses it; 75 the cluster does not answer: the run may go
on, and another pod is to look after it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import yaml
from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_exponential

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
SECONDS_BETWEEN_LOOKS = 15.0
SUCCEEDED, FAILED, REFUSED, NO_ANSWER = 0, 1, 2, 75
_PATIENCE_S = 900.0


@dataclass(frozen=True)
class Api:
    """Kubernetes' API as a pod sees it: `account` is the folder of its token and of the server's certificate."""

    address: str
    account: Path = ACCOUNT
    patience_s: float = _PATIENCE_S

    def send(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> requests.Response:
        """Return the answer to a request; what passes by itself is waited for."""
        passing = retry_if_exception(_passes)
        for attempt in Retrying(
            retry=passing, wait=wait_exponential(max=30), stop=stop_after_delay(self.patience_s), reraise=True
        ):
            with attempt:
                answer = self._send(method, path, body)
                if answer.status_code == 429 or answer.status_code >= 500:
                    answer.raise_for_status()
        return answer

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> requests.Response:
        # The token is read each time: Kubernetes puts a new one in its place every hour.
        headers = {"Authorization": f"Bearer {(self.account / 'token').read_text().strip()}"}
        authority = str(self.account / "ca.crt")
        return requests.request(
            method, f"{self.address}{path}", json=body, headers=headers, verify=authority, timeout=60
        )


def _passes(error: BaseException) -> bool:
    if isinstance(error, requests.HTTPError):
        return True  # only those that pass are raised
    return isinstance(error, requests.ConnectionError | requests.Timeout)


def run_to_end(api: Api, run: Mapping[str, Any], say: Callable[[str], None], pause: Callable[[], None]) -> int:
    """Create a RayJob, unless it is there, and wait until it has ended; return the exit status."""
    place = f"/apis/ray.io/v1/namespaces/{run['metadata']['namespace']}/rayjobs"
    name, told = run["metadata"]["name"], ""
    answer = api.send("POST", place, run)
    if answer.status_code not in (201, 409):
        say(f"{name}: the cluster refuses the RayJob ({answer.status_code}): {_reason(answer)}")
        return REFUSED
    while True:
        answer = api.send("GET", f"{place}/{name}")
        if answer.status_code != 200:
            gone = answer.status_code == 404
            say(f"{name}: the RayJob {'was deleted' if gone else 'cannot be looked at'}: {_reason(answer)}")
            return FAILED if gone else NO_ANSWER
        status = answer.json().get("status", {})
        state = status.get("jobDeploymentStatus", "")
        if state != told:
            say(f"{name}: {state or 'created'} {status.get('message', '')}".rstrip())
            told = state
        if state in ("Complete", "Failed"):  # a run that is tried again is Retrying
            return SUCCEEDED if status.get("jobStatus") == "SUCCEEDED" else FAILED
        pause()


def _reason(answer: requests.Response) -> str:
    try:
        return str(answer.json().get("message", ""))
    except ValueError:
        return answer.text[:1000]


def named(run: Mapping[str, Any], job: str, uid: str) -> dict[str, Any]:
    """Return a RayJob's manifest with the name of a Job, and owned by it."""
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": uid, "blockOwnerDeletion": False}
    return {**run, "metadata": {**run["metadata"], "name": job, "ownerReferences": [owner]}}


def main() -> None:
    """Run the manifest that the command names."""
    run = named(yaml.safe_load(Path(sys.argv[1]).read_bytes()), os.environ["JOB_NAME"], os.environ["JOB_UID"])
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT_HTTPS"]
    api = Api(f"https://{f'[{host}]' if ':' in host else host}:{port}")
    try:
        sys.exit(run_to_end(api, run, lambda text: print(text, flush=True), lambda: time.sleep(SECONDS_BETWEEN_LOOKS)))
    except requests.RequestException as error:
        print(f"the cluster does not answer: {error}", flush=True)
        sys.exit(NO_ANSWER)


if __name__ == "__main__":
    main()
