"""Download of a model while the chat stays open."""

from __future__ import annotations

import threading
from collections.abc import Callable

from edgespec.app.terminal import one_line
from edgespec.core import EdgespecError


def fetch(name: str, progress: Callable[[float], None], done: Callable[[str], None]) -> None:
    """Download a model, and the draft model it is paired with, in a thread.

    `progress` gets the downloaded share, `done` an error message, empty on success; both are called in that
    thread. If the program ends, the next download continues with what is there.
    """

    def run() -> None:
        from edgespec.models.hub import download
        from edgespec.models.hub.catalog import load_catalog
        from edgespec.models.hub.store import models_folder

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
        except Exception as error:  # noqa: BLE001 - nothing else would report it
            done(one_line(f"cannot download {name}: {type(error).__name__}: {error}"))
        else:
            done("")

    threading.Thread(target=run, name="edgespec-fetch", daemon=True).start()
