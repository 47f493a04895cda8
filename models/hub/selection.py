"""The choice of a model for this machine."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgespec.core import EdgespecError

if TYPE_CHECKING:
    from edgespec.models.hub.catalog import Entry

_NEEDED = 1.4  # bytes of memory per byte of a file: weights, cache, buffers


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """A model by the name that loads it; `here`: it is on this machine."""

    name: str
    here: bool
    about: str


def first_model() -> tuple[Entry, str]:
    """Return the model to fetch on a machine without one, and the reason.

    It is the catalog's starter, or the largest smaller chat model that fits memory and disk. Raises
    EdgespecError if there is none.
    """
    from edgespec.models.hub.catalog import load_catalog

    memory, disk = _room()
    chat = [entry for entry in load_catalog().values() if entry.role == "chat"]
    starter = max(chat, key=lambda entry: (entry.starter, entry.bytes))
    room = f"{memory / 1e9:.1f} GB of memory, {disk / 1e9:.1f} GB of disk free"
    for entry in sorted(chat, key=lambda entry: -entry.bytes):
        if entry.bytes > starter.bytes or not (_fits(entry, memory) and entry.bytes < disk):
            continue
        if entry is starter:
            return (
                entry,
                f"the smallest that answers simple questions correctly; it fits this machine ({room})",
            )
        return entry, f"the largest that fits this machine ({room}); simple questions need {starter.name}"
    raise EdgespecError(f"no model of the catalog fits this machine ({room}): free some disk")


def default_model() -> str:
    """Return the largest chat model on this machine that fits its memory, the smallest if none fits.

    Raises EdgespecError, with the model to fetch, if there is none.
    """
    from edgespec.models.hub.store import installed

    here = [one.entry for one in installed() if one.entry is not None and one.entry.role == "chat"]
    if not here:
        raise EdgespecError(
            f"no model on this machine: run `edgespec pull {first_model()[0].name}`, "
            "or choose one from `edgespec models`"
        )
    here.sort(key=lambda entry: entry.bytes)
    memory, _ = _room()
    return next((entry for entry in reversed(here) if _fits(entry, memory)), here[0]).name


def choices() -> list[ModelChoice]:
    """Return the chat models: those here, then the first to fetch, then those that fit, largest first."""
    from edgespec.models.hub.catalog import load_catalog
    from edgespec.models.hub.store import installed

    memory, disk = _room()
    first, why = None, ""
    with suppress(EdgespecError):
        first, why = first_model()
    files = installed()
    here = {one.entry.name for one in files if one.entry is not None}
    found: list[tuple[bool, bool, bool, int, ModelChoice]] = []
    for entry in load_catalog().values():
        if entry.role != "chat":
            continue
        parts = [f"{entry.bytes / 1e6:,.0f} MB", entry.licence]
        if entry.draft:
            parts.append(f"draft {entry.draft}" + ("" if entry.draft in here else " (not here)"))
        fits = _fits(entry, memory)
        if not fits:
            parts.append("larger than this machine's memory")
        if entry.name not in here:
            parts.append("to be fetched" if entry.bytes < disk else "larger than the free disk")
        begin = entry is first and not here
        choice = ModelChoice(
            entry.name, entry.name in here, " · ".join([*parts, why if begin else entry.note])
        )
        found.append((entry.name not in here, not begin, not fits, -entry.bytes, choice))
    for one in files:
        if one.entry is None:
            about = f"{one.bytes / 1e6:,.0f} MB · in the models folder"
            found.append((False, True, False, -one.bytes, ModelChoice(one.path.name, True, about)))
    return [choice for *_, choice in sorted(found, key=lambda row: row[:4])]


def _room() -> tuple[int, int]:
    """Return the bytes of memory of this machine, and of free disk in the models folder."""
    import shutil

    from edgespec.machine.sensors import memory_total
    from edgespec.models.hub.store import models_folder

    folder = models_folder()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return memory_total(), shutil.disk_usage(folder).free


def _fits(entry: Entry, memory: int) -> bool:
    return entry.bytes * _NEEDED < memory
