"""The CPUs that a process may use: its affinity mask, or the quota of its cgroup where that is less."""

import os
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch

from ditflow.media import video
from pipeline.cpus import limit_threads, usable_cpus
from pipeline.job import Job, Output, Resources
from pipeline.stages.attempt import Desk


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


# ----------------------------------------------------------------------------------------------- threads of libraries


@pytest.fixture
def _threads_as_before():
    before = torch.get_num_threads(), cv2.getNumThreads(), pa.cpu_count(), video.decoder_threads
    yield
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])
    pa.set_cpu_count(before[2])
    video.decoder_threads = before[3]


@pytest.mark.usefixtures("_threads_as_before")
def test_no_library_has_more_threads_than_it_may(tmp_path):
    torch.set_num_threads(3)
    cv2.setNumThreads(1)
    pa.set_cpu_count(8)
    limit_threads(2)
    assert (torch.get_num_threads(), cv2.getNumThreads(), pa.cpu_count()) == (2, 1, 2)
    assert decoder_threads_of(tmp_path) == 2


@pytest.mark.usefixtures("_threads_as_before")
def test_every_stage_has_the_threads_of_its_job(tmp_path):
    pa.set_cpu_count(8)
    job = Job("synthesize", "test", Output(str(tmp_path)), resources=Resources(threads=3))
    Desk(job, "read")
    assert pa.cpu_count() == 3
    assert decoder_threads_of(tmp_path) == 3


def decoder_threads_of(folder: Path) -> int:
    """The threads that a decoder of references has."""
    video.write_video(folder / "clip.mp4", np.zeros((2, 16, 16, 3), np.uint8), fps=8)
    with av.open(str(folder / "clip.mp4")) as container:
        return video._Video("clip.mp4", container, 16 * 16)._stream.codec_context.thread_count
