from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edgespec.core import EdgespecError
from edgespec.models.gguf.check import GgufSummary, check_gguf
from edgespec.models.gguf.tensors import GGML_TYPES

U8, I8, U16, U32, I32, F32, STRING, ARRAY, U64, F64 = 0, 1, 2, 4, 5, 6, 8, 9, 10, 12
ESCAPE = "\x1b]0;owned\x07\r\n\u202e"


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def text(value: str | bytes) -> bytes:
    return struct.pack("<I", STRING) + string(value)


def u32(value: int) -> bytes:
    return struct.pack("<II", U32, value)


def array(item: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<IIQ", ARRAY, item, count) + payload


def texts(*values: str | bytes) -> bytes:
    return array(STRING, len(values), b"".join(map(string, values)))


def numbers(item: int, code: str, *values: float) -> bytes:
    return array(item, len(values), struct.pack(f"<{len(values)}{code}", *values))


@dataclass(frozen=True)
class Tensor:
    name: str | bytes
    shape: tuple[int, ...]
    kind: int
    offset: int

    def __bytes__(self) -> bytes:
        rank = len(self.shape)
        return string(self.name) + struct.pack(f"<I{rank}QIQ", rank, *self.shape, self.kind, self.offset)


EMBEDDING = Tensor("token_embd.weight", (32, 4), 2, 0)  # Q4_0: 4 rows of 18 bytes, padded from 72 to 96
NORM = Tensor("output_norm.weight", (32,), 0, 96)
TEMPLATE = "{{ messages }}" * 100
TOKENS = ("<s>", "a", "b", "ab")


@dataclass(frozen=True)
class File:
    """A valid GGUF, of which a test replaces one thing."""

    magic: bytes = b"GGUF"
    version: int = 3
    keys: dict[str, bytes] = field(
        default_factory=lambda: {
            "general.architecture": text("llama"),
            "general.name": text("Tiny"),
            "general.file_type": u32(2),
            "general.tags": texts("one", "two"),
            "llama.block_count": u32(1),
            "llama.context_length": u32(64),
            "llama.embedding_length": u32(32),
            "llama.rope.freq_base": struct.pack("<If", F32, 10000.0),
            "tokenizer.ggml.model": text("gpt2"),
            "tokenizer.ggml.pre": text("default"),
            "tokenizer.ggml.tokens": texts(*TOKENS),
            "tokenizer.ggml.scores": numbers(F32, "f", 0, 1, 2, 3),
            "tokenizer.ggml.token_type": numbers(I32, "i", 3, 1, 1, 1),
            "tokenizer.ggml.merges": texts("a b"),
            "tokenizer.ggml.add_bos_token": struct.pack("<IB", 7, 1),
            "tokenizer.chat_template": text(TEMPLATE),
        }
    )
    again: bytes = b""  # a further key and its value, even one that is there already
    tensors: tuple[Tensor, ...] = (EMBEDDING, NORM)
    n_tensors: int | None = None
    n_keys: int | None = None
    alignment: int = 32
    data: bytes = bytes(96 + 128)

    def header(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) + bool(self.again) if self.n_keys is None else self.n_keys
        return b"".join(
            [self.magic, struct.pack("<IQQ", self.version, n_tensors, n_keys)]
            + [string(key) + value for key, value in self.keys.items()]
            + [self.again, *map(bytes, self.tensors)]
        )

    def __bytes__(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data


def valid(**changes: object) -> bytes:
    return bytes(replace(File(), **changes))  # type: ignore[arg-type]


def keys(changes: dict[str, bytes | None]) -> bytes:
    """A file with these keys added or replaced, or left out where None."""
    merged = {**File().keys, **{key: value for key, value in changes.items() if value is not None}}
    return valid(keys={key: value for key, value in merged.items() if changes.get(key, b"") is not None})


def key(name: str, value: bytes | None) -> bytes:
    return keys({name: value})


def grouped(experts: int, groups: int, used: int) -> bytes:
    counts = {"count": experts, "used_count": 1, "group_count": groups, "group_used_count": used}
    return keys({f"llama.expert_{name}": u32(count) for name, count in counts.items()})


def norm(**changes: object) -> bytes:
    return valid(tensors=(EMBEDDING, replace(NORM, **changes)))  # type: ignore[arg-type]


def embedding(**changes: object) -> bytes:
    return valid(tensors=(replace(EMBEDDING, **changes), NORM))  # type: ignore[arg-type]


def write(folder: Path, data: bytes, name: str = "model.gguf") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(EdgespecError) as caught:
        check_gguf(path)
    message = str(caught.value)
    assert message.isprintable(), "one line, nothing that a terminal obeys"
    return message


@pytest.fixture(scope="module")
def native() -> ctypes.CDLL:
    """The library that llama-cpp-python opens files with."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    library = next((Path(spec.origin).parent / "lib").glob("*ggml-base*"))
    return ctypes.CDLL(str(library))


class InitParams(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def native_accepts(native: ctypes.CDLL, path: Path) -> bool:
    native.gguf_init_from_file.restype = ctypes.c_void_p
    native.gguf_init_from_file.argtypes = (ctypes.c_char_p, InitParams)
    native.gguf_free.argtypes = (ctypes.c_void_p,)
    native.gguf_free.restype = None
    context = native.gguf_init_from_file(os.fsencode(path), InitParams(True, None))
    if context:
        native.gguf_free(context)
    return bool(context)


# What is accepted


def test_summary_of_a_valid_file(tmp_path: Path) -> None:
    summary = check_gguf(write(tmp_path, valid()))
    digest = hashlib.sha256()
    for name in ("model", "pre", "tokens", "token_type", "merges"):
        digest.update(name.encode() + b"\0" + File().keys[f"tokenizer.ggml.{name}"])
    assert summary == GgufSummary(
        architecture="llama",
        name="Tiny",
        metadata={
            "general.architecture": "llama",
            "general.name": "Tiny",
            "general.file_type": 2,
            "llama.block_count": 1,
            "llama.context_length": 64,
            "llama.embedding_length": 32,
            "llama.rope.freq_base": 10000.0,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.add_bos_token": True,
        },
        vocab_size=4,
        tokenizer_digest=digest.hexdigest(),
        parameters=32 * 4 + 32,
        tensor_bytes=72 + 128,
        types={"Q4_0": 72, "F32": 128},
        files=(tmp_path / "model.gguf",),
        tensors=summary.tensors,  # test_a_file_of_the_gguf_package compares them with the data
        has_chat_template=True,
        context_length=64,
    )


def test_what_a_file_may_leave_out(tmp_path: Path) -> None:
    data = keys({"general.name": None, "tokenizer.chat_template": None, "llama.context_length": None})
    summary = check_gguf(write(tmp_path, data, "some model.gguf"))
    assert (summary.name, summary.has_chat_template, summary.context_length) == ("some model", False, None)


@pytest.mark.parametrize("alignment", [None, 64])
def test_a_file_of_the_gguf_package(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_name("Written")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_feed_forward_length([64, 32])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list(TOKENS))
    writer.add_token_types([1, 1, 1, 1])
    rows, norm = np.arange(4 * 33, dtype=np.float16).reshape(4, 33), np.arange(33, dtype=np.float32)
    writer.add_tensor("token_embd.weight", rows)
    writer.add_tensor("output_norm.weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    summary = check_gguf(path)
    assert (summary.architecture, summary.name, summary.context_length) == ("qwen2", "Written", 128)
    assert summary.types == {"F16": 4 * 33 * 2, "F32": 33 * 4}
    data = path.read_bytes()
    for (name, tensor), written in zip(summary.tensors.items(), (rows, norm), strict=True):
        assert tensor.shape == written.shape[::-1], name
        assert data[tensor.offset : tensor.offset + tensor.bytes] == written.tobytes()
    assert summary.metadata.get("general.alignment") == alignment


ACCEPTED = {
    "version 2": valid(version=2),
    "empty tokens": key("tokenizer.ggml.tokens", texts("", "", "[EMPTY_0]x", "b")),
    "integer scores": key("tokenizer.ggml.scores", numbers(I32, "i", 1, 2, 3, 4)),
    "a value for each layer": key("llama.expert_used_count", numbers(U32, "I", 0)),
    "experts": keys({"llama.expert_count": u32(8), "llama.expert_used_count": u32(8)}),
    "groups of experts": grouped(experts=64, groups=8, used=4),
    "a single expert that is none": keys(
        {"general.architecture": text("hunyuan-dense"), "hunyuan-dense.expert_count": u32(1)}
    ),
    "a table": valid(tensors=(EMBEDDING, replace(NORM, name="d2t", kind=26))),
    "split into one": key("split.count", struct.pack("<IH", U16, 1)),
    "bytes after the data": valid() + b"more",
    "a name of 63 bytes": norm(name="n" * 63),
    "a key of 65535 bytes": key("k" * 65535, u32(1)),
    "a large alignment": valid(
        keys={**File().keys, "general.alignment": u32(4096)},
        tensors=(EMBEDDING, replace(NORM, offset=4096)),
        alignment=4096,
        data=bytes(8192),
    ),
}


@pytest.mark.parametrize("data", ACCEPTED.values(), ids=ACCEPTED)
def test_accepts_what_llama_cpp_accepts(tmp_path: Path, native: ctypes.CDLL, data: bytes) -> None:
    path = write(tmp_path, data)
    assert check_gguf(path).vocab_size == 4
    assert native_accepts(native, path)


def test_metadata_keeps_short_strings_only(tmp_path: Path) -> None:
    data = keys({"short": text("x" * 1024), "long": text("x" * 1025), "broken": text(b"\xff!")})
    metadata = check_gguf(write(tmp_path, data)).metadata
    assert metadata["short"] == "x" * 1024
    assert metadata["broken"] == "\ufffd!"
    assert "long" not in metadata


# The table of types


def test_types_have_the_sizes_of_the_gguf_package() -> None:
    known = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {kind: row for kind, row in GGML_TYPES.items() if kind in known} == {
        kind: row for kind, row in known.items() if kind in GGML_TYPES
    }
    assert {"Q8_1", "Q8_K", "I8", "I16", "F64"}.isdisjoint(name for name, _, _ in GGML_TYPES.values())
    assert {"F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "IQ4_XS"} <= {
        name for name, _, _ in GGML_TYPES.values()
    }


def test_types_have_the_sizes_of_the_library(native: ctypes.CDLL) -> None:
    native.ggml_type_name.restype = ctypes.c_char_p
    native.ggml_blck_size.restype = ctypes.c_int64
    native.ggml_type_size.restype = ctypes.c_size_t
    actual = {
        kind: (
            native.ggml_type_name(kind).decode().upper(),
            native.ggml_blck_size(kind),
            native.ggml_type_size(kind),
        )
        for kind in GGML_TYPES
    }
    assert actual == {kind: tuple(row) for kind, row in GGML_TYPES.items()}


# What is refused

HUGE = (1 << 63, (1 << 64) - 1, 1 << 61, 1 << 40)
BAD_KEY = string("x") + struct.pack("<I", 13)
BAD_TYPE = valid(again=BAD_KEY)
PARTS = struct.pack("<IH", U16, 3)
TWO_EXPERTS = {"llama.expert_count": u32(2), "llama.expert_used_count": u32(1)}

NOT_GGUF = {
    "html": (b"<!DOCTYPE html><html><title>Sign in", "begins with '<!DOCTYPE html><html><ti' (a web page)"),
    "html after space": (b"\n  <HTML lang=en>", "(a web page); the link may need a login"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:",
        "(a git-lfs pointer); run `git lfs pull`",
    ),
    "safetensors": (struct.pack("<Q", 80) + b'{"__metadata__":{', "(safetensors); convert it to GGUF"),
    "safetensors, length with a line feed": (struct.pack("<Q", 10) + b'{ "a":{}}', "(safetensors)"),
    "zip": (b"PK\x03\x04" + bytes(30), "begins with 'PK\\x03\\x04\\x00\\x00"),
    "zip advice": (b"PK\x03\x04" + bytes(30), "(an archive); unpack it first"),
    "gzip": (b"\x1f\x8b\x08\0", "(an archive); unpack it first"),
    "ggjt": (b"tjgg\3\0\0\0", "(a format from before GGUF); download a newer version"),
    "zeros": (bytes(100), "begins with '\\x00\\x00"),
    "anything": (b"hello", "is not a GGUF file: it begins with 'hello'; download it again"),
    "one byte": (b"G", "is not a GGUF file: it begins with 'G'; download it again"),
}
HEADER = {
    "version 0": (valid(version=0), "GGUF version 0, but only 2 and 3"),
    "version 1": (valid(version=1), "GGUF version 1, but only 2 and 3 can be read; download a newer version"),
    "version 4": (valid(version=4), "GGUF version 4, but only 2 and 3 can be read; update Edgespec"),
    "big-endian": (valid(version=3 << 24), "a big-endian GGUF; download the little-endian version"),
    "no tensors": (valid(tensors=()), ": no tensors, so this is only a vocabulary"),
    **{f"{n} tensors": (valid(n_tensors=n), f"{n} tensors, but no model has more than 65535") for n in HUGE},
    **{f"{n} keys": (valid(n_keys=n), f"{n} metadata keys, but no model has more than 65535") for n in HUGE},
    "one tensor too many": (valid(n_tensors=65536), "65536 tensors, but"),
    "one key too many": (valid(n_keys=65536), "65536 metadata keys, but"),
    "more tensors than there are": (valid(n_tensors=3, data=b""), "tensor number 2 at byte"),
}
METADATA = {
    "key of no bytes": (key("", u32(1)), "key number 16 at byte"),
    "key too long": (key("k" * 65536, u32(1)), "its name has 65536 bytes instead of 1 to 65535"),
    "key of 2^63 bytes": (valid(again=struct.pack("<Q", 1 << 63)), f"its name has {1 << 63} bytes"),
    "key beyond the end": (valid(again=struct.pack("<Q", 60000)), "60000 bytes needed"),
    "key twice": (valid(again=string("general.name") + text("x")), "key 'general.name' at byte"),
    "key twice, why": (valid(again=string("general.name") + text("x")), "it appears twice"),
    "key with a zero byte": (valid(again=string("a\0b") + u32(1)), "key 'a\\x00b' at byte"),
    "value type": (BAD_TYPE, f"key 'x' at byte {BAD_TYPE.index(BAD_KEY) + len(BAD_KEY)}: value type 13 does"),
    "element type": (key("x", array(77, 1)), "value type 77 does not exist"),
    "array of arrays": (key("x", array(ARRAY, 1, array(U8, 0))), "an array of arrays"),
    "array of 2^40 arrays": (key("x", array(ARRAY, 1 << 40)), "an array of arrays"),
    **{f"{n} strings": (key("x", array(STRING, n)), f"{8 * n} bytes needed") for n in HUGE},
    **{f"{n} doubles": (key("x", array(F64, n)), f"{8 * n} bytes needed") for n in HUGE},
    **{f"{n} bytes": (key("x", array(U8, n)), f"{n} bytes needed") for n in HUGE},
    "string of 2^64-1": (key("x", struct.pack("<IQ", STRING, (1 << 64) - 1)), "bytes needed"),
    "string in array": (key("x", array(STRING, 2, string("a") + struct.pack("<Q", 1 << 62))), "bytes needed"),
    "last string": (key("x", array(STRING, 1, struct.pack("<Q", (1 << 64) - 8))), "bytes needed"),
    "split": (key("split.count", PARTS), "is one of 3 parts; name it NAME-00001-of-00003.gguf"),
    "no architecture": (key("general.architecture", None), "has no key 'general.architecture'"),
    "architecture not a string": (key("general.architecture", u32(1)), "not the name of an architecture"),
    "architecture of odd letters": (key("general.architecture", text("ll\nama")), "not the name of"),
    "alignment 0": (key("general.alignment", u32(0)), "key 'general.alignment' at byte"),
    "alignment 4": (key("general.alignment", u32(4)), "a power of two from 8 to 65536"),
    "alignment 48": (key("general.alignment", u32(48)), "a power of two from 8 to 65536"),
    "alignment 2^31": (key("general.alignment", u32(1 << 31)), "a power of two from 8 to 65536"),
    "alignment of 64 bits": (key("general.alignment", struct.pack("<IQ", U64, 32)), "not a uint32"),
    "alignment array": (key("general.alignment", numbers(U32, "I", 32)), "not a uint32"),
}
HYPERPARAMETERS = {
    "no layers": (key("llama.block_count", u32(0)), "0 is not within 1 to 512"),
    "too many layers": (key("llama.block_count", u32(513)), "key 'llama.block_count' at byte"),
    "layers of 64 bits": (key("llama.block_count", struct.pack("<IQ", U64, 1)), "not a uint32, nor one"),
    "layers as a string": (key("llama.block_count", text("1")), "not a uint32, nor one"),
    "layers by layer": (key("llama.block_count", numbers(I32, "i", 1, -1)), "-1 is not within"),
    "513 values": (key("llama.expert_count", numbers(U32, "I", *[1] * 513)), "not a uint32, nor one"),
    "width": (key("llama.embedding_length", u32(1 << 31)), "is not within 1 to 1048576"),
    "context": (key("llama.context_length", u32((1 << 32) - 1)), "is not within 1 to"),
    "dummy tokens": (key("llama.vocab_size", u32(1 << 31)), "is not within 0 to 2097152"),
    "prediction layers": (key("llama.nextn_predict_layers", u32(2)), "more prediction layers than layers"),
    "experts unused": (key("llama.expert_count", u32(2)), "uses 0 of 2 experts"),
    "experts of none": (key("llama.expert_used_count", u32(1)), "uses 1 of 0 experts"),
    "experts": (keys({**TWO_EXPERTS, "llama.expert_used_count": u32(3)}), "uses 3 of 2 experts"),
    "1025 experts": (keys({**TWO_EXPERTS, "llama.expert_count": u32(1025)}), "1025 is not within 0 to 1024"),
    "as many groups": (grouped(experts=2, groups=2, used=1), "uses 1 of 2 experts in 1 of 2 groups"),
    "groups of none": (key("llama.expert_group_count", u32(1)), "uses 0 of 0 experts in 0 of 1 groups"),
    "uneven groups": (grouped(experts=7, groups=2, used=1), "uses 1 of 7 experts in 1 of 2 groups"),
    "no group used": (grouped(experts=8, groups=2, used=0), "uses 1 of 8 experts in 0 of 2 groups"),
    "all groups used": (grouped(experts=8, groups=2, used=2), "uses 1 of 8 experts in 2 of 2 groups"),
}
TOKENIZER = {
    "no tokens": (key("tokenizer.ggml.tokens", None), "has no vocabulary (tokenizer.ggml.tokens)"),
    "zero tokens": (key("tokenizer.ggml.tokens", texts()), "0 tokens instead of 1 to 2097152"),
    "tokens as a string": (key("tokenizer.ggml.tokens", text("abcd")), "string instead of string[]"),
    "tokens as numbers": (
        key("tokenizer.ggml.tokens", numbers(I32, "i", 1, 2, 3, 4)),
        "int32[] instead of string[]",
    ),
    "few scores": (key("tokenizer.ggml.scores", numbers(F32, "f", 1, 2, 3)), "3 elements for 4 tokens"),
    "many scores": (key("tokenizer.ggml.scores", numbers(F32, "f", *range(5))), "5 elements for 4 tokens"),
    "scores of bytes": (
        key("tokenizer.ggml.scores", numbers(U8, "B", 1, 2, 3, 4)),
        "uint8[] instead of float32[]",
    ),
    "one score": (key("tokenizer.ggml.scores", struct.pack("<If", F32, 1)), "float32 instead of float32[]"),
    "few types": (key("tokenizer.ggml.token_type", numbers(I32, "i", 1)), "1 elements for 4 tokens"),
    "types of bytes": (
        key("tokenizer.ggml.token_type", numbers(I8, "b", 1, 2, 3, 4)),
        "int8[] instead of int32[]",
    ),
    "merges as numbers": (key("tokenizer.ggml.merges", numbers(I32, "i", 1)), "int32[] instead of string[]"),
    "charsmap": (key("tokenizer.ggml.precompiled_charsmap", texts("x")), "instead of uint8[] or int8[]"),
    "token twice": (key("tokenizer.ggml.tokens", texts("a", "b", "c", "b")), "token 3, 'b', appears twice"),
    "tokens alike to C": (
        key("tokenizer.ggml.tokens", texts("a", "b\0x", "c", "b\0y")),
        "token 3, 'b', appears",
    ),
    "an empty token's name": (
        key("tokenizer.ggml.tokens", texts("", "[EMPTY_0]", "c", "d")),
        "token 1, '[EMPTY_0]'",
    ),
}
TENSORS = {
    "name of no bytes": (norm(name=""), "tensor number 1 at byte"),
    "name too long": (norm(name="n" * 64), "its name has 64 bytes instead of 1 to 63"),
    "name twice": (norm(name="token_embd.weight"), "tensor 'token_embd.weight' at byte"),
    "name twice, why": (norm(name="token_embd.weight"), "it appears twice"),
    "name with a zero byte": (norm(name="token_embd.weight\0x"), "its name is not plain ASCII"),
    "no dimensions": (norm(shape=()), "0 dimensions instead of 1 to 4"),
    "five dimensions": (norm(shape=(32, 1, 1, 1, 1)), "5 dimensions instead of 1 to 4"),
    "a zero dimension": (norm(shape=(32, 0)), "impossible shape [32, 0]"),
    "a negative dimension": (norm(shape=(32, (1 << 64) - 1)), "impossible shape"),
    "two negative dimensions": (norm(shape=((1 << 64) - 32, (1 << 64) - 1)), "impossible shape"),
    "product of 2^64": (norm(shape=(1 << 32, 1 << 32)), "impossible shape"),
    "product of 2^63": (norm(shape=(1 << 32, 1 << 31)), "impossible shape"),
    "product of 2^63, size of less": (embedding(shape=(1 << 32, 1 << 31)), "impossible shape"),
    "size of 2^63": (norm(shape=(1 << 31, 1 << 30)), "impossible shape"),
    "too large for the file": (norm(shape=(1 << 40,)), "ends in tensor 'output_norm.weight'"),
    "retired type": (embedding(kind=4), "ggml type 4 is not supported"),
    "future type": (embedding(kind=43), "ggml type 43 is not supported"),
    "negative type": (embedding(kind=(1 << 32) - 1), "ggml type 4294967295 is not supported"),
    "Q8_K": (embedding(kind=15, shape=(256, 4)), "ggml type 15 is not supported"),
    "integer weights": (embedding(kind=26), "I32 weights, which llama.cpp cannot compute with"),
    "half-precision vector": (
        norm(name="x.bias", kind=1),
        "F16 weights, which llama.cpp cannot compute with",
    ),
    "half-precision norm": (norm(shape=(32, 1), kind=1), "F16 weights, which llama.cpp cannot compute with"),
    "block": (embedding(shape=(16, 8)), "rows of 16 weights in Q4_0 blocks of 32"),
    "misaligned": (norm(offset=97), "data offset 97 is not a multiple of 32"),
    "overlap": (norm(offset=64), "data offset 64, but the previous tensor ends at 96"),
    "same place": (norm(offset=0), "data offset 0, but the previous tensor ends at 96"),
    "gap": (norm(offset=128), "data offset 128, but the previous tensor ends at 96"),
    "out of order": (valid(tensors=(NORM, EMBEDDING)), "data offset 96, but the previous tensor ends at 0"),
    "beyond the file": (norm(offset=1 << 62), f"data offset {1 << 62}, but the previous tensor ends at 96"),
    "wrapping offset": (norm(offset=(1 << 64) - 32), "but the previous tensor ends at 96"),
    "cut": (
        valid(data=bytes(96 + 28)),
        "ends in tensor 'output_norm.weight', 100 bytes are missing; download it again",
    ),
    "no data": (valid(data=b""), "ends in tensor 'token_embd.weight', 224 bytes are missing"),
}
REFUSED = {
    f"{group}: {name}": case
    for group, cases in {
        "not gguf": NOT_GGUF,
        "header": HEADER,
        "metadata": METADATA,
        "hyperparameters": HYPERPARAMETERS,
        "tokenizer": TOKENIZER,
        "tensors": TENSORS,
    }.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize(("data", "fragment"), REFUSED.values(), ids=REFUSED)
def test_refuses(tmp_path: Path, data: bytes, fragment: str) -> None:
    path = write(tmp_path, data)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert fragment in message
    assert "needed, -" not in message, "noticed only after the end was passed"


def test_truncated_anywhere(tmp_path: Path) -> None:
    data = valid()
    path = write(tmp_path, data)
    check_gguf(path)
    for size in range(len(data) - 1, -1, -1):
        os.truncate(path, size)
        message = refusal(path)
        assert "download it again" in message, size
        assert "MiB" not in message, size


# Files that are not files


def test_missing_folder_and_empty(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.gguf").endswith("none.gguf: does not exist")
    assert refusal(tmp_path).endswith(": is a folder, not a GGUF file")
    assert refusal(write(tmp_path, b"")).endswith(": is empty; download it again")
    assert "cannot be read: embedded null byte" in refusal(tmp_path / "a\0b")


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path, valid())
    monkeypatch.setattr(os, "open", forbidden)
    assert refusal(path).endswith("cannot be read: Permission denied")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in this system's file system")
@pytest.mark.timeout(10)
def test_pipes_and_devices_never_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *_: pytest.fail("opened, which alone can set off a device"))
        assert refusal(pipe).endswith(": is not a regular file")
        assert refusal(Path("/dev/zero")) == "/dev/zero: is not a regular file"

    # A pipe that takes the file's name after it was looked at, before it is opened.
    regular = write(tmp_path, valid()).stat()
    real = Path.stat
    seen: list[Path] = []

    def once(self: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        seen.append(self)
        return regular if len(seen) == 1 else real(self, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", once)
    assert refusal(pipe).endswith(": is not a regular file")
    assert seen[0] == pipe


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_closes_what_it_opens(tmp_path: Path) -> None:
    good, bad = write(tmp_path, valid()), write(tmp_path, valid(version=9), "bad.gguf")
    maps = Path("/proc/self/maps")
    before = len(list(Path("/proc/self/fd").iterdir()))
    check_gguf(good)
    errors = []
    for path in (bad, write(tmp_path, b"", "empty.gguf")):
        with pytest.raises(EdgespecError) as caught:
            check_gguf(path)
        errors.append(caught.value)  # keeps the traceback, and with it every frame, alive
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert str(tmp_path) not in maps.read_text()


# Hostile files


HOSTILE_NAMES: dict[str, Callable[[], bytes]] = {
    "magic": lambda: ESCAPE.encode(),
    "key": lambda: valid(again=string(ESCAPE) + u32(1)),
    "long key": lambda: valid(again=string(ESCAPE * 4000) + struct.pack("<I", 99)),
    "undecodable key": lambda: valid(again=string(b"\xff\xfe\x9b31m") + u32(1)),
    "tensor": lambda: norm(name=ESCAPE),
    "token": lambda: key("tokenizer.ggml.tokens", texts(ESCAPE, "b", "c", ESCAPE)),
    "architecture": lambda: key("general.architecture", text(ESCAPE)),
}


@pytest.mark.parametrize("data", HOSTILE_NAMES.values(), ids=HOSTILE_NAMES)
def test_hostile_names_stay_out_of_the_terminal(tmp_path: Path, data: Callable[[], bytes]) -> None:
    path = write(tmp_path, data())
    message = refusal(path)  # asserts that it is printable
    assert len(message) - len(str(path)) < 200
    if "architecture" not in message:
        assert "\\x" in message, "the name is shown, escaped"


def test_hostile_paths_and_titles(tmp_path: Path) -> None:
    assert "\\x1b[2J" in refusal(tmp_path / "a\x1b[2J\n.gguf")
    summary = check_gguf(write(tmp_path, key("general.name", text("\x1b[2J" + "long " * 100))))
    assert summary.name.startswith("\\x1b[2Jlong ")
    assert len(summary.name) == 60


def measured(path: Path) -> tuple[float, int]:
    """Seconds and peak bytes that a refusal takes."""
    started = time.perf_counter()
    refusal(path)
    seconds = time.perf_counter() - started
    tracemalloc.start()
    refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return seconds, peak


HUGE_COUNTS = {
    name: case[0] for name, case in (HEADER | METADATA | TENSORS).items() if any(c.isdigit() for c in name)
}


@pytest.mark.parametrize("data", HUGE_COUNTS.values(), ids=HUGE_COUNTS)
def test_huge_counts_cost_nothing(tmp_path: Path, data: bytes) -> None:
    seconds, peak = measured(write(tmp_path, data))
    assert seconds < 0.1
    assert peak < 1 << 20


@pytest.mark.parametrize("item", [STRING, U8])
def test_metadata_that_fills_a_large_file(tmp_path: Path, item: int) -> None:
    count = (1 << 30) // (8 if item == STRING else 1)
    data = File(keys={"x": array(item, count)}, tensors=(NORM,)).header()
    path = write(tmp_path, data)
    os.truncate(path, len(data) + (1 << 30))  # sparse: takes no space
    seconds, peak = measured(path)
    assert "more than 128 MiB of metadata" in refusal(path)
    assert seconds < 0.1
    assert peak < 1 << 20


def test_large_vocabulary_is_fast(tmp_path: Path) -> None:
    tokens = texts(*(f"token{i}" for i in range(152_000)))
    data = keys(
        {
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": tokens,
            "tokenizer.ggml.scores": None,
            "tokenizer.ggml.token_type": None,
        }
    )
    path = write(tmp_path, data)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        assert check_gguf(path).vocab_size == 152_000
        best = min(best, time.perf_counter() - started)
    assert best < 0.5  # some 0.06 s on two cores of 2023; the rest is for a busy machine


@dataclass(frozen=True)
class Edit:
    at: int
    removed: int
    inserted: bytes


VALID = valid()
INTERESTING = [
    b"\0",
    b"\1",
    b"\xff",
    b"\xff" * 8,
    b"\0" * 7 + b"\x80",
    struct.pack("<Q", 1 << 61),
    ESCAPE.encode(),
]
edits = st.lists(
    st.builds(
        Edit,
        at=st.integers(0, len(VALID) - 1),
        removed=st.sampled_from([0, 1, 1, 1, 4, 8, 50]),
        inserted=st.one_of(st.sampled_from(INTERESTING), st.binary(max_size=9)),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=600, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=edits)
@example(changes=[Edit(VALID.index(b"Tiny"), 1, b"D")])
@example(changes=[Edit(len(VALID) - 1, 1, b"\1")])
def test_random_changes(tmp_path: Path, native: ctypes.CDLL, changes: list[Edit]) -> None:
    data = VALID
    for change in changes:
        data = data[: change.at] + change.inserted + data[change.at + change.removed :]
    path = write(tmp_path, data)
    tracemalloc.start()
    try:
        outcome: GgufSummary | EdgespecError = check_gguf(path)
    except EdgespecError as error:
        outcome = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20
    if isinstance(outcome, GgufSummary):
        assert native_accepts(native, path), "what is accepted here, llama.cpp can open"
    else:
        assert str(outcome).isprintable()


# Which vocabularies are the same


def digest(folder: Path, data: bytes) -> str:
    return check_gguf(write(folder, data)).tokenizer_digest


def test_digest_ignores_everything_else(tmp_path: Path) -> None:
    expected = digest(tmp_path, valid())
    others = {
        "order": valid(keys=dict(reversed(File().keys.items()))),
        "name": key("general.name", text("Another")),
        "template": key("tokenizer.chat_template", None),
        "tensors": valid(tensors=(EMBEDDING,)),
        "version": valid(version=2),
    }
    assert {name: digest(tmp_path, data) for name, data in others.items()} == dict.fromkeys(others, expected)


def test_digest_depends_on_the_vocabulary(tmp_path: Path) -> None:
    prefix = "tokenizer.ggml."
    digests = [
        digest(tmp_path, data)
        for data in (
            valid(),
            key(prefix + "model", text("llama")),
            key(prefix + "pre", text("qwen2")),
            key(prefix + "pre", None),
            key(prefix + "tokens", texts("<s>", "a", "b", "ac")),
            key(prefix + "tokens", texts("<s>a", "", "b", "ab")),
            key(prefix + "tokens", texts("a", "<s>", "b", "ab")),
            key(prefix + "token_type", numbers(I32, "i", 3, 1, 1, 3)),
            key(prefix + "merges", texts("a  b")),
            key(prefix + "merges", texts("a b", "b a")),
            key(prefix + "merges", None),
        )
    ]
    assert len(set(digests)) == len(digests)
