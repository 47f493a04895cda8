"""Sockets to serve on: made with the right permissions, or taken over from systemd; who connects; the token.

Knows nothing of HTTP. Every refusal is one EdgespecError.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import secrets
import socket
import stat
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgespec.core import EdgespecError
from edgespec.text import printable

MAX_PATH = 107  # bytes of a socket's path, its final NUL aside (sun_path of Linux; 103 on macOS)
_FIRST_FD = 3  # of systemd's, sd_listen_fds(3)
_BACKLOG = 4096
_TOKEN_BYTES = 32
_LOCK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of a Unix socket, as it was when it connected."""

    pid: int
    uid: int


@dataclass(slots=True)
class Bound:
    """An open listening socket. `close` also removes its file, if it is still the one made here."""

    socket: socket.socket
    path: Path | None = None
    _identity: tuple[int, int] | None = None

    @property
    def is_tcp(self) -> bool:
        return self.socket.family in (socket.AF_INET, socket.AF_INET6)

    @property
    def address(self) -> str:
        """For a message: a path, or HOST:PORT."""
        if not self.is_tcp:
            return str(self.path or self.socket.getsockname() or "a Unix socket")
        host, port = self.socket.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self.path is not None and _identity(self.path) == self._identity:
                self.path.unlink()
        self.socket.close()


def default_path() -> Path:
    """`edgespec.sock` in XDG_RUNTIME_DIR, or in a folder of ours that nobody else may enter (made here)."""
    chosen = os.environ.get("XDG_RUNTIME_DIR", "")
    if chosen and Path(chosen).is_absolute() and Path(chosen).is_dir():
        return Path(chosen) / "edgespec.sock"
    folder = Path(tempfile.gettempdir()) / f"edgespec-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise EdgespecError(
            f"{printable(folder)} must be a folder of yours that nobody else may enter: "
            "remove it, or set XDG_RUNTIME_DIR."
        )
    return folder / "edgespec.sock"


def bind_unix(path: Path) -> Bound:
    """Listen on `path`, for its owner alone. A socket that nobody answers on is replaced.

    Call it before other threads run: the mask of permissions belongs to the whole process.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise EdgespecError("Python has no Unix sockets on this system: use --tcp 127.0.0.1:8080 alone.")
    path = Path(os.path.abspath(path))  # noqa: PTH100 - `resolve` would follow a link, which is refused
    if len(os.fsencode(path)) > MAX_PATH:
        raise EdgespecError(
            f"The socket's path has {len(os.fsencode(path))} bytes and may have {MAX_PATH}: "
            "choose a shorter --socket."
        )
    path = _checked(path.parent) / path.name
    with _alone(path.parent):
        _clear(path)
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            made.bind(str(path))
        except OSError as error:
            made.close()
            raise EdgespecError(f"Cannot make the socket {printable(path)}: {error.strerror}.") from None
        finally:
            os.umask(before)
        made.listen(_BACKLOG)
    made.setblocking(False)
    return Bound(made, path, _identity(path))


def bind_tcp(where: str, allow_remote: bool = False) -> Bound:
    """Listen on HOST:PORT; port 0 takes a free one. Other hosts may connect only with `allow_remote`."""
    host, colon, port = where.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise EdgespecError(f"--tcp {where!r}: write it as HOST:PORT, for example 127.0.0.1:8080.")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise EdgespecError(f"--tcp {where!r}: there is no host of that name.") from None
    found.sort(key=lambda one: one[0] != socket.AF_INET)
    family, kind, protocol, _, address = found[0]
    _check_reach(str(address[0]), allow_remote)
    made = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it lets two programs share a port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise EdgespecError(f"Cannot listen on {where}: {error.strerror}.") from None
    made.listen(_BACKLOG)
    made.setblocking(False)
    return Bound(made)


def inherited(allow_remote: bool = False) -> list[Bound]:
    """The sockets that systemd opened for this process (LISTEN_FDS), which belong to it."""
    mine = os.environ.pop("LISTEN_PID", "") == str(os.getpid())
    count = os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not mine or not count.isdigit():
        return []
    found: list[Bound] = []
    for fd in range(_FIRST_FD, _FIRST_FD + int(count)):
        try:
            os.set_inheritable(fd, False)
            one = socket.socket(fileno=fd)
            listening = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise EdgespecError(f"systemd's socket {fd} cannot be used: {error.strerror}.") from None
        families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
        if one.type != socket.SOCK_STREAM or one.family not in families or not listening:
            raise EdgespecError(f"systemd's socket {fd} is no listening stream socket: use ListenStream=.")
        if one.family != socket.AF_UNIX:
            _check_reach(str(one.getsockname()[0]), allow_remote)
        one.setblocking(False)
        found.append(Bound(one))
    return found


def peer_of(connection: socket.socket) -> Peer | None:
    """Who made a connection to a Unix socket; None where the system does not tell."""
    if connection.family != socket.AF_UNIX:
        return None
    system: str = sys.platform  # mypy takes the name itself for that of the machine it runs on
    try:
        if system == "linux":
            data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid, uid, _ = struct.unpack("iII", data)
            return Peer(pid, uid)
        if system == "darwin":  # LOCAL_PEERCRED and LOCAL_PEERPID of sys/un.h
            _, uid = struct.unpack_from("II", connection.getsockopt(0, 1, 76))
            (pid,) = struct.unpack("i", connection.getsockopt(0, 2, 4))
            return Peer(pid, uid)
    except OSError:
        pass
    return None


def token(folder: Path) -> tuple[str, Path]:
    """The bearer token in `folder`, made when there is none, and its file, which is the owner's alone."""
    path = folder / "server-token"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.path.lexists(path):
            _write_token(path)
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(fd, "rb") as file:
            found = os.fstat(file.fileno())
            text = file.read(1000).strip()
    except OSError as error:
        raise EdgespecError(f"Cannot read or make {printable(path)}: {error.strerror}.") from None
    if os.name == "posix" and (found.st_uid != os.geteuid() or found.st_mode & 0o077):
        raise EdgespecError(
            f"Others can read {printable(path)}: delete it, and a new token is made at the next start."
        )
    if len(text) < _TOKEN_BYTES or not all(0x21 <= byte <= 0x7E for byte in text):
        raise EdgespecError(f"{printable(path)} is no token: delete it, and one is made at the next start.")
    return text.decode(), path


