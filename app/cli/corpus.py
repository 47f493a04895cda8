"""`edgespec corpus`: manage the texts that drafts are retrieved from."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from edgespec.app.cli.options import JsonOption
from edgespec.app.engine import corpus_store
from edgespec.app.terminal import one_line
from edgespec.core import EdgespecError
from edgespec.text import printable

MAX_FILE = 16_000_000

app = typer.Typer(help="Manage the texts that drafts are retrieved from.", no_args_is_help=True)


@app.command()
def add(
    files: Annotated[list[Path], typer.Argument(help="Text files: sources, notes, documents.")],
    recursive: Annotated[
        bool,
        typer.Option(
            "-r", "--recursive", help="Add the text files in folders, except links and hidden files."
        ),
    ] = False,
) -> None:
    """Copy the text of files, to retrieve drafts from. A file that is added again is replaced."""
    texts, skipped = read_texts(files, recursive)
    done = corpus_store.add(texts)
    print(f"added {done.added}, unchanged {done.unchanged}, skipped {skipped}")
    for name in done.dropped:
        print(
            f"removed {one_line(name)}: the oldest, of more than {_megabytes(corpus_store.MAX_TEXT)} of text"
        )


@app.command("list")
def list_(as_json: JsonOption = False) -> None:
    """List the texts: size in bytes, date added, and name."""
    sources, sessions = corpus_store.sources(), corpus_store.sessions()
    times = [datetime.fromtimestamp(source.added, UTC) for source in sources]
    if as_json:
        rows = [
            {"name": source.name, "bytes": source.bytes, "added": added.isoformat()}
            for source, added in zip(sources, times, strict=True)
        ]
        print(json.dumps({"sources": rows, "sessions": sessions._asdict()}, indent=2))
        return
    for source, added in zip(sources, times, strict=True):
        print(f"{source.bytes:>12,}  {added.astimezone():%Y-%m-%d %H:%M}  {one_line(source.name)}")
    if not sources:
        print("no texts: `edgespec corpus add FILE` adds one")
    if sessions.remember:
        print(f"{sessions.bytes:>12,}  {sessions.texts} prompts and answers of past sessions")


@app.command()
def rm(
    name: Annotated[str, typer.Argument(help="A file, a folder, or a file's name without its folder.")],
) -> None:
    """Remove a text, or all texts in a folder. The files themselves stay."""
    print(f"removed {len(corpus_store.remove(name))}")


@app.command()
def clear() -> None:
    """Remove all texts and past sessions, and switch `remember` off."""
    print(f"freed {_megabytes(corpus_store.clear())}")


@app.command()
def remember(
    state: Annotated[Literal["on", "off"], typer.Argument(help="off also deletes the remembered text.")],
) -> None:
    """Remember prompts and answers, the last megabyte, to retrieve drafts from. Off by default."""
    corpus_store.set_remember(state == "on")
    if state == "on":
        print(f"prompts and answers are kept in {one_line(str(corpus_store.corpus_folder()))} from now on")
    else:
        print("prompts and answers are no longer kept; those that were kept are deleted")


def read_texts(paths: Sequence[Path], recursive: bool) -> tuple[dict[str, str], int]:
    """Read the text of each file, by `corpus_store.source_name`, and count the files that were skipped.

    In a folder, links and files that are hidden, binary, empty, unreadable or too large are skipped. Raises
    EdgespecError if such a file is named itself.
    """
    texts: dict[str, str] = {}
    size = skipped = 0
    for path in paths:
        is_folder = path.is_dir()
        if is_folder and not recursive:
            raise EdgespecError(f"{printable(path)} is a folder: --recursive adds the text files in it")
        for file in _files_in(path) if is_folder else [Path(os.path.realpath(path))]:
            try:
                text = texts[corpus_store.source_name(file)] = _read(file)
            except (OSError, ValueError) as error:
                if not is_folder:
                    what = error.strerror if isinstance(error, OSError) else error
                    raise EdgespecError(f"cannot add {printable(path)}: {what}") from None
                skipped += 1
                continue
            size += len(text.encode())
            if size > corpus_store.MAX_TEXT:
                raise EdgespecError(
                    f"more than {_megabytes(corpus_store.MAX_TEXT)} of text: add less at a time"
                )
    return texts, skipped


def _files_in(top: Path) -> Iterator[Path]:
    """Yield the files that are neither links nor hidden, nor in a hidden folder."""
    for folder, folders, files in os.walk(top):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(folder, name) for name in sorted(files) if not name.startswith("."))
        yield from (path for path in paths if not path.is_symlink())


def _read(path: Path) -> str:
    """The text of a file. Raises OSError, and ValueError with the reason if the file is not usable."""
    # A link that replaced the file meanwhile is not followed, and a pipe does not block.
    flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    with os.fdopen(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a file")
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ValueError(f"it is larger than {_megabytes(MAX_FILE)}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8") from None
    if "\0" in text:
        raise ValueError("it is not text")
    if not text.strip():
        raise ValueError("it is empty")
    return text.replace("\r\n", "\n")  # models generate \n


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.3g} MB"
