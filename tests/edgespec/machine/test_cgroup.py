"""What control groups allow: made trees as container runtimes lay them out, and this machine's own groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cgroups import RealGroup, real_group, tree

from edgespec.machine.cgroup import Limits, groups

MB, GB = 1 << 20, 1 << 30
UNLIMITED = str((1 << 63) - 4096)

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot"
V1 = "\n".join(
    [
        "31 23 0:27 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755",
        "32 31 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd",
        "33 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct",
        "34 31 0:30 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory",
    ]
)
MACHINES: dict[str, tuple[dict[str, str], float | None, int | None, int | None]] = {
    "no limits": (
        {"proc/self/cgroup": "0::/user.slice/a.scope", "sys/fs/cgroup/user.slice/cpu.max": "max 100000"},
        None, None, None,
    ),
    "no limits in version 1": (
        {
            "proc/self/mountinfo": V1,
            "proc/self/cgroup": "3:cpu,cpuacct:/\n2:memory:/a",
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes": UNLIMITED,
            "sys/fs/cgroup/memory/a/memory.usage_in_bytes": str(MB),
        },
        None, None, None,
    ),
    "systemd-run -p CPUQuota=150% -p MemoryMax=2G": (
        {
            "proc/self/cgroup": "0::/user.slice/run-7.scope",
            "sys/fs/cgroup/user.slice/run-7.scope/cpu.max": "150000 100000",
            "sys/fs/cgroup/user.slice/run-7.scope/memory.max": str(2 * GB),
            "sys/fs/cgroup/user.slice/run-7.scope/memory.high": "max",
            "sys/fs/cgroup/user.slice/run-7.scope/memory.current": str(GB),
            "sys/fs/cgroup/user.slice/run-7.scope/memory.stat":
                f"anon {GB // 2}\nfile {GB // 2}\ninactive_file {300 * MB}\nactive_file {100 * MB}",
        },
        1.5, 2 * GB, GB + 400 * MB,
    ),
    "a slice around it sets less": (
        {
            "proc/self/cgroup": "0::/user.slice/run-7.scope",
            "sys/fs/cgroup/user.slice/cpu.max": "50000 100000",
            "sys/fs/cgroup/user.slice/memory.high": str(GB),
            "sys/fs/cgroup/user.slice/memory.current": str(900 * MB),
            "sys/fs/cgroup/user.slice/run-7.scope/cpu.max": "150000 100000",
            "sys/fs/cgroup/user.slice/run-7.scope/memory.max": str(2 * GB),
            "sys/fs/cgroup/user.slice/run-7.scope/memory.current": str(300 * MB),
        },
        0.5, GB, GB - 900 * MB,
    ),
    "docker run --cpus 2 -m 1g, in a namespace": (
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/cpu.max": "200000 100000",
            "sys/fs/cgroup/memory.max": str(GB),
            "sys/fs/cgroup/memory.current": str(GB + MB),
        },
        2.0, GB, 0,
    ),
    "docker with its host's namespace": (
        {
            "proc/self/mountinfo": V2.replace("0:26 /", "0:26 /docker/0a1b"),
            "proc/self/cgroup": "0::/docker/0a1b/sub",
            "sys/fs/cgroup/cpu.max": "300000 100000",
            "sys/fs/cgroup/sub/cpu.max": "max 100000",
        },
        3.0, None, None,
    ),
    "a process from outside the namespace": (
        {"proc/self/cgroup": "0::/../..", "sys/fs/cgroup/cpu.max": "25000 50000"},
        0.5, None, None,
    ),
    "a path out of what is mounted": (
        {
            "proc/self/cgroup": "0::/../other",
            "sys/fs/cgroup/cpu.max": "100000 100000",
            "sys/fs/other/cpu.max": "50000 100000",
        },
        1.0, None, None,
    ),
    "a path that is not mounted": (
        {"proc/self/cgroup": "0::/kubepods/pod1/c2", "sys/fs/cgroup/cpu.max": "400000 100000"},
        4.0, None, None,
    ),
    "kubernetes on version 1": (
        {
            "proc/self/mountinfo": V1.replace("0:29 /", "0:29 /kubepods/pod1/c2").replace(
                "0:30 /", "0:30 /kubepods/pod1/c2"),
            "proc/self/cgroup":
                "12:memory:/kubepods/pod1/c2\n4:cpu,cpuacct:/kubepods/pod1/c2\n1:name=systemd:/kubepods",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "120000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(GB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(700 * MB),
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {100 * MB}",
        },
        1.2, GB, GB - 600 * MB,
    ),
    "LXC on version 1, one group in another": (
        {
            "proc/self/mountinfo": V1,
            "proc/self/cgroup": "3:cpu,cpuacct:/lxc/box/app\n2:memory:/lxc/box/app",
            "sys/fs/cgroup/cpu,cpuacct/lxc/box/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu,cpuacct/lxc/box/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/lxc/box/app/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu,cpuacct/lxc/box/app/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/lxc/box/memory.limit_in_bytes": str(4 * GB),
            "sys/fs/cgroup/memory/lxc/box/memory.usage_in_bytes": str(GB),
            "sys/fs/cgroup/memory/lxc/box/app/memory.limit_in_bytes": UNLIMITED,
            "sys/fs/cgroup/memory/lxc/box/app/memory.usage_in_bytes": str(GB),
        },
        2.0, 4 * GB, 3 * GB,
    ),
    "both versions: processors in 1, memory in 2": (
        {
            "proc/self/mountinfo":
                f"{V1.rsplit(chr(10), 1)[0]}\n40 31 0:40 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
            "proc/self/cgroup": "2:cpu,cpuacct:/a\n1:name=systemd:/a\n0::/b",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "100000",
            "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/unified/b/memory.max": str(GB),
        },
        1.0, GB, GB,
    ),
    "mounted elsewhere, under names with spaces": (
        {
            "proc/self/mountinfo": r"30 23 0:26 / /mnt/control\040groups rw - cgroup2 none rw",
            "proc/self/cgroup": "0::/my group:1",
            "mnt/control groups/my group:1/cpu.max": "50000 100000",
        },
        0.5, None, None,
    ),
    "mounted twice, once with less to see": (
        {
            "proc/self/mountinfo": f"29 23 0:26 /a /run/inner rw - cgroup2 none rw\n{V2}",
            "proc/self/cgroup": "0::/a/b",
            "sys/fs/cgroup/cpu.max": "50000 100000",
            "run/inner/cpu.max": "900000 100000",
        },
        0.5, None, None,
    ),
}  # fmt: skip


def machine(root: Path, files: dict[str, str]) -> Limits:
    return Limits(tree(root, {"proc/self/mountinfo": V2, **files}))


@pytest.mark.parametrize("name", MACHINES)
def test_the_least_limit_counts(name: str, tmp_path: Path) -> None:
    files, processors, memory, free = MACHINES[name]
    limits = machine(tmp_path, files)
    assert limits.processors == processors
    assert (limits.memory_total(), limits.memory_available()) == (memory, free)


NONSENSE = [
    "",
    "max",
    "-1",
    "0",
    "1e5",
    "nan",
    "+7",
    "1_0",
    "0x9",
    "9" * 5000,
    "x" * 5000,
    "\0",
    "\u0661\u0662",
    "7 7 7",
]


@pytest.mark.parametrize("text", NONSENSE, ids=lambda text: repr(text)[:12])
def test_what_is_no_limit_sets_none(text: str, tmp_path: Path) -> None:
    quotas = [
        {"cpu.max": f"{text} 100000"},
        {"cpu.max": f"100000 {text}"},
        {"cpu.max": text},
        {"cpu.cfs_quota_us": text, "cpu.cfs_period_us": "100000"},
        {"cpu.cfs_quota_us": "100000", "cpu.cfs_period_us": text},
        {"cpu.cfs_quota_us": "100000"},
        {"memory.max": text, "memory.high": text, "memory.limit_in_bytes": text},
    ]
    for i, files in enumerate(quotas):
        placed = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
        limits = machine(tmp_path / str(i), {"proc/self/cgroup": "0::/", **placed})
        assert (limits.processors, limits.memory_total(), limits.memory_available()) == (None, None, None)


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "", "proc/self/mountinfo": ""},
        {
            "proc/self/cgroup": "0::/",
            "proc/self/mountinfo": "cgroup2\n - cgroup2\n1 2 3 4 5 6 - cgroup2 x rw",
        },
        {"proc/self/cgroup": "::::\n0\n0:\nno", "proc/self/mountinfo": "a b c d e f - cgroup2 x"},
        {"proc/self/cgroup": "0::" + "/a" * 3000, "proc/self/mountinfo": V2},
        {"proc/self/cgroup": "0::/a\0b/\udcff", "proc/self/mountinfo": V2},
        {"proc/self/cgroup/folder": "", "proc/self/mountinfo": V2},
    ],
    ids=["empty", "half lines", "no lines", "long path", "no path", "a folder"],
)
def test_damaged_files_set_no_limit(files: dict[str, str], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    limits = Limits(tmp_path)
    assert (limits.processors, limits.memory_total(), limits.memory_available()) == (None, None, None)
    assert limits.processor_seconds() is None


def test_figures_of_use_that_are_damaged_count_as_none(tmp_path: Path) -> None:
    limits = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": str(GB),
            "sys/fs/cgroup/memory.current": "lots",
            "sys/fs/cgroup/memory.stat": f"inactive_file\ninactive_file -5\nactive_file {5 * GB} 7",
        },
    )
    assert limits.memory_available() == GB
    # More page cache than memory in use: two files that are read one after the other.
    tree(tmp_path, {"sys/fs/cgroup/memory.current": "7", "sys/fs/cgroup/memory.stat": "active_file 9"})
    assert limits.memory_available() == GB


def test_the_quota_is_read_once_and_memory_each_time(tmp_path: Path) -> None:
    files = {"cpu.max": "100000 100000", "memory.max": str(GB), "memory.current": "0"}
    limits = machine(
        tmp_path, {"proc/self/cgroup": "0::/", **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}
    )
    changes = {"cpu.max": "900000 100000", "memory.max": str(2 * GB), "memory.current": str(GB // 2)}
    tree(tmp_path / "sys/fs/cgroup", changes)
    assert limits.processors == 1.0
    assert (limits.memory_total(), limits.memory_available()) == (2 * GB, 2 * GB - GB // 2)


def test_what_all_that_share_a_quota_have_used(tmp_path: Path) -> None:
    quota = {"cpu.max": "200000 100000", "cpu.stat": "usage_usec 2500000\nuser_usec 7\nnr_throttled 3"}
    files = {f"sys/fs/cgroup/a/{k}": v for k, v in quota.items()}
    inner = {"sys/fs/cgroup/a/b/cpu.max": "200000 100000", "sys/fs/cgroup/a/b/cpu.stat": "usage_usec 1"}
    assert (
        machine(tmp_path / "2", {"proc/self/cgroup": "0::/a/b", **files, **inner}).processor_seconds() == 2.5
    )
    # Version 1 counts in a hierarchy of its own, which is another folder unless it is mounted with the other.
    apart = V1.replace("cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct", "cpu rw - cgroup cgroup rw,cpu")
    apart += "\n41 31 0:41 / /sys/fs/cgroup/cpuacct rw - cgroup cgroup rw,cpuacct"
    files = {
        "proc/self/mountinfo": apart,
        "proc/self/cgroup": "2:cpu:/a/b\n3:cpuacct:/a/b",
        "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "50000",
        "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/cpu/a/cpu.stat": "nr_periods 5",
        "sys/fs/cgroup/cpuacct/a/cpuacct.usage": "1500000000",
        "sys/fs/cgroup/cpuacct/a/b/cpuacct.usage": "1",
    }
    assert machine(tmp_path / "1", files).processor_seconds() == 1.5
    files["proc/self/cgroup"] = "2:cpu:/a/b\n3:cpuacct:/other"
    assert machine(tmp_path / "0", files).processor_seconds() is None


def test_a_hierarchy_of_this_machine_is_found() -> None:
    if not Path("/sys/fs/cgroup").is_dir():
        pytest.skip("this system has no control groups")
    found = groups("memory")
    assert found
    assert all(group.mount.is_dir() for group in found)


# --- real groups ---


@pytest.fixture(autouse=True)
def _all_cores() -> Iterator[None]:
    """A worker that tests run in may have one core, and no quota is less than that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    yield
    os.sched_setaffinity(0, before)


def answers(group: RealGroup, *expressions: str, first: str = "") -> list[Any]:
    """What expressions are to a process in `group` after `first`, with edgespec.machine.sensors as `s`."""
    lines = ["import json, time", "from edgespec.machine import sensors as s", first]
    done = group.run(
        sys.executable, "-c", "\n".join([*lines, f"print(json.dumps([{', '.join(expressions)}]))"])
    )
    assert done.returncode == 0, done.stderr
    answer: list[Any] = json.loads(done.stdout)
    return answer


def test_a_real_quota_and_limit() -> None:
    asked = "s.cpu_quota()", "s.compute_cores()", "s.logical_cores()", "s.cpu_name()"
    cores = len(os.sched_getaffinity(0))
    with real_group() as group:
        names = set()
        for processors in (0.5, 1.0, 1.5, cores - 0.25, cores, cores + 1.0):
            group.limit(processors, 2 * GB)
            quota, compute, logical, name = answers(group, *asked)
            assert quota == (processors if processors < cores else None)
            assert compute <= logical == max(1, min(cores, int(processors)))
            names.add(name)
        assert len(names) == len({0.5, 1.0, 1.5, cores - 0.25, cores})  # no two quotas have one key
        total, limit, free = answers(group, "s.memory_total()", "s.memory_limit()", "s.memory_available()")
        assert total == limit == 2 * GB
        assert GB < free < 2 * GB


