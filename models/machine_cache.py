"""Files in the cache folder: what was learned on this machine and can be learned again.

A file that is missing, damaged or of another version is simply not there, and one that cannot be written is
not written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgespec.files import write_whole
from edgespec.machine.paths import user_folder

VERSION = 1
_MOST = 100_000  # bytes of a file: what is larger is not ours


def cache_folder() -> Path:
    """`machine` in EDGESPEC_CACHE, or in the user's cache folder for Edgespec. May not exist yet."""
    return user_folder("cache", "EDGESPEC_CACHE") / "machine"


def digest(parts: tuple[object, ...]) -> str:
    """A key for what `parts` identify, by their repr."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def load(kind: str, key: str) -> dict[str, Any] | None:
    """What `save` kept under that name, None if there is nothing usable."""
    return _read(_path(kind, key))


def load_all(kind: str) -> Iterator[dict[str, Any]]:
    """Everything usable of that kind, the oldest first."""
    with contextlib.suppress(OSError):
        paths = cache_folder().glob(f"{kind}-*.json")
        for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
            if (data := _read(path)) is not None:
                yield data


def save(kind: str, key: str, data: dict[str, Any]) -> None:
    """Keep `data`, whole or not at all."""
    folder = cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(_path(kind, key), json.dumps({"version": VERSION, **data}).encode())


def forget(kind: str, key: str = "*") -> None:
    """Delete what was kept under that name, or all of that kind."""
    with contextlib.suppress(OSError):
        for path in cache_folder().glob(f"{kind}-{key}.json"):
            path.unlink(missing_ok=True)


def _path(kind: str, key: str) -> Path:
    return cache_folder() / f"{kind}-{key}.json"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(_MOST))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) and data.get("version") == VERSION else None
