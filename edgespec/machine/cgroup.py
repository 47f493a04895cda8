"""Limits of processor time and memory that control groups (versions 1 and 2) set for this process.

A limit applies to a group and to every group in it, so the lowest of the process's own group and its
ancestors counts, as far up as the hierarchy is mounted: a container finds its own group at the mount point.
A machine can have hierarchies of both versions, each controller in one of them; in the other, it has no
files. A missing or malformed file sets no limit.

Every function takes the root of the file system that it reads, so that tests can use a tree of their own.
Sources: cgroup-v2.rst and cgroup-v1/ in the kernel's Documentation/admin-guide, sched-bwc.rst in its
scheduler/.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from operator import itemgetter
from pathlib import Path, PurePosixPath

ROOT = Path("/")

_MOST = 4 << 20  # bytes of a file: a machine with thousands of mounts lists them in one
_UNLIMITED = 1 << 60  # bytes; version 1 writes the largest number of whole pages
_UNIFIED = ""  # the name of version 2's only hierarchy, in place of controllers


@dataclass(frozen=True, slots=True)
class Group:
    """A control group: the folder on which its hierarchy is mounted, and its path in there."""

    mount: Path
    path: tuple[str, ...] = ()

    def exists(self) -> bool:
        try:
            return stat.S_ISDIR(self.mount.joinpath(*self.path).stat().st_mode)
        except (OSError, ValueError):  # ValueError: a zero byte in the name
            return False

    def read(self, name: str) -> str:
        """Return the content of one of its files, "" if there is none or it cannot be read."""
        return _text(self.mount.joinpath(*self.path, name))


def groups(controller: str, root: Path = ROOT) -> list[Group]:
    """Return the groups that limit `controller` for this process: its own first, then its ancestors."""
    if os.name != "posix":  # elsewhere, anyone who can write to the drive could create these files
        return []
    member_of = dict(_memberships(_text(root / "proc/self/cgroup")))
    mounts = list(_mounts(_text(root / "proc/self/mountinfo")))
    found: list[Group] = []
    for hierarchy in (controller, _UNIFIED):
        points = [(point, top) for names, point, top in mounts if hierarchy in names]
        places = [(point, below(member_of.get(hierarchy), top)) for point, top in points]
        # Of several mounts, take the one that shows the most ancestors. A path outside the mount belongs to
        # another namespace, and then only the mount point is known of the group.
        inside = [(point, path) for point, path in places if path is not None]
        inside = inside or [(point, ()) for point, _ in points]
        if inside:
            point, path = max(inside, key=lambda place: len(place[1]))
            mount = root / point.lstrip("/")
            nested = (Group(mount, path[:depth]) for depth in range(len(path) + 1))
            found += reversed(list(takewhile(Group.exists, nested)))
    return found


def below(path: str | None, top: str) -> tuple[str, ...] | None:
    """Return the parts of a group's `path` below the group `top`, None if it is not in there."""
    parts, above = PurePosixPath(path or "").parts[1:], PurePosixPath(top).parts[1:]
    rest = parts[len(above) :]
    return rest if path is not None and parts[: len(above)] == above and ".." not in rest else None


def processors(group: Group) -> float | None:
    """Return the number of processors that the group's quota amounts to, None without one."""
    words = group.read("cpu.max").split()
    words = words or [group.read("cpu.cfs_quota_us"), group.read("cpu.cfs_period_us")]
    quota, period = map(_number, words) if len(words) == 2 else (None, None)
    return quota / period if quota and period else None


def memory_limit(group: Group) -> int | None:
    """Return the bytes that the group may hold before the kernel throttles or kills its processes."""
    limits = [_number(group.read(name)) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
    return min((limit for limit in limits if limit and limit < _UNLIMITED), default=None)


def memory_left(group: Group) -> int | None:
    """Return the bytes that the group can still take, None without a limit.

    Its page cache counts as free, whether used recently (active) or not: a model that was just downloaded and
    verified is in it, and the kernel drops it before it refuses an allocation.
    """
    limit = memory_limit(group)
    if limit is None:
        return None
    usage = _number(group.read("memory.current") or group.read("memory.usage_in_bytes")) or 0
    lines = [line.split(" ") for line in group.read("memory.stat").split("\n")]
    figures = {line[0]: _number(line[1]) or 0 for line in lines if len(line) == 2}
    # In version 1 only the values with "total" in their names include the groups below, as the usage does.
    cache = sum(
        figures.get(f"total_{name}", figures.get(name, 0)) for name in ("inactive_file", "active_file")
    )
    return max(0, limit - max(0, usage - cache))


class Limits:
    """The limits of this process. Its groups and its quota are read once, memory in every call."""

    def __init__(self, root: Path = ROOT) -> None:
        self._memory = groups("memory", root)
        # The outermost first: of equal quotas it is the one that the most programs share.
        quotas = [
            (quota, group)
            for group in reversed(groups("cpu", root))
            if (quota := processors(group)) is not None
        ]
        quota, group = min(quotas, key=itemgetter(0)) if quotas else (None, None)
        self.processors: float | None = quota
        """Processors that this process may use on average, possibly fractional; None without a quota."""
        self._counted = [] if group is None else [group]
        # Version 1 counts processor time in a controller of its own, mounted with the quota's or elsewhere.
        self._counted += [one for one in groups("cpuacct", root) if group and one.path == group.path]

    def processor_seconds(self) -> float | None:
        """Return the processor seconds used of the quota by all that share it; None where unavailable."""
        for group in self._counted:
            if found := re.search(r"^usage_usec ([0-9]{1,19})$", group.read("cpu.stat"), re.MULTILINE):
                return int(found[1]) * 1e-6
            if (nanoseconds := _number(group.read("cpuacct.usage"))) is not None:
                return nanoseconds * 1e-9
        return None

    def memory_total(self) -> int | None:
        """Return the lowest limit in bytes, None without one."""
        return min((n for n in map(memory_limit, self._memory) if n is not None), default=None)

    def memory_available(self) -> int | None:
        """Return the bytes that can still be taken, None without a limit."""
        return min((n for n in map(memory_left, self._memory) if n is not None), default=None)


def _memberships(text: str) -> Iterator[tuple[str, str]]:
    """Yield controller and path of the group, for each line of /proc/self/cgroup."""
    for line in text.split("\n"):
        _, *names, path = line.split(":", 2) if line.count(":") >= 2 else ("", "")
        yield from ((name, path) for one in names for name in one.split(","))


def _mounts(text: str) -> Iterator[tuple[set[str], str, str]]:
    """Yield controllers, folder and topmost group of each hierarchy in /proc/self/mountinfo."""
    for line in text.split("\n"):
        before, _, after = line.partition(" - ")
        fields, source = before.split(" "), after.split(" ")
        if len(fields) >= 6 and len(source) >= 3 and source[0] in ("cgroup", "cgroup2"):
            names = {_UNIFIED} if source[0] == "cgroup2" else set(source[2].split(",")) - {_UNIFIED}
            yield names, _unescaped(fields[4]), _unescaped(fields[3])


def _unescaped(text: str) -> str:
    """Decode white space and backslashes, which are written as three octal digits."""
    return re.sub(r"\\([0-3][0-7]{2})", lambda found: chr(int(found[1], 8)), text)


def _number(text: str) -> int | None:
    """Parse a whole number of at most 19 digits; None for anything else, including "max" and "-1"."""
    return int(text) if re.fullmatch("[0-9]{1,19}", text) else None


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MOST).decode("utf-8", "surrogateescape").strip()
    except OSError:
        return ""
