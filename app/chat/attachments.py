"""Text files that a message brings along: `@path` in what is typed, the file's text in what is sent."""

from __future__ import annotations

import os
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edgespec.app.terminal import one_line
from edgespec.core import EdgespecError

MOST_BYTES = 1_000_000
_MENTION = re.compile(r"""(?<!\S)@(?:"([^"\n]+)"|(\S+))""")
_ATTACHED = re.compile(r"\n\nFile ([^\n]+):\n(`{3,})\n(.*?)\n\2(?=\n|\Z)", re.DOTALL)
_MOST_NAMES = 200


@dataclass(frozen=True, slots=True)
class Attached:
    """A file that was found: its text, or why it cannot be attached."""

    name: str
    text: str = ""
    error: str = ""


def mentions(text: str) -> list[str]:
    """The paths written as `@path` or `@"a path"`, in order, each once."""
    return list(dict.fromkeys(match[1] or match[2].rstrip(".,;:!?)") for match in _MENTION.finditer(text)))


def find(text: str, folder: Path | None = None) -> list[Attached]:
    """The files that `text` mentions, read. What is no path of a file is taken for a word and left out."""
    found = []
    for name in mentions(text):
        path = _path(name, folder)
        try:
            if not path.is_file():
                continue
            size = path.stat().st_size
            if size > MOST_BYTES:
                error = f"has {size:,} bytes, more than {MOST_BYTES:,}: attach a part of it"
                found.append(Attached(name, error=error))
                continue
            with path.open("rb") as file:
                data = file.read(MOST_BYTES)
        except (OSError, ValueError) as problem:
            reason = problem.strerror if isinstance(problem, OSError) else str(problem)
            found.append(Attached(name, error=f"cannot be read: {reason}"))
            continue
        try:
            content = data.decode()
        except UnicodeDecodeError:
            content = "\0"
        binary = "\0" in content
        found.append(Attached(name, "" if binary else content, "is no UTF-8 text" if binary else ""))
    return found


def with_files(text: str, files: list[Attached]) -> str:
    """The message as the model reads it: what was typed, then each file in a fence of its own."""
    for one in files:
        longest = max(map(len, re.findall("`{3,}", one.text)), default=2)
        fence = "`" * (longest + 1)
        text += f"\n\nFile {one_line(one.name)}:\n{fence}\n{one.text.rstrip(chr(10))}\n{fence}"
    return text


def folded(text: str) -> str:
    """The message as it was typed, with a line for each file."""
    return _ATTACHED.sub(lambda m: f"\n@{m[1]}: {m[3].count(chr(10)) + 1:,} lines", text)


def unfolded_question(text: str) -> str:
    """The message as it was typed: to edit it."""
    return _ATTACHED.sub("", text)


def complete(typed: str, folder: Path | None = None) -> list[str]:
    """The paths that begin with `typed`, folders with a slash at their end; hidden ones only if asked for."""
    head, _, tail = typed.rpartition("/")
    where = _path(head + "/" if "/" in typed else "", folder)
    names = []
    try:
        with os.scandir(where) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(tail) and (tail.startswith(".") or not name.startswith(".")):
                    names.append((head + "/" if "/" in typed else "") + name + "/" * entry.is_dir())
                if len(names) >= _MOST_NAMES:
                    break
    except (OSError, ValueError):
        return []
    return sorted(names)


def path_of(typed: str) -> Path:
    """The file meant by the rest of a command, with or without quotes. Raises EdgespecError."""
    with suppress(ValueError):
        typed = " ".join(shlex.split(typed)) or typed
    if "\0" in typed:
        raise EdgespecError("A file name holds no NUL.")
    return _path(typed, None)


def _path(name: str, folder: Path | None) -> Path:
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises for an unknown ~user
    return path if path.is_absolute() else (folder or Path.cwd()) / path
