"""Sockets and the token: safe permissions, and files of others are left alone."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgespec.app.serve import sockets
from edgespec.core import EdgespecError

ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="needs root, to be another user")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "run"
    made.mkdir(mode=0o700)
    return made


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_socket_is_its_owners_alone(folder: Path) -> None:
    before = os.umask(0)  # the most permissive
    try:
        bound = sockets.bind_unix(folder / "s")
        assert os.umask(0) == 0, "the mask is restored"
    finally:
        os.umask(before)
    assert mode(folder / "s") == 0o600
    assert not bound.is_tcp
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(folder / "s"))
    bound.close()
    assert not (folder / "s").exists()


def test_only_the_socket_that_was_made_is_removed(folder: Path) -> None:
    bound = sockets.bind_unix(folder / "s")
    (folder / "s").rename(folder / "old")
    (folder / "s").write_text("mine")
    bound.close()
    assert (folder / "s").read_text() == "mine"
    bound = sockets.bind_unix(folder / "t")
    (folder / "t").unlink()
    bound.close()


def test_a_stale_socket_is_replaced(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(folder / "s"))
    sockets.bind_unix(folder / "s").close()


def test_a_living_server_is_left_alone(folder: Path) -> None:
    bound = sockets.bind_unix(folder / "s")
    with pytest.raises(EdgespecError, match="server is running"):
        sockets.bind_unix(folder / "s")
    assert (folder / "s").exists()
    bound.close()


def test_a_living_server_with_a_full_backlog_is_left_alone(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(folder / "s"))
        busy.listen(0)
        clients = [socket.socket(socket.AF_UNIX) for _ in range(4)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(str(folder / "s"))
        with pytest.raises(EdgespecError, match="server is running"):
            sockets.bind_unix(folder / "s")
        for client in clients:
            client.close()


def test_of_many_that_start_at_once_one_gets_the_socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(folder / "s"))
    code = (
        "import sys, time; from pathlib import Path\n"
        "from edgespec.app.serve import sockets; from edgespec.core import *\n"
        "clear = sockets._clear; sockets._clear = lambda path: (clear(path), time.sleep(0.3))\n"
        "try: bound = sockets.bind_unix(Path(sys.argv[1])); print('bound', flush=True); sys.stdin.read()\n"
        "except EdgespecError as e: print(e)"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder / "s")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(6)
    ]  # fmt: skip
    lines = [process.stdout.readline() for process in started if process.stdout]
    for process in started:
        process.communicate()
    assert sorted(line.startswith("bound") for line in lines) == [False] * 5 + [True], lines
    assert all("server is running" in line for line in lines if not line.startswith("bound"))


@pytest.mark.parametrize("what", ["link", "dangling link", "file", "folder", "fifo"])
def test_anything_but_a_socket_is_kept(what: str, folder: Path) -> None:
    path = folder / "s"
    match what:
        case "link":
            (folder / "other").write_text("precious")
            path.symlink_to(folder / "other")
        case "dangling link":
            path.symlink_to(folder / "nothing")
        case "file":
            path.write_text("precious")
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
    with pytest.raises(EdgespecError, match="remove it, or choose another --socket"):
        sockets.bind_unix(path)
    assert os.path.lexists(path)


def test_a_link_to_a_living_socket_is_refused(folder: Path) -> None:
    bound = sockets.bind_unix(folder / "real")
    (folder / "s").symlink_to(folder / "real")
    with pytest.raises(EdgespecError, match="a link"):
        sockets.bind_unix(folder / "s")
    bound.close()


@pytest.mark.parametrize("bits", [0o722, 0o770, 0o777, 0o1777])
def test_a_folder_that_others_write_to_is_refused(bits: int, folder: Path) -> None:
    folder.chmod(bits)
    with pytest.raises(EdgespecError, match="others can write"):
        sockets.bind_unix(folder / "s")


def test_a_folder_within_one_that_others_write_to_is_refused(folder: Path) -> None:
    (folder / "in").mkdir(mode=0o700)
    folder.chmod(0o777)
    with pytest.raises(EdgespecError, match="others can write"):
        sockets.bind_unix(folder / "in" / "s")


@needs_root
def test_a_folder_of_another_user_is_refused(folder: Path) -> None:
    os.chown(folder, 65534, 65534)
    with pytest.raises(EdgespecError, match="others can write"):
        sockets.bind_unix(folder / "s")


def test_a_folder_that_is_not_there(folder: Path) -> None:
    with pytest.raises(EdgespecError, match="no folder"):
        sockets.bind_unix(folder / "nothing" / "s")


@pytest.mark.parametrize(("length", "good"), [(107, True), (108, False), (5000, False)])
def test_the_longest_path(length: int, good: bool, folder: Path) -> None:
    path = folder / ("é" * ((length - len(str(folder)) - 1) // 2))
    path = path.with_name(path.name + "x" * (length - len(os.fsencode(path))))
    assert len(os.fsencode(path)) == length
    if good:
        sockets.bind_unix(path).close()
    else:
        with pytest.raises(EdgespecError, match="107"):
            sockets.bind_unix(path)


def test_the_default_is_in_the_runtime_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    assert sockets.default_path() == folder / "edgespec.sock"


def test_the_default_without_a_runtime_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(folder))
    for value in ("", "relative", str(folder / "gone")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
        path = sockets.default_path()
        assert path.parent == folder / f"edgespec-{os.geteuid()}"
        assert mode(path.parent) == 0o700
    sockets.bind_unix(path).close()


@pytest.mark.parametrize("what", ["open", "file", "link"])
def test_somebody_else_made_the_default_folder(
    what: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(folder))
    mine = folder / f"edgespec-{os.geteuid()}"
    if what == "open":
        mine.mkdir()
        mine.chmod(0o755)
    elif what == "file":
        mine.write_text("")
    else:
        (folder / "trap").mkdir(mode=0o700)
        mine.symlink_to(folder / "trap")
    with pytest.raises(EdgespecError, match="not a private folder"):
        sockets.default_path()


def test_who_connects(folder: Path) -> None:
    bound = sockets.bind_unix(folder / "s")
    bound.socket.setblocking(True)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(folder / "s"))
        connection, _ = bound.socket.accept()
        with connection:
            assert sockets.peer_of(connection) == sockets.Peer(os.getpid(), os.geteuid())
    bound.close()


def test_nobody_is_known_over_tcp() -> None:
    bound = sockets.bind_tcp("127.0.0.1:0")
    assert bound.is_tcp
    assert sockets.peer_of(bound.socket) is None
    bound.close()


@pytest.mark.parametrize(
    "where", ["127.0.0.1", "", ":80", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000", "127.0.0.1:-1", "::1"]
)
def test_addresses_that_are_none(where: str) -> None:
    with pytest.raises(EdgespecError, match=r"HOST:PORT|unknown host"):
        sockets.bind_tcp(where)


@pytest.mark.parametrize("where", ["0.0.0.0:0", "[::]:0"])
def test_other_machines_only_when_asked_for(where: str) -> None:
    with pytest.raises(EdgespecError, match="--allow-remote"):
        sockets.bind_tcp(where)
    if where.startswith("0"):
        bound = sockets.bind_tcp(where, allow_remote=True)
        assert bound.address.startswith("0.0.0.0:")
        bound.close()


def test_a_port_in_use() -> None:
    bound = sockets.bind_tcp("localhost:0")
    with pytest.raises(EdgespecError, match="cannot listen"):
        sockets.bind_tcp(bound.address)
    bound.close()


def test_the_token_is_made_once(folder: Path) -> None:
    before = os.umask(0)
    try:
        token, path = sockets.token(folder / "data")
    finally:
        os.umask(before)
    assert mode(path) == 0o600
    assert len(token) >= 40
    assert sockets.token(folder / "data") == (token, path)
    assert sockets.token(folder / "other")[0] != token
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_of_many_tokens_made_at_once_one_stays(folder: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(sockets.token(folder)[0])) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert len(set(found)) == 1


@pytest.mark.parametrize("what", ["readable", "short", "empty", "binary", "link", "folder", "fifo"])
def test_a_token_that_cannot_be_trusted(what: str, folder: Path) -> None:
    path = folder / "server-token"
    match what:
        case "readable":
            path.write_text("x" * 40)
            path.chmod(0o640)
        case "link":
            (folder / "other").write_text("x" * 40)
            (folder / "other").chmod(0o600)
            path.symlink_to(folder / "other")
        case "folder":
            path.mkdir(mode=0o700)
        case "fifo":
            os.mkfifo(path, 0o600)
        case _:
            path.write_bytes({"short": b"x" * 31, "empty": b"", "binary": b"\xff" * 40}[what])
            path.chmod(0o600)
    with pytest.raises(EdgespecError):
        sockets.token(folder)


@needs_root
def test_a_token_of_another_user(folder: Path) -> None:
    path = folder / "server-token"
    path.write_text("x" * 40)
    path.chmod(0o600)
    os.chown(path, 65534, 65534)
    with pytest.raises(EdgespecError, match="read by others"):
        sockets.token(folder)


@pytest.fixture
def activation() -> Iterator[list[str]]:
    """A command that prints the sockets it inherits from systemd."""
    code = (
        "import os, sys\n"
        "os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "from edgespec.app.serve import sockets; from edgespec.core import EdgespecError\n"
        "try: found = sockets.inherited(); print([one.is_tcp for one in found], 'LISTEN_FDS' in os.environ)\n"
        "except EdgespecError as e: print(e)\n"
        "[one.close() for one in sockets.inherited()]"
    )
    return [sys.executable, "-c", code]


def activated(command: list[str], given: socket.socket) -> str:
    code = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.execv(sys.argv[2], sys.argv[2:])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(given.fileno()), *command],
        pass_fds=[given.fileno()], env={**os.environ, "LISTEN_FDS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_a_socket_of_systemd(activation: list[str], folder: Path) -> None:
    bound = sockets.bind_unix(folder / "s")
    assert activated(activation, bound.socket) == "[False] False\n"
    assert (folder / "s").exists(), "it belongs to systemd"
    tcp = sockets.bind_tcp("127.0.0.1:0")
    assert activated(activation, tcp.socket) == "[True] False\n"
    tcp.close()
    bound.close()


def test_sockets_of_systemd_that_are_none(activation: list[str]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        assert "not a listening stream socket" in activated(activation, datagrams)
    with socket.socket() as deaf:
        assert "not a listening stream socket" in activated(activation, deaf)
    with socket.create_server(("0.0.0.0", 0)) as remote:
        assert "--allow-remote" in activated(activation, remote)


def test_sockets_for_another_process_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert sockets.inherited() == []
    assert "LISTEN_FDS" not in os.environ
