"""KV-cache snapshots of evicted conversations, on disk, until they continue."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from edgespec.app.engine.slots import Slot
from edgespec.core import common_prefix
from edgespec.machine.sensors import process_runs
from edgespec.models.machine_cache import cache_folder
from edgespec.models.state import load_state, save_state, state_tokens

_WORTH = 256  # tokens: a prefill of fewer is as fast as a disk


class PromptCache:
    """Keeps what slots lose, the most recently used within `most` bytes.

    In a temporary folder of its own or, if `lasting`, in a folder that the next program finds again. Belongs
    to the thread that owns the models. Failures to write or to read only cost another prefill.
    """

    def __init__(self, most: int = 2 << 30, folder: Path | None = None, *, lasting: bool = False) -> None:
        self._most = most
        self._parent = folder or cache_folder().parent / "states"
        self._folder: Path | None = None
        self._lasting = lasting
        self._kept: OrderedDict[Path, tuple[tuple[int, ...], int]] = OrderedDict()  # oldest first
        self._count = 0
        self._looked = not lasting

    def swap(self, slot: Slot, prompt: Sequence[int], held: int) -> int:
        """Keep what `slot` loses for `prompt`, of which it holds `held` tokens, and load a better snapshot.

        Returns how many tokens it holds then.
        """
        self._look(slot)
        best, shared = self._best(prompt)
        if len(slot.sequence.tokens) - held >= _WORTH:
            self.keep(slot)
        if best is not None and shared - held >= _WORTH:
            load_state(slot.sequence, best)
            held = slot.sequence.reachable(common_prefix(slot.sequence.tokens, prompt))
            if best in self._kept:
                self._kept.move_to_end(best)
                with contextlib.suppress(OSError):
                    best.touch()
        return held

    def keep(self, slot: Slot) -> None:
        """Keep what `slot` holds, replacing earlier snapshots of the same conversation."""
        tokens = tuple(slot.sequence.tokens)
        if len(tokens) < _WORTH:
            return
        self._look(slot)
        for path, (other, _) in list(self._kept.items()):
            if 0 < len(other) <= len(tokens) and common_prefix(other, tokens) == len(other):
                self._drop(path)
            elif common_prefix(other, tokens) == len(tokens):
                return
        place = self._place()
        if place is None or not save_state(slot.sequence, place):
            return
        self._kept[place] = (tokens, place.stat().st_size)
        while sum(size for _, size in self._kept.values()) > self._most:
            self._drop(next(iter(self._kept)))

    def forget(self, tokens: Sequence[int], slot: Slot) -> None:
        """Delete every snapshot with a useful part of `tokens`, and empty `slot` if it holds one."""
        self._look(slot)
        worth = min(_WORTH, len(tokens))
        for path, (other, _) in list(self._kept.items()):
            if other and common_prefix(other, tokens) >= worth:
                self._drop(path)
        if common_prefix(slot.sequence.tokens, tokens) >= worth:
            slot.forget()

    def close(self) -> None:
        """Delete everything, unless `lasting`."""
        self._kept.clear()
        if self._folder is not None and not self._lasting:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def _look(self, slot: Slot) -> None:
        """Find the snapshots of an earlier program, once."""
        if self._looked:
            return
        self._looked = True
        with contextlib.suppress(OSError):
            for path in sorted(self._parent.glob("*.state"), key=lambda one: one.stat().st_mtime):
                tokens = state_tokens(slot.sequence, path) or []  # of another model: only its size counts
                self._kept[path] = (tuple(tokens), path.stat().st_size)

    def _best(self, prompt: Sequence[int]) -> tuple[Path | None, int]:
        shared = {path: common_prefix(tokens, prompt) for path, (tokens, _) in self._kept.items()}
        best = max(shared, key=shared.__getitem__, default=None)
        return best, shared[best] if best is not None else 0

    def _place(self) -> Path | None:
        """Return the path of the next snapshot, None if there is no folder for it."""
        with contextlib.suppress(OSError):
            if self._folder is None:
                self._parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                if self._lasting:
                    self._folder = self._parent
                else:
                    _sweep(self._parent)
                    self._folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=self._parent))
            self._count += 1
            return self._folder / f"{os.getpid()}-{self._count}-{time.time_ns()}.state"
        return None

    def _drop(self, path: Path) -> None:
        del self._kept[path]
        with contextlib.suppress(OSError):
            path.unlink()


def _sweep(parent: Path) -> None:
    """Delete the folders of programs that were killed; they are named after their process."""
    for folder in parent.iterdir():
        pid = folder.name.partition("-")[0]
        if pid.isdecimal() and not process_runs(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
