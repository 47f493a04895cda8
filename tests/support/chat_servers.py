"""A scripted OpenAI-compatible server, on TCP or on a Unix socket."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import sleep
from typing import Any

Write = Callable[[bytes], object]


class Script:
    """The responses of the server, and the requests it got."""

    def __init__(self) -> None:
        self.models: Any = {"data": [{"id": "big-model", "max_model_len": 8192}]}
        self.status = 200
        self.answer: Callable[[Write], None] = lambda write: None
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = ""


def chunk(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


def words(*texts: str, pause: float = 0.0) -> Callable[[Write], None]:
    def answer(write: Write) -> None:
        for text in texts:
            write(chunk(text))
            sleep(pause)
        usage = {"prompt_tokens": 21, "completion_tokens": len(texts), "speculation": {"rounds": 2}}
        write(b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n")

    return answer


def handler(script: Script) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def _begin(self, kind: str) -> None:
            script.keys.append(self.headers.get("Authorization"))
            self.send_response(script.status)
            self.send_header("Content-Type", kind)
            self.end_headers()

        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self._begin("application/json")
            self.wfile.write(json.dumps(script.models).encode())

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            script.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self._begin("text/event-stream")
            try:
                script.answer(lambda data: (self.wfile.write(data), self.wfile.flush()))
            except OSError:
                script.keys.append("gone")

    return Handler


class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def get_request(self) -> tuple[Any, Any]:
        request, _ = super().get_request()
        return request, ("local", 0)


@contextmanager
def serving(socket: Path | None = None) -> Iterator[Script]:
    """Run a server with a script, on `socket` or on a free port."""
    script = Script()
    server: Any
    if socket is None:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler(script))
        script.url = f"http://127.0.0.1:{server.server_port}"
    else:
        server = UnixServer(str(socket), handler(script))
        script.url = f"unix:{socket}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
