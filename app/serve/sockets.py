"""Listening sockets, created with safe permissions or inherited from systemd; peers; the bearer token.

Knows no HTTP. Every failure is an EdgespecError.
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

MAX_PATH = 107  # bytes of a socket's path without the final NUL (sun_path on Linux; 103 on macOS)
_FIRST_FD = 3  # the first that systemd passes: sd_listen_fds(3)
_BACKLOG = 4096
_TOKEN_BYTES = 32
_LOCK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of a Unix socket, at the time it connected."""

    pid: int
    uid: int


@dataclass(slots=True)
class Bound:
    """An open listening socket. `close` also removes its file, if that is still the one created here."""

    socket: socket.socket
    path: Path | None = None
    _identity: tuple[int, int] | None = None

    @property
    def is_tcp(self) -> bool:
        return self.socket.family in (socket.AF_INET, socket.AF_INET6)

    @property
    def address(self) -> str:
        """The path, or HOST:PORT, for messages."""
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
    """Return `edgespec.sock` in XDG_RUNTIME_DIR, or else in a private temporary folder, which is created.

    Raises EdgespecError if that folder belongs to another user or is open to others.
    """
    chosen = os.environ.get("XDG_RUNTIME_DIR", "")
    if chosen and Path(chosen).is_absolute() and Path(chosen).is_dir():
        return Path(chosen) / "edgespec.sock"
    folder = Path(tempfile.gettempdir()) / f"edgespec-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise EdgespecError(
            f"{printable(folder)} is not a private folder of yours: remove it, or set XDG_RUNTIME_DIR"
        )
    return folder / "edgespec.sock"


def bind_unix(path: Path) -> Bound:
    """Listen on `path`, which only its owner can connect to. A socket without a server is replaced.

    Must be called before other threads start: the umask belongs to the whole process. Raises EdgespecError if
    something else is at `path`, a server listens there, or others can write to its folder.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise EdgespecError("this system has no Unix sockets: use --tcp 127.0.0.1:8080")
    path = Path(os.path.abspath(path))  # noqa: PTH100 - `resolve` would follow a link, which is refused
    if len(os.fsencode(path)) > MAX_PATH:
        raise EdgespecError(
            f"the path of the socket has {len(os.fsencode(path))} bytes, and the maximum is {MAX_PATH}: "
            "choose a shorter --socket"
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
            raise EdgespecError(f"cannot create the socket {printable(path)}: {error.strerror}") from None
        finally:
            os.umask(before)
        made.listen(_BACKLOG)
    made.setblocking(False)
    return Bound(made, path, _identity(path))


def bind_tcp(where: str, allow_remote: bool = False) -> Bound:
    """Listen on HOST:PORT; port 0 selects a free one.

    Raises EdgespecError if the address is invalid or in use, or can be reached from other machines without
    `allow_remote`.
    """
    host, colon, port = where.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise EdgespecError(f"invalid --tcp {where!r}: use HOST:PORT, for example 127.0.0.1:8080")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise EdgespecError(f"invalid --tcp {where!r}: unknown host") from None
    found.sort(key=lambda one: one[0] != socket.AF_INET)
    family, kind, protocol, _, address = found[0]
    _check_reach(str(address[0]), allow_remote)
    made = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # on other systems it lets two programs share a port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        raise EdgespecError(f"cannot listen on {where}: {error.strerror}") from None
    made.listen(_BACKLOG)
    made.setblocking(False)
    return Bound(made)


def inherited(allow_remote: bool = False) -> list[Bound]:
    """Return the sockets that systemd passed to this process in LISTEN_FDS, which it owns.

    Raises EdgespecError for those that are not listening stream sockets, or reachable without `allow_remote`.
    """
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
            raise EdgespecError(f"cannot use socket {fd} of systemd: {error.strerror}") from None
        families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)
        if one.type != socket.SOCK_STREAM or one.family not in families or not listening:
            raise EdgespecError(f"socket {fd} of systemd is not a listening stream socket: use ListenStream=")
        if one.family != socket.AF_UNIX:
            _check_reach(str(one.getsockname()[0]), allow_remote)
        one.setblocking(False)
        found.append(Bound(one))
    return found


def peer_of(connection: socket.socket) -> Peer | None:
    """Return the client of a connection to a Unix socket, None where the system does not report it."""
    if connection.family != socket.AF_UNIX:
        return None
    system: str = sys.platform  # mypy evaluates `sys.platform` for the machine it runs on
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
    """Return the bearer token in `folder`, generated if there is none, and its file.

    Raises EdgespecError if the file cannot be read or written, is readable by others, or contains no token.
    """
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
        raise EdgespecError(f"cannot read or create {printable(path)}: {error.strerror}") from None
    if os.name == "posix" and (found.st_uid != os.geteuid() or found.st_mode & 0o077):
        raise EdgespecError(
            f"{printable(path)} can be read by others: delete it, and the next start creates a new token"
        )
    if len(text) < _TOKEN_BYTES or not all(0x21 <= byte <= 0x7E for byte in text):
        raise EdgespecError(f"{printable(path)} contains no token: delete it, and the next start creates one")
    return text.decode(), path


def _write_token(path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_urlsafe(_TOKEN_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        # Unlike a rename, a link replaces nothing: if two servers start at once, both use the same token.
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()


def _check_reach(host: str, allow_remote: bool) -> None:
    if not allow_remote and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        raise EdgespecError(
            f"{host} can be reached from other machines, without encryption: "
            "use 127.0.0.1, or add --allow-remote"
        )


def _checked(folder: Path) -> Path:
    """Resolve `folder`. Raises EdgespecError for one in which other users could replace the socket."""
    try:
        real = folder.resolve(strict=True)
        found = [(one, one.stat()) for one in (real, *real.parents)]
    except (OSError, RuntimeError):
        raise EdgespecError(
            f"no folder {printable(folder)} for the socket: create it, or choose another --socket"
        ) from None
    for one, status in found:
        sticky = one != real and status.st_mode & stat.S_ISVTX
        if status.st_uid not in (0, os.geteuid()) or (status.st_mode & 0o022 and not sticky):
            raise EdgespecError(
                f"others can write to {printable(one)}, and so replace the socket: "
                "choose --socket in a folder of yours"
            )
    return real


def _clear(path: Path) -> None:
    """Make sure that nothing is at `path`: remove a socket of this user on which no server listens."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
        what = "a link" if stat.S_ISLNK(found.st_mode) else "not a socket"
        what = "another user's" if stat.S_ISSOCK(found.st_mode) else what
        raise EdgespecError(f"{printable(path)} is {what}: remove it, or choose another --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog would block, and means that a server runs
        if probe.connect_ex(str(path)) != errno.ECONNREFUSED:
            raise EdgespecError(
                f"a server is running on {printable(path)}: use it, stop it, or choose another --socket"
            )
    path.unlink()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lock `folder`: else, of two programs that find a stale socket, one could remove the other's new one."""
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
                        f"another program holds a lock on {printable(folder)}: choose another --socket"
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(fd)


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino
