"""Control groups for tests: made trees of files, and real groups where this machine lets a test make them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from edgespec.machine.cgroup import groups

_PERIOD = 100_000  # microseconds


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return root


class RealGroup:
    """A control group of this machine, in the hierarchies of `cpu`, `cpuacct` and `memory`."""

    def __init__(self, *folders: Path) -> None:
        self._folders = folders
        for folder in folders:
            folder.mkdir()

    def inside(self, name: str) -> RealGroup:
        """A group in this one."""
        for folder in self._folders:
            if (folder / "cgroup.subtree_control").exists():
                (folder / "cgroup.subtree_control").write_text("+cpu +memory")
        return RealGroup(*(folder / name for folder in self._folders))

    def limit(self, processors: float | None = None, memory: int | None = None) -> None:
        quota = None if processors is None else int(processors * _PERIOD)
        values = {
            "cpu.max": quota and f"{quota} {_PERIOD}", "cpu.cfs_quota_us": quota,
            "memory.max": memory, "memory.limit_in_bytes": memory,
        }  # fmt: skip
        for folder in self._folders:
            for name, value in values.items():
                if value is not None and (folder / name).exists():
                    (folder / name).write_text(str(value))

    def command(self, *arguments: str) -> list[str]:
        """A command that runs `arguments` in this group."""
        joining = "".join(f"echo $$ > '{folder}/cgroup.procs' && " for folder in self._folders)
        return ["/bin/sh", "-c", f'{joining}exec "$@"', "sh", *arguments]

    def run(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **(env or {})}
        return subprocess.run(
            self.command(*arguments), capture_output=True, text=True, timeout=120, env=environment
        )

    def remove(self) -> None:
        for folder in self._folders:
            for _ in range(100):  # a group that a process has just left is busy for a moment
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    break
                time.sleep(0.05)
            else:
                raise AssertionError(f"{folder} stays: {(folder / 'cgroup.procs').read_text().split()}")


def _parents() -> list[Path]:
    """The folders that a test may make a group in, one for each hierarchy. Skips where one is missing."""
    found: list[Path] = []
    for controller in ("cpu", "cpuacct", "memory"):
        for group in groups(controller):
            folder = group.mount.joinpath(*group.path)
            switches = group.mount / "cgroup.subtree_control"
            if switches.exists():  # version 2: a group with processes has none inside, but for the outermost
                folder, wanted = group.mount, controller.removesuffix("acct")
                if (folder / "cgroup.type").exists() or wanted not in switches.read_text().split():
                    continue
            if os.access(folder, os.W_OK):
                found += [folder] if folder not in found else []
                break
        else:
            pytest.skip(f"no control group with the controller {controller} can be made here: run as root")
    return found


@contextlib.contextmanager
def real_group(suffix: str = "") -> Iterator[RealGroup]:
    """A group to run processes in, removed afterwards."""
    group = RealGroup(*(folder / f"edgespec-test-{os.getpid()}{suffix}" for folder in _parents()))
    try:
        yield group
    finally:
        group.remove()
