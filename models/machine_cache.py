"""Measurements of this machine in the cache folder, each of which can be made again.

A file that is missing, damaged or of another version counts as absent; a failure to write one is ignored.
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
_MOST = 100_000  # bytes; a larger file was not written by Edgespec


def cache_folder() -> Path:
    """Return `machine` in EDGESPEC_CACHE, or in the user's cache folder for Edgespec. May not exist yet."""
    return user_folder("cache", "EDGESPEC_CACHE") / "machine"


def digest(parts: tuple[object, ...]) -> str:
    """Return a key for `parts`, from their repr."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def load(kind: str, key: str) -> dict[str, Any] | None:
    """Return the data saved under `kind` and `key`, None if there is none or it is unusable."""
    return _read(_path(kind, key))


def load_all(kind: str) -> Iterator[dict[str, Any]]:
    """Yield all usable data of `kind`, oldest first."""
    with contextlib.suppress(OSError):
        paths = cache_folder().glob(f"{kind}-*.json")
        for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns):
            if (data := _read(path)) is not None:
                yield data


def save(kind: str, key: str, data: dict[str, Any]) -> None:
    """Save `data` atomically."""
    folder = cache_folder()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(_path(kind, key), json.dumps({"version": VERSION, **data}).encode())


def forget(kind: str, key: str = "*") -> None:
    """Delete the data saved under `kind` and `key`, or all of `kind`."""
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
