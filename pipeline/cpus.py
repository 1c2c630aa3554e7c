"""How many CPUs this process may use, and the threads of its libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import pyarrow as pa
import torch

from ditflow.media import video


def limit_threads(most: int) -> None:
    """Let each library of this process compute with at most so many threads; one that has fewer keeps them.

    By itself each starts one for every CPU that it sees, whatever the quota of its container is.
    """
    pa.set_cpu_count(min(most, pa.cpu_count()))
    video.decoder_threads = most
    if torch.get_num_threads() > most:
        torch.set_num_threads(most)
    if cv2.getNumThreads() > most:
        cv2.setNumThreads(most)


def usable_cpus(mount: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Return the CPUs of the affinity mask or, where a cgroup's quota is smaller, the whole CPUs of it; at least 1.

    A container with a limit sees every CPU of its machine, and more threads than the limit only wait for each other.
    mount: where the cgroups are; membership: to which of them this process belongs.
    """
    quotas = [quota for folder in _cgroups(mount, membership) if (quota := _quota(folder)) is not None]
    return max(1, int(min([len(os.sched_getaffinity(0)), *quotas])))


def _cgroups(mount: Path, membership: Path) -> Iterator[Path]:
    """This process's groups of the cpu controller, versions 1 and 2, with the groups around them.

    A container sees its own group as the mount itself, whatever path its membership has.
    """
    try:
        lines = membership.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = mount / controllers
        group = root / path.lstrip("/")
        yield group
        yield from (parent for parent in group.parents if parent.is_relative_to(root))


def _quota(group: Path) -> float | None:
    """The CPUs that a group may use, or None if it has no limit, or is not visible here."""
    try:
        if (limit := group / "cpu.max").exists():
            quota, period = limit.read_text(encoding="ascii").split()
        else:
            quota, period = ((group / f"cpu.cfs_{part}_us").read_text(encoding="ascii") for part in ("quota", "period"))
        return None if quota == "max" or int(quota) <= 0 else int(quota) / int(period)
    except (OSError, ValueError):
        return None
