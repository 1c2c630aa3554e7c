"""A cluster's profile: what `ditflow submit --to kuberay` has to know of a Kubernetes cluster.

The keys of its YAML file are the fields below; `infra/kuberay/profile.yaml` is a sample.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditflow.errors import SettingsError
from jobs.spec import read_section

SAMPLE = Path("infra/kuberay/profile.yaml")
SAMPLE_REGISTRY = "registry.example.com/"
"""Where nobody has an image: what the sample profile names until you write your own."""

NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
"""A name in Kubernetes (a label of RFC 1035)."""
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?([kMGTP]|[KMGTP]i)?")
_TOLERATION = re.compile(r"(?P<key>[^=:]+)(=(?P<value>[^=:]*))?(:(?P<effect>NoSchedule|PreferNoSchedule|NoExecute))?")
_SECRET = re.compile(r"secret|token|passw|credential|access_?key", re.IGNORECASE)


def _check_name(key: str, name: str | None) -> None:
    if name is not None and not (NAME.fullmatch(name) and len(name) <= 63):
        raise SettingsError(key, name, "a name of lower-case letters, digits and '-', such as ditflow-storage")


def _check_quantity(key: str, quantity: str | None) -> None:
    if quantity is not None and not _QUANTITY.fullmatch(quantity):
        raise SettingsError(key, quantity, "an amount, such as 64Gi")


@dataclass(frozen=True)
class Place:
    """What every kind of pod asks for, and on which nodes it may run.

    memory and disk are amounts, such as 64Gi; disk is where copies of models and references from object storage go.
    tolerations are written as taints are for kubectl: key, key:effect or key=value:effect.
    """

    cpus: float = 2
    memory: str = "8Gi"
    disk: str | None = None
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.cpus <= 0:
            raise SettingsError("cpus", self.cpus, "above 0")
        _check_quantity("memory", self.memory)
        _check_quantity("disk", self.disk)
        self.toleration_fields()

    def toleration_fields(self) -> list[dict[str, str]]:
        """Return the tolerations as Kubernetes has them."""
        return [_toleration(text) for text in self.tolerations]


def _toleration(text: str) -> dict[str, str]:
    found = _TOLERATION.fullmatch(text)
    if found is None:
        raise SettingsError(
            "tolerations", text, "key, key:effect or key=value:effect, such as nvidia.com/gpu:NoSchedule"
        )
    value = {"operator": "Exists"} if found["value"] is None else {"operator": "Equal", "value": found["value"]}
    return {"key": found["key"], **value, **({"effect": found["effect"]} if found["effect"] else {})}


@dataclass(frozen=True)
class Group(Place):
    """Workers of one kind, such as spot or on-demand machines.

    replicas: [least, most]. gpus: of each worker, counted as gpu_resource.
    """

    replicas: tuple[int, int] = (0, 1)
    gpus: int = 0
    gpu_resource: str = "nvidia.com/gpu"

    def __post_init__(self) -> None:
        super().__post_init__()
        least, most = self.replicas
        if not 0 <= least <= most or most < 1:
            raise SettingsError("replicas", list(self.replicas), "[least, most] with 0 <= least <= most, and 1 <= most")
        if self.gpus < 0:
            raise SettingsError("gpus", self.gpus, "a count, 0 or more")


@dataclass(frozen=True)
class Profile:
    """One cluster, as jobs see it.

    context: of kubectl's configuration (None: the current one). secret: its keys become environment variables of every
    pod, such as AWS_ACCESS_KEY_ID. service_account: for clouds that give a pod its rights by it. volumes: paths of
    PersistentVolumeClaims, by their names, such as {weights: /models}. runtime_env: of Ray, for what the image lacks.

    retries: how often a job that failed is run again, each time on a new cluster, where it goes on. deadline_s: after
    which KubeRay ends a run, and does not try it again. keep_s: how long a finished job's cluster stays, to be looked
    at. idle_s: after which the autoscaler gives a worker back. time_zone: of schedules.
    """

    namespace: str
    image: str
    groups: dict[str, Group]
    head: Place = field(default_factory=Place)
    context: str | None = None
    image_pull_secret: str | None = None
    secret: str | None = None
    service_account: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    volumes: dict[str, str] = field(default_factory=dict)
    runtime_env: dict[str, Any] = field(default_factory=dict)
    retries: int = 2
    deadline_s: int | None = None
    keep_s: int = 600
    idle_s: int = 300
    time_zone: str = "Etc/UTC"

    def __post_init__(self) -> None:
        for key in ("namespace", "image_pull_secret", "secret", "service_account"):
            _check_name(key, getattr(self, key))
        for name in (*self.groups, *self.volumes):
            _check_name("groups" if name in self.groups else "volumes", name)
        if not self.groups:
            raise SettingsError("groups", self.groups, "at least one group of workers: the head does no work")
        for claim, path in self.volumes.items():
            if not path.startswith("/"):
                raise SettingsError("volumes", f"{claim}: {path}", "an absolute path for each claim")
        for key, least in {"retries": 0, "deadline_s": 1, "keep_s": 0, "idle_s": 1}.items():
            value = getattr(self, key)
            if value is not None and value < least:
                raise SettingsError(key, value, f"{least} or more")
        self._refuse_secrets()

    def _refuse_secrets(self) -> None:
        """Environments are seen by everybody who may read the manifests: they hold no secrets."""
        variables = self.runtime_env.get("env_vars", {})
        for key, names in (("environment", self.environment), ("runtime_env", variables)):
            found = [name for name in names if _SECRET.search(name)] if isinstance(names, Mapping) else []
            if found:
                raise SettingsError(key, found[0], "no credentials: put them into a Secret and name it by `secret`")

    @property
    def has_gpus(self) -> bool:
        """Whether any worker has a GPU."""
        return any(group.gpus for group in self.groups.values())


def load_profile(path: Path) -> Profile:
    """Read and check a profile. Raises SpecError with every mistake that was found."""
    return read_section(path, Profile, f"Copy {SAMPLE} from the repository, or name yours with --profile")
