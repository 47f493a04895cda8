"""Exports and imports of the history."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from histories import storable

from edgespec.app.history.io import from_json, read, to_json, to_markdown, write
from edgespec.app.history.store import History
from edgespec.app.terminal import clean
from edgespec.core import EdgespecError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "history.db"


@pytest.fixture
def history(path: Path) -> Iterator[History]:
    with History(path) as history:
        yield history


def test_markdown_is_the_branch_shown_without_control_characters(history: History) -> None:
    about = history.new("A \x1b]52;c;x\x07 title", system="Be \u202e brief", model="q\x9bwen")
    question = history.append(about.id, "user", "What?\r\n```py\nx\n```")
    history.append(about.id, "assistant", "hidden")
    history.append(about.id, "assistant", "Half\x1b[2J", parent=question.id, state="stopped")
    text = to_markdown(history, about.id)
    assert clean(text) == text
    assert text.startswith("# A ]52;c;x title\n\n")
    assert (
        "## System\n\nBe  brief\n\n## User\n\nWhat?\n```py\nx\n```\n\n## Assistant (stopped)\n\nHalf[2J\n"
        in text
    )
    assert "hidden" not in text


def test_json_restores_everything(path: Path, history: History) -> None:
    nasty = "xyz " + "".join(map(chr, range(0x100))) + "\u202e\u2066\u2028 🦊 ä \\u0041 \ud800"
    about = history.new(
        nasty, system=nasty, persona="p", model="m", sampling={"temperature": 0.5, "stop": [nasty]}
    )
    question = history.append(about.id, "user", nasty)
    history.append(
        about.id, "assistant", "a", parent=question.id, stats={"tokens": 3}, sources=[("target", [1, 0])]
    )
    history.append(about.id, "assistant", "b", parent=question.id)
    history.switch(question.id + 1)
    history.pin(about.id)
    text = to_json(history)
    assert clean(text) == text
    assert "🦊 ä" in text
    with History(path.with_name("other.db")) as other:
        (number,) = from_json(other, text)
        assert to_json(other) == text
        kept = other.conversation(number)
        assert (kept.created, kept.pinned, kept.system) == (about.created, True, storable(nasty))
        assert other.branch(number)[-1].sources == (("target", (1, 0)),)
        assert [hit.message for hit in other.search("xyz") if hit.message] == [1]
        assert len(from_json(other, text)) == 1
        assert len(other.conversations()) == 2  # in addition to what is there


def one(**changes: Any) -> dict[str, Any]:
    """A conversation that can be imported, with changes."""
    message = {"id": 1, "parent": None, "role": "user", "text": "hello", "created": 1.0, "state": "complete"}
    return {
        "title": "t", "created": 1.0, "updated": 2, "pinned": False, "system": "", "persona": "", "model": "",
        "sampling": {}, "head": 1, "messages": [{**message, "stats": {}, "sources": []}], **changes,
    }  # fmt: skip


def file_of(*conversations: object, **changes: Any) -> str:
    return json.dumps({"format": "edgespec-history", "version": 1, "conversations": conversations, **changes})


def with_message(**changes: Any) -> dict[str, Any]:
    return one(messages=[{**one()["messages"][0], **changes}])


def chain(*links: tuple[int, int | None]) -> dict[str, Any]:
    message = one()["messages"][0]
    return one(messages=[{**message, "id": number, "parent": parent} for number, parent in links])


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"x": value}
    return value


def test_the_smallest_import(history: History) -> None:
    assert from_json(history, file_of(one(), chain((5, None), (1, 5), (7, 5)))) == [1, 2]
    (partial,) = from_json(history, file_of(with_message(state="partial")))
    assert history.branch(partial)[0].state == "stopped"
    assert from_json(history, file_of(one(head=None, messages=[]))) == [4]


@pytest.mark.parametrize(
    "text",
    [
        "", "nothing", "[]", "null", '"x"', "{", "\0", "[" * 100_000, '{"a":' * 100_000, "1" * 5000,
        file_of(one(), version=2), file_of(one(), version=True), file_of(one(), format="x"),
        file_of(conversations=None), file_of(conversations={"a": 1}), file_of(None), file_of([one()]),
        file_of({}), file_of(one(extra=1)), file_of(one(title=None)), file_of(one(title="x" * 1001)),
        file_of(one(pinned=1)), file_of(one(created=-1)), file_of(one(created=True)),
        file_of(one(created=1e300)),
        file_of(one(created=float("nan"))), file_of(one()).replace("1.0", "1e999"), file_of(one(updated="2")),
        file_of(one(sampling=[])), file_of(one(sampling=nested(5))), file_of(one(sampling=nested(400))),
        file_of(one(sampling={"x": "x" * 30_000})), file_of(one(head=2)), file_of(one(head=None)),
        file_of(one(head="1")), file_of(one(messages=[])), file_of(one(messages=[1])),
        file_of(one(messages="x")), file_of(with_message(role="root")), file_of(with_message(role=[])),
        file_of(with_message(state="done")),
        file_of(with_message(text=1)), file_of(with_message(id=True)), file_of(with_message(id=1.0)),
        file_of(with_message(id="1; DROP TABLE messages")), file_of(with_message(parent=1)),
        file_of(with_message(parent=0)), file_of(with_message(stats=None)),
        file_of(with_message(stats={"x": 0.75})).replace("0.75", "1e999"), file_of(with_message(more=1)),
        file_of(with_message(sources=[["a"]])), file_of(with_message(sources=[["a", [-1]]])),
        file_of(with_message(sources=[["a", [1.5]]])), file_of(with_message(sources=[[1, [1]]])),
        file_of(with_message(sources="abc")), file_of(chain((1, 2), (2, 1))),
        file_of(chain((1, None), (1, None))), file_of(chain((1, 2), (2, None))),
        file_of(chain((1, None), (2, 3), (3, 2))),
        "[" + "0," * 10_000_001 + "0]",
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_a_hostile_import_adds_nothing(history: History, text: str) -> None:
    with pytest.raises(EdgespecError) as raised:
        from_json(history, text)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 200
    if text.startswith('{"format'):  # valid ones before it are not added either
        data = json.loads(text)
        if isinstance(data["conversations"], list):
            data["conversations"].insert(0, one())
            with pytest.raises(EdgespecError):
                from_json(history, json.dumps(data))
    assert history.conversations() == []


def test_numbers_of_any_size_are_only_names(history: History) -> None:
    (number,) = from_json(history, file_of(one(**chain((10**300, None), (-5, 10**300)), **{}) | {"head": -5}))
    assert len(history.branch(number)) == 2


def test_a_file_is_written_atomically_and_checked_when_read(tmp_path: Path) -> None:
    path, folder = tmp_path / "export.json", tmp_path / "folder"
    folder.mkdir()
    write(path, "ä\n")
    write(path, "ö\n")
    assert (path.read_bytes(), read(path)) == ("ö\n".encode(), "ö\n")
    path.write_bytes("\ufeffx".encode())
    assert read(path) == "x"
    with pytest.raises(EdgespecError, match="cannot write"):
        write(tmp_path / "none" / "x", "x")
    with pytest.raises(EdgespecError, match="cannot write"):
        write(folder, "x")
    assert sorted(tmp_path.iterdir()) == [path, folder]
    with pytest.raises(EdgespecError, match="cannot read"):
        read(tmp_path / "none")
    path.write_bytes(b"\xff")
    with pytest.raises(EdgespecError, match="UTF-8"):
        read(path)
    os.truncate(path, 64_000_001)
    with pytest.raises(EdgespecError, match="larger"):
        read(path)
    if sys.platform != "win32":
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(EdgespecError, match="not a file"):
            read(path)
