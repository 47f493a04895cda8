"""Downloads with a progress bar, for the commands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import typer

from edgespec.app.console import interruptible
from edgespec.core import EdgespecError
from edgespec.models.hub.catalog import Entry
from edgespec.models.hub.references import load_references
from edgespec.models.hub.repository import parse_name, pinned
from edgespec.models.hub.store import models_folder
from edgespec.text import printable


def fetch_missing(name: str) -> None:
    """Download a model of the Hub that a command names and that is not on this machine.

    Only a name that cannot be a path is fetched without having been asked to: with a tag, or after `hf.co/`.
    """
    repository = parse_name(name)
    if repository is None or Path(name).exists() or pinned(repository, models_folder()):
        return
    if repository.tag or name != str(repository):
        fetch_repository(name)


def fetch(entry: Entry, offline: bool = False) -> Path:
    """Download a model with a progress bar and return its verified file. Raises EdgespecError."""
    from edgespec.models.hub import download

    with _download_bar(entry.name) as report, interruptible("run the same command again to resume"):
        return download.pull(entry, models_folder(), offline=offline, progress=report)


def fetch_repository(name: str, offline: bool = False) -> Path:
    """Download a model of the Hub with a progress bar, return its first file. Raises EdgespecError."""
    from edgespec.models.hub.listing import pull_repository

    reference = load_references().get(name)
    repository = reference.repository if reference is not None else parse_name(name)
    if repository is None:
        raise EdgespecError(f"unknown model {printable(name)!r}: `edgespec models` lists the catalog")
    notes: list[str] = []
    with _download_bar(str(repository)) as report, interruptible("run the same command again to resume"):
        path = pull_repository(
            repository, models_folder(), offline=offline, progress=report, note=notes.append
        )
    for line in notes:
        typer.echo(line, err=True)
    return path


@contextlib.contextmanager
def _download_bar(name: str) -> Iterator[Callable[[int, int, str], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # Without a terminal it would leave an empty line.
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(name, total=None)
        yield lambda done, total, what: bars.update(
            task, completed=done, total=total, description=f"{name}: {what}"
        )
