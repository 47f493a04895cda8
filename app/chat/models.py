"""The models to choose from, and fetching one while the chat stays open."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from edgespec.app.terminal import one_line

_NEEDED = 1.4  # bytes of memory for each byte of a file: weights, cache, buffers


@dataclass(frozen=True, slots=True)
class Choice:
    """A model by the name that loads it; `here`: no need to fetch it."""

    name: str
    here: bool
    about: str


def choices() -> list[Choice]:
    """The models one can chat with: those here first, then those that fit this machine, the largest first."""
    import shutil

    from edgespec.models.catalog import load_catalog
    from edgespec.models.store import installed, models_folder
    from edgespec.sensors import memory_total

    memory, folder = memory_total(), models_folder()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    disk = shutil.disk_usage(folder).free
    files = installed()
    here = {one.entry.name for one in files if one.entry is not None}
    found: list[tuple[bool, bool, int, Choice]] = []
    for entry in load_catalog().values():
        if entry.role != "chat":
            continue
        parts = [f"{entry.bytes / 1e6:,.0f} MB", entry.licence]
        if entry.draft:
            parts.append(f"draft {entry.draft}" + ("" if entry.draft in here else " (not here)"))
        fits = entry.bytes * _NEEDED < memory
        if not fits:
            parts.append("larger than this machine's memory")
        if entry.name not in here:
            parts.append("to be fetched" if entry.bytes < disk else "more than the disk has free")
        choice = Choice(entry.name, entry.name in here, " · ".join([*parts, entry.note]))
        found.append((entry.name not in here, not fits, -entry.bytes, choice))
    for one in files:
        if one.entry is None:
            about = f"{one.bytes / 1e6:,.0f} MB · in the models folder"
            found.append((False, False, -one.bytes, Choice(one.path.name, True, about)))
    return [choice for *_, choice in sorted(found, key=lambda row: row[:3])]


def fetch(name: str, progress: Callable[[float], None], done: Callable[[str], None]) -> None:
    """Pull a model, and the draft it pairs with, in a thread. `done` gets an error, empty if all went well.

    Both are called in that thread. A program that ends meanwhile finds what came so far the next time.
    """

    def run() -> None:
        from edgespec.core import EdgespecError
        from edgespec.models import download
        from edgespec.models.catalog import load_catalog
        from edgespec.models.store import models_folder

        catalog = load_catalog()
        entries = [catalog[name]]
        if (draft := catalog[name].draft) is not None:
            entries.append(catalog[draft])
        total, before = sum(entry.bytes for entry in entries), 0
        try:
            for entry in entries:

                def report(got: int, _all: int, _what: str, start: int = before) -> None:
                    progress((start + got) / total)

                download.pull(entry, models_folder(), progress=report)
                before += entry.bytes
        except EdgespecError as error:
            done(one_line(str(error)))
        except Exception as error:  # noqa: BLE001 - of a thread nobody watches
            done(one_line(f"{name} could not be fetched: {type(error).__name__}: {error}"))
        else:
            done("")

    threading.Thread(target=run, name="edgespec-fetch", daemon=True).start()
