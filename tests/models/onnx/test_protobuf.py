"""The wire format, against the library that defines it."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgespec.models.onnx.protobuf import Wire, WireError, bytes_field, number_field, varint


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1)), st.text(max_size=40), st.binary(max_size=200))
def test_what_the_library_writes_is_read(numbers, name, raw):
    tensor = onnx.TensorProto(name=name, dims=numbers, raw_data=raw, data_type=7)
    data = tensor.SerializeToString()
    wire = Wire(data)
    assert wire.numbers(0, len(data), 1) == numbers
    assert wire.texts(0, len(data), 8) == [name]
    assert [bytes(wire.data[a:b]) for a, b in wire.parts(0, len(data), 9)] == [raw]


@given(st.integers(0, (1 << 63) - 1), st.binary(max_size=300))
def test_what_is_written_the_library_reads(number, raw):
    tensor = onnx.TensorProto.FromString(
        number_field(1, number) + bytes_field(8, "a", "b") + bytes_field(9, raw)
    )
    assert (list(tensor.dims), tensor.name, tensor.raw_data) == ([number], "ab", raw)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data):
    try:
        for _ in Wire(data).fields(0, len(data)):
            pass
    except WireError:
        pass


@pytest.mark.parametrize(
    "data",
    [
        b"\x08",  # a tag without a value
        b"\x08" + b"\xff" * 11,  # a number without an end
        b"\x0a\x05abcd",  # shorter than it says
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # longer than anything
        b"\x0b\x0c",  # a group
        b"\x00\x01",  # field 0
        b"\x0d\x01",  # four bytes that are one
    ],
)
def test_what_is_broken_is_refused(data):
    with pytest.raises(WireError):
        list(Wire(data).fields(0, len(data)))


def test_a_number_is_as_long_as_it_must_be():
    assert [len(varint(n)) for n in (0, 127, 128, 1 << 14)] == [1, 1, 2, 3]
