"""A bare system to try the bundle in: no Python, no network, nothing but the home and /tmp to write to."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

USER = 1000
HOME = "/home/user"
OPT = "/opt"
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgespec" / "roots"


def make_root(folder: Path) -> Path:
    """Unpack the bare system into `folder`; the first time debootstrap makes it, a minute and 100 MB.

    Its release is that of this machine, where the program was built: the oldest glibc that is promised.
    """
    release = _system("VERSION_CODENAME")
    archive = _CACHE / f"{release}.tar"
    if not archive.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        show = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
        mirror = subprocess.run(show, capture_output=True, text=True, check=True).stdout.split()[0]
        fresh = folder.with_name("debootstrap")
        subprocess.run(["debootstrap", "--variant=minbase", release, str(fresh), mirror], check=True)
        partial = archive.with_suffix(".partial")
        subprocess.run(["tar", "-C", str(fresh), "-cf", str(partial), "."], check=True)
        partial.replace(archive)
    folder.mkdir()
    subprocess.run(["tar", "-C", str(folder), "-xpf", str(archive)], check=True)
    for name in (HOME, OPT):
        (folder / name[1:]).mkdir(parents=True, exist_ok=True)
    return folder


def _system(key: str) -> str:
    lines = Path("/etc/os-release").read_text().splitlines()
    return next(line.partition("=")[2].strip('"') for line in lines if line.startswith(f"{key}="))


def end(pid: int) -> None:
    """Kill what `Bare.command` started as process `pid`: its child is the first of all the others."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Bare:
    """How the program is run: `root` read-only, `opt` shown at /opt, `home` at /home/user.

    `tmp` and `home_options` are mount options; with `home_size` the home is a file system of its own.
    """

    root: Path
    opt: Path
    home: Path
    tmp: str = "mode=1777"
    home_options: str = "bind"
    home_size: str = ""

    def change(self, **fields: str) -> Bare:
        return replace(self, **fields)

    def command(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None, where: str = HOME
    ) -> list[str]:
        """The command line that runs `arguments` in there, as an ordinary user without a network."""
        q = {name: shlex.quote(str(getattr(self, name))) for name in ("root", "opt", "home")}
        mounts = [
            "mount --make-rprivate /",
            f"mount --bind {q['root']} {q['root']}",
            f"mount --bind {q['opt']} {q['root']}{OPT}",
            f"mount -o remount,bind,ro {q['root']}{OPT}",
            f"mount -t proc proc {q['root']}/proc",
            f"mount --rbind /dev {q['root']}/dev",
            f"mount -t tmpfs -o {self.tmp} tmpfs {q['root']}/tmp",
        ]
        target = f"{q['root']}{HOME}"
        if self.home_size:
            mounts.append(f"mount -t tmpfs -o size={self.home_size},uid={USER},gid={USER} tmpfs {target}")
        else:
            mounts.append(f"mount --bind {q['home']} {target}")
            if self.home_options != "bind":
                mounts.append(f"mount -o remount,bind,{self.home_options} {target}")
        mounts.append(f"mount -o remount,bind,ro {q['root']}")
        given = {"HOME": HOME, "PATH": "/usr/bin:/bin", "TERM": "xterm-256color", **(environment or {})}
        inner = [
            "chroot", f"--userspec={USER}:{USER}", "--groups=", str(self.root), "/usr/bin/env", "-i",
            *(f"{key}={value}" for key, value in given.items()),
            "/bin/sh", "-c", 'cd "$0" && exec "$@"', where, *arguments,
        ]  # fmt: skip
        script = " && ".join([*mounts, f"exec {shlex.join(inner)}"])
        unshare = ["/usr/bin/unshare", "--net", "--mount", "--pid", "--fork"]
        return [*unshare, "/bin/sh", "-c", script]

    def run(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        where: str = HOME,
        good: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end; with `good` it must succeed."""
        command = self.command(arguments, environment, where)
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=600, check=False
        )
        assert not good or done.returncode == 0, done.stderr
        return done
