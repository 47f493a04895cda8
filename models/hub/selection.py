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
        if entry.bytes > starter.bytes or not (fits(entry.bytes, memory) and entry.bytes < disk):
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
    from edgespec.models.hub.repository import all_pinned
    from edgespec.models.hub.store import installed, models_folder

    entries = [one.entry for one in installed() if one.entry is not None and one.entry.role == "chat"]
    here = [(entry.bytes, entry.name) for entry in entries]
    here += [(model.bytes, model.name) for model in all_pinned(models_folder())]
    if not here:
        raise EdgespecError(
            f"no model on this machine: run `edgespec pull {first_model()[0].name}`, "
            "or choose one from `edgespec models`"
        )
    here.sort()
    memory, _ = _room()
    return next((name for size, name in reversed(here) if fits(size, memory)), here[0][1])


def choices() -> list[ModelChoice]:
    """Return the chat models: those here, then the first to fetch, then those that fit, largest first."""
    from edgespec.models.hub.catalog import load_catalog
    from edgespec.models.hub.references import load_references
    from edgespec.models.hub.repository import all_pinned
    from edgespec.models.hub.store import installed, models_folder

    memory, disk = _room()
    first, why = None, ""
    with suppress(EdgespecError):
        first, why = first_model()
    folder, files = models_folder(), installed()
    here = {one.entry.name for one in files if one.entry is not None}
    found: list[tuple[bool, bool, bool, int, ModelChoice]] = []

    def add(name: str, size: int, parts: list[str], *, present: bool, begin: bool = False) -> None:
        fitting = fits(size, memory)
        if not fitting:
            parts.append("larger than this machine's memory")
        if not present:
            parts.append("to be fetched" if size < disk else "larger than the free disk")
        choice = ModelChoice(name, present, " · ".join(part for part in parts if part))
        found.append((not present, not begin, not fitting, -size, choice))

    for entry in load_catalog().values():
        if entry.role == "chat":
            draft = f"draft {entry.draft}" + ("" if entry.draft in here else " (not here)")
            begin = entry == first and not here
            parts = [_megabytes(entry.bytes), entry.licence, draft if entry.draft else ""]
            add(
                entry.name,
                entry.bytes,
                [*parts, why if begin else entry.note],
                present=entry.name in here,
                begin=begin,
            )
    known = set()
    for reference in load_references().values():
        model = reference.here(folder)
        known.add(model and model.name)
        size = model.bytes if model else reference.bytes
        drafter = reference.drafter and f"drafts with its {reference.drafter}"
        parts = [
            _megabytes(size),
            reference.licence,
            drafter or (reference.draft and f"draft {reference.draft}"),
        ]
        add(reference.name, size, parts, present=model is not None)
    for model in all_pinned(folder):
        if model.name not in known:
            add(model.name, model.bytes, [_megabytes(model.bytes), "from the Hub"], present=True)
    for one in files:
        if one.entry is None:
            add(one.path.name, one.bytes, [_megabytes(one.bytes), "in the models folder"], present=True)
    return [choice for *_, choice in sorted(found, key=lambda row: row[:4])]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _room() -> tuple[int, int]:
    """Return the bytes of memory of this machine, and of free disk in the models folder."""
    import shutil

    from edgespec.machine.sensors import memory_total
    from edgespec.models.hub.store import models_folder

    folder = models_folder()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return memory_total(), shutil.disk_usage(folder).free


def fits(size: int, memory: int) -> bool:
    """Whether a model file of `size` bytes fits `memory` bytes, with its context."""
    return size * _NEEDED < memory
