"""The part of the protocol buffer wire format that checking and changing an ONNX file needs.

It reads a buffer without copying, so that the cost depends on the structure and not on the weights:
`onnx.load` would keep all weights in memory, twice while it parses.

Format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_MOST_FIELDS = 3_000_000  # takes seconds; a decoder of 2,000 nodes has 50,000

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class WireError(ValueError):
    """Invalid protocol buffer, or more fields than any model has."""


class Field(NamedTuple):
    """One field of a message, from `start`, its tag, to `end`. `value`: a number, or the offset of bytes."""

    number: int
    kind: int
    value: int
    start: int
    end: int


class Wire:
    """Messages in `data`, a buffer of bytes. Each is identified by its start and end."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.data = data if isinstance(data, memoryview) else memoryview(data)
        self._left = _MOST_FIELDS

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """Yield the fields of the message in [start, end). Raises WireError if it is invalid."""
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
                raise WireError(f"a field of unknown wire type {kind}")
            if stop > end or number == 0:
                raise WireError("a field that exceeds its message")
            yield Field(number, kind, value, at, stop)
            at = stop

    def parts(self, start: int, end: int, number: int) -> Iterator[tuple[int, int]]:
        """Yield start and end of each message or string in field `number`."""
        for field in self.fields(start, end):
            if field.number == number and field.kind == BYTES:
                yield field.value, field.end

    def text(self, start: int, end: int, most: int = 4096) -> str:
        """Return the string in [start, end). Raises WireError if it is too long or not UTF-8."""
        if end - start > most:
            raise WireError("a name that is too long")
        try:
            return bytes(self.data[start:end]).decode()
        except UnicodeDecodeError:
            raise WireError("a name that is not UTF-8") from None

    def texts(self, start: int, end: int, number: int) -> list[str]:
        return [self.text(*part) for part in self.parts(start, end, number)]

    def numbers(self, start: int, end: int, number: int) -> list[int]:
        """Return all values of an integer field, packed or not, as signed 64-bit numbers."""
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
                raise WireError("a number that does not end")
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF, at
            shift += 7


def varint(value: int) -> bytes:
    """Encode a number of at least 0."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number_field(number: int, value: int) -> bytes:
    return varint(number << 3 | VARINT) + varint(value)


def bytes_field(number: int, *values: bytes | memoryview | str) -> bytes:
    """Encode a message or string, the concatenation of `values`."""
    parts = [value.encode() if isinstance(value, str) else value for value in values]
    return b"".join([varint(number << 3 | BYTES), varint(sum(map(len, parts))), *parts])
