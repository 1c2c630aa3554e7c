"""A job as Kubernetes manifests for KubeRay (ray.io/v1): built as data, written as YAML by its library.

    ConfigMap: the job spec          mounted in the head's pod
    RayJob: a cluster for one run    head (plans, does no rows) + groups of workers; gone when the run has ended
    CronJob: a schedule              its pod creates the RayJob and waits for its end, so that runs never overlap

A run that fails is tried again on a new cluster, up to `retries`: what is done stands in the output, and the new run
goes on there. Failed rows are no failed run: they would only be looked at again, on one new cluster after the other.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import yaml

from jobs.cron import check_cron
from jobs.profile import NAME, Group, Place, Profile
from jobs.scheduled import FAILED, REFUSED
from jobs.shipping import SPEC_FILE, Shipment
from jobs.yaml12 import Dumper, dump

Manifest = dict[str, Any]

FOLDER = "/etc/ditflow"
"""Where the job spec is in the head's pod."""
RAYJOB_FILE = "rayjob.yaml"

# KubeRay takes RayJobs' names of up to 47 characters, for it appends to them. A single run's name gets 6 characters
# from Kubernetes; a scheduled one's is its Job's: the CronJob's and 11 more (its time in minutes).
LONGEST_NAME, SUFFIX, CRON_SUFFIX = 47, 6, 11
_LARGEST_CONFIG = 1024**2 - 1024
_MOST_KUEUE_GROUPS = 7


CRONS = ("cronjob", "raycronjob")


class SubmissionError(ValueError):
    """A job that cannot be submitted as it was asked for."""


@dataclass(frozen=True)
class Wish:
    """How a job is to be run. name: None for the job's own. cron: what makes a schedule's runs, of CRONS."""

    name: str | None = None
    schedule: str | None = None
    cron: str = "cronjob"
    queue: str | None = None


@dataclass(frozen=True)
class Manifests:
    """What is submitted. `applied` may be applied again and again; `created` is one new run."""

    applied: list[Manifest]
    created: list[Manifest]

    def to_yaml(self) -> str:
        """Return all of them as one YAML stream."""
        return as_yaml([*self.applied, *self.created])


def render(shipment: Shipment, profile: Profile, wish: Wish) -> Manifests:
    """Return the manifests of a job. Raises SubmissionError for what Kubernetes or KubeRay would refuse."""
    _check(profile, wish)
    builder = _Builder(_name(shipment.job.name, wish), shipment, profile, wish)
    if wish.schedule is None:
        return Manifests([builder.config()], [builder.single_run()])
    if wish.cron == "raycronjob":
        return Manifests([builder.config(), builder.ray_cron_job(wish.schedule)], [])
    return Manifests(builder.schedule(wish.schedule), [])


def as_yaml(manifests: list[Manifest]) -> str:
    """Return manifests as a YAML stream. Texts of several lines keep their lines, so that they can be read."""
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(Dumper):
    """Writes texts of several lines as blocks, and repeats what is the same instead of pointing to it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _check(profile: Profile, wish: Wish) -> None:
    if wish.cron not in CRONS:
        raise SubmissionError(f"--cron: {wish.cron!r} is not valid: expected {' or '.join(CRONS)}")
    if wish.schedule is not None:
        check_cron(wish.schedule)
    if wish.queue is not None and len(profile.groups) > _MOST_KUEUE_GROUPS:
        raise SubmissionError(
            f"--queue: the profile has {len(profile.groups)} groups; Kueue takes at most {_MOST_KUEUE_GROUPS}"
        )
    if wish.queue is not None and wish.cron == "raycronjob":
        raise SubmissionError("--queue: a RayCronJob hands no label on to its RayJobs: take --cron cronjob")
    # KubeRay hands the runtime environment to a shell, in double quotes.
    text = dump(profile.runtime_env)
    if found := re.search(r"[$`]", text):
        raise SubmissionError(
            f"runtime_env: a {found[0]!r} in it would be expanded by a shell on its way: leave it out"
        )


def _name(job: str, wish: Wish) -> str:
    """Return a job's name as Kubernetes takes it, with room for what is appended."""
    longest = LONGEST_NAME - (SUFFIX if wish.schedule is None else CRON_SUFFIX)
    name = wish.name if wish.name is not None else re.sub(r"[^a-z0-9]+", "-", job.lower()).strip("-")
    if not NAME.fullmatch(name) or len(name) > longest:
        raise SubmissionError(
            f"{name!r} is no name for Kubernetes: expected at most {longest} lower-case letters, digits and '-', the "
            "first a letter. Give one with --name."
        )
    return name


