"""What reaches a terminal is text."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgespec.app.terminal import CleanHandler, clean, one_line

# Any code point, lone surrogates too, and the dangerous ones often enough to meet each other.
NASTY = st.text(st.characters() | st.sampled_from("\x1b\x07\x9b\x7f\r\n\t\x85\u202e\u2066\u2028\ud800\udc00"))


def allowed(char: str) -> bool:
    code = ord(char)
    control = (code < 0x20 and char not in "\n\t") or 0x7F <= code <= 0x9F
    turns = 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    return not (control or turns or code in (0x2028, 0x2029) or 0xD800 <= code <= 0xDFFF)


@given(NASTY)
def test_only_allowed_characters_pass(text: str) -> None:
    cleaned = clean(text)
    assert all(map(allowed, cleaned))
    assert clean(cleaned) == cleaned
    assert "\n" not in one_line(text)


@given(NASTY)
def test_what_is_allowed_stays_as_it_is(text: str) -> None:
    plain = "".join(filter(allowed, text))
    assert clean(plain) == plain
    # Nothing allowed is lost from among the rest either.
    assert [c for c in clean(text) if c not in "\n\ufffd"] == [c for c in plain if c not in "\n\ufffd"]


@given(st.lists(NASTY))
def test_pieces_clean_like_the_whole(pieces: list[str]) -> None:
    pieces = [piece.replace("\r", "") for piece in pieces]  # "\r\n" parted is two newlines
    assert "".join(map(clean, pieces)) == clean("".join(pieces))


def test_ends_of_lines() -> None:
    assert clean("a\r\nb\rc\u2028d\u2029e\n") == "a\nb\nc\nd\ne\n"
    assert clean("a\r") + clean("\nb") == "a\n\nb"


def test_sequences_become_harmless_text() -> None:
    assert clean("\x1b]52;c;AAAA\x07\x9b31mred") == "]52;c;AAAA31mred"
    assert clean("a\ud83dz") == "a\ufffdz"
    assert one_line(" a\n\tb\x1b ") == "a b"


def test_log_records_are_cleaned_with_what_their_tracebacks_quote(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.Logger("test")
    log.addHandler(CleanHandler())
    try:
        raise ValueError("\x1b]52;c;aGk=\x07\x9b2J")
    except ValueError:
        log.exception("said %s", "\x1b[2J\u202e")
    said = capsys.readouterr().err
    assert said.startswith("said [2J\n")
    assert "ValueError: ]52;c;aGk=2J" in said
    assert all(map(allowed, said))
