"""A reader for the values of a GGUF file, which never reads past the end of the file.

Every error contains the key or tensor and the byte offset. Valid values: see `check`.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from edgespec.core import EdgespecError
from edgespec.text import printable

Scalar = bool | int | float | str

# GGUF's value types in the order of their numbers, with struct codes for those that have one.
_TYPES = {
    "uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "uint32": "I", "int32": "i", "float32": "f",
    "bool": "?", "string": "", "array": "", "uint64": "Q", "int64": "q", "float64": "d",
}  # fmt: skip
_NUMBERS = {name: struct.Struct("<" + code) for name, code in _TYPES.items() if code}
_U32, U64 = _NUMBERS["uint32"], _NUMBERS["uint64"]

_MAX_HEADER = 128 << 20  # far above any model, so that a malicious file costs seconds, not hours
_SHORT = 1024
NAME_LENGTH = 60  # characters of a name that are shown
_AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class GgufValue:
    """Metadata: `count` elements from byte `start` to `end`; an array's `type` ends in [].

    `tag` is the offset of the type. `scalar` is None for arrays and for long strings.
    """

    key: str
    type: str
    count: int
    tag: int
    start: int
    end: int
    scalar: Scalar | None


class Cursor:
    """A position in the file, which moves within the file only."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.pos, self.end = path, data, 0, min(len(data), _MAX_HEADER)
        self.place: tuple[str, str | bytes] = ("header", "")

    def error(self, problem: str, value: GgufValue | None = None, advice: str = _AGAIN) -> EdgespecError:
        kind, name = ("key", value.key) if value else self.place
        where = f"{kind} '{printable(name, NAME_LENGTH)}'" if name else kind
        return file_error(self.path, f"{where} at byte {value.tag if value else self.pos}: {problem}", advice)

    def skip(self, size: int) -> int:
        """Skip `size` bytes and return where they begin."""
        start, left = self.pos, len(self.data) - self.pos
        if size > left:
            raise self.error(f"{size} bytes needed, {left} left in the file")
        if size > self.end - start:
            raise self.error(f"more than {_MAX_HEADER >> 20} MiB of metadata, which no model has")
        self.pos = start + size
        return start

    def u32(self) -> int:
        return int(_U32.unpack_from(self.data, self.skip(4))[0])

    def u64(self) -> int:
        return int(U64.unpack_from(self.data, self.skip(8))[0])

    def name(self, kind: str, number: int, limit: int) -> str:
        """Read the name of a key or a tensor, which later errors contain."""
        self.place = (f"{kind} number {number}", "")
        size = self.u64()
        if not 0 < size <= limit:
            raise self.error(f"its name has {size} bytes instead of 1 to {limit}")
        start = self.skip(size)
        name = self.data[start : self.pos]
        self.place = (kind, name)
        if not re.fullmatch(rb"[ -~]+", name):
            raise self.error("its name is not plain ASCII")
        return name.decode("ascii")

    def strings(self, count: int) -> None:
        """Skip `count` strings: about 300,000 in a large vocabulary, hence no calls in the loop."""
        data, pos, last, unpack = self.data, self.pos, self.end - 8, U64.unpack_from
        self.pos = self.skip(8 * count)  # raises at once if the lengths alone do not fit
        for _ in range(count):
            if pos > last:
                self.skip(pos + 8 - self.pos)  # raises: one more length does not fit
            pos += 8 + unpack(data, pos)[0]
        self.skip(pos - self.pos)

    def value(self, key: str) -> GgufValue:
        tag, kind, array, count, scalar = self.pos, self.type_name(), "", 1, None
        if kind == "array":
            array, kind, count = "[]", self.type_name(), self.u64()
            if kind == "array":
                raise self.error("an array of arrays, which llama.cpp does not read")
        start = self.pos
        if kind in _NUMBERS:
            self.skip(_NUMBERS[kind].size * count)
            scalar = None if array else _NUMBERS[kind].unpack_from(self.data, start)[0]
        else:
            self.strings(count)
            if not array and self.pos - start <= 8 + _SHORT:
                scalar = self.data[start + 8 : self.pos].decode("utf-8", "replace")
        return GgufValue(key, kind + array, count, tag, start, self.pos, scalar)

    def type_name(self) -> str:
        if (number := self.u32()) >= len(_TYPES):
            raise self.error(f"value type {number} does not exist")
        return tuple(_TYPES)[number]


def file_error(path: Path, problem: str, advice: str = _AGAIN) -> EdgespecError:
    return EdgespecError(f"{printable(path, None)}: {problem}" + (f"; {advice}" if advice else ""))


def map_file(path: Path) -> mmap.mmap:
    """Map the regular file at `path`."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
            try:
                # Checked again for the opened file: a pipe may have replaced it in between.
                opened = os.fstat(fd)
                if stat.S_ISREG(opened.st_mode):
                    if opened.st_size == 0:
                        raise file_error(path, "is empty")
                    return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
            finally:
                os.close(fd)
        what = "is a folder, not a GGUF file" if path.is_dir() else "is not a regular file"
    except FileNotFoundError:
        what = "does not exist"
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        what = f"cannot be read: {printable(getattr(error, 'strerror', None) or str(error))}"
    raise file_error(path, what, advice="")
