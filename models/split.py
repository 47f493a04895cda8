"""Names of the parts of a split GGUF model, `NAME-00001-of-0000N.gguf`, as llama-gguf-split writes them."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_MOST = 1000  # far more parts than any model has


def part_paths(path: Path) -> tuple[Path, ...]:
    """Return the paths of all parts, from that of any; empty if the name is not that of a part."""
    match = _NAME.fullmatch(path.name)
    if match is None or not 1 <= int(match[2]) <= int(match[3]) <= _MOST:
        return ()
    count = int(match[3])
    return tuple(path.with_name(f"{match[1]}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1))
