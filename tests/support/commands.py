"""`edgespec` as a process, and what its errors must look like."""

from __future__ import annotations

import os
import subprocess
import sys

EDGESPEC = [sys.executable, "-m", "edgespec.app.cli.main"]


def edgespec(*arguments: str, env: dict[str, str] | None = None, stdin: str = "", timeout: float = 120):
    return subprocess.run(
        [*EDGESPEC, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
    )


def one_line_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode not in (0, None)
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]