def test_a_real_group_in_another() -> None:
    with real_group() as outer:
        outer.limit(1.0, GB)
        inner = outer.inside("inner")
        try:
            inner.limit(memory=2 * GB)
            assert answers(inner, "s.cpu_quota()", "s.compute_cores()", "s.memory_total()") == [1.0, 1, GB]
        finally:
            inner.remove()


def test_page_cache_of_a_real_group_counts_as_free(tmp_path: Path) -> None:
    read = f"with open({str(tmp_path / 'model')!r}, 'rb') as file: file.read()"
    write = f"with open({str(tmp_path / 'model')!r}, 'wb') as file: file.write(bytes({200 * MB}))"
    with real_group() as group:
        group.limit(memory=400 * MB)
        before, after = answers(
            group,
            "before",
            "s.memory_available()",
            first=(f"before = s.memory_available()\n{write}\n{read}\n{read}"),
        )
        assert before - after < 50 * MB
        before, after = answers(
            group,
            "before",
            "s.memory_available()",
            first=(f"before = s.memory_available()\nheld = bytearray({100 * MB})"),
        )
        assert before - after > 90 * MB


def test_who_shares_a_real_quota_is_seen() -> None:
    with real_group() as group:
        group.limit(0.5)
        loop = subprocess.Popen(group.command(sys.executable, "-I", "-c", "while True: pass"))
        try:
            (reading,) = answers(group, "load()", first="load = s.ProcessorLoad()\ntime.sleep(1.0)")
        finally:
            loop.kill()
            loop.wait()
    assert reading["others"] > 0.6  # of half a processor, which is a quarter or less of the machine
    assert reading["load"] >= reading["others"]


def test_doctor_in_a_real_group(tmp_path: Path) -> None:
    with real_group() as group:
        group.limit(1.5, 3 * GB)
        doctor = [sys.executable, "-m", "edgespec.app.cli.main", "doctor"]
        report = json.loads(group.run(*doctor, "--json").stdout)
        assert report["limits"] == {"processors": 1.5, "memory": 3 * GB}
        assert report["processor"]["compute_cores"] == 1
        assert report["processor"]["name"].endswith(" quota 1.5")
        assert report["sensors"]["memory_free"] < 3 * GB
        text = group.run(*doctor).stdout
    assert "limits       1.5 processors and 3,221 MB of memory by control groups" in text.splitlines()
