"""A stand-in for llama-server."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from textwrap import dedent, indent

import pytest

SERVER = os.environ.get("EDGESPEC_LLAMA_SERVER", "")


needs_server = pytest.mark.skipif(
    not SERVER, reason="EDGESPEC_LLAMA_SERVER does not name a llama-server program"
)


HEAD = """\
    #!{python}
    import http.server, json, socketserver, sys, time

    class Unix(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True
        def get_request(self):
            return self.socket.accept()[0], ("peer", 0)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        def log_message(self, *_): pass
        def do_GET(self):
            self.whole(200, {{"status": "ok", "build_info": "b1"}})
        def whole(self, code, value):
            body = json.dumps(value).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        def begin(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
        def send(self, data):
            self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(data), data))
            self.wfile.flush()
        def event(self, **fields):
            self.send(b"data: " + json.dumps(fields).encode() + b"\\n\\n")
        def final(self, written, **fields):
            fields = {{"tokens_evaluated": 3, "stop_type": "limit", "timings": {{}}, **fields}}
            self.event(tokens=[], tokens_predicted=written, stop=True, **fields)
            self.send(b"")
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(asked)
        def answer(self, asked):
    {answer}

    def serve():
        host = sys.argv[sys.argv.index("--host") + 1]
        if host.endswith(".sock"):
            server = Unix(host, Handler)
        else:
            port = int(sys.argv[sys.argv.index("--port") + 1])
            server = http.server.ThreadingHTTPServer((host, port), Handler)
        server.serve_forever()

    {main}
"""


WELL = """\
self.begin()
self.event(tokens=[5], tokens_predicted=1, stop=False)
time.sleep(0.2)
self.event(tokens=[7], tokens_predicted=3, stop=False)
self.event(tokens=[2], tokens_predicted=4, stop=False)
self.final(4, stop_type="eos", timings={"draft_n": 3, "draft_n_accepted": 2, "cache_n": 0})
"""


def peer(folder: Path, answer: str = WELL, main: str = "serve()") -> Path:
    """A program that is started like llama-server and answers as notes."""
    program = folder / "peer"
    text = dedent(HEAD).format(python=sys.executable, answer=indent(dedent(answer), " " * 8), main=main)
    program.write_text(text)
    program.chmod(0o755)
    return program
