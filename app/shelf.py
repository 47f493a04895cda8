"""Conversations that had to leave their slot, on disk, until they go on."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from edgespec.app.profile import cache_folder
from edgespec.app.writing import Slot, choose_slot
from edgespec.core import common_prefix
from edgespec.models.state import load_state, save_state
from edgespec.sensors import process_runs

_WORTH = 256  # tokens: reading fewer is as quick as a disk


class Shelf:
    """Keeps what leaves a slot, the most recently used within `most` bytes, in a folder of its own.

    Belongs to the thread that owns the models. What cannot be written or read back is read anew.
    """

    def __init__(self, most: int = 2 << 30, folder: Path | None = None) -> None:
        self._most = most
        self._parent = folder or cache_folder().parent / "states"
        self._folder: Path | None = None
        self._kept: OrderedDict[Path, tuple[tuple[int, ...], int]] = OrderedDict()  # oldest first
        self._count = 0

    def arrange(self, free: Sequence[Slot], prompt: Sequence[int]) -> Slot:
        """The slot for `prompt`, with as much of it as is known; what it held before is kept."""
        slot = choose_slot(free, prompt)
        held = common_prefix(slot.sequence.tokens, prompt)
        best, shared = self._best(prompt)
        if len(slot.sequence.tokens) - held >= _WORTH:
            self._put(slot)
        if best is not None and shared - held >= _WORTH:
            load_state(slot.sequence, best)
            if best in self._kept:
                self._kept.move_to_end(best)
        return slot

    def close(self) -> None:
        """Delete everything."""
        self._kept.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _best(self, prompt: Sequence[int]) -> tuple[Path | None, int]:
        shared = {path: common_prefix(tokens, prompt) for path, (tokens, _) in self._kept.items()}
        best = max(shared, key=shared.__getitem__, default=None)
        return best, shared[best] if best is not None else 0

    def _put(self, slot: Slot) -> None:
        tokens = tuple(slot.sequence.tokens)
        for path, (other, _) in list(self._kept.items()):
            if len(other) <= len(tokens) and common_prefix(other, tokens) == len(other):
                self._drop(path)  # an earlier state of the same conversation
            elif common_prefix(other, tokens) == len(tokens):
                return
        place = self._place()
        if place is None or not save_state(slot.sequence, place):
            return
        self._kept[place] = (tokens, place.stat().st_size)
        while sum(size for _, size in self._kept.values()) > self._most:
            self._drop(next(iter(self._kept)))

    def _place(self) -> Path | None:
        if self._folder is None:
            with contextlib.suppress(OSError):
                self._parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                _sweep(self._parent)
                self._folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=self._parent))
        self._count += 1
        return self._folder and self._folder / f"{self._count}.state"

    def _drop(self, path: Path) -> None:
        del self._kept[path]
        path.unlink(missing_ok=True)


def _sweep(parent: Path) -> None:
    """Delete what programs that were killed left behind: folders are named after their process."""
    for folder in parent.iterdir():
        pid = folder.name.partition("-")[0]
        if pid.isdecimal() and not process_runs(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
