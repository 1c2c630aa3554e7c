"""Facts about the manifests of a job on Kubernetes: what the schemas and rules of its controllers say of them."""

import copy
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay.rules import mistakes
from test_cli import ditflow, errors_of

from jobs.cli import app
from jobs.cron import check_cron
from jobs.kuberay import Manifests, SubmissionError, Wish, render
from jobs.profile import Group, Place, Profile, load_profile
from jobs.shipping import Shipment, pack
from jobs.spec import PRESETS, SpecError

ROOT = PRESETS.parent
NIGHTLY = PRESETS / "nightly-synthesis.yaml"
SAMPLE = ROOT / "infra/kuberay/profile.yaml"
WISHES = {
    "once": Wish(),
    "nightly": Wish(schedule="0 2 * * *"),
    "nightly by KubeRay": Wish(schedule="0 2 * * *", cron="raycronjob"),
    "in a queue": Wish(queue="gpus"),
    "nightly in a queue": Wish(schedule="@daily", queue="gpus", name="tonight"),
}
PROFILES: dict[str, Callable[[], Profile]] = {
    "sample": lambda: load_profile(SAMPLE),
    "least": lambda: Profile("video", "registry/ditflow:cpu", {"cpu": Group(cpus=0.5)}),
    "most": lambda: Profile(
        "video",
        "registry/ditflow:gpu",
        {
            "a100": Group(8, "90Gi", "1Ti", {"gpu": "a100"}, ("gpu=a100:NoExecute", "spot"), (0, 9), 2, "amd.com/gpu"),
            "cpu": Group(),
        },
        head=Place(tolerations=("head:PreferNoSchedule",)),
        context="production",
        image_pull_secret="registry",
        secret="storage",
        service_account="ditflow",
        environment={"AWS_ENDPOINT_URL": "https://objects.example.com", "ODD": "yes: #'\" \n *"},
        volumes={"weights": "/models", "data": "/data"},
        runtime_env={"env_vars": {"DITFLOW_PLUGINS": "/data/plugins"}, "pip": ["einops"]},
        retries=0,
        deadline_s=60,
        keep_s=0,
    ),
}


@pytest.fixture(scope="module")
def shipment() -> Shipment:
    return pack(NIGHTLY, (), ("/models", "/data"), gpus=True)


def all_of(manifests: Manifests) -> list[dict[str, Any]]:
    """What the cluster would read: the YAML, and the manifest that a schedule's pod creates."""
    read = list(yaml.safe_load_all(manifests.to_yaml()))
    inner = [
        yaml.safe_load(data) for one in read for name, data in one.get("data", {}).items() if name == "rayjob.yaml"
    ]
    return [*read, *inner]


def of_kind(kind: str, manifests: Manifests) -> dict[str, Any]:
    (found,) = [one for one in all_of(manifests) if one["kind"] == kind]
    return found


# ------------------------------------------------------------------------------------------------------- schemas


@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)
@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_every_manifest_is_one_that_its_controller_takes(shipment, profile, wish):
    manifests = all_of(render(shipment, profile(), wish))
    assert {one["kind"]: mistakes(one) for one in manifests} == {one["kind"]: [] for one in manifests}


