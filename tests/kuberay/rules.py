"""What Kubernetes, KubeRay and Kueue ask of manifests: their schemas, and rules that no schema has."""

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

KUBERNETES = "1.33"
"""The oldest version that manifests are checked against; schemas are closed, so newer fields are errors."""
HERE = Path(__file__).parent


def mistakes(manifest: dict[str, Any]) -> list[str]:
    """All that the schema of its kind says against a manifest, and the rules of RayJobs."""
    kind = manifest["kind"]
    if manifest["apiVersion"].split("/")[0] != "ray.io":
        try:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            return [error.message]
        return []
    found = [f"{error.json_path}: {error.message}" for error in schema_of(kind).iter_errors(manifest)]
    spec = manifest.get("spec", {})
    run = spec if kind == "RayJob" else spec.get("jobTemplate", {})
    return [*found, *(name_mistakes(manifest)), *job_mistakes(manifest, run)]


@cache
def schema_of(kind: str) -> Draft202012Validator:
    folder = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict"
    texts = [files("kubernetes_validate").joinpath(folder, "_definitions.json").read_text()]
    texts += [(HERE / f"{name}.json").read_text() for name in ("rayjob", "raycronjob")]
    schemas = [json.loads(text) for text in texts]
    registry = Registry().with_resources([(schema["$id"], Resource.from_contents(schema)) for schema in schemas])
    return Draft202012Validator(json.loads((HERE / f"{kind.lower()}.json").read_text()), registry=registry)


def name_mistakes(manifest: dict[str, Any]) -> Iterator[str]:
    """KubeRay makes names of services and pods of a RayJob's, and of a RayCronJob's with the time of the run."""
    metadata = manifest["metadata"]
    name = metadata.get("name") or metadata["generateName"] + "x" * 5
    longest = 47 if manifest["kind"] == "RayJob" else 47 - 11
    if len(name) > longest or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"metadata.name: {name}"


def job_mistakes(manifest: dict[str, Any], spec: dict[str, Any]) -> Iterator[str]:
    if ("rayClusterSpec" in spec) == ("clusterSelector" in spec):
        yield "one of rayClusterSpec and clusterSelector"
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttlSecondsAfterFinished: below 0"
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished: without shutdownAfterJobFinishes it does nothing"
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend: without shutdownAfterJobFinishes"
    if spec.get("backoffLimit", 0) < 0 or (
        spec.get("backoffLimit") and spec.get("submissionMode") == "InteractiveMode"
    ):
        yield "backoffLimit"
    if spec.get("activeDeadlineSeconds", 1) <= 0:
        yield "activeDeadlineSeconds: not above 0"
    yield from command_mistakes(spec)
    yield from cluster_mistakes(spec.get("rayClusterSpec", {}))
    if "kueue.x-k8s.io/queue-name" in manifest["metadata"].get("labels", {}):
        yield from kueue_mistakes(spec)


def command_mistakes(spec: dict[str, Any]) -> Iterator[str]:
    """The entrypoint stands in a shell's command without quotes, the runtime environment in double ones."""
    entrypoint = spec.get("entrypoint", "")
    if not entrypoint or entrypoint != shlex.join(entrypoint.split()):
        yield f"entrypoint: {entrypoint!r}"
    environment = yaml.safe_load(spec.get("runtimeEnvYAML", "{}"))
    if not isinstance(environment, dict) or re.search(r"[$`]", json.dumps(environment)):
        yield "runtimeEnvYAML"


def cluster_mistakes(cluster: dict[str, Any]) -> Iterator[str]:
    groups = cluster.get("workerGroupSpecs", [])
    names = [group["groupName"] for group in groups]
    if len(set(names)) != len(names):
        yield f"groupName: {names}"
    for group in groups:
        if not 0 <= group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            yield f"replicas of {group['groupName']}"
    for group in (*groups, cluster.get("headGroupSpec", {})):
        yield from pod_mistakes(group, cluster)


def pod_mistakes(group: dict[str, Any], cluster: dict[str, Any]) -> Iterator[str]:
    pod = group["template"]["spec"]
    if not pod["containers"]:
        yield "containers"
    named = {"num-cpus", "num-gpus", "memory", "resources"} & set(group.get("rayStartParams", {}))
    if named and group.get("resources"):
        yield "resources stand in rayStartParams and in resources"
    if cluster.get("enableInTreeAutoscaling") and pod.get("restartPolicy", "Never") != "Never":
        yield "restartPolicy: the autoscaler (v2) needs Never"
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    for container in pod["containers"]:
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"volumeMounts: there is no volume {mount['name']}"


def kueue_mistakes(spec: dict[str, Any]) -> Iterator[str]:
    cluster = spec.get("rayClusterSpec", {})
    if not spec.get("shutdownAfterJobFinishes"):
        yield "Kueue: shutdownAfterJobFinishes"
    if cluster.get("enableInTreeAutoscaling"):
        yield "Kueue: enableInTreeAutoscaling"
    if len(cluster.get("workerGroupSpecs", [])) > 7:
        yield "Kueue: workerGroupSpecs"
