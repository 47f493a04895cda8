"""Attached text files: `@path` in the message as typed, the text of the file in the message as sent."""

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
    """A mentioned file: its text, or the reason why it cannot be attached."""

    name: str
    text: str = ""
    error: str = ""


def mentions(text: str) -> list[str]:
    """The paths mentioned as `@path` or `@"a path"`, in order, without duplicates."""
    return list(dict.fromkeys(match[1] or match[2].rstrip(".,;:!?)") for match in _MENTION.finditer(text)))


def find(text: str, folder: Path | None = None) -> list[Attached]:
    """Read the files that `text` mentions. A mention that is not the path of a file counts as a word."""
    found = []
    for name in mentions(text):
        path = _path(name, folder)
        try:
            if not path.is_file():
                continue
            size = path.stat().st_size
            if size > MOST_BYTES:
                error = f"has {size:,} bytes and the limit is {MOST_BYTES:,}: attach a part of it"
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
        found.append(Attached(name, "" if binary else content, "is not UTF-8 text" if binary else ""))
    return found


def attach(text: str, folder: Path | None = None) -> tuple[str, list[Attached]]:
    """Attach the files that `text` mentions. Returns the message to send, and the files.

    Raises EdgespecError if a file cannot be read.
    """
    files = find(text, folder) if "@" in text else []
    if wrong := next((one for one in files if one.error), None):
        raise EdgespecError(f"@{wrong.name} {wrong.error}")
    return with_files(text, files), files


def with_files(text: str, files: list[Attached]) -> str:
    """The message to send: the text as typed, then each file in its own code fence."""
    for one in files:
        longest = max(map(len, re.findall("`{3,}", one.text)), default=2)
        fence = "`" * (longest + 1)
        text += f"\n\nFile {one_line(one.name)}:\n{fence}\n{one.text.rstrip(chr(10))}\n{fence}"
    return text


def folded(text: str) -> str:
    """The message as typed, with one line for each attached file."""
    return _ATTACHED.sub(lambda m: f"\n@{m[1]}: {m[3].count(chr(10)) + 1:,} lines", text)


def unfolded_question(text: str) -> str:
    """The message as typed, to be edited."""
    return _ATTACHED.sub("", text)


def complete(typed: str, folder: Path | None = None) -> list[str]:
    """The paths that begin with `typed`. Folders end with a slash; hidden files only match a leading dot."""
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
    """The path in the argument of a command, with or without quotes. Raises EdgespecError."""
    with suppress(ValueError):
        typed = " ".join(shlex.split(typed)) or typed
    if "\0" in typed:
        raise EdgespecError("invalid file name: it contains a NUL character")
    return _path(typed, None)


def _path(name: str, folder: Path | None) -> Path:
    path = Path(os.path.expanduser(name))  # noqa: PTH111 - Path.expanduser raises for an unknown ~user
    return path if path.is_absolute() else (folder or Path.cwd()) / path
