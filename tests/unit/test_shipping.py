"""Facts about what of a job spec goes to a cluster, and what is refused because the cluster would not find it."""

from pathlib import Path

import pytest
import yaml
from running import write_spec

from jobs.shipping import pack
from jobs.spec import PRESETS, SpecError, load_spec

REMOTE = {"references": {"uri": "s3://bucket/references"}, "output": {"uri": "s3://bucket/runs"}}


def spec_of(folder: Path, **changes) -> Path:
    return write_spec(folder, **{**REMOTE, **changes})


def test_a_shipped_spec_is_the_same_job_with_its_overrides(tmp_path):
    file = spec_of(tmp_path, prompts=["yes: #'\"\n 2024-01-01", "🐆"])
    shipped = tmp_path / "shipped.yaml"
    shipped.write_text(pack(file, ["seeds=[1,2]"], (), gpus=False).text, encoding="utf-8")
    assert load_spec(shipped).job == load_spec(file, ["seeds=[1,2]"]).job


def test_a_model_that_is_only_on_the_cluster_needs_not_be_here(tmp_path):
    file = spec_of(tmp_path, model={"path": "/models/nowhere-here"})
    assert pack(file, (), ["/models"], gpus=False).job.model.path == "/models/nowhere-here"
    with pytest.raises(SpecError, match="neither a folder here"):
        load_spec(file)


LOCAL = {
    "references": ({"references": {"uri": "clips/"}}, "references.uri: 'clips/' is on this machine"),
    "one of several": ({"references": {"uri": ["s3://bucket/a", "/home/clips"]}}, "references.uri: '/home/clips'"),
    "a file's uri": ({"references": {"uri": "file:///home/clips"}}, "references.uri: 'file:///home/clips'"),
    "a way out of a volume": ({"references": {"uri": "/data/../home"}}, "references.uri: '/data/../home'"),
    "output": ({"output": {"uri": "outputs/x"}}, "output.uri: 'outputs/x'"),
    "prompts": ({"prompts": {"uri": "prompts.csv"}}, "prompts.uri: 'prompts.csv'"),
    "pairs": ({"pairing": {"uri": "pairs.csv"}}, "pairing.uri: 'pairs.csv'"),
    "banks": ({"banks": {"uri": "banks"}}, "banks.uri: 'banks'"),
    "model": ({"model": {"path": "/home/models/5b"}}, "model.path: '/home/models/5b' is on this machine"),
    "model here": ({"model": {"path": "./models/5b"}}, "model.path: './models/5b' is on this machine"),
    "hub id": ({"model": {"path": "THUDM/CogVideoX-5b"}}, "model.path: 'THUDM/CogVideoX-5b' is the id of a hub"),
    "clip": ({"metrics": {"names": ["prompt_similarity"], "clip": "clip"}}, "metrics.clip: 'clip' is on this machine"),
}


@pytest.mark.parametrize(("changes", "says"), LOCAL.values(), ids=LOCAL)
def test_what_the_cluster_would_not_find_is_refused_with_its_key_and_line(tmp_path, changes, says):
    with pytest.raises(SpecError) as caught:
        pack(spec_of(tmp_path, **changes), (), ["/data"], gpus=False)
    (said,) = str(caught.value).splitlines()
    assert says in said
    assert said.startswith(f"{tmp_path / 'job.yaml'}:")


def test_all_that_the_cluster_would_not_find_is_told_at_once(tmp_path):
    with pytest.raises(SpecError) as caught:
        pack(PRESETS / "paper-table.yaml", (), (), gpus=False)
    keys = [line.split(": ")[1] for line in str(caught.value).splitlines()]
    assert keys == ["output.uri", "references.uri", "pairing.uri", "model.path"]


def test_what_lies_on_a_volume_or_may_be_fetched_is_found(tmp_path):
    places = {"references": {"uri": "/data/clips"}, "output": {"uri": "file:///data/runs"}}
    pack(spec_of(tmp_path, **places, prompts={"uri": "gs://bucket/prompts.csv"}), (), ["/data"], gpus=False)
    pack(spec_of(tmp_path, model={"path": "THUDM/CogVideoX-5b", "download": True}), (), (), gpus=False)


def test_credentials_do_not_leave_this_machine(tmp_path):
    secret = "wJalrXUtnFEMI-K7MDENG"
    for changes in ({"storage_options": {"secret": secret}}, {"references": {"uri": f"s3://user:{secret}@bucket/a"}}):
        with pytest.raises(SpecError) as caught:
            pack(spec_of(tmp_path, **changes), (), (), gpus=False)
        assert secret not in str(caught.value)


def test_actors_of_a_cluster_with_gpus_ask_for_their_share_before_there_is_one(tmp_path):
    pools = {"generate": {"actors": [1, 8]}, "extract": {"gpus": 1}}
    file = spec_of(tmp_path, resources=pools)
    resources = yaml.safe_load(pack(file, (), (), gpus=True).text)["resources"]
    assert resources == {"generate": {"actors": [1, 8], "gpus": 0.8}, "extract": {"gpus": 1}}
    assert yaml.safe_load(pack(file, (), (), gpus=False).text)["resources"] == pools


def test_a_pool_that_an_alias_repeats_gets_a_share_of_its_own(tmp_path):
    file = spec_of(tmp_path)
    file.write_text(file.read_text() + "resources: {extract: &pool {actors: 2}, generate: *pool}\n")
    resources = yaml.safe_load(pack(file, (), (), gpus=True).text)["resources"]
    assert [resources[pool] for pool in ("extract", "generate")] == [{"actors": 2, "gpus": n} for n in (0.2, 0.8)]
