"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path, mode: int = 0o600) -> Iterator[BinaryIO]:
    """Yield a file next to `path` that takes its place when the block ends.

    `mode` are its permissions, less the umask; by default only the owner reads it. An exception from the
    block leaves `path` as it was and no other file behind. Raises OSError.
    """
    unfinished = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(unfinished, "xb", opener=partial(os.open, mode=mode)) as file:
            yield file
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path`, readable by its owner only. Raises OSError, and then `path` is as it was."""
    with replacing(path) as file:
        file.write(data)