def fields_of(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every mapping in a manifest whose keys are fields: those of labels and the like are free."""
    free = ("labels", "nodeSelector", "data", "requests", "limits", "rayStartParams", "matchLabels")
    if isinstance(value, dict) and not (path and path[-1] in free):
        return [path, *(found for key, inner in value.items() for found in fields_of(inner, (*path, key)))]
    if isinstance(value, list):
        return [found for number, inner in enumerate(value) for found in fields_of(inner, (*path, number))]
    return []


@pytest.mark.parametrize("wish", ["nightly", "nightly by KubeRay"])
def test_a_field_that_does_not_exist_is_a_mistake_wherever_it_stands(shipment, wish):
    for manifest in all_of(render(shipment, PROFILES["most"](), WISHES[wish])):
        for path in fields_of(manifest):
            wrong = copy.deepcopy(manifest)
            place = wrong
            for key in path:
                place = place[key]
            place["minReplica"] = 1
            assert mistakes(wrong), (manifest["kind"], path)


def changed(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            manifest = manifest[int(parent)] if parent.isdigit() else manifest[parent]
        manifest[last] = value

    return change


CLUSTER = "spec.rayClusterSpec"
BROKEN_RULES = {
    "long name": changed("metadata.generateName", "n" * 43),
    "name of a number": changed("metadata.generateName", "7-nights-"),
    "two ways to a cluster": changed("spec.clusterSelector", {"ray.io/cluster": "old"}),
    "negative time to live": changed("spec.ttlSecondsAfterFinished", -1),
    "time to live of a cluster that stays": changed("spec.shutdownAfterJobFinishes", False),
    "negative retries": changed("spec.backoffLimit", -1),
    "no time": changed("spec.activeDeadlineSeconds", 0),
    "command of a shell": changed("spec.entrypoint", "ditflow run job.yaml || true"),
    "environment that is expanded": changed("spec.runtimeEnvYAML", "env_vars: {A: $HOME}"),
    "environment that is no mapping": changed("spec.runtimeEnvYAML", "- pip"),
    "two groups of one name": changed(f"{CLUSTER}.workerGroupSpecs.1.groupName", "spot"),
    "more least than most": changed(f"{CLUSTER}.workerGroupSpecs.1.minReplicas", 5),
    "no containers": changed(f"{CLUSTER}.headGroupSpec.template.spec.containers", []),
    "resources in two places": changed(f"{CLUSTER}.headGroupSpec.resources", {"CPU": "1"}),
    "pods that start again": changed(f"{CLUSTER}.headGroupSpec.template.spec.restartPolicy", "Always"),
    "no such volume": changed(f"{CLUSTER}.headGroupSpec.template.spec.volumes", []),
    "autoscaling in a queue": changed("metadata.labels", {"kueue.x-k8s.io/queue-name": "gpus"}),
    "a field's type": changed(f"{CLUSTER}.headGroupSpec.rayStartParams", {"num-cpus": 0}),
}


@pytest.mark.parametrize("change", BROKEN_RULES.values(), ids=BROKEN_RULES)
def test_each_rule_outside_the_schema_is_one_that_can_be_broken(shipment, change):
    run = of_kind("RayJob", render(shipment, PROFILES["sample"](), Wish()))
    assert mistakes(run) == []
    change(run)
    assert mistakes(run)


# ------------------------------------------------------------------------------------------------------ what it says


def test_the_head_has_the_spec_and_no_work_and_each_group_its_bounds_and_nodes(shipment):
    cluster = of_kind("RayJob", render(shipment, PROFILES["sample"](), Wish()))["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    mounts = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert {mount["mountPath"] for mount in mounts} == {"/models", "/etc/ditflow"}
    spot, on_demand = cluster["workerGroupSpecs"]
    assert [(group["minReplicas"], group["maxReplicas"]) for group in (spot, on_demand)] == [(0, 8), (1, 2)]
    pod = spot["template"]["spec"]
    assert pod["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}
    assert {"key": "spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"} in pod["tolerations"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "ditflow-storage"}}]


def test_runs_of_a_schedule_do_not_overlap_and_may_do_nothing_but_create_and_look(shipment):
    manifests = render(shipment, PROFILES["sample"](), WISHES["nightly"])
    assert of_kind("CronJob", manifests)["spec"]["concurrencyPolicy"] == "Forbid"
    (rule,) = of_kind("Role", manifests)["rules"]
    assert rule == {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "get"]}
    account = of_kind("ServiceAccount", manifests)["metadata"]["name"]
    assert [subject["name"] for subject in of_kind("RoleBinding", manifests)["subjects"]] == [account]
    pod = of_kind("CronJob", manifests)["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == account


@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)
def test_every_name_that_is_mounted_is_the_name_of_a_manifest(shipment, wish):
    manifests = all_of(render(shipment, PROFILES["sample"](), wish))
    made = {one["metadata"].get("name") for one in manifests if one["kind"] == "ConfigMap"}
    assert set(config_maps_in(manifests)) == made


def config_maps_in(value: Any) -> list[str]:
    """Every ConfigMap that a volume names."""
    if isinstance(value, dict):
        own = [value["configMap"]["name"]] if isinstance(value.get("configMap"), dict) else []
        return [*own, *(name for inner in value.values() for name in config_maps_in(inner))]
    return [name for inner in value for name in config_maps_in(inner)] if isinstance(value, list) else []


def test_another_spec_is_another_config_map_and_the_same_one_is_the_same(shipment, tmp_path):
    other = pack(NIGHTLY, ["seeds=[2]"], ("/models",), gpus=True)
    first, again, second = (
        of_kind("ConfigMap", render(one, PROFILES["sample"](), Wish())) for one in (shipment, shipment, other)
    )
    assert first == again
    assert first["metadata"]["name"] != second["metadata"]["name"]


def test_in_a_queue_all_workers_are_asked_for_at_once(shipment):
    run = of_kind("RayJob", render(shipment, PROFILES["sample"](), WISHES["in a queue"]))
    assert run["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    groups = run["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [(group["minReplicas"], group["replicas"], group["maxReplicas"]) for group in groups] == [(8,) * 3, (2,) * 3]


def test_failed_rows_do_not_make_kuberay_run_the_job_again(shipment, monkeypatch):
    """KubeRay retries a run whose command fails: the command that it is given ends with 0 when only rows failed."""
    entrypoint = of_kind("RayJob", render(shipment, PROFILES["sample"](), Wish()))["spec"]["entrypoint"]
    program, *arguments = shlex.split(entrypoint)
    assert program == "ditflow"
    monkeypatch.setattr("jobs.cli._run_one", lambda *_: False)
    ditflow(*arguments, status=0)
    ditflow(*(argument for argument in arguments if argument != "--allow-failed-rows"), status=3)


@pytest.mark.parametrize("error", [RuntimeError, SpecError, MemoryError])
def test_a_run_that_fails_as_a_whole_is_run_again(shipment, monkeypatch, error):
    from typer.testing import CliRunner

    def fail(*_: object) -> bool:
        raise error("as a whole")

    monkeypatch.setattr("jobs.cli._run_one", fail)
    entrypoint = of_kind("RayJob", render(shipment, PROFILES["sample"](), Wish()))["spec"]["entrypoint"]
    assert CliRunner().invoke(app, shlex.split(entrypoint)[1:]).exit_code != 0


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "schedule", ["0 2 * * *", "*/15 8-18 1,15 jan-mar mon-fri", "? ? ? ? ?", "0/5 * * * 0", "@daily"]
)
def test_a_schedule_that_kubernetes_takes_is_taken(schedule):
    check_cron(schedule)


@pytest.mark.parametrize(
    "schedule",
    [
        *("", "0 2 * *", "0 2 * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * * 13 *", "* * * * 7"),
        *("5-1 * * * *", "*/0 * * * *", "a * * * *", "*-5 * * * *", "1, * * * *", "@nightly", "0 0 L * *"),
        *("0 0 * * 1#2", "² * * * *"),
    ],
)
def test_a_schedule_that_kubernetes_refuses_is_refused(schedule):
    with pytest.raises(ValueError, match="--schedule"):
        check_cron(schedule)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (Wish(name="Nightly"), "no name for Kubernetes"),
        (Wish(name="n" * 42), "at most 41"),
        (Wish(name="n" * 37, schedule="@daily"), "at most 36"),
        (Wish(schedule="@daily", cron="crond"), "cronjob or raycronjob"),
        (Wish(schedule="@daily", cron="raycronjob", queue="gpus"), "hands no label on"),
    ],
)
def test_what_kubernetes_would_refuse_is_refused_here(shipment, wish, says):
    with pytest.raises(SubmissionError, match=says):
        render(shipment, PROFILES["sample"](), wish)


def test_a_spec_that_no_config_map_holds_is_refused(shipment):
    with pytest.raises(SubmissionError, match=r"more than a ConfigMap holds.*a table on the storage"):
        render(Shipment(shipment.job, "x" * 1024**2), PROFILES["sample"](), Wish())


PROFILE_MISTAKES = {
    "misspelt key": ("namespace: ditflow", "namespce: ditflow", "namespce: there is no such key; did you mean namesp"),
    "misspelt key of a group": ("replicas: [0, 8]", "replica: [0, 8]", "groups.spot.replica: there is no such key"),
    "no groups": ("groups:\n", "unknown:\n", "groups"),
    "more least than most": ("[0, 8]", "[9, 8]", "groups.spot.replicas: [9, 8] is not valid: expected [least, most]"),
    "no amount": ("memory: 8Gi", "memory: 8 GB", "head.memory: '8 GB' is not valid: expected an amount"),
    "no toleration": ("spot=true:NoSchedule", "spot=true:Never", "groups.spot.tolerations"),
    "a selector of no text": ("capacity-type: spot}", "capacity-type: true}", "groups.spot.node_selector"),
    "a credential": ("AWS_DEFAULT_REGION: eu", "AWS_SECRET_ACCESS_KEY: eu", "expected no credentials"),
    "a relative path": (": /models}", ": models}", "volumes"),
    "a name of capitals": ("secret: ditflow-storage", "secret: Storage", "secret: 'Storage' is not valid"),
    "negative retries": ("retries: 2 ", "retries: -2 ", "retries: -2 is not valid: expected 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "wrong", "says"), PROFILE_MISTAKES.values(), ids=PROFILE_MISTAKES)
def test_a_mistake_in_a_profile_is_told_with_its_key_and_line(tmp_path, text, wrong, says):
    sample = SAMPLE.read_text()
    assert sample.count(text) == 1
    profile = tmp_path / "profile.yaml"
    profile.write_text(sample.replace(text, wrong))
    with pytest.raises(SpecError) as caught:
        load_profile(profile)
    assert says in str(caught.value)
    assert f"{profile}:" in str(caught.value)


# ----------------------------------------------------------------------------------------------- the command line


def test_the_command_prints_manifests_that_pass(monkeypatch):
    monkeypatch.chdir(ROOT)
    printed = ditflow("submit", NIGHTLY, "--to", "kuberay", "--schedule", "0 2 * * *", "--dry-run").stdout
    kinds = [one["kind"] for one in yaml.safe_load_all(printed) if mistakes(one) == []]
    assert kinds == ["ConfigMap", "ConfigMap", "ServiceAccount", "Role", "RoleBinding", "CronJob"]


SAMPLES = {
    "nightly-cronjob.yaml": ["jobs/nightly-synthesis.yaml", "--schedule", "0 2 * * *"],
    "once.yaml": ["jobs/nightly-synthesis.yaml", "--name", "synthesis", "--set", "model.path=s3://my-bucket/models/5b"],
    "queued.yaml": ["jobs/nightly-synthesis.yaml", "--name", "queued", "--queue", "gpus"],
    "raycronjob.yaml": ["jobs/nightly-synthesis.yaml", "--schedule", "0 2 * * *", "--cron", "raycronjob"],
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_samples_are_what_the_command_prints(sample, monkeypatch):
    """Printed anew by: DITFLOW_WRITE_SAMPLES=1 python -m pytest tests/unit/test_kuberay.py -k samples"""
    monkeypatch.chdir(ROOT)
    printed = ditflow("submit", *SAMPLES[sample], "--to", "kuberay", "--dry-run").stdout
    file = ROOT / "infra/kuberay" / sample
    if os.environ.get("DITFLOW_WRITE_SAMPLES"):
        file.write_text(printed)
    assert file.read_text() == printed


@pytest.fixture
def kubectl(tmp_path, monkeypatch) -> Path:
    """A program called kubectl that notes what it is given, and its folder."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "kubectl"
    program.write_text(
        f'#!/bin/sh\necho "$*" >> {folder}/calls\necho "---" >> {folder}/stdin\ncat >> {folder}/stdin\nexit 0\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return folder


@pytest.fixture
def own_profile(tmp_path) -> Path:
    profile = tmp_path / "profile.yaml"
    profile.write_text(SAMPLE.read_text().replace("registry.example.com", "registry.mine") + "context: gpus\n")
    return profile


def test_a_schedule_is_applied_and_a_single_run_created(kubectl, own_profile):
    ditflow("submit", NIGHTLY, "--to", "kuberay", "--profile", own_profile, "--schedule", "0 2 * * *")
    assert (kubectl / "calls").read_text().splitlines() == ["--context gpus apply -f -"]
    ditflow("submit", NIGHTLY, "--to", "kuberay", "--profile", own_profile)
    assert (kubectl / "calls").read_text().splitlines()[1:] == [
        f"--context gpus {verb} -f -" for verb in ("apply", "create")
    ]
    kinds = [
        one["kind"]
        for one in yaml.safe_load_all((kubectl / "stdin").read_text().replace("\napiVersion", "\n---\napiVersion"))
        if one
    ]
    assert kinds[-2:] == ["ConfigMap", "RayJob"]


def test_a_cluster_that_refuses_is_told_with_its_words(kubectl, own_profile):
    (kubectl / "kubectl").write_text('#!/bin/sh\ncat > /dev/null\necho "no matches for kind RayJob" >&2\nexit 1\n')
    said = errors_of(ditflow("submit", NIGHTLY, "--to", "kuberay", "--profile", own_profile, status=1))
    assert "no matches for kind RayJob" in said[0]


def test_a_missing_kubectl_is_told(kubectl, own_profile, monkeypatch):
    (kubectl / "kubectl").unlink()
    monkeypatch.setenv("PATH", str(kubectl))
    (said,) = errors_of(ditflow("submit", NIGHTLY, "--to", "kuberay", "--profile", own_profile, status=1))
    assert "no kubectl on the PATH" in said


def test_the_sample_profile_is_printed_but_not_applied(kubectl):
    (said,) = errors_of(ditflow("submit", NIGHTLY, "--to", "kuberay", "--profile", SAMPLE, status=2))
    assert "build infra/docker/Dockerfile" in said
    assert not (kubectl / "calls").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((NIGHTLY, "--to", "slurm"), "expected ray or kuberay"),
        ((NIGHTLY, "--schedule", "@daily"), "--schedule is not valid with --to ray"),
        ((NIGHTLY, "--dry-run"), "--dry-run is not valid with --to ray"),
        ((NIGHTLY, "--to", "kuberay", "--no-wait"), "--no-wait is not valid with --to kuberay"),
        ((), "expected a job spec, or --follow"),
        ((NIGHTLY, "--follow", "raysubmit_x"), "and not both"),
        ((NIGHTLY, "--address", "ray-head:6379"), "expected the address of Ray's dashboard"),
        (("none.yaml", "--to", "kuberay", "--profile", SAMPLE), "cannot be read"),
        ((NIGHTLY, "--to", "kuberay", "--profile", "none.yaml"), "Copy infra/kuberay/profile.yaml"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_with_what_is_valid(arguments, says, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said = errors_of(ditflow("submit", *arguments, status=2))
    assert says in "\n".join(said)


def test_a_cluster_that_does_not_answer_is_told():
    (said,) = errors_of(ditflow("submit", NIGHTLY, "--address", "http://127.0.0.1:9", status=1))
    assert "http://127.0.0.1:9" in said


def test_kubectl_gets_utf_8_on_every_terminal(tmp_path):
    """The prompts of a spec are in the manifests."""
    (tmp_path / "kubectl").write_text(f"#!/bin/sh\ncat > {tmp_path / 'applied'}\n")
    (tmp_path / "kubectl").chmod(0o755)
    code = (
        "from types import SimpleNamespace; from jobs.launch import _kubectl; "
        "_kubectl(['apply'], [{'prompt': 'a y\\u00e9llow st\\u00e4r'}], SimpleNamespace(context=None))"
    )
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], env=ascii_only, check=True)
    assert "a yéllow stär" in (tmp_path / "applied").read_text(encoding="utf-8")