def _write_token(path: Path) -> None:
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_urlsafe(_TOKEN_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        # Unlike a rename, a link takes nobody's place: of two servers that start at once, one token stays.
        with contextlib.suppress(FileExistsError):
            os.link(beside, path)
    finally:
        beside.unlink()


def _check_reach(host: str, allow_remote: bool) -> None:
    if not allow_remote and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        raise EdgespecError(
            f"{host} can be reached from other machines, and what is sent is not encrypted: "
            "add --allow-remote if that is what you want, or choose 127.0.0.1."
        )


def _checked(folder: Path) -> Path:
    """`folder` without links. Refuses one in which others could put another socket in the place of ours."""
    try:
        real = folder.resolve(strict=True)
        found = [(one, one.stat()) for one in (real, *real.parents)]
    except (OSError, RuntimeError):
        raise EdgespecError(f"There is no folder {printable(folder)} for the socket.") from None
    for one, status in found:
        sticky = one != real and status.st_mode & stat.S_ISVTX
        if status.st_uid not in (0, os.geteuid()) or (status.st_mode & 0o022 and not sticky):
            raise EdgespecError(
                f"Others can write to {printable(one)}, and so replace the socket: "
                "choose --socket in a folder of yours."
            )
    return real


def _clear(path: Path) -> None:
    """Make sure that nothing is at `path`: remove a socket of ours that nobody listens on."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        what = "a link" if stat.S_ISLNK(found.st_mode) else "no socket"
        what = "another user's" if stat.S_ISSOCK(found.st_mode) else what
        raise EdgespecError(f"{printable(path)} is {what}: remove it, or choose another --socket.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog would block, and is a sign of life
        if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
            raise EdgespecError(
                f"A server answers on {printable(path)} already: use it, stop it, or choose another --socket."
            )
    path.unlink()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One program at a time: of two that find the same old socket, one would remove the other's new one."""
    import fcntl

    fd = os.open(folder, os.O_RDONLY)
    end = time.monotonic() + _LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise EdgespecError(
                        f"Another program holds a lock on {printable(folder)}: choose another --socket."
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(fd)


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino
