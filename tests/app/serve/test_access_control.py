"""Access: every combination of host, origin, token and user that is known to matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Running, exchange, question, running

from edgespec.app.serve.access_control import own_names

GET, POST = "GET /health", "POST /tokenize"
BODY = json.dumps({"content": "hello"}).encode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("guard")
    with running(folder, "--draft", "none", "--host-name", "Edge.Example") as one:
        yield one


def send(server: Running, tcp: bool, what: str, lines: list[str]) -> tuple[int, dict[str, str], bytes]:
    """Send a request with exactly these header lines; TOKEN and PORT in them are filled in."""
    body = BODY if what.startswith("POST") else b""
    if body:
        lines = [*lines, f"Content-Length: {len(body)}"]
        if not any(line.lower().startswith("content-type") for line in lines):
            lines.append("Content-Type: application/json")
    text = "\r\n".join([f"{what} HTTP/1.1", *lines]) + "\r\n\r\n"
    text = text.replace("TOKEN", server.token).replace("PORT", str(server.port))
    with server.connect(tcp) as connection:
        return exchange(connection, text.encode("latin-1") + body)


BEARER, KEY = "Authorization: Bearer TOKEN", "X-Api-Key: TOKEN"
HERE = "Host: 127.0.0.1:PORT"

TCP = [
    # the token
    (GET, [HERE, BEARER], 200),
    (GET, [HERE, KEY], 200),
    (GET, [HERE, "authorization: bearer TOKEN"], 200),
    (GET, [HERE, "Authorization: Bearer  TOKEN "], 200),
    (GET, [HERE], 401),
    (GET, [HERE, "Authorization: Bearer"], 401),
    (GET, [HERE, "Authorization: Bearer "], 401),
    (GET, [HERE, "Authorization: Bearer wrong"], 401),
    (GET, [HERE, "Authorization: Bearer TOKENx"], 401),
    (GET, [HERE, "Authorization: Bearer xTOKEN"], 401),
    (GET, [HERE, "Authorization: Basic TOKEN"], 401),
    (GET, [HERE, "Authorization: TOKEN"], 401),
    (GET, [HERE, "X-Api-Key: wrong"], 401),
    (GET, [HERE, "X-Api-Key: \xff\xfe"], 401),
    (GET, [HERE, "Cookie: token=TOKEN"], 401),
    ("GET /health?token=TOKEN", [HERE], 401),
    (GET, [HERE, "Authorization: Bearer wrong", KEY], 401),
    (GET, [HERE, BEARER, "Authorization: Bearer wrong"], 400),
    (GET, [HERE, KEY, KEY], 400),
    ("GET /metrics", [HERE], 401),
    ("GET /openapi.json", [HERE], 401),
    ("GET /nothing", [HERE], 401),
    (POST, [HERE], 401),
    (POST, [HERE, BEARER], 200),
    # the host: names that an attacker's DNS may resolve to this machine
    (GET, ["Host: localhost", BEARER], 200),
    (GET, ["Host: LOCALHOST:1", BEARER], 200),
    (GET, ["Host: localhost.", BEARER], 200),
    (GET, ["Host: [::1]:80", BEARER], 200),
    (GET, ["Host: edge.example:80", BEARER], 200),
    (GET, ["Host: evil.example", BEARER], 403),
    (GET, ["Host: evil.example"], 403),
    (GET, ["Host: localhost.evil.example", BEARER], 403),
    (GET, ["Host: 127.0.0.1.evil.example:PORT", BEARER], 403),
    (GET, ["Host: evil.example:127.0.0.1", BEARER], 403),
    (GET, ["Host: localhost:80@evil.example", BEARER], 403),
    (GET, ["Host: ", BEARER], 403),
    (GET, ["Host: 127.0.0.2:PORT", BEARER], 403),
    (GET, ["Host: 0.0.0.0:PORT", BEARER], 403),
    (GET, ["Host: [::1", BEARER], 403),
    (GET, ["Host: localhost, evil.example", BEARER], 403),
    (GET, [HERE, "Host: evil.example", BEARER], 400),
    (GET, [BEARER], 400),
    (POST, ["Host: evil.example", BEARER], 403),
    (GET, ["Host: evil.example", "X-Forwarded-Host: localhost", BEARER], 403),
    ("GET http://127.0.0.1/health", ["Host: evil.example", BEARER], 400),
    ("GET http://evil.example/health", [HERE, BEARER], 400),
    # the origin
    (GET, [HERE, BEARER, "Origin: http://127.0.0.1:PORT"], 200),
    (GET, [HERE, BEARER, "Origin: http://localhost:PORT"], 403),
    (GET, [HERE, BEARER, "Origin: http://127.0.0.1:1"], 403),
    (GET, [HERE, BEARER, "Origin: https://127.0.0.1:PORT"], 403),
    (GET, [HERE, BEARER, "Origin: https://evil.example"], 403),
    (GET, [HERE, BEARER, "Origin: null"], 403),
    (GET, [HERE, BEARER, "Origin: "], 403),
    (GET, [HERE, BEARER, "Origin: http://127.0.0.1:PORT", "Origin: null"], 400),
    (POST, [HERE, BEARER, "Origin: https://evil.example", "Content-Type: text/plain"], 403),
    (GET, ["Host: evil.example:PORT", BEARER, "Origin: http://evil.example:PORT"], 403),
    (GET, [HERE, BEARER, "Sec-Fetch-Site: cross-site"], 403),
    (GET, [HERE, BEARER, "Sec-Fetch-Site: same-site"], 403),
    (GET, [HERE, BEARER, "Sec-Fetch-Site: none"], 200),
    ("OPTIONS /v1/chat/completions", [HERE, "Origin: https://evil.example"], 403),
    ("OPTIONS /v1/chat/completions", [HERE, BEARER], 405),
    # what a page may send without a preflight request
    (POST, [HERE, BEARER, "Content-Type: text/plain"], 415),
    (POST, [HERE, BEARER, "Content-Type: application/x-www-form-urlencoded"], 415),
    (POST, [HERE, BEARER, "Content-Type: application/json; charset=utf-8"], 200),
    (POST, [HERE, BEARER, "Content-Type: text/plain", "Content-Type: application/json"], 400),
]

UNIX = [
    (GET, ["Host: localhost"], 200),
    (GET, ["Host: anything"], 200),
    (GET, ["Host: localhost", "Authorization: Bearer whatever"], 200),
    (POST, ["Host: localhost"], 200),
    (GET, ["Host: localhost", "Origin: http://localhost"], 403),
    (GET, ["Host: localhost", "Origin: null"], 403),
    (POST, ["Host: localhost", "Content-Type: text/plain"], 415),
    (GET, [], 400),
]


@pytest.mark.parametrize(("what", "lines", "status"), TCP)
def test_over_tcp(what: str, lines: list[str], status: int, server: Running) -> None:
    found, headers, body = send(server, True, what, lines)
    assert found == status, body
    assert not any(name.startswith("access-control") for name in headers)
    if status == 401:
        assert headers["www-authenticate"] == "Bearer"
    assert server.token.encode() not in body
    if status >= 400 and headers["content-type"] == "application/json":
        assert json.loads(body)["error"]["message"]


@pytest.mark.parametrize(("what", "lines", "status"), UNIX)
def test_over_the_unix_socket(what: str, lines: list[str], status: int, server: Running) -> None:
    assert send(server, False, what, lines)[0] == status


def test_there_are_enough_rows() -> None:
    assert len(TCP) + len(UNIX) >= 40


def test_the_token_is_shown_to_nobody(server: Running) -> None:
    assert not any(server.token in line for line in server.said)
    assert any("server-token" in line for line in server.said)
    assert server.token not in Path(f"/proc/{server.process.pid}/cmdline").read_text()


def test_the_socket_is_its_owners(server: Running) -> None:
    assert server.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be another user")
def test_another_user_is_disconnected(server: Running) -> None:
    code = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.settimeout(10)\n"
        "os.chdir(sys.argv[1]); os.setgid(65534); os.setuid(int(sys.argv[2])); s.connect('edgespec.sock')\n"
        "for _ in range(2):\n"
        "    try: s.sendall(b'GET /health HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n')\n"
        "    except BrokenPipeError: pass\n"
        "try: print(s.recv(100)[:15])\n"
        "except ConnectionResetError: print(b'')\n"
    )

    def send_as(uid: int) -> str:
        command = [sys.executable, "-c", code, str(server.path.parent), str(uid)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout

    server.path.chmod(0o666)  # so that only the server itself can reject the connection
    server.path.parent.chmod(0o711)
    try:
        assert send_as(0) == "b'HTTP/1.1 200 OK'\n"
        assert send_as(65534) == "b''\n"
    finally:
        server.path.chmod(0o600)
        server.path.parent.chmod(0o700)


def test_a_keep_alive_connection_is_checked_at_every_request(server: Running) -> None:
    good = f"GET /health HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.token}\r\n\r\n".encode()
    bad = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with server.connect(tcp=True) as connection:
        assert [exchange(connection, one)[0] for one in (good, good, bad)] == [200, 200, 401]


def test_anthropic_clients_get_errors_in_their_format(server: Running) -> None:
    with server.client(tcp=True) as client:
        answer = client.post("/v1/messages", json=question(), headers={"authorization": "Bearer wrong"})
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"


def test_web_sockets_are_not_served(server: Running) -> None:
    upgrade = ["Host: localhost", "Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13"]
    assert send(server, False, GET, [*upgrade, "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="])[0] == 200


def test_the_names_of_this_machine() -> None:
    assert all(name == name.lower() and name for name in own_names())
