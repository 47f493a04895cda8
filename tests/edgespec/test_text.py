"""Text in pieces is the text in one piece, up to the stop that begins first."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgespec.text import TextStream, printable

relaxed = settings(max_examples=300, deadline=None, derandomize=True)
cuts = st.lists(st.integers(0, 80), max_size=12)
small = st.text("abä€🙂", max_size=40)  # one to four bytes a character, and many repetitions
stops = st.lists(st.text("abä€🙂", min_size=1, max_size=6), max_size=4)


def pieces(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def stream(parts: Sequence[bytes], stops: Sequence[str] = ()) -> tuple[list[str], str | None]:
    """What comes out after each part, and after the end, and the stop found."""
    text = TextStream(stops)
    out = []
    for part in parts:
        text.push(part)
        out.append(text.take())
    text.push(b"", final=True)
    return [*out, text.take()], text.stopped


def until_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` before the earliest stop in it."""
    at = min((text.find(stop) for stop in stops if stop in text), default=-1)
    return (text, False) if at < 0 else (text[:at], True)


@relaxed
@given(st.text(max_size=40), cuts)
def test_characters_survive_any_split(text: str, at: list[int]) -> None:
    parts = pieces(text.encode("utf-8", "replace"), at)
    assert "".join(stream(parts)[0]) == text.encode("utf-8", "replace").decode()


@relaxed
@given(st.binary(max_size=40), cuts)
@example("🙂".encode()[:3] + b"a\xff\xc3", [1, 2, 3])
def test_bytes_that_are_no_text_become_replacement_characters(data: bytes, at: list[int]) -> None:
    assert "".join(stream(pieces(data, at))[0]) == data.decode("utf-8", "replace")


@relaxed
@given(st.text(max_size=20))
def test_a_character_comes_with_its_last_byte(text: str) -> None:
    data = text.encode("utf-8", "replace")
    out, _ = stream([bytes([byte]) for byte in data])
    for i in range(len(data) + 1):
        assert "".join(out[:i]) == data[:i].decode("utf-8", "ignore")


@relaxed
@given(small, stops, cuts)
@example("abcd", ["abcd", "bc"], [1, 2, 3])
@example("aab", ["ab"], [2])
@example("abab", ["abb", "ba"], [1, 2, 3])
def test_text_ends_before_the_earliest_stop_however_split(text: str, stops: list[str], at: list[int]) -> None:
    expected, found = until_stop(text, stops)
    out, stopped = stream(pieces(text.encode(), at), stops)
    assert "".join(out) == expected
    assert (stopped is not None) == found
    if stopped is not None:
        assert stopped in stops
        assert text.startswith(stopped, len(expected))


@relaxed
@given(small, stops, cuts)
def test_only_what_may_begin_a_stop_is_held_back(text: str, stops: list[str], at: list[int]) -> None:
    parts = pieces(text.encode(), at)
    out, _ = stream(parts, stops)
    for i in range(len(parts)):
        seen = b"".join(parts[: i + 1]).decode("utf-8", "ignore")
        certain, given_out = until_stop(seen, stops)[0], "".join(out[: i + 1])
        assert certain.startswith(given_out)
        held = certain[len(given_out) :]
        assert len(held) < max((len(stop) for stop in stops), default=1)
        assert not held or any(stop.startswith(held) for stop in stops)


@relaxed
@given(small, stops)
def test_a_stop_is_seen_with_its_last_byte(text: str, stops: list[str]) -> None:
    """Unless one that began earlier is still undecided."""
    stream_ = TextStream(stops)
    seen = ""
    for character in text:
        stream_.push(character.encode())
        seen += character
        expected, found = until_stop(seen, stops)
        earlier = any(
            len(stop) > len(seen) - at and stop.startswith(seen[at:])
            for stop in stops
            for at in range(len(expected))
        )
        assert (stream_.stopped is not None) == (found and not earlier)
        if stream_.stopped is not None:
            break


def test_nothing_follows_a_stop() -> None:
    text = TextStream(["END"])
    text.push(b"one EN")
    assert text.take() == "one "
    text.push(b"D two")
    assert (text.take(), text.stopped) == ("", "END")
    text.push(b" three", final=True)
    assert (text.take(), text.stopped) == ("", "END")


def test_the_longer_of_two_stops_at_one_place_is_named() -> None:
    text = TextStream(["ab", "abc", "b"])
    text.push(b"xabc")
    assert (text.take(), text.stopped) == ("x", "abc")


def test_the_end_gives_out_what_was_held_back() -> None:
    text = TextStream(["END"])
    text.push(b"EN\xe2\x82")
    assert text.take() == ""
    text.push(b"", final=True)
    assert (text.take(), text.stopped) == ("EN\ufffd", None)


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        TextStream(["a", ""])


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain Ünïcode 模型", "plain Ünïcode 模型"),
        (b"bytes \xff", "bytes \\xff"),
        ("\x1b[31m\x9b\x7f\n", "\\x1b[31m\\x9b\\x7f\\n"),
        ("\u202eevil\u2066\ufeff", "\\u202eevil\\u2066\\ufeff"),
        ("\udc80", "\\udc80"),
        ("a\x1b]52;c;aGk=\x07b", r"a\x1b]52;c;aGk=\x07b"),
        ("x" * 60, "x" * 60),
        ("x" * 61, "x" * 59 + "…"),
    ],
)
def test_what_drives_a_terminal_is_escaped(raw: str | bytes, shown: str) -> None:
    assert printable(raw, 60) == shown


def test_a_long_text_is_cut_after_its_escapes() -> None:
    assert (
        len(printable(b"\x1b" * 1000)) == len(printable("\x1b" * 1000)) == len(printable("x" * 1000)) == 300
    )
    assert printable("x" * 1000, None) == "x" * 1000


def test_no_more_is_read_than_is_shown() -> None:
    hostile = b"\x1b" * (64 << 20)
    started = time.perf_counter()
    assert len(printable(hostile, 60)) == 60
    assert time.perf_counter() - started < 0.1
