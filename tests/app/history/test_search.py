"""Full-text search of the history."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from histories import talk, written
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgespec.app.history.store import History


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "history.db"


@pytest.fixture
def history(path: Path) -> Iterator[History]:
    with History(path) as history:
        yield history


def found(history: History, query: str) -> list[str]:
    """The first match in each hit."""
    return ["|".join(hit.snippet[a:b] for a, b in hit.matches) for hit in history.search(query)]


def test_words_match_as_prefixes(history: History) -> None:
    talk(history, "Wie groß ist die Zugspitze?", "The naïve answer: 2962 metres, foo-bar.")
    assert found(history, "zug") == ["Zugspitze", "Zugspitze"]  # in the title and in the message
    assert found(history, "NAIVE met") == ["naïve|metres"]
    assert found(history, "foo-ba") == ["foo-bar"]
    assert found(history, "pitze") == found(history, "zug metres") == found(history, "  ") == []


def test_symbols_and_scripts_without_spaces_match_anywhere(history: History) -> None:
    talk(history, "我喜欢机器学习", "In C: p->next = 100%; 🦊 _x")
    assert found(history, "机器") == ["机器", "机器"]
    assert found(history, "->") == ["->"]
    assert found(history, "🦊") == ["🦊"]
    assert found(history, "%") == ["%"]
    assert found(history, "nex -> %") == ["next"]
    assert found(history, "nex <-") == []


def test_a_search_follows_every_change(history: History) -> None:
    question, answer = talk(history, "alpha", "beta")
    number = question.conversation
    history.rename(number, "gamma")
    assert [hit.message for hit in history.search("gamma")] == [None]
    assert [hit.message for hit in history.search("alpha")] == [question.id]
    history.append_text(answer.id, " delta")
    history.finish(answer.id)
    assert [hit.message for hit in history.search("delt")] == [answer.id]
    history.delete(number)
    assert history.search("alpha") == []
    history.restore(number)
    assert len(history.search("alpha")) == 1
    history.purge(number)
    assert history.search("alpha") == history.search("gamma") == []


def test_the_newest_come_first_within_the_limit(history: History) -> None:
    made = [message.id for message in talk(history, *["word"] * 9)]
    assert [hit.message for hit in history.search("word", 4)] == [None, *made[:-4:-1]]
    assert len(history.search("word", 0)) == 0


@pytest.mark.parametrize(
    "query",
    [
        '"', "*", "NEAR(", "-", "a AND", "OR", "NOT", "^", "a:b", "text:", "{a b}:", "(", ")", '"a', "a\0b",
        "\ud800", "'", "\\", "%", "a" * 100_000, "* " * 100_000, '""""', "+", "NEAR(a b, 5)", "rowid:1",
        "\u0300", "𞤀", "\x1b]52;",
    ],
)  # fmt: skip
def test_every_query_is_valid(history: History, query: str) -> None:
    talk(history, "a b NEAR text", "or not")
    for hit in history.search(query):
        assert all(0 <= start < end <= len(hit.snippet) for start, end in hit.matches)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=written, query=written, cut=st.tuples(st.integers(0, 20), st.integers(1, 20)))
def test_any_query_on_any_text(history: History, text: str, query: str, cut: tuple[int, int]) -> None:
    number = talk(history, text)[0].conversation
    for each in (query, text[cut[0] : cut[0] + cut[1]]):
        for hit in history.search(each):
            assert all(0 <= start < end <= len(hit.snippet) for start, end in hit.matches)
            assert len(hit.snippet) <= 240
    history.purge(number)


def test_a_snippet_is_short_and_shows_the_match(history: History) -> None:
    talk(history, "x", "a" * 5000 + " needle " + "b" * 5000)
    (hit,) = history.search("needle")
    assert len(hit.snippet) <= 240
    assert found(history, "needle") == ["needle"]
    talk(history, "x", "y" * 5000 + "->" + "z" * 5000)
    assert found(history, "->") == ["->"]
    talk(history, "x", "endless" * 1000)
    (hit,) = history.search("endl")
    assert hit.matches == ((0, 240),)


def test_a_text_cannot_pretend_to_match(history: History) -> None:
    talk(history, "x", "<b>needle</b> < > <mark>hay</mark> [hay] \x01hay\x02")
    assert found(history, "needle") == ["needle"]
