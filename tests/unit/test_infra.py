"""Facts about the files under infra/: linters, schemas and the rules that a reviewer would look for."""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs.spec import PRESETS

ROOT = PRESETS.parent
DOCKERFILE = ROOT / "infra/docker/Dockerfile"
CLUSTER = ROOT / "infra/aws/cluster.yaml"
POLICY = ROOT / "infra/aws/policy.json"
BUCKET, OUTPUTS = "arn:aws:s3:::my-bucket", "arn:aws:s3:::my-bucket/runs/*"


# --------------------------------------------------------------------------------------------------------- images


def lint(dockerfile: Path) -> list[str]:
    """What hadolint says, a line each."""
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([program, "--no-color", dockerfile], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout.splitlines()


def targets() -> dict[str, list[str]]:
    """The instructions of each target, after its FROM."""
    text = re.sub(r"\\\n", "", DOCKERFILE.read_text())
    instructions = [line for line in text.splitlines() if line and not line.startswith("#")]
    found: dict[str, list[str]] = {}
    for line in instructions:
        if line.startswith("FROM"):
            found[line.split()[-1]] = [line]
        elif found:
            found[list(found)[-1]].append(line)
    return found


def test_the_linter_has_nothing_to_say():
    assert lint(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("text", "wrong", "rule"),
    [("USER 1000:100", "USER root", "DL3002"), ("${RAY_VERSION}-py311-cpu", "latest", "DL3007")],
)
def test_the_linter_says_what_is_wrong(tmp_path, text, wrong, rule):
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text(DOCKERFILE.read_text().replace(text, wrong))
    assert any(rule in line for line in lint(dockerfile))


def test_both_targets_are_made_alike_on_the_images_of_the_pinned_ray():
    cpu, cuda = targets()["cpu"], targets()["cuda"]
    assert cpu[1:] == cuda[1:]
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
    assert f"ARG RAY_VERSION={pinned['ray']}\n" in DOCKERFILE.read_text()
    assert cpu[0].split()[1] == "rayproject/ray:${RAY_VERSION}-py311-cpu"


def test_dependencies_are_installed_by_constraints_before_the_source_is_copied():
    steps = targets()["cuda"]
    (install,) = [number for number, step in enumerate(steps) if "-c constraints.txt" in step]
    (source,) = [number for number, step in enumerate(steps) if step.endswith(" . .")]
    assert install < source
    assert all("--no-deps" in step for step in steps[source:] if "pip install" in step)


def test_the_image_does_not_run_as_root_and_its_health_is_what_the_doctor_says():
    for steps in targets().values():
        assert [step.split()[1] for step in steps if step.startswith("USER")] == ["1000:100"]
        (check,) = [step for step in steps if step.startswith("HEALTHCHECK")]
        assert json.loads(check[check.index("[") :]) == ["ditflow", "doctor"]


def test_requirements_are_the_dependencies_of_the_package_and_of_clusters():
    command = [sys.executable, ROOT / "infra/docker/requirements.py", ROOT / "pyproject.toml"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert printed == project["dependencies"] + project["optional-dependencies"]["cluster"]


def test_all_that_is_copied_is_let_through_to_the_build():
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for step in targets()["cpu"]:
        if step.startswith("COPY"):
            assert set(shlex.split(step)[2:-1]) - {"."} <= let_through
    assert let_through >= {"ditflow", "pipeline", "jobs", "pyproject.toml", "README.md", "LICENSE"}


# ------------------------------------------------------------------------------------------------------------ AWS


def cluster(**changes: object) -> dict:
    return {**yaml.safe_load(CLUSTER.read_text()), **changes}


def check_as_ray_up_does(config: dict) -> None:
    validate_config(prepare_config(config))


def test_the_cluster_is_one_that_ray_takes():
    check_as_ray_up_does(cluster())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_worker": 3}, "max_worker"),
        ({"head_node_type": "nowhere"}, "nowhere|head_node_type"),
        ({"upscaling_speed": "fast"}, "fast"),
        ({"docker": {"image": "x", "container_name": "y", "imagee": "x"}}, "imagee"),
    ],
    ids=["misspelt key", "no such node", "wrong type", "misspelt key of a section"],
)
def test_a_cluster_that_ray_refuses_is_seen(change, says):
    with pytest.raises(Exception, match=says):
        check_as_ray_up_does(cluster(**change))


def test_workers_scale_from_nothing_on_spot_and_on_demand_and_the_head_does_no_row():
    types = cluster()["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in types["on-demand"]["node_config"]
    for name in ("spot", "on-demand"):
        assert 0 == types[name]["min_workers"] < types[name]["max_workers"]
        assert types[name]["resources"]["GPU"] == 1
        assert types[name]["node_config"]["IamInstanceProfile"] == types["head"]["node_config"]["IamInstanceProfile"]


def too_much(policy: dict) -> list[str]:
    """What a policy allows beyond reading inputs, and reading, writing and listing outputs."""
    found = []
    for statement in policy["Statement"]:
        actions, resources = statement["Action"], statement["Resource"]
        found += [action for action in actions if "*" in action or not action.startswith("s3:")]
        for resource in resources:
            below = re.fullmatch(rf"{BUCKET}/[^*]+?(/\*)?", resource)
            if not below and not (resource == BUCKET and actions == ["s3:ListBucket"] and "Condition" in statement):
                found.append(resource)
        writes = set(actions) - {"s3:GetObject", "s3:ListBucket"}
        found += [f"{action} on {resources}" for action in writes if resources != [OUTPUTS]]
        prefixes = statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix", [])
        found += [prefix for prefix in prefixes if prefix.startswith("*") or "*" in prefix.removesuffix("/*")]
    return found


def test_the_policy_allows_the_prefixes_of_the_nightly_job_and_nothing_else():
    policy = json.loads(POLICY.read_text())
    assert too_much(policy) == []
    allowed = {resource for statement in policy["Statement"] for resource in statement["Resource"]}
    job = yaml.safe_load((PRESETS / "nightly-synthesis.yaml").read_text())
    for uri in (job["references"]["uri"], job["output"]["uri"]):
        folder = uri.removeprefix("s3://").split("/")[:2]
        assert f"arn:aws:s3:::{'/'.join(folder)}/*" in allowed


@pytest.mark.parametrize(
    ("number", "key", "value"),
    [
        (0, "Action", ["s3:*"]),
        (0, "Action", ["s3:PutObject"]),
        (0, "Resource", [f"{BUCKET}/*"]),
        (2, "Resource", ["*"]),
        (1, "Condition", {"StringLike": {"s3:prefix": ["*"]}}),
        (2, "Action", ["iam:PassRole"]),
    ],
)
def test_a_policy_that_allows_too_much_is_seen(number, key, value):
    policy = json.loads(POLICY.read_text())
    policy["Statement"][number][key] = value
    assert too_much(policy)
