"""Making drafts, as a process, also on a busy machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ANYHOW = "import edgespec.quant.draft as d; d.UNDISTURBED = 0.0\n"  # other programs may be busy here


EDGESPEC = [sys.executable, "-c", f"{ANYHOW}from edgespec.app.cli.main import main; main()"]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def edgespec(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*EDGESPEC, *arguments], capture_output=True, text=True, timeout=280, env={**os.environ, **env}
    )
