"""The wire format of protocol buffers, as much of it as checking an ONNX file and changing one node need.

Reads what lies in a buffer without copying it, so that a file of a gigabyte costs what its structure costs:
`onnx.load` would hold all its weights in memory, twice while it parses.

Format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_MOST_FIELDS = 3_000_000  # some seconds; a decoder of 2,000 nodes has 50,000

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """Not a protocol buffer, or more of it than any model has."""


class Field(NamedTuple):
    """One field of a message: from `start`, its tag, to `end`. `value` is a number, or where bytes begin."""

    number: int
    kind: int
    value: int
    start: int
    end: int


class Wire:
    """Messages in `data`, any buffer of bytes. Each is named by where it begins and ends."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = data if isinstance(data, memoryview) else memoryview(data)
        self._left = _MOST_FIELDS

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """The fields of the message in [start, end), in order. Raises WireError where there is none."""
        at = start
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise WireError("more fields than any model has")
            tag, after = self._varint(at, end)
            number, kind = tag >> 3, tag & 7
            if kind == VARINT:
                value, stop = self._varint(after, end)
            elif kind == BYTES:
                length, value = self._varint(after, end)
                stop = value + length
            elif kind in (FIXED64, FIXED32):
                value, stop = after, after + (8 if kind == FIXED64 else 4)
            else:
                raise WireError(f"a field of unknown kind {kind}")
            if stop > end or number == 0:
                raise WireError("a field that goes over its end")
            yield Field(number, kind, value, at, stop)
            at = stop

    def parts(self, start: int, end: int, number: int) -> Iterator[tuple[int, int]]:
        """Where each message or string in the field of that number begins and ends."""
        for field in self.fields(start, end):
            if field.number == number and field.kind == BYTES:
                yield field.value, field.end

    def text(self, start: int, end: int, most: int = 4096) -> str:
        """The string in [start, end). Raises WireError for one that is too long or not UTF-8."""
        if end - start > most:
            raise WireError("a name longer than any")
        try:
            return bytes(self.data[start:end]).decode()
        except UnicodeDecodeError:
            raise WireError("a name that is not UTF-8") from None

    def texts(self, start: int, end: int, number: int) -> list[str]:
        return [self.text(*part) for part in self.parts(start, end, number)]

    def numbers(self, start: int, end: int, number: int) -> list[int]:
        """All values of an integer field, packed or not, as signed 64-bit numbers."""
        found = []
        for field in self.fields(start, end):
            if field.number != number:
                continue
            if field.kind == VARINT:
                found.append(field.value)
            elif field.kind == BYTES:
                at = field.value
                while at < field.end:
                    self._left -= 1
                    if self._left < 0:
                        raise WireError("more numbers than any model has")
                    value, at = self._varint(at, field.end)
                    found.append(value)
        return [value - (1 << 64) if value >> 63 else value for value in found]

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        value = shift = 0
        data = self.data
        while True:
            if at >= end or shift > 63:
                raise WireError("a number without an end")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at
            shift += 7


def varint(value: int) -> bytes:
    """A number of at least 0 as the format writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number_field(number: int, value: int) -> bytes:
    return varint(number << 3 | VARINT) + varint(value)


def bytes_field(number: int, *values: bytes | memoryview | str) -> bytes:
    """A message or string, of `values` one after the other."""
    parts = [value.encode() if isinstance(value, str) else value for value in values]
    return b"".join([varint(number << 3 | BYTES), varint(sum(map(len, parts))), *parts])
