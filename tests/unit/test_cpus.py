"""The CPUs that a process may use: its affinity mask, or the quota of its cgroup where that is less."""

import os
from pathlib import Path

import pytest

from pipeline.cpus import usable_cpus


@pytest.fixture(autouse=True)
def _eight_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def cpus(folder: Path, membership: str, **files: str) -> int:
    """What a machine with these files below /sys/fs/cgroup gives; a double underscore stands for a folder."""
    for name, content in files.items():
        file = folder / "cgroup" / name.replace("__", "/").replace("cpu_max", "cpu.max").replace("cfs", "cpu.cfs")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    (folder / "membership").write_text(membership + "\n")
    return usable_cpus(folder / "cgroup", folder / "membership")


def test_without_a_quota_the_affinity_mask_counts(tmp_path):
    assert cpus(tmp_path, "0::/", cpu_max="max 100000") == 8
    assert usable_cpus(tmp_path / "nowhere", tmp_path / "nothing") == 8
    assert usable_cpus() <= 8


def test_a_quota_counts_in_whole_cpus_and_never_none(tmp_path):
    assert cpus(tmp_path, "0::/", cpu_max="300000 100000") == 3
    assert cpus(tmp_path, "0::/", cpu_max="250000 100000") == 2
    assert cpus(tmp_path, "0::/", cpu_max="50000 100000") == 1
    assert cpus(tmp_path, "0::/", cpu_max="6400000 100000") == 8


def test_the_smallest_quota_of_the_groups_around_a_process_counts(tmp_path):
    files = {"job__cpu_max": "200000 100000", "job__step__cpu_max": "max 100000", "other__cpu_max": "100000 100000"}
    assert cpus(tmp_path, "0::/job/step", **files) == 2


def test_a_container_that_sees_its_group_as_the_mount_has_its_quota(tmp_path):
    assert cpus(tmp_path, "0::/kubepods/pod-1/container", cpu_max="400000 100000") == 4


@pytest.mark.parametrize("path", ["/", "/docker/0123"])
def test_quotas_of_cgroup_version_1_count(tmp_path, path):
    files = {"cpu,cpuacct__cfs_quota_us": "150000", "cpu,cpuacct__cfs_period_us": "50000"}
    assert cpus(tmp_path, f"5:memory:/x\n4:cpu,cpuacct:{path}\n0::/", **files) == 3
    assert cpus(tmp_path, f"4:cpu,cpuacct:{path}", **{"cpu,cpuacct__cfs_quota_us": "-1"}) == 8