@dataclass(frozen=True)
class _Builder:
    """Builds the manifests of one job on one cluster."""

    name: str
    shipment: Shipment
    profile: Profile
    wish: Wish

    # ------------------------------------------------------------------------------------------------ what it makes

    def config(self) -> Manifest:
        """The job spec. It never changes: another spec has another name, so that no run finds it changed."""
        size = len(self.shipment.text.encode())
        if size > _LARGEST_CONFIG:
            raise SubmissionError(
                f"the job spec has {size} bytes, more than a ConfigMap holds ({_LARGEST_CONFIG}). Put the prompts into "
                "a table on the storage: prompts: {uri: s3://bucket/prompts.parquet}"
            )
        return self._file(self._spec_name(), SPEC_FILE, self.shipment.text)

    def _file(self, name: str, file: str, text: str) -> Manifest:
        return {**self._head("v1", "ConfigMap", name), "immutable": True, "data": {file: text}}

    def single_run(self) -> Manifest:
        """A RayJob whose name Kubernetes completes: every submission is a run of its own."""
        head = self._head("ray.io/v1", "RayJob", self.name, self._queue_label())
        metadata = head["metadata"]
        head["metadata"] = {"generateName": f"{metadata.pop('name')}-", **metadata}
        return {**head, "spec": self._ray_job_spec()}

    def ray_cron_job(self, schedule: str) -> Manifest:
        """KubeRay's own schedule. It lets runs overlap: the later one is refused by the output's lease."""
        head = self._head("ray.io/v1", "RayCronJob", self.name, self._queue_label())
        return {**head, "spec": {"schedule": schedule, "jobTemplate": self._ray_job_spec()}}

    def schedule(self, schedule: str) -> list[Manifest]:
        """A CronJob with what it needs: the RayJob to create, and the right to create it and to look at it."""
        head = self._head("ray.io/v1", "RayJob", self.name, self._queue_label())
        text = as_yaml([{**head, "spec": self._ray_job_spec()}])
        holder = f"{self.name}-run-{_digest(text)}"
        return [
            self.config(),
            self._file(holder, RAYJOB_FILE, text),
            *self._rights(),
            self._cron_job(schedule, holder),
        ]

    # ------------------------------------------------------------------------------------------------ the RayJob

    def _ray_job_spec(self) -> Manifest:
        profile = self.profile
        spec: Manifest = {
            "entrypoint": f"ditflow run {FOLDER}/{SPEC_FILE} --allow-failed-rows",
            "submissionMode": "K8sJobMode",
            "backoffLimit": profile.retries,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": profile.keep_s,
        }
        if profile.deadline_s is not None:
            spec["activeDeadlineSeconds"] = profile.deadline_s
        if profile.runtime_env:
            spec["runtimeEnvYAML"] = dump(profile.runtime_env)
        spec["submitterPodTemplate"] = {"spec": self._submitter_pod()}
        spec["rayClusterSpec"] = self._cluster()
        return spec

    def _cluster(self) -> Manifest:
        """Kueue admits a cluster as a whole: then all workers are asked for at once, and none is given back."""
        scales = self.wish.queue is None
        cluster: Manifest = {"rayVersion": version("ray"), "enableInTreeAutoscaling": scales}
        if scales:
            cluster["autoscalerOptions"] = {
                "version": "v2",
                "idleTimeoutSeconds": self.profile.idle_s,
                "securityContext": _RESTRICTED,
            }
        cluster["headGroupSpec"] = {
            "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
            "template": self._pod("ray-head", self.profile.head, has_spec=True),
        }
        cluster["workerGroupSpecs"] = [self._group(*group, scales) for group in self.profile.groups.items()]
        return cluster

    def _group(self, name: str, group: Group, scales: bool) -> Manifest:
        least, most = group.replicas if scales else (group.replicas[1], group.replicas[1])
        return {
            "groupName": name,
            "replicas": least,
            "minReplicas": least,
            "maxReplicas": most,
            "rayStartParams": {},
            "template": self._pod("ray-worker", group),
        }

    # ------------------------------------------------------------------------------------------------ pods

    def _pod(self, container: str, place: Place, has_spec: bool = False) -> Manifest:
        """A pod of the Ray cluster."""
        profile = self.profile
        mounts: list[Manifest] = [{"name": claim, "mountPath": path} for claim, path in profile.volumes.items()]
        volumes: list[Manifest] = [
            {"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in profile.volumes
        ]
        if has_spec:
            mounts.append({"name": "ditflow-job", "mountPath": FOLDER, "readOnly": True})
            volumes.append({"name": "ditflow-job", "configMap": {"name": self._spec_name()}})
        ray: Manifest = {**self._container(container), "resources": _resources(place)}
        if profile.secret is not None:
            ray["envFrom"] = [{"secretRef": {"name": profile.secret}}]
        if profile.environment:
            ray["env"] = [{"name": name, "value": value} for name, value in profile.environment.items()]
        spec = {**self._pod_base(), "containers": [{**ray, **_filled(volumeMounts=mounts)}]}
        spec |= _filled(volumes=volumes, nodeSelector=place.node_selector, tolerations=place.toleration_fields())
        if profile.service_account is not None:
            spec["serviceAccountName"] = profile.service_account
        return {"metadata": {"labels": self._labels()}, "spec": spec}

    def _submitter_pod(self) -> Manifest:
        """The pod that starts the run on the cluster and shows its log."""
        small = {"cpu": "500m", "memory": "512Mi"}
        container = {**self._container("ray-job-submitter"), "resources": {"requests": small, "limits": small}}
        return {**self._pod_base(), "automountServiceAccountToken": False, "containers": [container]}

    def _container(self, name: str) -> Manifest:
        return {"name": name, "image": self.profile.image, "securityContext": _RESTRICTED}

    def _pod_base(self) -> Manifest:
        """What all pods have: they run as the image's user, and end as they ended, without being started again."""
        security = {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 100, "fsGroup": 100}
        secret = self.profile.image_pull_secret
        return {
            "restartPolicy": "Never",
            "securityContext": {**security, "seccompProfile": {"type": "RuntimeDefault"}},
            **_filled(imagePullSecrets=[{"name": secret}] if secret else []),
        }

    # ------------------------------------------------------------------------------------------------ the schedule

    def _rights(self) -> list[Manifest]:
        """A ServiceAccount that may create RayJobs and look at them, and nothing else."""
        name, group = self._account(), "rbac.authorization.k8s.io"
        rule = {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
        account = {"kind": "ServiceAccount", "name": name, "namespace": self.profile.namespace}
        return [
            self._head("v1", "ServiceAccount", name),
            {**self._head(f"{group}/v1", "Role", name), "rules": [rule]},
            {
                **self._head(f"{group}/v1", "RoleBinding", name),
                "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
                "subjects": [account],
            },
        ]

    def _cron_job(self, schedule: str, holder: str) -> Manifest:
        job = {
            # A pod that goes away, or gets no answer, is made again and finds its run. A failed run is final.
            "backoffLimit": 5,
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": {"containerName": "create-run", "operator": "In", "values": [FAILED, REFUSED]},
                    },
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                ]
            },
            "template": {"metadata": {"labels": self._labels()}, "spec": self._creating_pod(holder)},
        }
        return {
            **self._head("batch/v1", "CronJob", self.name),
            "spec": {
                "schedule": schedule,
                "timeZone": self.profile.time_zone,
                "concurrencyPolicy": "Forbid",
                "startingDeadlineSeconds": 3600,
                "successfulJobsHistoryLimit": 3,
                "failedJobsHistoryLimit": 3,
                "jobTemplate": {"spec": job},
            },
        }

    def _creating_pod(self, holder: str) -> Manifest:
        """The pod of one date: it creates the RayJob, called and owned as its Job is, and waits until it has ended."""
        small = {"cpu": "100m", "memory": "256Mi"}
        container = {
            **self._container("create-run"),
            "command": ["python", "-m", "jobs.scheduled", f"{FOLDER}/{RAYJOB_FILE}"],
            "env": [
                _from_label("JOB_NAME", "batch.kubernetes.io/job-name"),
                _from_label("JOB_UID", "batch.kubernetes.io/controller-uid"),
            ],
            "resources": {"requests": small, "limits": small},
            "volumeMounts": [{"name": "ditflow-run", "mountPath": FOLDER, "readOnly": True}],
        }
        return {
            **self._pod_base(),
            "serviceAccountName": self._account(),
            "containers": [container],
            "volumes": [{"name": "ditflow-run", "configMap": {"name": holder}}],
        }

    # ------------------------------------------------------------------------------------------------ names

    def _head(self, api: str, kind: str, name: str, labels: dict[str, str] | None = None) -> Manifest:
        metadata = {"name": name, "namespace": self.profile.namespace, "labels": {**self._labels(), **(labels or {})}}
        return {"apiVersion": api, "kind": kind, "metadata": metadata}

    def _labels(self) -> dict[str, str]:
        return {"app.kubernetes.io/name": "ditflow", "app.kubernetes.io/instance": self.name}

    def _queue_label(self) -> dict[str, str]:
        return {} if self.wish.queue is None else {"kueue.x-k8s.io/queue-name": self.wish.queue}

    def _spec_name(self) -> str:
        return f"{self.name}-{_digest(self.shipment.text)}"

    def _account(self) -> str:
        return f"{self.name}-schedule"


_RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
"""What a namespace with the standard `restricted` asks of every container."""


def _from_label(variable: str, label: str) -> Manifest:
    return {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{label}']"}}}


def _resources(place: Place) -> Manifest:
    """Requests and limits are the same: Ray counts on what it sees, and a pod that is given more is killed for it."""
    amounts: dict[str, Any] = {"cpu": f"{place.cpus:g}", "memory": place.memory}
    amounts |= _filled(**{"ephemeral-storage": place.disk})
    if isinstance(place, Group) and place.gpus:
        amounts[place.gpu_resource] = str(place.gpus)
    return {"requests": amounts, "limits": amounts}


def _filled(**parts: Any) -> dict[str, Any]:
    """Return the parts that are not empty."""
    return {key: value for key, value in parts.items() if value}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
