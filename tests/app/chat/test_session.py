"""The messages a model gets, the sources of tokens, and the merging of events, without a screen."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from edgespec.app.chat.chat_model import TokenTrace
from edgespec.app.chat.events import ChatEvent, Ended, TextAppended, merge_text
from edgespec.app.chat.messages import BranchMessage, model_messages
from edgespec.app.engine.request import Step
from edgespec.core import Draft, Round


def chain(*messages: tuple[str, str]) -> BranchMessage:
    """The last of a chain of messages, each the child of the one before."""
    item = None
    for number, (role, text) in enumerate(messages, 1):
        item = BranchMessage(number, role, text, "complete", item)  # type: ignore[arg-type]
    assert item is not None
    return item


def texts(last: BranchMessage, **settings: int) -> list[str]:
    return [f"{m['role'][0]}:{m['content']}" for m in model_messages(last, "S", **settings)]


def test_questions_without_an_answer_are_left_out() -> None:
    last = chain(
        ("user", "a"), ("assistant", "A"), ("user", "b"), ("assistant", ""), ("user", "c"), ("assistant", "")
    )
    assert texts(last) == ["s:S", "u:a", "a:A", "u:c"]
    assert texts(chain(("user", "a"), ("user", "b"), ("assistant", ""))) == ["s:S", "u:b"]


def test_a_continued_answer_is_included() -> None:
    assert texts(chain(("user", "a"), ("assistant", "half"))) == ["s:S", "u:a", "a:half"]


def test_trimmed_messages_are_left_out() -> None:
    last = chain(("user", "a"), ("assistant", "A"), ("user", "b"), ("assistant", ""))
    assert texts(last, since=3) == ["s:S", "u:b"]
    assert texts(last, since=2) == ["s:S", "u:b"]  # never starts with an answer
    assert model_messages(last, "", 3) == [{"role": "user", "content": "b"}]


def test_an_imported_system_message_is_included() -> None:
    assert texts(chain(("system", "x"), ("user", "a"), ("assistant", ""))) == ["s:S", "s:x", "u:a"]


@given(st.lists(st.tuples(st.integers(0, 2), st.text(max_size=3)), max_size=30))
def test_bursts_are_merged_and_lose_nothing(pieces: list[tuple[int, str]]) -> None:
    items = [chain(("user", str(n))) for n in range(3)]
    events: list[ChatEvent] = [TextAppended(items[n], text) for n, text in pieces]
    events.insert(len(events) // 2, Ended(items[0]))
    merged = merge_text(events)
    for item in items:
        expected = "".join(text for n, text in pieces if items[n] is item)
        assert "".join(e.text for e in merged if isinstance(e, TextAppended) and e.item is item) == expected
    assert all(
        not (isinstance(a, TextAppended) and isinstance(b, TextAppended) and a.item is b.item)
        for a, b in pairwise(merged)
    )


def test_sources_are_those_of_the_accepted_tokens() -> None:
    pieces = {1: b"a", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"bcd", 9: b""}
    result = TokenTrace()
    result.piece = pieces.__getitem__

    def add(tokens: tuple[int, ...], drafted: int, accepted: int, ended: bool = False) -> None:
        draft = Draft((7,) * drafted, (0.5,) * drafted, ("suffix",) + ("model",) * (drafted - 1))
        round_ = Round(tokens, draft, accepted, 0.5, 0.1, 0.1, ended)
        result.add(Step(tokens=tokens[: len(tokens) - ended], round=round_))

    add((1,), 0, 0)
    add((2, 3, 4), 3, 2)
    add((4, 9), 2, 1, ended=True)
    assert result.spans == [("target", 1), ("suffix", 0), ("model", 1), ("target", 3), ("suffix", 3)]
    assert list(result.sources()) == [
        ("target", [1]), ("suffix", [0]), ("model", [1]), ("target", [3]), ("suffix", [3])
    ]  # fmt: skip
    assert result.drafts == [0, 3, 2]
    assert result.speeds == [6.0, 4.0]
